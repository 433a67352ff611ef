"""Whole runs of a tiny model on a tiny text: what is written, what goes on where, what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import sys
from functools import partial

import jax
import numpy as np
import optax
import pytest

from t5x_ext.checkpoints import CheckpointStore, RunFolder
from t5x_ext.checkpoints.store import SaveError
from t5x_ext.contracts import UserError
from t5x_ext.data import PackedBatches, prepare
from t5x_ext.decode import Beam, DecodeConfig, Greedy, Translator
from t5x_ext.models import config_from_json, init_params, model_from_json, num_params
from t5x_ext.objectives import LabelSmoothedCrossEntropy
from t5x_ext.optim import adam
from t5x_ext.parallel import MeshConfig
from t5x_ext.train import CheckpointConfig, EvaluationConfig, InitFrom, create_state, make_evaluation_step

pytestmark = pytest.mark.usefixtures("compile_once")

SHORT = {"max_length_ratio": 0.0, "max_length_extra": 4}
CONFIG = "adam.b2 = 0.98\nt5x_ext.train.Run.steps = 6\n# t5x_ext.train.Run.mesh = MeshConfig(data=-1)\n"


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir):
    return {line["step"]: line["loss"] for line in lines(run_dir) if "loss" in line}


def measured(run_dir):
    return {line["step"]: line for line in lines(run_dir) if "valid/loss" in line}


def best(run_dir):
    with CheckpointStore(run_dir / "checkpoints") as store:
        return store.ranked_steps()


def weights(run_dir, which="last", subtree="params"):
    with CheckpointStore(run_dir / "checkpoints") as store:
        return store.restore_params(which, subtree)


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def largest_difference(one, other):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), one, other)))


@pytest.fixture(scope="module")
def whole(place):
    """What a run with everything on is made of: average of the weights, evaluations, test, dropout."""
    return {
        "data": place.data(valid=True, test=True),
        "dropout": 0.1,
        "ema_decay": 0.5,
        "evaluation": EvaluationConfig(every=3),
        "max_lines": 2,
        "decode": DecodeConfig(Greedy(), **SHORT),
        "test_decode": DecodeConfig(Beam(beam_size=2), **SHORT),
    }


@pytest.fixture(scope="module")
def finished(place, whole, compile_once, tmp_path_factory):
    """The folder of a finished run; tests that change it take a copy."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    place.run(run_dir, config_text=CONFIG, **whole)
    return run_dir


def test_results_and_records_of_a_run(finished, place):
    results = json.loads((finished / "results.json").read_text())
    model = config_from_json(RunFolder(finished).read_model().model)
    assert results["steps"] == 6
    assert results["parameters"] == num_params(model) == sum(leaf.size for leaf in jax.tree.leaves(weights(finished)))
    assert results["train_seconds"] == pytest.approx(sum(results["goodput"]["seconds"].values()), rel=0.01)
    assert sum(results["goodput"]["fractions"].values()) == pytest.approx(1, abs=0.01)
    assert results["target_tokens_per_second"] > 0
    assert set(results["directions"]) == {"en-de"}
    scores = results["directions"]["en-de"]
    assert {"bleu", "chrf", "exact_match", "signature"} <= set(scores)
    assert results["mean_bleu"] == scores["bleu"]
    assert results["mean_exact_match"] == scores["exact_match"]
    (sample,) = results["samples"]
    assert sample["reference"] == (place.path / "test.de").read_text().splitlines()[0]
    assert "families" not in results
    read = lines(finished)
    assert [line["step"] for line in read if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in read if "valid/bleu" in line] == [3, 6]
    tokens = sum(line["target_tokens"] for line in read if "loss" in line)
    assert results["target_tokens_per_second"] == pytest.approx(tokens / results["train_seconds"], rel=0.02)
    assert (finished / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "config.gin").read_text() == CONFIG
    assert json.loads((finished / "environment.json").read_text())["devices"] == ["cpu"] * jax.device_count()


def test_a_finished_run_says_so_and_does_not_train(finished, place, whole, monkeypatch, capsys):
    # The package's `execute` is the function, not the module of that name.
    monkeypatch.setattr(sys.modules["t5x_ext.tasks.translation"], "prepare", lambda *_: pytest.fail("reads data"))
    results = place.run(finished, config_text=CONFIG, **whole)
    assert results == json.loads((finished / "results.json").read_text())
    assert f"{finished} is finished, with 6 updates" in capsys.readouterr().err


