"""What an experiment is: arms that differ in a few settings, seeds, a budget, what is measured, what is compared."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from t5x_ext.contracts import UserError
from t5x_ext.study.measurements import Measurement

Settings: TypeAlias = Mapping[str, Any]
"""Values by gin name, as `{'optim.flora.rank': 16, 'STEPS': 400}`: each becomes one `--gin.NAME=VALUE` of a command.

A text is written without further quotes, as on the command line: `'@optim.flora()'` is a reference, `'16'` a number.
"""

Command: TypeAlias = Literal["train", "pipeline"]

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Budget:
    """What every run may use; exactly one of the four.

    Attributes:
      steps: updates; sets `Run.steps`, and schedules that share its macro.
      target_tokens: labels, see `train.Budget`. `Run.steps` stays the most updates that a run makes, and what its
        schedule is for: set it to about what the budget buys.
      model_flops: floating point operations, likewise.
      seconds: of computing updates, likewise.

    Raises:
      UserError: for none or several of them, or one that is not positive.
    """

    steps: int | None = None
    target_tokens: float | None = None
    model_flops: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        limits = {name: value for name, value in vars(self).items() if value is not None}
        if len(limits) != 1:
            names = ", ".join(limits) or "none of them"
            raise UserError(f"Budget: give one of steps, target_tokens, model_flops and seconds, not {names}")
        if self.limit <= 0:
            raise UserError(f"Budget.{self.kind} is {self.limit:g}; it must be more than 0")

    @property
    def kind(self) -> str:
        """The name of the limit."""
        return next(name for name, value in vars(self).items() if value is not None)

    @property
    def limit(self) -> float:
        """The limit."""
        return next(value for value in vars(self).values() if value is not None)


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared.

    Attributes:
      name: of folders and files: lower case letters, digits, `_`, `-` and `.`.
      label: what people call it in tables and pictures; empty: its name.
      gin_files: over those of the study.
      bindings: over the files, and over those of the study.
      command: what runs: `t5x_ext train`, or `t5x_ext pipeline`, whose stages have their own lengths and no budget.
      baseline: the arm that it is tested against; None: that of the study; empty: none.
      run: arms that name the same run share its process and folder, and differ in what is measured there (`part`);
        empty: a run of its own.
      part: what of its run a measurement is to look at, as a stage of a pipeline; empty: all of it.
      tuned: by gin name, values to choose from before the reported runs (see `Tuning`); of several names all
        combinations are tried.
      tuned_as: the arm whose choice it takes: one that adds something to another one is compared with the other's rate.
      family: arms of one family have one colour.
      position: where it stands on the axis of a sweep, as a rank; None: on none.
    """

    name: str
    label: str = ""
    gin_files: tuple[str, ...] = ()
    bindings: Settings = field(default_factory=dict)
    command: Command = "train"
    baseline: str | None = None
    run: str = ""
    part: str = ""
    tuned: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    tuned_as: str = ""
    family: str = ""
    position: float | None = None

    def __post_init__(self) -> None:
        for name in (self.name, *([self.run] if self.run else [])):
            if not _NAME.fullmatch(name):
                raise UserError(f"Arm.name={name!r}: write lower case letters, digits, '_', '-' and '.'")
        if self.tuned and self.tuned_as:
            raise UserError(f"Arm {self.name!r}: give either tuned or tuned_as")
        _check_settings(f"Arm {self.name!r}: bindings", self.bindings)
        for name, values in self.tuned.items():
            if not values:
                raise UserError(f"Arm {self.name!r}: tuned[{name!r}] has no value to choose from")
            for value in values:
                _check_settings(f"Arm {self.name!r}: tuned", {name: value})

    @property
    def title(self) -> str:
        """What people call it."""
        return self.label or self.name

    @property
    def run_name(self) -> str:
        """The run in which it is measured."""
        return self.run or self.name

    @property
    def choices(self) -> list[dict[str, Any]]:
        """What is tried before the reported runs; empty if nothing is."""
        if not self.tuned:
            return []
        return [dict(zip(self.tuned, values)) for values in itertools.product(*self.tuned.values())]


@dataclass(frozen=True)
class Tuning:
    """How settings are chosen that decide the outcome but are not what is compared, as learning rates.

    Every arm with `Arm.tuned` is trained with each of its choices; reported runs take the one with the best mean over
    seeds. A choice of which a run failed, or measured no finite number, is not taken.

    Attributes:
      seeds: none of those of the reported runs, so that the choice knows nothing of their luck.
      measurement: what is compared, as in `Study.measurements`: on held-out data that is not the test.
      higher_is_better: whether more of it is better.
      budget: of the runs; None: that of the study. Much shorter runs choose too large a learning rate.
    """

    seeds: tuple[int, ...] = (1000,)
    measurement: str = "valid/loss"
    higher_is_better: bool = False
    budget: Budget | None = None

    def __post_init__(self) -> None:
        _check_seeds("Tuning.seeds", self.seeds)


