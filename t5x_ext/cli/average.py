"""Averages the weights of several checkpoints of a run into a new run folder, ready to translate with.

example: t5x_ext average --run_dir=out --last=5 --output=averaged
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags

from t5x_ext.cli.files import check_absent, check_folder, check_writable, report
from t5x_ext.cli.flags import require
from t5x_ext.cli.messages import UsageError

if TYPE_CHECKING:
    from t5x_ext.checkpoints import CheckpointStore


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags of `t5x_ext average`."""
    flags.DEFINE_string("run_dir", None, "run folder with the checkpoints; required", flag_values=values)
    flags.DEFINE_string("output", None, "run folder to write; required", flag_values=values)
    flags.DEFINE_integer("last", None, "take the newest so many", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("best", None, "take the best so many by the run's metric", lower_bound=1, flag_values=values)
    flags.DEFINE_list("steps", [], "take these steps, separated by commas", flag_values=values)
    flags.DEFINE_string("json_out", None, "file for the result as JSON; - is standard output", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs `t5x_ext average`."""
    from t5x_ext.checkpoints import CheckpointStore, RunFolder, average_run

    require(values, "run_dir", "output")
    if sum(map(bool, (values.last, values.best, values.steps))) != 1:
        raise UsageError("give one of --last, --best and --steps")
    check_absent(values.output, "--output")
    check_folder(values.output, "--output")
    check_writable(values.json_out, "--json_out")
    source = RunFolder(values.run_dir)
    source.read_model()
    with CheckpointStore(source.checkpoints) as store:
        steps = _steps(values, store)
    average_run(source, steps, values.output)
    result = {"output": values.output, "steps": steps}
    report(f"mean of the steps {', '.join(map(str, steps))}: {values.output}", result, values.json_out)


def _steps(values: flags.FlagValues, store: CheckpointStore) -> list[int]:
    """The steps that the flags pick, ascending."""
    finished = store.steps()
    if values.steps:
        chosen = values.steps
        missing = [step for step in chosen if not step.isdecimal() or int(step) not in finished]
        if missing:
            raise UsageError(
                f"--steps={','.join(chosen)}: there is no checkpoint of step {missing[0]}; finished: {finished}"
            )
        return sorted({int(step) for step in chosen})
    count = values.last or values.best
    ranked = finished[::-1] if values.last else store.ranked_steps()
    if count > len(ranked):
        name = "last" if values.last else "best"
        kind = "finished" if values.last else "measured"
        raise UsageError(f"--{name}={count}: {values.run_dir} has {len(ranked)} {kind} checkpoints")
    return sorted(ranked[:count])
