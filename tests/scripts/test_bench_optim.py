"""Quality of optimizers: the small form runs; eigenvalues and learning rates are those that they should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import bench_optim
import jax
import jax.numpy as jnp
import numpy as np
import optim_arms
import optim_quality
import pytest
from matplotlib.image import imread

from t5x_ext.contracts import Loss, UserError


def test_small_form(tmp_path):
    """Every part of the quality; programs that run for seconds are compiled quickly."""
    parts = [f"--part={part}" for part in ("sst2", "multi30k", "sharpness")]
    flags = ["--arms=adam", "--json_out=out.json", "--figure_out=."]
    command = [sys.executable, bench_optim.__file__, "--quick", *parts, *flags]
    # On one core, in one process: others would compile the same programs again.
    core = min(os.sched_getaffinity(0))
    ran = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    for part in ("sst2", "multi30k"):
        assert [line["arm"] for line in found[part]["lines"]] == ["adam"]
        assert found[part]["rates"]["adam"] in optim_arms.ADAM.rates
    assert all(0 <= value <= 100 for value in found["sst2"]["runs"]["adam"]["16"])
    assert np.isfinite(found["multi30k"]["runs"]["adam"][0]["loss"])
    for seed in (seed for runs in found["sharpness"]["runs"].values() for seed in runs["adam"]):
        # Uphill is the worst of all directions, for steps as short as this.
        assert seed["uphill 0.05"] > abs(seed["random 0.05"])
    for part in ("sst2", "multi30k", "sharpness"):
        assert (imread(tmp_path / f"optim_{part}.png")[..., :3].min(axis=2) < 0.9).mean() > 0.005


def test_gaps_are_to_the_counterpart_and_paired_by_seeds(tmp_path, monkeypatch):
    """Losses that are known: Flora is 0.1, then 0.3 above its counterpart, whose own losses are far apart."""
    losses = {("flora 4", 0): 5.1, ("flora 4", 1): 2.3, ("adafactor momentum", 0): 5.0, ("adafactor momentum", 1): 2.0}
    found = lambda name, size, task, rate, seed: {"loss": losses[name, seed], "bleu": 10.0 * seed, "train": []}
    monkeypatch.setattr(optim_quality, "_translation", lambda *arguments: None)
    monkeypatch.setattr(optim_quality, "_tune_translation", lambda *arguments: {0.1: 2.0, 0.01: 1.0})
    monkeypatch.setattr(optim_quality, "_translate", found)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    arms = [optim_arms.by_name(name) for name in ("adafactor momentum", "flora 4")]
    measured = optim_quality.multi30k(optim_quality.QUICK_SIZES, arms, tmp_path)
    assert measured["lines"] == [
        {"arm": "adafactor momentum", "learning rate": 0.01, "validation loss": "3.500 ± 1.500", "gap": "",
         "BLEU": "5.0 ± 5.0"},
        {"arm": "flora 4", "learning rate": 0.01, "validation loss": "3.700 ± 1.400", "gap": "+0.200 ± 0.100",
         "BLEU": "5.0 ± 5.0"},
    ]  # fmt: skip
    bench_optim.draw({"multi30k": measured}, tmp_path)
    assert (imread(tmp_path / "optim_multi30k.png")[..., :3].min(axis=2) < 0.9).mean() > 0.005


@pytest.mark.parametrize("steps", [6, 40])
def test_largest_eigenvalue_is_that_of_the_matrix(steps):
    """Also beyond the dimension, where the space of the products is exhausted."""
    eigenvalues = np.array([-9.0, -1.0, 0.0, 0.5, 2.0, 7.0])
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))
    matrix = jnp.asarray(rotation * eigenvalues @ rotation.T, jnp.float32)
    found = optim_quality.largest_eigenvalue(lambda x: matrix @ x, jnp.ones(6), steps)
    assert float(found) == pytest.approx(7.0, rel=1e-5)


def test_curvature_of_a_known_loss():
    """Of half of a squared norm with curvatures 1 and 4, at (1, 0): gradient (1, 0), largest eigenvalue 4."""

    class Quadratic:
        def __call__(self, params, batch, context):
            value = jnp.sum(jnp.array([1.0, 4.0]) * params["w"] ** 2) / 2
            return Loss(3 * value, jnp.float32(3), {})

    found = optim_quality._curvature(Quadratic(), {"w": jnp.array([1.0, 0.0])}, {}, 0)
    assert float(found["training loss"]) == 0.5
    assert float(found["largest eigenvalue"]) == pytest.approx(4, rel=1e-5)
    for radius in (0.05, 0.5):
        assert float(found[f"uphill {radius:g}"]) == pytest.approx(radius + radius**2 / 2, rel=1e-4)


def test_rows_of_a_classification_end_where_sentences_end():
    sentences = optim_quality.Sentences(np.array([[7, 8, 2, 0], [9, 2, 0, 0]]), np.array([3, 2]), np.array([1, 0]))
    task = optim_quality.Classification(None, None, None, None, pieces=(5, 6), eos_id=2)
    batch = task.batch(sentences.take(np.array([[0, 1], [1, 1]])))
    assert batch["source_segment_ids"].tolist() == [[[1, 1, 1, 0], [1, 1, 0, 0]], [[1, 1, 0, 0], [1, 1, 0, 0]]]
    assert batch["target_inputs"].tolist() == [[[2, 6], [2, 5]], [[2, 5], [2, 5]]]
    assert batch["target_labels"].tolist() == [[[6, 2], [5, 2]], [[5, 2], [5, 2]]]


def test_learning_rates_are_those_of_the_least_loss_that_is_finite():
    tuning = {"adam": {0.1: 2.0, 0.2: 1.0, 0.3: float("nan")}}
    rates = optim_quality._best_rates([optim_arms.ADAM, optim_arms.SAM], tuning)
    assert rates == {"adam": 0.2, "sam": 0.2}


def test_arms_have_names_of_their_own_and_make_optimizers():
    names = [arm.name for arm in optim_arms.ARMS]
    assert len(set(names)) == len(names)
    params = {"kernel": jnp.ones((64, 80))}
    states = {name: jax.eval_shape(optim_arms.by_name(name).make(1e-3, None).init, params) for name in names}
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(state)) for name, state in states.items()}
    assert sizes["flora 4"] < sizes["flora 16"] < sizes["flora 32"] < sizes["adafactor momentum"] < sizes["adam"]
    with pytest.raises(UserError, match="no arm is called 'adm'; there are adam, "):
        optim_arms.by_name("adm")
