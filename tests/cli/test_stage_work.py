"""Which program stands for a stage: the model that it reads, wherever it was trained, and how it decodes."""

from __future__ import annotations

import pytest

from t5x_ext.cli.gin_config import build_run
from t5x_ext.cli.messages import UsageError
from t5x_ext.cli.stage_work import stage_work
from t5x_ext.pipeline import Pipeline


def tiny(*bindings: str) -> Pipeline:
    return build_run(["runs/vega_mt_tiny.gin"], bindings, root=Pipeline)[0]


def test_a_stage_that_trains_is_its_run():
    pipeline = tiny()
    work = stage_work(pipeline, "generalise")
    assert (work.decode, work.members) == (None, 1)
    assert work.run == next(stage.run for stage in pipeline.stages if stage.name == "generalise")


@pytest.mark.parametrize(
    ("stage", "strategy", "beam_size", "members"),
    [
        ("cycle", "greedy", 5, 1),
        ("round1", "beam", 2, 1),  # forward; backward draws one
        ("best", "greedy", 5, 2),
        ("pretrained_test", "beam", 2, 1),
        ("best_test", "beam", 2, 2),
    ],
)
def test_a_stage_that_decodes_has_the_model_it_reads_laid_out_as_the_pipeline_says(stage, strategy, beam_size, members):
    mesh = ("Pipeline.mesh=@here/t5x_ext.parallel.MeshConfig()", "here/t5x_ext.parallel.MeshConfig.tensor=2")
    work = stage_work(tiny(*mesh), stage)
    assert (work.decode.strategy, work.decode.beam_size, work.members) == (strategy, beam_size, members)
    assert work.run.mesh.tensor == 2
    assert work.run.task.model.encoder_layers == 1


def test_an_ensemble_has_no_more_members_than_it_may():
    assert stage_work(tiny("best/GreedyEnsemble.max_members=1"), "best_test").members == 1


def test_the_vocabulary_is_that_of_the_run_it_began_with():
    """pretrain, retrain1, finetune: the sizes of the later two are never trained."""
    pipeline = tiny("pretrain/VocabularyConfig.size=777", "finetune/VocabularyConfig.size=888")
    for stage in ("pretrain", "retrain1", "finetune", "lm", "past_lm", "round1", "best_test"):
        assert stage_work(pipeline, stage).run.task.data.vocabulary.size == 777


def test_what_has_no_program_says_which_stages_have():
    with pytest.raises(UsageError, match="Average has no program to compile; stages that have: pretrain, lm, cycle, "):
        stage_work(tiny(), "average")
