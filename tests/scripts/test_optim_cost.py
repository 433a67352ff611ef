"""Costs of optimizers: what is compared with what, bytes against closed forms, and a whole trial of one card."""

from __future__ import annotations

import json

import bench_one_card
import jax
import optax
import optim_cost
import pytest
from matplotlib.image import imread
from optim_cost import QUICK_SIZES, SIZES

from t5x_ext.cli.flags import parse
from t5x_ext.models import init_params, num_params
from t5x_ext.models.presets import Base, Vega4B7


def test_sizes_are_those_of_the_comparison():
    assert SIZES.model == Base()
    assert SIZES.planned == Vega4B7()
    assert SIZES.rows * SIZES.length >= 4096
    assert SIZES.rank == 128


def test_an_update_that_is_due_counts_by_its_interval(monkeypatch):
    seconds = {"adam": {1: 2.0}, "sam": {1: 4.0}, "fsam": {1: 4.0, 0: 24.0}}

    class Training:
        def __init__(self, arm, sizes, params):
            self.seconds = seconds[arm.name]

        def update(self, count):
            return self.seconds[count]

    chosen = [arm for arm in optim_cost.arms(128) if arm.name in seconds]
    monkeypatch.setattr(optim_cost, "_Training", Training)
    monkeypatch.setattr(optim_cost, "init_params", lambda config, key: {})
    monkeypatch.setattr(optim_cost, "arms", lambda rank, min_dim: chosen)
    found = optim_cost.cost(QUICK_SIZES._replace(rounds=3))
    ratios = {(line["arm"], line["to"]): line["ratio"] for line in found["lines"]}
    # 99 updates of 4 seconds and one of 24.
    assert ratios["fsam", "sam"] == pytest.approx(4.2 / 4)
    assert ratios["fsam", "adam"] == pytest.approx(4.2 / 2)
    assert [line["bar"] for line in found["lines"] if line["arm"] == "fsam"] == [2.1, 1.05]
    assert found["seconds"]["fsam"] == {1: [4.0] * 3, 0: [24.0] * 3}


def test_an_update_begins_at_the_count_that_is_asked_for():
    adam = optim_cost.arms(4)[0]
    training = optim_cost._Training(adam, QUICK_SIZES, init_params(QUICK_SIZES.model, jax.random.key(0)))
    step, counts = training.step, []

    def watched(state, frozen, batch):
        counts.append(optax.tree.get(state, "count").item())
        state, metrics = step(state, frozen, batch)
        counts.append(optax.tree.get(state, "count").item())
        return state, metrics

    training.step = watched
    assert all(training.update(count) > 0 for count in (999, 1))
    assert counts == [999, 1000, 1, 2]


def test_bytes_are_those_of_the_closed_form(monkeypatch):
    wanted = ("adam", "fsam", "ginger 4")
    chosen = [arm for arm in optim_cost.arms(4) if arm.name in wanted]
    monkeypatch.setattr(optim_cost, "arms", lambda rank, min_dim: chosen)
    lines = {line["state"]: line for line in optim_cost.memory(QUICK_SIZES)["lines"]}
    planned = num_params(QUICK_SIZES.planned)
    assert lines["adam"]["to_params"] == pytest.approx(2, rel=1e-3)
    assert lines["adam"]["planned_bytes"] == 8 * planned + 4
    assert lines["ginger 4"]["planned_to_adam"] == pytest.approx(2.5, rel=0.01)  # momentum and four of a basis
    assert lines["fsam"]["planned_bytes"] - lines["adam"]["planned_bytes"] == pytest.approx(planned / 8, rel=0.05)


def test_the_picture_has_both_panels(tmp_path):
    cost = [{"arm": arm.name, "to": "adam", "ratio": 1.5, "least": 1.4, "most": 1.7} for arm in optim_cost.arms(128)]
    memory = [{"state": name, "planned_bytes": 10**9, "planned_to_adam": 0.03} for name in ("adam", "flora 128")]
    optim_cost.draw({"cost": {"lines": cost}}, tmp_path)
    one = imread(tmp_path / "optim_cost.png").shape
    optim_cost.draw({"cost": {"lines": cost}, "memory": {"lines": memory}}, tmp_path)
    both = imread(tmp_path / "optim_cost.png").shape
    assert both[1] > 1.8 * one[1]


@pytest.mark.parametrize("limit", [0, 1, 5, 64, 100, 1024, 5000])
def test_the_largest_batch_is_found_to_within_an_eighth(limit):
    tried = []

    def fits(rows):
        tried.append(rows)
        return rows <= limit

    found = bench_one_card.largest_rows(fits, most=1024)
    assert min(limit, 1024) * 8 / 9 <= found + 1 / 9 <= min(limit, 1024) + 1 / 9
    assert len(tried) == len(set(tried)) <= 16


@pytest.fixture
def one_card():
    return lambda *arguments: parse(bench_one_card.define_flags, ["--quick", *arguments])


def test_both_are_timed_with_the_batch_that_both_can_take(one_card, monkeypatch, tmp_path):
    most = {"flora": 2, "adam": 1}

    def examine(values, arm, rows, updates):
        return {"fits": rows <= most[arm], "updates": updates}

    monkeypatch.setattr(bench_one_card, "_in_a_process", examine)
    assert bench_one_card.main(one_card(f"--json_out={tmp_path}/out.json")) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["largest_rows"] == most
    timed = [(line["arm"], line["rows"]) for line in found["lines"] if line["updates"] == 2]
    assert timed == [("flora", 1), ("flora", 2), ("adam", 1)]


def test_a_trial_trains(one_card):
    found = bench_one_card.trial(one_card(), "flora", 2, 1)
    assert found["fits"] is True
    assert found["target_tokens_per_second"] == pytest.approx(2 * 16 / found["seconds"])
    assert found["argument_bytes"] > 0
    assert 0 < found["loss"] < 10


def test_a_card_that_is_too_small_is_an_answer_and_a_mistake_is_not(one_card, monkeypatch):
    def fail(message):
        def train(values, arm, rows, updates):
            raise jax.errors.JaxRuntimeError(message)

        monkeypatch.setattr(bench_one_card, "_train", train)

    fail("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore")
    found = bench_one_card.trial(one_card(), "adam", 1, 1)
    assert found == {"fits": False, "error": "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."}
    fail("INTERNAL: another error")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        bench_one_card.trial(one_card(), "adam", 1, 1)


def test_a_plan_of_one_card(one_card):
    flora, adam = (bench_one_card._planned(one_card(), arm, 2) for arm in ("flora", "adam"))
    assert adam["optimizer_bytes"] == pytest.approx(2 * adam["params_bytes"], rel=0.01)
    assert flora["params_bytes"] == adam["params_bytes"]
    assert flora["temporary_bytes"] == adam["temporary_bytes"]
    assert flora["fits"]
