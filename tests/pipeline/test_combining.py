from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import numpy as np
import optax
import pytest
from stand_ins import Given, Lines, StandIn

from t5x_ext.checkpoints import CheckpointStore, Retention, RunFolder
from t5x_ext.contracts import UserError
from t5x_ext.data import DataConfig
from t5x_ext.decode import DecodeConfig, Greedy
from t5x_ext.models import TransformerConfig
from t5x_ext.pipeline import (
    Artefact,
    Average,
    Evaluate,
    GreedyEnsemble,
    Model,
    Pipeline,
    Train,
    Translate,
    Weights,
    audit,
    choose_greedily,
    execute,
)
from t5x_ext.tasks import Translation
from t5x_ext.train import CheckpointConfig, Run

GREEDY = DecodeConfig(Greedy())

# Averages


@dataclass(frozen=True)
class Runs:
    """A stage with run folders whose weights are known: those of step s are `values(s)`."""

    name: str
    folders: tuple[str, ...]
    steps: tuple[int, ...] = (1, 2, 3)
    same: bool = False

    def inputs(self):
        return ()

    def sources(self):
        return ()

    def make(self, workspace):
        models = []
        for number, name in enumerate(self.folders):
            folder = RunFolder(workspace.path(workspace.own(name)))
            folder.write_model({"a": 1}, {}, (name,), "")
            folder.vocabulary.mkdir()
            (folder.vocabulary / "vocabulary.json").write_text("{}")
            with CheckpointStore(folder.checkpoints, Retention(9, 9, "loss", "min")) as store:
                for step in self.steps:
                    # The later, the worse.
                    store.save(step, {"params": self.values(0 if self.same else step + number)}, {}, {"loss": step})
            models.append(Model((name,), (Weights(workspace.own(name), self.steps[0]),)))
        return Artefact("models", models=tuple(models))

    @staticmethod
    def values(seed: int):
        return {"layer": {"w": np.random.default_rng(seed).normal(size=(3, 2)).astype(np.float32)}}


def weights(folder, run):
    with CheckpointStore(RunFolder(folder / run).checkpoints) as store:
        return store.restore_params("last")["layer"]["w"]


def test_the_mean_of_the_last_or_the_best_in_the_place_of_each_model(tmp_path):
    runs = Runs("p4", ("en-de", "de-en"))
    made = execute(Pipeline((runs, Average("last", "p4", last=2), Average("best", "p4", best=2))), tmp_path)
    assert made["last"].models == (
        Model(("en-de",), (Weights("last/en-de", 3),)),
        Model(("de-en",), (Weights("last/de-en", 3),)),
    )
    for number, direction in enumerate(("en-de", "de-en")):
        values = [Runs.values(step + number)["layer"]["w"].astype(np.float64) for step in (1, 2, 3)]
        np.testing.assert_array_equal(weights(tmp_path, f"last/{direction}"), np.float32((values[1] + values[2]) / 2))
        np.testing.assert_array_equal(weights(tmp_path, f"best/{direction}"), np.float32((values[0] + values[1]) / 2))
    assert made["best"].counts == {"en-de": {"averaged": [1, 2]}, "de-en": {"averaged": [1, 2]}}
    assert RunFolder(tmp_path / "last/de-en").read_model().directions == ("de-en",)
    assert not any(stage.problems for stage in audit(tmp_path))


def test_the_mean_of_equal_checkpoints_is_each_of_them(tmp_path):
    execute(Pipeline((Runs("p1", ("run",), same=True), Average("mean", "p1", last=3))), tmp_path)
    np.testing.assert_array_equal(weights(tmp_path, "mean/run"), Runs.values(0)["layer"]["w"])


def test_averages_that_cannot_be(tmp_path):
    for fields in ({}, {"last": 1, "best": 1}, {"last": 0}):
        with pytest.raises(UserError, match="give one of them, at least 1"):
            Average("mean", "p1", **fields)


@pytest.mark.parametrize("setting", ["last", "best"])
def test_runs_that_keep_too_few_are_refused_before_anything_is_trained(setting):
    data, kept = DataConfig((Lines("a", ("en", "de"), ()),)), CheckpointConfig(keep_last=3, keep_best=3)
    train = Train("p1", Run(Translation(data, TransformerConfig()), optax.sgd(0.1), 2, checkpoints=kept))
    Pipeline((train, Average("mean", "p1", **{setting: 3})))
    message = f"Average.{setting}=4, but the runs of 'p1' keep 3; set CheckpointConfig.keep_{setting} of 'p1' to 4"
    with pytest.raises(UserError, match=message):
        Pipeline((train, Average("mean", "p1", **{setting: 4})))


def test_a_run_that_stopped_early_is_averaged_as_far_as_it_came(tmp_path, caplog):
    made = execute(Pipeline((Runs("p1", ("run",)), Average("mean", "p1", last=4))), tmp_path)
    assert made["mean"].counts == {"run": {"averaged": [1, 2, 3]}}
    assert "p1/run: averaging 3 checkpoints, there are not 4" in caplog.text


# Greedy ensembles


@pytest.mark.parametrize("seed", range(8))
def test_greedy_choice_is_what_its_definition_says(seed):
    """Against a search through all sets that keeps those that one can come to; scores never decrease."""
    draw = random.Random(seed)
    candidates = "abcd"
    value = {frozenset(group): draw.random() for n in range(1, 5) for group in itertools.combinations(candidates, n)}
    choice = choose_greedily(candidates, lambda members: value[frozenset(members)])
    chosen: frozenset[str] = frozenset()
    while True:
        options = sorted((value[chosen | {one}], chosen | {one}) for one in candidates if one not in chosen)
        if not options or (chosen and options[-1][0] <= value[chosen]):
            break
        chosen = options[-1][1]
    assert frozenset(choice.members) == chosen
    assert list(choice.scores) == sorted(choice.scores)
    assert choice.scores[0] == max(value[frozenset(one)] for one in candidates)
    assert choice.scores == tuple(value[frozenset(choice.members[: n + 1])] for n in range(len(choice.members)))


