"""What a study has found: values by arm and seed, their means and tests, as JSON and as tables of text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from t5x_ext.study.jobs import Selection
from t5x_ext.study.measurements import LineMeasurement
from t5x_ext.study.statistics import Moments, Paired, Resampled, moments, paired, resampled
from t5x_ext.study.study import Arm, Settings, Study

NOTE = (
    "Mean ± standard error over seeds. In brackets the difference to the arm that is named, ± its standard error, and "
    "the two-sided p-value of Student's paired t-test over seeds; of translations, whose lines are resampled, the 95 % "
    "interval and the p-value of the paired bootstrap. p-values are not adjusted for the number of comparisons."
)


class RunResult(NamedTuple):
    """What is known of one arm with one seed."""

    path: str  # of the run, below the study's folder
    state: str  # new, unfinished, failed, changed or finished
    error: str = ""  # one line; also where a run has finished and something could not be measured
    command: str = ""
    seconds: float = 0.0  # wall time of the run
    values: Mapping[str, float] = {}
    lines: Mapping[str, Float[np.ndarray, "lines sums"]] = {}


class Choice(NamedTuple):
    """What tuning has found for an arm."""

    tried: tuple[tuple[Settings, float], ...]  # settings, and the mean of what was measured; NaN where a run failed
    higher_is_better: bool
    has_run: bool

    @property
    def settings(self) -> Settings | None:
        """The best; None where nothing finite was measured."""
        finite = [(value, index) for index, (_, value) in enumerate(self.tried) if math.isfinite(value)]
        if not finite:
            return None
        best = max(finite, key=lambda one: one[0]) if self.higher_is_better else min(finite)
        return self.tried[best[1]][0]


class Cell(NamedTuple):
    """One measured value of one arm, over its seeds."""

    moments: Moments | None  # None where no seed has it
    against: str = ""  # the arm it is tested against
    difference: Paired | None = None  # over the seeds that both have
    resampled: Resampled | None = None  # over lines


class Results(NamedTuple):
    """Everything that a study has found."""

    study: Study
    runs: Mapping[str, Mapping[int, RunResult]]  # by name of the arm and seed
    choices: Mapping[str, Choice] = {}  # by name of a tuned arm

    def errors(self, selection: Selection | None = None) -> list[tuple[Arm, int, str]]:
        """What was not found, and why: arm, seed, one line; of selected arms and seeds only."""
        found = []
        for arm, seed, run in self._all():
            is_selected = selection is None or (arm.name in selection.arms and seed in selection.seeds)
            if is_selected and (run.error or run.state != "finished"):
                found.append((arm, seed, run.error or run.state))
        return found

    @property
    def names(self) -> list[str]:
        """Of everything that was measured anywhere, in the order of the first run that has it."""
        return list(dict.fromkeys(name for _, _, run in self._all() for name in run.values))

    def values(self, arm: Arm, name: str) -> dict[int, float]:
        """By seed, what was measured."""
        runs = self.runs[arm.name]
        return {seed: run.values[name] for seed, run in runs.items() if name in run.values}

    def cell(self, arm: Arm, name: str) -> Cell:
        """One value of one arm."""
        values = self.values(arm, name)
        if not values:
            return Cell(None)
        mean = moments(list(values.values()))
        baseline = self.study.baseline_of(arm)
        if baseline is None:
            return Cell(mean)
        over_lines = self._resampled(arm, baseline, name, list(values))
        others = self.values(baseline, name)
        both = [seed for seed in values if seed in others]
        if over_lines is not None:
            # The mean over all directions is compared over those that both have, seed by seed.
            by_seed = [self._resampled(arm, baseline, name, [seed]) for seed in both]
            differences = [one.difference for one in by_seed if one is not None]
            return Cell(mean, baseline.name, paired(differences, np.zeros_like(differences).tolist()), over_lines)
        if not both:
            return Cell(mean)
        found = paired([values[seed] for seed in both], [others[seed] for seed in both])
        return Cell(mean, baseline.name, found)

    def _resampled(self, arm: Arm, baseline: Arm, name: str, seeds: Sequence[int]) -> Resampled | None:
        prefix = name.split("/")[0]
        seeds = [seed for seed in seeds if self._lines(arm, seed, prefix) and self._lines(baseline, seed, prefix)]
        score = next((one.score for one in self.study.measurements if isinstance(one, LineMeasurement)), None)
        if not seeds or score is None:
            return None
        ours, theirs = (_lists_by_name([self._lines(one, seed, prefix) for seed in seeds]) for one in (arm, baseline))
        if name != prefix:
            ours = {key: sums for key, sums in ours.items() if key == name}
            return resampled(ours, theirs, score, prefix).get(name)
        found = resampled(ours, theirs, score, prefix)
        return found.get(prefix) or next(iter(found.values()), None)

    def _lines(self, arm: Arm, seed: int, prefix: str) -> dict[str, np.ndarray]:
        lines = self.runs[arm.name][seed].lines
        return {name: sums for name, sums in lines.items() if name.split("/")[0] == prefix}

    def _all(self) -> Iterator[tuple[Arm, int, RunResult]]:
        for arm in self.study.arms:
            for seed, run in self.runs[arm.name].items():
                yield arm, seed, run


def _lists_by_name(seeds: Sequence[Mapping[str, np.ndarray]]) -> dict[str, list[np.ndarray]]:
    """What every seed has."""
    return {name: [one[name] for one in seeds] for name in seeds[0] if all(name in one for one in seeds)}


def to_json(results: Results) -> dict[str, Any]:
    """Everything but lines, as plain values; None where a number is not finite."""
    study = results.study
    found = {
        "study": study.name,
        "budget": {study.budget.kind: study.budget.limit} if study.budget else None,
        "seeds": list(study.seeds),
        "values": results.names,
        "arms": [_arm_json(results, arm) for arm in study.arms],
        "tuning": {
            name: {
                "tried": [{"settings": dict(settings), "value": value} for settings, value in choice.tried],
                "chosen": choice.settings,
            }
            for name, choice in results.choices.items()
        },
    }
    return _plain(found)


def _arm_json(results: Results, arm: Arm) -> dict[str, Any]:
    cells = {name: results.cell(arm, name) for name in results.names}
    return {
        "name": arm.name,
        "label": arm.title,
        "bindings": dict(arm.bindings),
        "gin_files": list(arm.gin_files),
        "runs": {
            seed: {name: value for name, value in run._asdict().items() if name != "lines"}
            for seed, run in results.runs[arm.name].items()
        },
        "values": {
            name: {
                "mean": cell.moments.mean,
                "error": cell.moments.error,
                "size": cell.moments.size,
                "against": cell.against,
                "difference": cell.difference._asdict() if cell.difference else None,
                "resampled": cell.resampled._asdict() if cell.resampled else None,
            }
            for name, cell in cells.items()
            if cell.moments
        },
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Table(NamedTuple):
    """A table of text."""

    title: str
    head: list[str]
    rows: list[list[str]]


def tables(results: Results) -> list[Table]:
    """What people read: the arms; what tuning has chosen; what went wrong."""
    study, names = results.study, results.names
    against = any(study.baseline_of(arm) for arm in study.arms)
    head = ["arm", *(["against"] if against else []), "seeds", *map(study.label_of, names)]
    rows = []
    for arm in study.arms:
        cells = [results.cell(arm, name) for name in names]
        baseline = study.baseline_of(arm)
        count = max((cell.moments.size for cell in cells if cell.moments), default=0)
        seeds = str(count) if count == len(study.seeds) else f"{count} of {len(study.seeds)}"
        tested = [baseline.title if baseline else ""] if against else []
        rows.append([arm.title, *tested, seeds, *map(show, cells)])
    found = [Table("Arms", head, rows)]
    if results.choices:
        found.append(Table("Tuning", ["arm", "tried", "chosen"], list(_tuning_rows(results))))
    errors = results.errors()
    if errors:
        rows = [[arm.title, str(seed), error] for arm, seed, error in errors]
        found.append(Table("Not finished", ["arm", "seed", "why"], rows))
    return found


def _tuning_rows(results: Results) -> Iterator[list[str]]:
    write = lambda settings: ", ".join(f"{name} = {value}" for name, value in settings.items())
    for name, choice in results.choices.items():
        tried = "; ".join(f"{write(settings)}: {value:.4g}" for settings, value in choice.tried)
        chosen = "nothing" if choice.settings is None else write(choice.settings)
        yield [results.study.arm(name).title, tried, chosen]


def show(cell: Cell) -> str:
    """A cell as text: `3.142 ± 0.012 (-0.031 ± 0.008, p = 0.02)`."""
    if cell.moments is None:
        return ""
    mean, error, _ = cell.moments
    places = _places(mean, error)
    text = f"{mean:z,.{places}f}" + (f" ± {error:,.{places}f}" if error is not None else "")
    difference = _show_difference(cell)
    return f"{text} ({difference})" if difference else text


def _show_difference(cell: Cell) -> str:
    assert cell.moments is not None
    if cell.resampled is not None:
        found = cell.resampled
        places = _places(cell.moments.mean, (found.high - found.low) / 4)
        low, high = _signed(found.low, places), _signed(found.high, places)
        return f"{_signed(found.difference, places)}, {low} to {high}, {_p(found.p_value)}"
    if cell.difference is None:
        return ""
    difference, error, _, p_value, _ = cell.difference
    places = _places(cell.moments.mean, error or cell.moments.error)
    text = _signed(difference, places) + (f" ± {error:.{places}f}" if error is not None else "")
    return text if p_value is None else f"{text}, {_p(p_value)}"


def _signed(value: float, places: int) -> str:
    return f"{round(value, places) + 0.0:+.{places}f}"  # + 0.0: no negative zero


def _places(mean: float, error: float | None) -> int:
    """Decimals that show two digits of the error; without one, four digits of the mean."""
    if not math.isfinite(mean):
        return 0
    size = abs(error) if error and math.isfinite(error) else abs(mean) / 100
    return max(0, min(9, 1 - math.floor(math.log10(size)))) if size > 0 else 1


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def markdown(found: Sequence[Table]) -> str:
    """Tables in Markdown."""
    from tabulate import tabulate

    parts = []
    for number, table in enumerate(found):
        cells = [[cell.replace("|", "\\|") for cell in row] for row in table.rows]
        parts += [f"## {table.title}", tabulate(cells, table.head, tablefmt="github", disable_numparse=True)]
        parts += [NOTE] if number == 0 else []
    return "\n\n".join(parts) + "\n"