def test_more_steps_go_on_where_the_run_stood(finished, place, whole, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    more = whole | {"evaluation": EvaluationConfig(every=0), "max_lines": 0, "data": place.data(valid=True)}
    results = place.run(tmp_path / "run", steps=8, config_text=CONFIG.replace("steps = 6", "steps = 8"), **more)
    assert results["steps"] == 8
    before, after = lines(finished), lines(tmp_path / "run")
    assert after[: len(before)] == before
    assert [line["step"] for line in after[len(before) :]] == [7, 8, 8]
    assert "steps = 8" in (tmp_path / "run/config.gin").read_text()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (CONFIG.replace("0.98", "0.999"), "adam.b2 = 0.98, now it is 0.999;"),
        (CONFIG + "t5x_ext.train.Run.seed = 1\n", "Run.seed = unset, now it is 1;"),
        ("", "adam.b2 = 0.98, now it is unset;"),
    ],
)
def test_changed_settings_are_refused_by_name(finished, place, whole, config, name):
    with pytest.raises(UserError, match=name):
        place.run(finished, config_text=config, **whole)
    assert (finished / "config.gin").read_text() == CONFIG


def test_settings_that_touch_nothing_learned_may_change(finished, place, whole):
    config = CONFIG.replace("steps = 6", "steps = 5") + "t5x_ext.train.EvaluationConfig.every = 7\n"
    assert place.run(finished, config_text=config, **whole | {"steps": 5})["steps"] == 6


def test_changed_data_are_refused(finished, place, whole, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for name in ("train.en", "train.de"):
        shutil.copy(place.path / name, tmp_path / name)
        (tmp_path / name).write_text((place.path / name).read_text() + "one\n")
    other = dataclasses.replace(place, path=tmp_path).corpus("train")
    changed = whole | {"data": dataclasses.replace(whole["data"], train=(other,))}
    with pytest.raises(UserError, match=r"was trained on other data \(caches changed\)"):
        place.run(tmp_path / "run", steps=8, config_text=CONFIG, **changed)


@pytest.mark.parametrize(
    ("mesh", "complaint"),
    [(MeshConfig(data=3, fsdp=3), "does not fit"), (MeshConfig(tensor=5), "does not fit")],
)
def test_a_mistake_before_training_leaves_nothing_behind(place, tmp_path, mesh, complaint):
    with pytest.raises(UserError, match=complaint):
        place.run(tmp_path / "run", mesh=mesh)
    assert not (tmp_path / "run").exists()


def test_before_the_first_checkpoint_settings_may_change(place, tmp_path):
    def broken(model):
        raise UserError("an objective that does not like the model")

    with pytest.raises(UserError, match="does not like"):
        place.run(tmp_path / "run", config_text=CONFIG, objective=broken)
    assert place.run(tmp_path / "run", optimizer=optax.sgd(0.0), steps=1)["steps"] == 1


def test_a_folder_of_weights_alone_is_left_as_it_is(finished, place, whole, tmp_path):
    """As `t5x_ext average` makes them: there is no optimizer state to go on with, and no configuration to compare."""
    for name in ("model.json", "vocabulary"):
        copy = shutil.copytree if (finished / name).is_dir() else shutil.copy
        copy(finished / name, tmp_path / name)
    with CheckpointStore(tmp_path / "checkpoints") as store:
        store.save(3, {"params": weights(finished)})
    other = dataclasses.replace(place.tiny_run().task.model, encoder_layers=2)
    with pytest.raises(UserError, match="belongs to another model or optimizer"):
        place.run(tmp_path, config_text=CONFIG, model=other)
    assert (tmp_path / "model.json").read_text() == (finished / "model.json").read_text()


class Kill:
    """Sends this process a signal after an update, as a scheduler would."""

    def __init__(self, step):
        self._step = step

    def after_step(self, loop):
        if loop.step == self._step:
            os.kill(os.getpid(), signal.SIGTERM)

    def at_end(self, loop):
        pass


def test_an_interrupted_run_goes_on_to_the_same_weights(finished, place, whole, tmp_path, capsys):
    assert place.run(tmp_path / "run", config_text=CONFIG, hooks=(Kill(2),), **whole) == {}
    assert "stopped at step 3 of 6: SIGTERM received; rerun the same command to resume" in capsys.readouterr().err
    assert not (tmp_path / "run/results.json").exists()
    results = place.run(tmp_path / "run", config_text=CONFIG, **whole)
    assert results["directions"] == json.loads((finished / "results.json").read_text())["directions"]
    assert losses(tmp_path / "run") == losses(finished)
    # The evaluation of update 3 was put off, and made up for.
    assert measured(tmp_path / "run") == measured(finished)
    assert results["preemption_seconds"] == [
        line["preemption_seconds"] for line in lines(tmp_path / "run") if "preemption_seconds" in line
    ]
    assert 0 < results["preemption_seconds"][0] < 30
    assert best(tmp_path / "run") == best(finished)
    for subtree in ("params", "ema"):
        assert_equal(weights(tmp_path / "run", subtree=subtree), weights(finished, subtree=subtree))


def test_an_evaluation_is_given_up_for_a_signal_and_made_up_for(finished, place, whole, tmp_path, monkeypatch):
    """SIGTERM while the first line is decoded after update 3: the run saves at once, and goes on to the same end."""
    translate = Translator.translate

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return translate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Translator, "translate", interrupted)
        assert place.run(tmp_path, config_text=CONFIG, **whole) == {}
    assert [line["step"] for line in lines(tmp_path) if "valid/loss" in line] == []
    place.run(tmp_path, config_text=CONFIG, **whole)
    assert measured(tmp_path) == measured(finished)
    assert best(tmp_path) == best(finished)
    assert_equal(weights(tmp_path), weights(finished))


