"""Trains a translation model; rerun the same command to resume an interrupted run.

Two text files are enough: vocabulary, model and batches come from the packaged default run. Everything else is in gin
files and bindings.

example: t5x_ext train --train_source=a.en --train_target=a.de --valid_source=b.en --valid_target=b.de
             --source_language=en --target_language=de --run_dir=out
example: t5x_ext train --gin_file=runs/multi30k_en_de.gin --run_dir=out --gin.Run.steps=2000
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from absl import flags

from t5x_ext.cli.compile_cache import define_compile_cache_flag, keep_compiled_programs
from t5x_ext.cli.distributed_flags import define_distributed_flags, join_processes
from t5x_ext.cli.environment import define_deterministic_flag, restore_environment
from t5x_ext.cli.files import check_folder, check_writable, report
from t5x_ext.cli.flags import require
from t5x_ext.cli.messages import UsageError
from t5x_ext.cli.run_flags import check_texts, define_run_flags, run_from_flags, text_corpora

if TYPE_CHECKING:
    from t5x_ext.checkpoints import RunFolder
    from t5x_ext.train import InitFrom, Run

_SHAPE_FIELDS = (
    "kind", "embed_dim", "mlp_dim", "num_heads", "encoder_layers", "decoder_layers", "encoder_sharing",
    "decoder_sharing", "layers", "sharing", "upsample", "max_target_length", "auxiliary_layers",
    "norm", "use_bias", "final_norm", "tied_embeddings",
)  # fmt: skip
_INIT_FROM = re.compile(r"(?P<run_dir>.+?)(:(?P<checkpoint>best|last|\d+))?")


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags of `t5x_ext train`."""
    flags.DEFINE_string("run_dir", None, "folder for everything the run writes; required", flag_values=values)
    define_run_flags(values)
    flags.DEFINE_string("init_from", None, "run folder to start from, as DIR, DIR:last or DIR:STEP", flag_values=values)
    flags.DEFINE_boolean(
        "keep_optimizer", False, "go on with the optimizer state of --init_from, too; by default it starts afresh",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "cache_dir", None, "folder of token caches that runs share; by default in --run_dir", flag_values=values
    )
    flags.DEFINE_string("json_out", None, "file for the results as JSON; - is standard output", flag_values=values)
    define_deterministic_flag(values)
    define_compile_cache_flag(values)
    define_distributed_flags(values)


def main(values: flags.FlagValues) -> int:
    """Runs `t5x_ext train`; 130 when a signal ended it early, so that schedulers and scripts can tell."""
    require(values, "run_dir")
    check_writable(values.json_out, "--json_out")
    check_folder(values.run_dir, "--run_dir")
    if values.init_from and (values.vocabulary or values.vocab_size):
        raise UsageError("--init_from brings its own vocabulary: leave --vocabulary and --vocab_size out")
    if values.keep_optimizer and not values.init_from:
        raise UsageError("--keep_optimizer goes with --init_from")
    # Before anything touches a device: reading gin files may.
    restore_environment(values.run_dir, values.deterministic)
    primary = join_processes(values)
    keep_compiled_programs(values)
    run, text = run_from_flags(values)
    init_from = _init_from(values, run)

    from etils import epath

    from t5x_ext.parallel import barrier, failing_together, primary_first
    from t5x_ext.train import execute

    with primary_first("texts"):
        if primary and not (epath.Path(values.run_dir) / "checkpoints").is_dir():
            check_texts(run)

    with failing_together():
        results = execute(run, values.run_dir, config_text=text, cache_dir=values.cache_dir, init_from=init_from)
    if not results:
        return 130
    if primary:
        report(_summary(values.run_dir, results), results, values.json_out)
    barrier("end")  # the first to leave would wait for the last for seconds only
    return 0


