"""The same run on eight virtual devices, however they are laid out, and on one."""

from __future__ import annotations

import dataclasses
import json
import sys
from functools import cache

import jax
import numpy as np
import pytest

from t5x_ext.checkpoints import CheckpointStore
from t5x_ext.models import LayerSharing
from t5x_ext.optim import adam
from t5x_ext.parallel import AxisRules, MeshConfig, data_parallel, fsdp_tensor, make_mesh

STEPS = 5
# Sums over rows and devices are taken in another order. The key projections' biases have no gradient but rounding:
# Adam must not divide by so little.
OPTIMIZER = adam(0.01, eps=1e-4)
TOLERANCE = 1e-5


def train(place, run_dir, mesh, rules):
    """Losses by step, and the weights at the end: shared layers, packed rows, dropout, an average of the weights."""
    run = place.tiny_run(dropout=0.1)
    data = dataclasses.replace(run.data, batch=dataclasses.replace(run.data.batch, rows=16))
    model = dataclasses.replace(
        run.model, encoder_layers=2, encoder_sharing=LayerSharing("universal"), attention_dropout=0.1
    )
    settings = {"data": data, "model": model, "optimizer": OPTIMIZER, "ema_decay": 0.9, "num_microbatches": 2}
    place.run(run_dir, mesh=mesh, axis_rules=rules, steps=STEPS, **settings)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    with CheckpointStore(run_dir / "checkpoints") as store:
        return [line["loss"] for line in lines], [store.restore_params("last", part) for part in ("params", "ema")]


@cache  # not a fixture: fixtures are made in the outer process, too
def on_one_device(place, run_dir):
    with pytest.MonkeyPatch.context() as patch:
        one = lambda config: make_mesh(config, jax.devices()[:1])
        patch.setattr(sys.modules["t5x_ext.train.execute"], "make_mesh", one)
        return train(place, run_dir, MeshConfig(), AxisRules())


@pytest.mark.devices(8)
@pytest.mark.usefixtures("compile_once")
@pytest.mark.parametrize(
    ("mesh", "rules"),
    [(MeshConfig(), data_parallel()), (MeshConfig(data=2, fsdp=2, tensor=2), fsdp_tensor())],
    ids=["data", "data-fsdp-tensor"],
)
def test_eight_devices_train_as_one(place, tmp_path, mesh, rules):
    assert jax.device_count() == 8
    losses, weights = train(place, tmp_path, mesh, rules)
    expected_losses, expected_weights = on_one_device(place, place.path / "one_device")
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=TOLERANCE), weights, expected_weights)
    assert losses[-1] < losses[0] - 0.3
