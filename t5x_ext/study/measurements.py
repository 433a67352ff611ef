"""What is measured of a run that has ended: values that it recorded itself, or anything computed from its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import Float

from t5x_ext.checkpoints import RunFolder
from t5x_ext.contracts import UserError
from t5x_ext.train.report import read_metrics

if TYPE_CHECKING:
    from t5x_ext.study.study import Arm

MetricLine = Mapping[str, float | None]
"""A line of `metrics.jsonl`; None is a number that was not finite."""


class MeasuredRun(NamedTuple):
    """What a measurement is given."""

    folder: Path  # of the run, or of the pipeline
    arm: Arm
    seed: int
    config: Any  # the `train.Run` or the `pipeline.Pipeline` of which the folder is
    cache_dir: str  # of token caches


@runtime_checkable
class Measurement(Protocol):
    """From a run to named values; any callable of this shape will do, and gin names it.

    It is called in a process of its own, so that it may compute on devices, and once a run: what it found is kept. A
    measurement of lines of text may have two methods more, `lines` and `score` (see `LineMeasurement`).
    """

    def __call__(self, run: MeasuredRun) -> Mapping[str, float]:
        """Values by name; of a sequence of measurements no two have a name in common."""
        ...


@runtime_checkable
class LineMeasurement(Measurement, Protocol):
    """A measurement that is a function of sums over lines: its differences are resampled line by line.

    The value of a name in front of all others by a slash (`bleu` of `bleu/en-de` and `bleu/de-en`) is their mean.
    """

    def lines(self, run: MeasuredRun) -> Mapping[str, Float[np.ndarray, "lines sums"]]:
        """By the name of a value, what its score sums up, line by line; line i is the same in all arms and seeds."""
        ...

    def score(self, sums: Float[np.ndarray, "*samples sums"]) -> Float[np.ndarray, "*samples"]:
        """The values of sums over lines."""
        ...


@dataclass(frozen=True)
class Recorded:
    """A value that the run has recorded; in `Study.measurements` its name alone stands for `Recorded(name)`.

    Attributes:
      name: a value of `metrics.jsonl` (`valid/loss`), else a path into `results.json`, parts joined by slashes
        (`mean_bleu`, `directions/en-de/bleu`, `spent/target_tokens`).
      take: of a value that was recorded at several updates, the last one, the least or the most.
    """

    name: str
    take: Literal["last", "least", "most"] = "last"

    @property
    def value_name(self) -> str:
        """What the value is called: that of the last update by its name, the least as `least valid/loss`."""
        return self.name if self.take == "last" else f"{self.take} {self.name}"

    def __call__(self, run: MeasuredRun) -> dict[str, float]:
        """The value.

        Raises:
          UserError: if the run has recorded no such value; what it has is named.
        """
        folder = RunFolder(run.folder)
        lines = read_metrics(folder.metrics_jsonl)
        found = [line[self.name] for line in lines if self.name in line]
        if found:
            return {self.value_name: self._taken([math.nan if value is None else value for value in found])}
        results = json.loads(folder.results_json.read_text()) if folder.results_json.exists() else {}
        value = _at(results, self.name)
        if value is None:
            known = sorted({*_paths(results), *(name for line in lines for name in line)} - {"step"})
            raise UserError(f"{self.name} was not recorded; recorded are {', '.join(known) or 'no values'}")
        return {self.value_name: value}

    def _taken(self, values: list[float]) -> float:
        finite = [value for value in values if math.isfinite(value)]
        if self.take == "last" or not finite:
            return values[-1]
        return min(finite) if self.take == "least" else max(finite)


def _at(results: Mapping[str, Any], name: str) -> float | None:
    value: Any = results
    for part in name.split("/"):
        value = value.get(part) if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _paths(results: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    """All names under which numbers are found."""
    for name, value in results.items():
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}"


class Curve(NamedTuple):
    """A value over the course of a run."""

    x: Float[np.ndarray, " points"]
    y: Float[np.ndarray, " points"]  # NaN where the value was not finite


AXES = {
    "steps": "updates",
    "target_tokens": "target tokens",
    "model_flops": "model FLOPs",
    "seconds": "seconds of training",
}
"""What a curve can be drawn over, as the kinds of a `Budget`, with the labels of the axes."""


def curve(folder: Path, name: str, axis: str) -> Curve | None:
    """A value of `metrics.jsonl` over what was spent until then.

    Args:
      folder: of the run.
      name: of the value.
      axis: one of `AXES`.

    Returns:
      None where the value was recorded at no update.
    """
    lines = read_metrics(epath.Path(folder) / "metrics.jsonl")
    points = [(line["step"] or 0, line[name]) for line in lines if name in line]
    if not points:
        return None
    steps, values = (np.array(each, float) for each in zip(*points))
    if axis != "steps":
        steps = np.interp(steps, *_spent(lines, _USED[axis]))
    return Curve(steps, values)


def _training_seconds(line: MetricLine) -> float:
    share = (line.get("time/data") or 0.0) + (line.get("time/step") or 0.0)
    return (line["seconds"] or 0.0) * share


_USED: dict[str, Callable[[MetricLine], float]] = {
    "target_tokens": lambda line: line.get("target_tokens") or 0.0,
    "model_flops": lambda line: (line.get("model_flops_per_second") or 0.0) * _training_seconds(line),
    "seconds": _training_seconds,
}
"""What the updates of a training line have used."""


def _spent(lines: Iterable[MetricLine], used: Callable[[MetricLine], float]) -> tuple[list[float], list[float]]:
    """Updates, and what was spent until each; between training lines it is a straight line."""
    steps, spent = [0.0], [0.0]
    for line in lines:
        if "seconds" in line and "time/step" in line:
            steps.append(line["step"] or 0.0)
            spent.append(spent[-1] + used(line))
    return steps, spent