def _init_from(values: flags.FlagValues, run: Run) -> InitFrom | None:
    """The run to start from, after checking that its weights fit this one."""
    if not values.init_from:
        return None
    from t5x_ext.checkpoints import CheckpointStore, RunFolder
    from t5x_ext.train import InitFrom

    match = _INIT_FROM.fullmatch(values.init_from)
    assert match is not None
    run_dir, checkpoint = match["run_dir"], match["checkpoint"] or "best"
    folder = RunFolder(run_dir)
    if text_corpora(run):
        _check_same_text_model(values.init_from, folder, run)
    with CheckpointStore(folder.checkpoints) as store:
        steps = store.steps()
    if not steps or (checkpoint.isdecimal() and int(checkpoint) not in steps):
        raise UsageError(f"--init_from={values.init_from}: no such checkpoint; finished steps: {steps or 'none'}")
    which = int(checkpoint) if checkpoint.isdecimal() else checkpoint
    return InitFrom(run_dir, which, keep_optimizer=values.keep_optimizer)


def _check_same_text_model(init_from: str, folder: RunFolder, run: Run) -> None:
    """Refuses a model of another shape, and a vocabulary without the languages of the run."""
    from t5x_ext.data import Vocabulary
    from t5x_ext.models import model_from_json

    task: Any = run.task
    theirs, ours = model_from_json(folder.read_model().model).config, task.model
    known = Vocabulary.load(str(folder.vocabulary)).languages
    for language in (language for corpus in task.data.train for language in corpus.languages):
        if language not in known:
            raise UsageError(f"--init_from={init_from}: its vocabulary has no tag for {language}, only {known}")
    for name in _SHAPE_FIELDS:
        there, here = getattr(theirs, name, None), getattr(ours, name, None)
        if there != here:
            raise UsageError(
                f"--init_from={init_from} holds another model: {name} is {there} there, {here} here; "
                "give the gin file that it was trained with"
            )


def _summary(run_dir: str, results: dict[str, Any]) -> str:
    """What a person sees at the end: scores, samples, where things are and what to do with them."""
    from t5x_ext.checkpoints import RunFolder
    from t5x_ext.evaluate import format_table, scores_from_json

    folder = RunFolder(run_dir)
    lines = [
        f"{results['steps']:,} updates in {results['train_seconds'] / 60:.1f} min, "
        f"{results['target_tokens_per_second']:,.0f} target tokens/s, {results['parameters']:,} parameters",
        *_efficiency(results),
        "",
    ]
    if "directions" in results:
        lines += [format_table({name: scores_from_json(scores) for name, scores in results["directions"].items()}), ""]
        for sample in results["samples"]:
            lines.append(f"{sample['direction']}  {sample['source']}")
            mark = "=" if sample["translation"] == sample["reference"] else "≠"
            lines += [f"       {sample['translation']}", f"     {mark} {sample['reference']}"]
        lines.append("")
    lines += _classes(results)
    lines += [
        f"learning curve  {folder.learning_curve_png}",
        f"TensorBoard     {folder.tensorboard}   (tensorboard --logdir {folder.tensorboard})",
        f"checkpoints     {folder.checkpoints}",
        f"results         {folder.results_json}",
        "",
        _use(folder, run_dir),
    ]
    return "\n".join(lines)


def _use(folder: RunFolder, run_dir: str) -> str:
    """What to do with the model."""
    from t5x_ext.checkpoints.run_folder import TEXT_TASKS

    if folder.read_record()["task"] in TEXT_TASKS:
        return f"Translate:      t5x_ext translate --run_dir={run_dir} --input=-{_languages(folder)}"
    return f"Use:            t5x_ext.load({run_dir!r}) in Python"


def _classes(results: dict[str, Any]) -> list[str]:
    """Scores of a classification."""
    scores = " · ".join(f"{name} {results[name]:.4f}" for name in ("accuracy", "f1", "matthews") if name in results)
    return [f"test: {scores} on {results['examples']:,} examples", ""] if scores else []


def _efficiency(results: dict[str, Any]) -> list[str]:
    """Where the time went and how well the devices were used, as far as it is known."""
    shares = results.get("goodput", {}).get("fractions", {})
    parts = [f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005]
    parts += [f"MFU {results['mfu']:.1%}"] if "mfu" in results else []
    return [f"time: {', '.join(parts)}"] if parts else []


def _languages(folder: RunFolder) -> str:
    """Language flags for an example, where the model has several directions."""
    directions = folder.read_model().directions
    if len(directions) < 2:
        return ""
    source, _, target = directions[0].partition("-")
    return f" --source_language={source} --target_language={target}"