def test_lines_of_several_updates_are_the_same_wherever_a_run_was_cut(place, tmp_path):
    """Lines after updates 4 and 6; cut by a signal after 3, and then by a crash after 5."""
    place.run(tmp_path / "whole", log_every=4)
    place.run(tmp_path / "run", log_every=4, hooks=(Kill(2),), checkpoints=CheckpointConfig(every=1))
    assert losses(tmp_path / "run") == {}
    with contextlib.suppress(RuntimeError):
        place.run(tmp_path / "run", log_every=4, hooks=(Crash(6),), checkpoints=CheckpointConfig(every=1))
    place.run(tmp_path / "run", log_every=4)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    tokens = [sum(line.get("target_tokens", 0) for line in lines(tmp_path / name)) for name in ("run", "whole")]
    assert tokens[0] == tokens[1]


class Crash:
    """Ends the process as a bug would, after an update."""

    def __init__(self, step):
        self._step = step

    def after_step(self, loop):
        if loop.step == self._step:
            raise RuntimeError("a bug")

    def at_end(self, loop):
        pass


def test_what_a_crash_has_cost_is_counted_as_lost(place, tmp_path):
    run = {"checkpoints": CheckpointConfig(every=2)}
    with pytest.raises(RuntimeError, match="a bug"):
        place.run(tmp_path, **run, hooks=(Crash(4),))  # before 4 is saved: 3 is lost, and half of 4
    thrown_away = sum(line["seconds"] for line in lines(tmp_path) if line["step"] > 2)
    results = place.run(tmp_path, **run)
    assert 0 < results["goodput"]["seconds"]["lost"] <= thrown_away + 0.001
    assert sum(results["goodput"]["seconds"].values()) == pytest.approx(results["train_seconds"], abs=0.02)


