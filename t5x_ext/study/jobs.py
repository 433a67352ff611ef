"""The runs of a study: which there are, in which folder each is, and the command that makes it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from t5x_ext.contracts import UserError
from t5x_ext.study.study import Arm, Budget, Settings, Study

CACHE = "cache"
"""Folder of token caches, which all runs of a study share; may be deleted."""


class Job(NamedTuple):
    """One run of a study.

    Beside its folder are `PATH.json`, its state; `PATH.log`, what it printed; `PATH.measured.json` and
    `PATH.lines.npz`, what was computed of it. Any of them may be deleted to have it made again.
    """

    arm: str  # the arm of which it is, or the first of those that share it
    seed: int
    path: str  # of its folder, below that of the study
    arguments: tuple[str, ...]  # of `t5x_ext`

    @property
    def command(self) -> str:
        """What a person would type."""
        return shlex.join(("t5x_ext", *self.arguments))


class Selection(NamedTuple):
    """Which runs are made now; the others stay as they are."""

    arms: tuple[str, ...]
    seeds: tuple[int, ...]


def select(study: Study, arms: Collection[str] = (), seeds: Collection[int] = ()) -> Selection:
    """Arms and seeds of a study, all where none are named.

    Raises:
      UserError: for one that the study does not have.
    """
    for name in arms:
        study.arm(name)
    unknown = [seed for seed in seeds if seed not in study.seeds]
    if unknown:
        raise UserError(f"the study has no seed {unknown[0]}; it has {', '.join(map(str, study.seeds))}")
    return Selection(
        tuple(arm.name for arm in study.arms if not arms or arm.name in arms),
        tuple(seed for seed in study.seeds if not seeds or seed in seeds),
    )


def reported_jobs(
    study: Study, output_dir: str, selection: Selection, chosen: Mapping[str, Settings | None]
) -> Iterator[Job]:
    """The runs that are compared, seed by seed, so that a study that is stopped has whole comparisons.

    Args:
      study: the study.
      output_dir: its folder.
      selection: of its arms and seeds.
      chosen: by name of a tuned arm, what was chosen; None: nothing could be, and its runs are not made.
    """
    for seed in selection.seeds:
        for arm in _one_a_run(study, selection):
            chooser = study.chooser_of(arm)
            settings = chosen[chooser.name] if chooser else {}
            if settings is not None:
                yield _job(study, output_dir, arm, seed, path_of(arm, seed), study.budget, settings)


def tuning_jobs(study: Study, output_dir: str, selection: Selection) -> Iterator[tuple[Arm, Settings, Job]]:
    """The runs that choose settings for the selected arms: the arm that is tuned, the choice, the run."""
    if study.tuning is None:
        return
    arms = (study.chooser_of(study.arm(name)) for name in selection.arms)
    for arm in {arm.name: arm for arm in arms if arm}.values():
        for number, choice in enumerate(arm.choices):
            for seed in study.tuning.seeds:
                path = f"tuning/{arm.name}/choice_{number}/seed_{seed}"
                budget = study.tuning.budget or study.budget
                yield arm, choice, _job(study, output_dir, arm, seed, path, budget, choice)


def path_of(arm: Arm, seed: int) -> str:
    """The folder of an arm's run, below that of the study."""
    return f"arms/{arm.run_name}/seed_{seed}"


def _one_a_run(study: Study, selection: Selection) -> list[Arm]:
    """The selected arms, of those that share a run the first."""
    return list({arm.run_name: arm for arm in reversed(study.arms) if arm.name in selection.arms}.values())[::-1]


def _job(study: Study, output_dir: str, arm: Arm, seed: int, path: str, budget: Budget | None, chosen: Settings) -> Job:
    settings: dict[str, Any] = {**study.bindings, **arm.bindings, **chosen}
    folder = f"{output_dir}/{path}"
    if arm.command == "train":
        own = [f"--seed={seed}", *_budget_flags(budget), f"--run_dir={folder}", f"--cache_dir={output_dir}/{CACHE}"]
    else:
        own = [f"--gin.Run.seed={seed}", f"--output_dir={folder}"]
    files = [f"--gin_file={name}" for name in (*study.gin_files, *arm.gin_files)]
    return Job(arm.name, seed, path, (arm.command, *files, *map(_flag, settings.items()), *own))


def _budget_flags(budget: Budget | None) -> list[str]:
    if budget is None:
        return []
    if budget.kind == "steps":
        return [f"--steps={budget.limit}"]
    name = "t5x_ext.train.Budget"
    return [f"--gin.Run.budget=@{name}()", f"--gin.{name}.{budget.kind}={budget.limit!r}"]


def _flag(setting: tuple[str, Any]) -> str:
    name, value = setting
    return f"--gin.{name}={value if isinstance(value, str) else repr(value)}"