def test_greedy_choice_stops_where_too_little_is_gained():
    score = lambda members: {1: 10.0, 2: 11.0, 3: 11.5}[len(members)]
    assert len(choose_greedily("abc", score).members) == 3
    assert choose_greedily("abc", score, delta=0.5).scores == (10.0, 11.0)
    assert choose_greedily("abc", score, delta=1.0).members == ("a",)
    assert choose_greedily("abc", score, max_members=2).members == ("a", "b")
    assert choose_greedily("a", score) == (("a",), (10.0,))


WORDS = tuple(f"w{number}" for number in range(12))
DEV = Given("dev", texts=(("d", ("en", "de"), tuple((word, f"{word} {word} {word} {word} {word}") for word in WORDS)),))
KNOWN = {"a": WORDS[:6], "b": WORDS[:5], "c": WORDS[6:9]}
DIRECTIONS = ("en-de", "de-en")


def knows(members) -> StandIn:
    """Translates what any member knows from English; the way back it always knows."""
    known = {word for member in members for word in KNOWN[member]}

    def words(source, target, line):
        if source == "de":
            return line.split()[0]
        return f"{line} {line} {line} {line} {line}" if line in known else "?"

    return StandIn(words)


def ensemble(tmp_path, candidates, opened, **options):
    stages = (DEV, *(Given(name, directions=DIRECTIONS) for name in candidates))
    stage = GreedyEnsemble("best", tuple(candidates), ("dev",), decode=GREEDY, **options)

    def opener(folder, model):
        members = tuple(weights.run_dir.removeprefix("stand-ins/") for weights in model.members)
        opened.append(members)
        return knows(members)

    return execute(Pipeline((*stages, stage)), tmp_path, opener=opener)["best"]


def test_the_models_that_help_are_taken_in_the_order_in_which_they_help(tmp_path):
    opened = []
    made = ensemble(tmp_path, "bac", opened)
    (model,) = made.models
    assert model == Model(DIRECTIONS, (Weights("stand-ins/a", 1), Weights("stand-ins/c", 1)))
    counts = made.counts["en-de, de-en"]
    assert counts["members"] == ["stand-ins/a:1", "stand-ins/c:1"]
    assert counts["bleu"] == sorted(counts["bleu"])
    assert len(counts["bleu"]) == 2
    # Three alone, two with the best, one with both; each was opened once.
    assert counts["tried"] == len(opened) == 6
    assert ("a", "c", "b") in opened


def test_one_candidate_is_itself(tmp_path):
    made = ensemble(tmp_path, "b", [])
    assert made.models == (Model(DIRECTIONS, (Weights("stand-ins/b", 1),)),)


def test_what_was_tried_is_not_tried_again(tmp_path):
    class Killed(BaseException):
        pass

    class Until(list):
        def append(self, members):
            if len(self) == 4:
                raise Killed
            super().append(members)

    with pytest.raises(Killed):
        ensemble(tmp_path / "out", "bac", Until())
    opened = []
    made = ensemble(tmp_path / "out", "bac", opened)
    assert len(opened) == 2
    assert made == ensemble(tmp_path / "whole", "bac", [])


def test_models_are_chosen_by_what_translate_would_give_readers(tmp_path):
    """The score of the one candidate is that of `Evaluate` for its translation of the same text."""
    rows = tuple((f"“w{n}”", f"你好，世界，第{n}行，很好。") for n in range(9))
    dev = Given("dev", texts=(("d", ("en", "zh"), rows),))
    # Knows straight quotes only, and writes half-width punctuation.
    model = StandIn(lambda source, target, line: f"你好,世界,第{line[2:-1]}行,很好." if line[0] == '"' else "?")
    bleu = {}
    for name, options in (("readers", {}), ("raw", {"normalize": False}), ("half", {"postprocess": "none"})):
        stages = (
            Given("a", directions=("en-zh",)),
            GreedyEnsemble("best", ("a",), ("dev",), **options),
            Translate("out", "best", ("dev",), **options),
            Evaluate("scores", ("out",)),
        )
        made = execute(Pipeline((dev, *stages)), tmp_path / name, opener=lambda folder, model_: model)
        (bleu[name],) = made["best"].counts["en-zh"]["bleu"]
        assert bleu[name] == made["scores"].scores["out"]["d.en-zh"]["bleu"]
    assert bleu["readers"] == pytest.approx(100)
    assert bleu["raw"] < bleu["half"] < bleu["readers"]


def test_ensembles_that_cannot_be(tmp_path):
    for empty in ({"candidates": (), "dev": ("d",)}, {"candidates": ("a",), "dev": ()}):
        with pytest.raises(UserError, match="there is no stage; give at least one"):
            GreedyEnsemble("best", **empty)
    with pytest.raises(UserError, match="delta must be 0 or more"):
        GreedyEnsemble("best", ("a",), ("dev",), delta=-1.0)
    stages = (DEV, Given("a", directions=("en-de",)), Given("b", directions=("de-en",)))
    with pytest.raises(UserError, match="the candidates have no direction in common"):
        execute(Pipeline((*stages, GreedyEnsemble("best", ("a", "b"), ("dev",)))), tmp_path / "1")
    stages = (DEV, Given("a", directions=("cs-en",)), GreedyEnsemble("best", ("a",), ("dev",)))
    with pytest.raises(UserError, match="there is no development text for cs-en"):
        execute(Pipeline(stages), tmp_path / "2")