def test_a_reader_that_fails_ends_the_run_with_its_error_and_saves_what_was_learned(place, tmp_path, monkeypatch):
    read = PackedBatches.read

    def damaged(self, index, start, stop):
        if index == 4:
            raise OSError("shard 3 is damaged")
        return read(self, index, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(PackedBatches, "read", damaged)
        with pytest.raises(OSError, match="shard 3 is damaged"):
            place.run(tmp_path / "run")
    with CheckpointStore(tmp_path / "run/checkpoints") as store:
        assert store.steps() == [4]
    assert place.run(tmp_path / "run")["steps"] == 6
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_what_there_is(place, tmp_path, monkeypatch):
    save = CheckpointStore.save

    def full(self, step, *arguments):
        if step == 4:
            raise SaveError("step 4 could not be saved: No space left on device")
        save(self, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "save", full)
        with pytest.raises(UserError, match="No space left on device"):
            place.run(tmp_path, checkpoints=CheckpointConfig(every=2))
    with CheckpointStore(tmp_path / "checkpoints") as store:
        assert store.steps() == [2]
    assert place.run(tmp_path, checkpoints=CheckpointConfig(every=2))["steps"] == 6


def test_a_changed_environment_is_told_in_one_line(place, tmp_path, caplog):
    place.run(tmp_path, steps=1)
    path = tmp_path / "environment.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "packages": {**record["packages"], "jaxlib": "0.1.2"}, "cpu_threads": 1000}))
    place.run(tmp_path, steps=2)
    (message,) = [record.message for record in caplog.records if "equal to rounding" in record.message]
    assert re.search(r"jaxlib \S+ \(was 0.1.2\); threads \d+ \(was 1000\)", message)


def test_averaged_weights_are_what_is_evaluated_and_translated_with(finished, place, whole):
    with CheckpointStore(finished / "checkpoints") as store:
        best = store.best_step()
    average, raw = weights(finished, best, "ema"), weights(finished, best)
    assert largest_difference(average, raw) > 1e-3
    assert_equal(Translator.from_run(finished).params, average)

    data = prepare(whole["data"], str(finished), str(place.path / "caches"))
    model = model_from_json(RunFolder(finished).read_model().model)
    step = jax.jit(make_evaluation_step(LabelSmoothedCrossEntropy(model)))
    sums = [[step(params, {}, (), 0, batch) for batch in data.valid_batches()] for params in (average, raw)]
    mean, mean_raw = (sum(loss.sum for loss in part) / sum(loss.weight for loss in part) for part in sums)
    (reported,) = (line["valid/loss"] for line in lines(finished) if line["step"] == best and "valid/loss" in line)
    assert reported == pytest.approx(float(mean), rel=1e-5)
    assert abs(reported - mean_raw) > 1e-3


def test_fine_tuning_starts_from_averaged_weights_with_a_fresh_optimizer(finished, place, whole, tmp_path):
    init_from = InitFrom(str(finished), 3)
    place.run(tmp_path, init_from=init_from, steps=1, optimizer=optax.sgd(0.0), ema_decay=0.5)
    for subtree in ("params", "ema"):
        assert_equal(weights(tmp_path, subtree=subtree), weights(finished, 3, "ema"))


def test_fine_tuning_with_the_optimizer_of_the_other_run(finished, place, whole, tmp_path):
    init_from = InitFrom(str(finished), "last", keep_optimizer=True)
    place.run(tmp_path / "tuned", init_from=init_from, steps=1, ema_decay=0.5, dropout=0.1)
    model = config_from_json(RunFolder(finished).read_model().model)
    params = jax.eval_shape(partial(init_params, model), jax.random.key(0))
    template = jax.eval_shape(partial(create_state, optimizer=adam(0.01), with_ema=True), params)
    states = []
    for folder in (finished, tmp_path / "tuned"):
        with CheckpointStore(folder / "checkpoints") as store:
            states.append(store.restore(template)[0])
    counts = [optax.tree.get(state.optimizer_state, "count") for state in states]
    assert (states[1].step, *counts) == (1, 6, 7)
    assert largest_difference(states[0].params, states[1].params) < 0.05


def test_weights_of_another_model_are_refused(finished, place, tmp_path):
    model = dataclasses.replace(place.tiny_run().task.model, mlp_dim=48)
    with pytest.raises(
        UserError, match=r"init_from=.*: .* has the shape \(1, 32, 16\) there, \(1, 48, 16\) in this model"
    ):
        place.run(tmp_path / "tuned", init_from=InitFrom(str(finished)), model=model)


def test_early_stop_is_an_end_until_more_patience_is_given(place, tmp_path):
    """At learning rate 0 no evaluation is better than the first."""

    def run(patience):
        evaluation = EvaluationConfig(every=2, patience=patience)
        still = {"data": place.data(valid=True), "optimizer": optax.sgd(0.0), "steps": 30}
        return place.run(tmp_path, evaluation=evaluation, **still)

    results = run(patience=2)
    assert (results["steps"], results["evaluations_without_gain"]) == (6, 2)
    assert run(patience=1) == results
    (tmp_path / "results.json").unlink()  # as if the run had been killed during its test
    assert run(patience=2)["steps"] == 6
    assert run(patience=3)["steps"] == 8


def test_microbatches_change_nothing(place, tmp_path):
    for pieces in (1, 2):
        place.run(tmp_path / str(pieces), num_microbatches=pieces, steps=4)
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert one.keys() == two.keys() == {1, 2, 3, 4}
    assert max(abs(one[step] - two[step]) for step in one) < 1e-5
    assert one[4] < one[1]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"steps": 0}, "Run.steps is 0"),
        ({"num_microbatches": 3}, "does not divide the 8 rows"),
        ({"ema_decay": 1.0}, "Run.ema_decay is 1.0"),
    ],
)
def test_runs_that_cannot_be(place, change, complaint):
    with pytest.raises(UserError, match=complaint):
        place.tiny_run(**change)


def test_evaluations_that_cannot_be(place):
    with pytest.raises(UserError, match="max_lines is 0, so that nothing is decoded"):
        place.tiny_run(evaluation=EvaluationConfig(metric="valid/bleu/en-de"))
    with pytest.raises(UserError, match=r"EvaluationConfig\.every is '3 lines'; give updates, or a text like"):
        EvaluationConfig(every="3 lines")
    with pytest.raises(UserError, match="patience is 0"):
        EvaluationConfig(patience=0)
