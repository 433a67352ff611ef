"""What stages compute, said by the stages themselves: those of the package, and foreign ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import optax
import pytest
from stand_ins import Given, Lines

from t5x_ext.contracts import UserError
from t5x_ext.data import DataConfig, VocabularyConfig
from t5x_ext.decode import Beam, DecodeConfig, Greedy
from t5x_ext.models import TransformerConfig
from t5x_ext.parallel import AxisRules, MeshConfig
from t5x_ext.pipeline import (
    Average,
    ComputingStage,
    Evaluate,
    GreedyEnsemble,
    ModelOrigin,
    ModelStage,
    Pipeline,
    StageWork,
    Train,
    Translate,
    decoding_work,
)
from t5x_ext.tasks import Translation
from t5x_ext.train import CheckpointConfig, Run
from t5x_ext.vega_mt import CycleTranslate, Synthesize

BEAM, GREEDY = DecodeConfig(Beam(beam_size=4)), DecodeConfig(Greedy())
TEXTS = Given("texts", texts=(("a", ("en", "de"), (("one", "eins"),)),))


def run_with(size: int = 300, **changes) -> Run:
    data = DataConfig((Lines("a", ("en", "de"), ()),), vocabulary=VocabularyConfig(size=size))
    return replace(Run(Translation(data, TransformerConfig()), optax.sgd(0.1), 2, num_microbatches=2), **changes)


@dataclass(frozen=True)
class Prune:
    """A foreign stage that trains: with a run of its own, on the model of another stage."""

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
        origin = earlier[self.model].origin(earlier)
        return StageWork(replace(origin.run, steps=self.steps))

    def origin(self, earlier):
        return ModelOrigin(self.program(earlier).run)


@dataclass(frozen=True)
class Rescore:
    """A foreign stage that decodes."""

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
        assert self.name not in earlier
        return decoding_work(self.model, self.decode, earlier)


def test_foreign_stages_say_what_they_compute():
    mesh, rules = MeshConfig(tensor=2), AxisRules(mlp="tensor")
    run = run_with()
    stages = (Train("p1", run), Prune("small", "p1", 7), Rescore("out", "small", BEAM))
    pipeline = Pipeline(stages, mesh, rules)
    assert isinstance(stages[1], ComputingStage)
    assert isinstance(stages[1], ModelStage)
    assert pipeline.program("small") == StageWork(replace(run, steps=7))
    laid_out = replace(run, steps=7, mesh=mesh, axis_rules=rules, num_microbatches=1)
    assert pipeline.program("out") == StageWork(laid_out, BEAM)


def test_stages_of_the_package_decode_with_models_of_foreign_ones():
    pipeline = Pipeline(
        (
            *(TEXTS, Train("p1", run_with()), Prune("small", "p1", 7)),
            Average("mean", "small", last=2),
            GreedyEnsemble("best", ("mean", "small", "p1"), ("texts",), GREEDY, max_members=2),
            Translate("out", "best", ("texts",), decode=BEAM),
            Synthesize("round", "small", ("texts",), forward=GREEDY, backward=BEAM),
            CycleTranslate("cycle", "mean", "p1", ("texts",), ("de-en",), decode=GREEDY),
        )
    )
    found = {name: pipeline.program(name) for name in ("best", "out", "round", "cycle")}
    assert {work.run.steps for work in found.values()} == {7}
    assert {name: (work.decode, work.members) for name, work in found.items()} == {
        "best": (GREEDY, 2),
        "out": (BEAM, 2),
        "round": (BEAM, 1),
        "cycle": (GREEDY, 1),
    }
    assert pipeline.program("mean") is None
    assert pipeline.program("texts") is None


def test_without_the_origin_of_its_model_a_search_has_no_program():
    model = Given("model", directions=("en-de", "de-en"))
    stages = (
        *(TEXTS, model, Average("mean", "model", last=1)),
        *(Translate("out", "mean", ("texts",)), GreedyEnsemble("best", ("model",), ("texts",))),
        *(Rescore("again", "best", BEAM), Evaluate("scores", ("out",))),
    )
    pipeline = Pipeline(stages)
    assert {pipeline.program(stage.name) for stage in stages} == {None}


def test_the_vocabulary_comes_along_through_any_stage():
    stages = (Train("p1", run_with(777)), Prune("small", "p1", 7), Train("p2", run_with(888), init_from="small"))
    assert Pipeline(stages).program("p2").run.task.data.vocabulary.size == 777


@pytest.mark.parametrize("setting", ["last", "best"])
def test_an_average_of_too_many_checkpoints_of_a_foreign_run_is_refused(setting):
    run = run_with(checkpoints=CheckpointConfig(keep_last=3, keep_best=3))
    stages = (Train("p1", run), Prune("small", "p1", 7))
    Pipeline((*stages, Average("mean", "small", **{setting: 3})))
    with pytest.raises(UserError, match=f"Average.{setting}=4, but the runs of 'small' keep 3"):
        Pipeline((*stages, Average("mean", "small", **{setting: 4})))
