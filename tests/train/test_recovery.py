"""Losses that are not finite, in whole runs: left out, gone back from, and at last an end that names the examples."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ext.checkpoints import CheckpointStore
from t5x_ext.contracts import UserError
from t5x_ext.objectives import LabelSmoothedCrossEntropy
from t5x_ext.train import CheckpointConfig, Hook
from t5x_ext.train.recovery import skipped_after

pytestmark = pytest.mark.usefixtures("compile_once")


@dataclasses.dataclass(frozen=True)
class Poisoned:
    """The usual objective, but infinite for batches whose sum of labels is among these."""

    inner: LabelSmoothedCrossEntropy
    sums: tuple[int, ...]

    def __call__(self, params, batch, context):
        loss = self.inner(params, batch, context)
        bad = jnp.isin(jnp.sum(batch["target_labels"]), jnp.asarray(self.sums))
        return loss._replace(sum=loss.sum + jnp.where(bad, jnp.inf, 0.0))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(run_dir):
    with CheckpointStore(run_dir / "checkpoints") as store:
        return store.restore_params("last"), store.steps()


@pytest.fixture(scope="module")
def batches(place, compile_once, tmp_path_factory):
    """The batches of the tiny run."""
    from t5x_ext.data import prepare

    folder = tmp_path_factory.mktemp("data")
    return prepare(place.data(), str(folder), str(place.path / "caches")).batches


@pytest.fixture(scope="module")
def poisoned(batches):
    """The setting that makes losses infinite on these batches."""

    def make(*numbers):
        sums = tuple(int(batches[number]["target_labels"].sum()) for number in numbers)
        return {"objective": lambda model: Poisoned(LabelSmoothedCrossEntropy(model), sums)}

    return make


SETTINGS = {
    "checkpoints": CheckpointConfig(every=2, keep_last=9),
    "max_skipped_updates": 2,
    "max_rewinds": 2,
    "steps": 10,
}


@pytest.fixture(scope="module")
def gone_back(place, poisoned, tmp_path_factory):
    """The folder of a run whose batches 5 and 6 are bad, and its results."""
    run_dir = tmp_path_factory.mktemp("runs") / "gone_back"
    return run_dir, place.run(run_dir, **SETTINGS, **poisoned(5, 6))


def test_a_few_bad_batches_are_left_out_and_named(place, poisoned, batches, tmp_path):
    results = place.run(tmp_path, **{**SETTINGS, "max_skipped_updates": 3}, **poisoned(5, 6))
    assert results["skipped_updates"] == 2
    assert "rewinds" not in results
    records = lines(tmp_path / "skipped_examples.jsonl")
    assert [(record["step"], record["batch"]) for record in records] == [(6, 5), (7, 6)]
    assert records[0]["examples"] == [list(example) for example in batches.examples(5)]


def test_a_bad_stretch_takes_the_run_back_and_on_with_other_data(gone_back, batches):
    """From step 4 on, without batches 4 to 6, the run is one that never had them."""
    run_dir, results = gone_back
    assert (results["steps"], results["rewinds"], results["skipped_updates"]) == (10, 1, 2)
    assert results["goodput"]["seconds"]["lost"] > 0
    assert [record["batch"] for record in lines(run_dir / "skipped_examples.jsonl")] == [5, 6]

    read = [line for line in lines(run_dir / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in read] == list(range(1, 11))
    expected = [0, 1, 2, 3, *range(7, 13)]
    labels = [int((batches[number]["target_segment_ids"] > 0).sum()) for number in expected]
    assert [line["target_tokens"] for line in read] == labels
    assert weights(run_dir)[1] == [2, 4, 6, 8, 10]


def test_a_restart_after_going_back_leaves_the_same_data_out(place, poisoned, gone_back, tmp_path):
    for steps in (8, 10):
        results = place.run(tmp_path, **{**SETTINGS, "steps": steps}, **poisoned(5, 6))
    assert results["rewinds"] == 1
    jax.tree.map(np.testing.assert_array_equal, weights(tmp_path)[0], weights(gone_back[0])[0])


def test_before_the_first_checkpoint_the_run_begins_again(place, poisoned, tmp_path, caplog):
    results = place.run(tmp_path, **{**SETTINGS, "checkpoints": CheckpointConfig(every=0)}, **poisoned(5, 6))
    assert (results["rewinds"], results["steps"]) == (1, 10)
    assert "updates 6 to 7 all had a loss or gradient that is not finite: going back to step 0" in caplog.text
    read = [line for line in lines(tmp_path / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in read] == list(range(1, 11))


def test_where_only_a_checkpoint_of_the_stretch_was_kept_it_will_do(place, poisoned, tmp_path):
    """A signal after the first bad update saves it, and `keep_last=1` deletes what was before."""
    settings = {**SETTINGS, "checkpoints": CheckpointConfig(every=2, keep_last=1), **poisoned(5, 6)}

    class Stop(Hook):
        def after_step(self, loop):
            if loop.step == 6:
                loop.stop, loop.interrupted = "told to", True

    place.run(tmp_path, **settings, hooks=(Stop(),))
    assert weights(tmp_path)[1] == [6]
    results = place.run(tmp_path, **settings)
    assert (results["steps"], results["rewinds"], results["skipped_updates"]) == (10, 1, 2)


def test_a_run_that_keeps_diverging_ends_with_the_place_of_its_examples(place, poisoned, tmp_path):
    bad = range(3, 40)
    with pytest.raises(UserError, match=r"after going back 2 times; their examples are in .*skipped_examples.jsonl"):
        place.run(tmp_path / "run", **SETTINGS, **poisoned(*bad))
    assert [record["batch"] for record in lines(tmp_path / "run/skipped_examples.jsonl")] == list(range(3, 9))
    state, steps = weights(tmp_path / "run")
    assert steps == [2]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_ranges_add_up_in_the_numbers_of_the_whole_data(batches):
    first = skipped_after(batches, [], 4, 6)
    assert first == [(4, 7)]
    assert skipped_after(batches.skipping(first), first, 2, 3) == [(2, 7)]
    assert skipped_after(batches.skipping(first), first, 3, 4) == [(3, 8)]
    assert skipped_after(batches.skipping(first), first, 8, 9) == [(4, 7), (11, 13)]
