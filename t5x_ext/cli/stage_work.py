"""What `t5x_ext check --stage` compiles: the update of the run that a stage trains, or the search it decodes by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t5x_ext.cli.messages import UsageError, did_you_mean

if TYPE_CHECKING:
    from t5x_ext.pipeline import Pipeline, StageWork


def stage_work(pipeline: Pipeline, name: str) -> StageWork:
    """The program of a stage, as the stage itself gives it (`pipeline.ComputingStage`).

    Raises:
      UsageError: for an unknown stage, and for one that neither trains nor decodes or does not say what it computes.
    """
    stages = {stage.name: stage for stage in pipeline.stages}
    if name not in stages:
        raise UsageError(f"--stage={name}: there is no such stage{did_you_mean(name, stages)}")
    work = pipeline.program(name)
    if work is None:
        others = ", ".join(other for other in stages if pipeline.program(other))
        kind = type(stages[name]).__name__
        raise UsageError(f"--stage={name}: {kind} has no program to compile; stages that have: {others or 'none'}")
    return work
