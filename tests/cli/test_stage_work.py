"""Which program a stage has: the model that it reads, trained by any stage, and how it decodes."""

from __future__ import annotations

import json

import jax
import pytest

from t5x_ext.cli.gin_config import build_run
from t5x_ext.cli.main import main
from t5x_ext.cli.messages import UsageError
from t5x_ext.cli.stage_work import stage_work
from t5x_ext.decode import Beam, Greedy
from t5x_ext.pipeline import Pipeline


def tiny(*bindings: str) -> Pipeline:
    return build_run(["runs/vega_mt_tiny.gin"], bindings, root=Pipeline)[0]


def test_a_stage_that_trains_is_its_run():
    pipeline = tiny()
    work = stage_work(pipeline, "generalise")
    assert (work.decode, work.members) == (None, 1)
    assert work.run == next(stage.run for stage in pipeline.stages if stage.name == "generalise")


@pytest.mark.parametrize(
    ("stage", "search", "members"),
    [
        ("cycle", Greedy(), 1),
        ("round1", Beam(beam_size=2), 1),  # forward; backward samples one
        ("best", Greedy(), 2),
        ("pretrained_test", Beam(beam_size=2), 1),
        ("best_test", Beam(beam_size=2), 2),
    ],
)
def test_a_stage_that_decodes_has_the_model_it_reads_laid_out_as_the_pipeline_says(stage, search, members):
    mesh = ("Pipeline.mesh=@here/t5x_ext.parallel.MeshConfig()", "here/t5x_ext.parallel.MeshConfig.tensor=2")
    work = stage_work(tiny(*mesh), stage)
    assert (work.decode.search, work.members) == (search, members)
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


FOREIGN = '''
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from t5x_ext.decode import DecodeConfig
from t5x_ext.pipeline import ModelOrigin, StageWork, decoding_work


@dataclass(frozen=True)
class Shorter:
    """Trains the run of another stage for fewer updates."""

    name: str
    model: str
    steps: int

    def inputs(self):
        return (self.model,)

    def sources(self):
        return ()

    def make(self, workspace):
        raise NotImplementedError

    def program(self, earlier):
        return StageWork(replace(earlier[self.model].origin(earlier).run, steps=self.steps))

    def origin(self, earlier):
        return ModelOrigin(self.program(earlier).run)


@dataclass(frozen=True)
class Rescore:
    """Decodes with a model."""

    name: str
    model: str
    decode: DecodeConfig

    def inputs(self):
        return (self.model,)

    def sources(self):
        return ()

    def make(self, workspace):
        raise NotImplementedError

    def program(self, earlier):
        return decoding_work(self.model, self.decode, earlier)
'''
FOREIGN_GIN = """
from __gin__ import dynamic_registration
import foreign_stages
from t5x_ext import pipeline
from t5x_ext import decode

include 'runs/vega_mt_tiny.gin'

pipeline.Pipeline.stages = [
    @bitext/pipeline.Texts(), @dev/pipeline.Texts(), @test/pipeline.Texts(), @past/pipeline.Texts(),
    @clean/pipeline.Clean(), @pretrain/pipeline.Train(), @foreign_stages.Shorter(), @foreign_stages.Rescore(),
]
foreign_stages.Shorter.name = 'shorter'
foreign_stages.Shorter.model = 'pretrain'
foreign_stages.Shorter.steps = 5
foreign_stages.Rescore.name = 'rescore'
foreign_stages.Rescore.model = 'shorter'
foreign_stages.Rescore.decode = @rescore/decode.DecodeConfig()
rescore/decode.DecodeConfig.search = @decode.Beam()
rescore/decode.Beam.beam_size = 3
"""


@pytest.fixture
def foreign(folder, monkeypatch):
    """A gin file with stages of another package, on the path as a user's would be."""
    (folder / "foreign_stages.py").write_text(FOREIGN)
    (folder / "foreign.gin").write_text(FOREIGN_GIN)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield "check --gin_file=foreign.gin --topology=h100:1 --decode_rows=4 --json_out=-"
    jax.config.update("jax_disable_most_optimizations", before)


def test_stages_of_another_package_are_compiled(foreign, capfd):
    assert main([*foreign.split(), "--stage=shorter"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["program"], found["rows"], found["steps"]) == ("train", 8, 5)
    assert main([*foreign.split(), "--stage=rescore"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["program"], found["rows"]) == ("decode", 4)
    assert found["assumption"] == "beam, 3 hypotheses of 69 tokens for each sentence of 64"
    assert main([*foreign.split(), "--stage=clean"]) == 2
    error = capfd.readouterr().err
    assert "Clean has no program to compile; stages that have: pretrain, shorter, rescore\n" in error
