"""What of a pipeline's stage is compiled for devices: the update of the run it trains, or the search it decodes by."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

from t5x_ext.cli.messages import UsageError, did_you_mean

if TYPE_CHECKING:
    from t5x_ext.decode import DecodeConfig
    from t5x_ext.pipeline import Pipeline, Stage, Train
    from t5x_ext.train import Run


class StageWork(NamedTuple):
    """The program of a stage.

    Attributes:
      run: of a stage that trains; else the run that its model is from, laid out as the pipeline decodes.
      decode: how the stage decodes; None where it trains.
      members: models that decode together.
    """

    run: Run
    decode: DecodeConfig | None = None
    members: int = 1


def stage_work(pipeline: Pipeline, name: str) -> StageWork:
    """What a stage has to be compiled for.

    A stage that decodes in several ways is taken by the one with most hypotheses, an ensemble with all members that it
    may have. The vocabulary is that of the run which the stage's model began with.

    Raises:
      UsageError: for an unknown stage, and for one that neither trains nor decodes.
    """
    stages = {stage.name: stage for stage in pipeline.stages}
    if name not in stages:
        raise UsageError(f"--stage={name}: there is no such stage{did_you_mean(name, stages)}")
    work = _work(stages[name], stages, pipeline)
    if work is None:
        others = ", ".join(other for other, stage in stages.items() if _work(stage, stages, pipeline))
        kind = type(stages[name]).__name__
        raise UsageError(f"--stage={name}: {kind} has no program to compile; stages that have: {others or 'none'}")
    return work


def _work(stage: Stage, stages: dict[str, Stage], pipeline: Pipeline) -> StageWork | None:
    from t5x_ext.pipeline import Train

    if isinstance(stage, Train):
        return StageWork(_with_vocabulary(stage, stages))
    found = _decoding(stage)
    if found is None:
        return None
    model, decode = found
    origin = _origin(model, stages)
    if origin is None:
        return None
    train, members = origin
    laid_out = dataclasses.replace(
        _with_vocabulary(train, stages), mesh=pipeline.mesh, axis_rules=pipeline.axis_rules, num_microbatches=1
    )
    return StageWork(laid_out, decode, members)


def _decoding(stage: Stage) -> tuple[str, DecodeConfig] | None:
    """The model that a stage decodes with, by its stage, and how; None where it decodes nothing.

    Candidates of an ensemble are of one shape: the ensemble decodes as a model of its own.
    """
    from t5x_ext.pipeline import GreedyEnsemble, Translate
    from t5x_ext.plan.check import num_hypotheses
    from t5x_ext.vega_mt import CycleTranslate, Synthesize

    if isinstance(stage, GreedyEnsemble):
        return stage.name, stage.decode
    if isinstance(stage, CycleTranslate | Translate):
        return stage.model, stage.decode
    if isinstance(stage, Synthesize):
        return stage.model, max(filter(None, (stage.forward, stage.backward)), key=num_hypotheses)
    return None


def _origin(name: str, stages: dict[str, Stage]) -> tuple[Train, int] | None:
    """The stage that has trained a model, and how many such ones decode together; None for another kind of model."""
    from t5x_ext.pipeline import Average, GreedyEnsemble, Train

    stage = stages[name]
    if isinstance(stage, Average):
        return _origin(stage.model, stages)
    if isinstance(stage, GreedyEnsemble):
        first = _origin(stage.candidates[0], stages)
        return first and (first[0], min(len(stage.candidates), stage.max_members or len(stage.candidates)))
    return (stage, 1) if isinstance(stage, Train) else None


def _with_vocabulary(train: Train, stages: dict[str, Stage]) -> Run:
    """The run of a stage with the vocabulary that it takes over from another."""
    source = train.init_from or train.vocabulary
    origin = source and _origin(source, stages)
    if not origin:
        return train.run
    from t5x_ext.tasks import text_task, with_data

    vocabulary = text_task(_with_vocabulary(origin[0], stages)).data.vocabulary
    return with_data(train.run, dataclasses.replace(text_task(train.run).data, vocabulary=vocabulary))