@dataclass(frozen=True)
class Study:
    """An experiment: every arm with every seed.

    Attributes:
      name: of the study, in titles.
      arms: what is compared.
      seeds: of the runs; every arm has all of them, so that arms can be compared seed by seed.
      gin_files: what all arms train.
      bindings: over those files.
      budget: of every run; None: as long as the files say.
      measurements: names of values that runs record, as `valid/loss` or `mean_bleu` (see `measurements.Recorded`), or
        measurements that are computed from a run's folder.
      baseline: the arm that the others are tested against; empty: none, unless an arm names one.
      tuning: how `Arm.tuned` is chosen.
      curves: names of values of `metrics.jsonl` that are drawn over the budget; None: those of `measurements`.
      labels: by name of a measured value, what tables and axes call it, with its unit.
      axis: what `Arm.position` is, as `rank`.

    Raises:
      UserError: for no or equal arms, no or equal seeds, names of arms that are none, and what does not go together.
    """

    name: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    gin_files: tuple[str, ...] = ()
    bindings: Settings = field(default_factory=dict)
    budget: Budget | None = None
    measurements: tuple[str | Measurement, ...] = ("valid/loss",)
    baseline: str = ""
    tuning: Tuning | None = None
    curves: tuple[str, ...] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    axis: str = "position"

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if not names:
            raise UserError("Study.arms: there is no arm; give at least one")
        if not self.measurements:
            raise UserError("Study.measurements: nothing is measured; name at least one value")
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"Study.arms: {names.count(name)} arms are called {name!r}")
        _check_seeds("Study.seeds", self.seeds)
        _check_settings("Study.bindings", self.bindings)
        if self.baseline and self.baseline not in names:
            raise UserError(f"Study.baseline={self.baseline!r}: {_known(names)}")
        for arm in self.arms:
            if arm.baseline and arm.baseline not in names:
                raise UserError(f"Arm {arm.name!r}: baseline={arm.baseline!r}: {_known(names)}")
            self._check_tuning(arm)
            self._check_run(arm)

    def arm(self, name: str) -> Arm:
        """The arm of that name.

        Raises:
          UserError: if there is none.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise UserError(f"there is no arm {name!r}; {_known(arm.name for arm in self.arms)}")

    def baseline_of(self, arm: Arm) -> Arm | None:
        """The arm that one is tested against; None: it is tested against none."""
        name = self.baseline if arm.baseline is None else arm.baseline
        return self.arm(name) if name and name != arm.name else None

    def chooser_of(self, arm: Arm) -> Arm | None:
        """The arm whose tuning decides for this one; None: nothing is tuned."""
        chooser = self.arm(arm.tuned_as) if arm.tuned_as else arm
        return chooser if chooser.tuned else None

    def label_of(self, value: str) -> str:
        """What tables and axes call a measured value."""
        return self.labels.get(value, value)

    def _check_tuning(self, arm: Arm) -> None:
        if arm.tuned_as and not self.arm(arm.tuned_as).tuned:
            raise UserError(f"Arm {arm.name!r}: tuned_as={arm.tuned_as!r}, which has nothing to choose from")
        if not arm.tuned:
            return
        if self.tuning is None:
            raise UserError(f"Arm {arm.name!r} is tuned, but Study.tuning does not say how")
        common = set(self.seeds) & set(self.tuning.seeds)
        if common:
            raise UserError(f"Tuning.seeds: {min(common)} is a seed of the reported runs, too; take others")

    def _check_run(self, arm: Arm) -> None:
        """Arms that share a run say the same of it; a pipeline has no budget."""
        settings = lambda arm: (arm.command, arm.gin_files, dict(arm.bindings), self.chooser_of(arm))
        first = next(other for other in self.arms if other.run_name == arm.run_name)
        if settings(first) != settings(arm):
            raise UserError(
                f"Study.arms: {first.name!r} and {arm.name!r} share the run {arm.run_name!r} but differ in command, "
                "gin_files, bindings or tuning"
            )
        if arm.command == "pipeline" and (self.budget or arm.tuned or arm.tuned_as):
            raise UserError(
                f"Arm {arm.name!r} is a pipeline, whose stages have their own lengths: no budget, no tuning"
            )


def _check_seeds(where: str, seeds: Sequence[int]) -> None:
    if not seeds:
        raise UserError(f"{where}: there is no seed; give at least one")
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"{where}={list(seeds)}: seeds are different numbers from 0 on")


def _check_settings(where: str, settings: Settings) -> None:
    for name, value in settings.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise UserError(
                f"{where}[{name!r}] is {value!r}; write a number, a text, True, False, None or a list of them, "
                "references as text: '@optim.adam()'"
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(part) for item in value.items() for part in item)
    return isinstance(value, _PLAIN)


def _known(names: Any) -> str:
    return f"there are {', '.join(names)}"
