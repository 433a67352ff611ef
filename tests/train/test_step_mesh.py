"""Optimizers that call for gradients: eight devices that share rows and weights compute what one does."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from t5x_ext.corpora import ParallelText
from t5x_ext.data import BatchConfig, DataConfig, VocabularyConfig
from t5x_ext.models import DecoderConfig, init_params, logical_axes
from t5x_ext.optim import flora, flora_accumulator, fsam, ginger, mean_accumulator, sam
from t5x_ext.parallel import MeshConfig, fsdp_tensor, make_mesh
from t5x_ext.parallel.batches import batch_sharding
from t5x_ext.tasks import Translation
from t5x_ext.train import Run
from t5x_ext.train.curvature import _sample
from t5x_ext.train.program import make_program
from t5x_ext.train.state import create_state

VOCAB_SIZE = 64
# A decoder alone, which compiles in half the time. No biases: that of keys has a gradient of nothing but rounding, and
# Flora scales that up.
MODEL = DecoderConfig(
    vocab_size=VOCAB_SIZE, embed_dim=16, mlp_dim=32, num_heads=2, layers=1, dropout=0.1,
    use_bias=False,
)  # fmt: skip
BATCH = BatchConfig(rows=16, source_length=8, target_length=8)
STEPS = 2
_PARTS = ("sam", "fsam", "flora", "flora_accumulator")


def method(name: str) -> dict[str, Any]:
    """Optimizer and accumulator of a run."""
    sgd, axes = optax.sgd(0.1), logical_axes(MODEL)
    masked: dict[str, Any] = {"rho": 0.1, "sparsity": 0.5, "mask_update_interval": STEPS}
    is_compressed = lambda name: "table" in name or "up" in name  # few, since every one is compiled
    compressed: dict[str, Any] = {"min_dim_size_to_compress": 8, "axes": axes, "compressible": is_compressed}
    make: dict[str, Any] = {
        "sam": lambda: sam(sgd, 0.1),
        "fsam": lambda: fsam(sgd, **masked),
        "fsam_per_example": lambda: fsam(sgd, fisher="per_example", **masked),
        "flora": lambda: flora(0.1, 4, 0.3, 1, **compressed),
        "flora_accumulator": lambda: sgd,
        "flora_twice": lambda: flora(0.1, 4, 0.3, 1, key=1, **compressed),
        "ginger": lambda: ginger(0.1, 2, damping=0.1, axes=axes),
    }
    compresses_sums = name in ("flora_accumulator", "flora_twice")
    accumulator = flora_accumulator(4, **compressed) if compresses_sums else mean_accumulator()
    return {"optimizer": make[name](), "accumulator": accumulator}


def packed_batch(step: int) -> dict[str, np.ndarray]:
    """Rows of one, two or three examples, and of none."""
    random = np.random.default_rng(step)
    segments = np.array([[1, 1, 1, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 2, 2, 0], [0] * 8, [1] * 6 + [0] * 2], np.int32)
    segments = random.permutation(np.tile(segments, (BATCH.rows // 4, 1)))
    starts = np.diff(segments, axis=1, prepend=0) > 0
    positions = np.arange(8) - np.maximum.accumulate(np.where(starts, np.arange(8), 0), axis=1)
    tokens = ("source_tokens", "target_inputs", "target_labels")
    batch = {name: random.integers(1, VOCAB_SIZE, (BATCH.rows, 8)).astype(np.int32) for name in tokens}
    for side in ("source", "target"):
        batch |= {f"{side}_segment_ids": segments, f"{side}_positions": positions.astype(np.int32)}
    return batch


def trained(name: str, mesh_config: MeshConfig, devices: list[jax.Device]) -> Any:
    mesh = make_mesh(mesh_config, devices)
    data = DataConfig(
        train=(ParallelText("unread.en", "unread.de", "en", "de"),),
        vocabulary=VocabularyConfig(size=VOCAB_SIZE),
        batch=BATCH,
    )
    run = Run(
        task=Translation(data, MODEL),
        steps=STEPS,
        num_microbatches=2,
        mesh=mesh_config,
        axis_rules=fsdp_tensor(),
        **method(name),
    )
    program = make_program(run, {"vocab_size": VOCAB_SIZE}, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.template)
    create = lambda key: create_state(init_params(MODEL, key), run.optimizer, with_ema=False)
    state, step = jax.jit(create, out_shardings=shardings)(jax.random.key(0)), program.compile()
    for number in range(STEPS):
        state, metrics = step(state, {}, jax.device_put(packed_batch(number), batch_sharding(mesh)))
        assert metrics.finite
    return state


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    "name",
    [
        "fsam_per_example",
        "flora_twice",
        "ginger",
        # What the first two are made of.
        *(pytest.param(part, marks=pytest.mark.slow) for part in _PARTS),
    ],
)
def test_eight_devices_train_as_one(name):
    """With dropout and two microbatches; the weights are in units of how far the largest of an array has moved."""
    begin = init_params(MODEL, jax.random.key(0))
    one = trained(name, MeshConfig(), jax.devices()[:1]).params
    eight = trained(name, MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()).params

    def close(begin: Any, one: Any, eight: Any) -> None:
        moved = np.abs(np.asarray(one) - np.asarray(begin)).max()
        assert moved > 1e-4
        np.testing.assert_allclose(eight, one, rtol=0, atol=1e-4 * moved + 1e-7)

    jax.tree.map(close, begin, one, eight)


@pytest.mark.devices(8)
@pytest.mark.parametrize("vocab", [1024, 1000])  # a multiple of the groups of a vocabulary, and none
def test_labels_are_drawn_where_the_scores_are(vocab):
    """Of a vocabulary over two devices only sums of groups are gathered, and the scores of one group."""
    mesh, random = make_mesh(MeshConfig(data=4, tensor=2)), np.random.default_rng(0)
    weights, uniforms = random.random((8, 6, vocab), np.float32) ** 8, random.random((8, 6, 2), np.float32)
    cut = (PartitionSpec("data", None, "tensor"), PartitionSpec("data"))
    placed = jax.device_put((weights, uniforms), tuple(NamedSharding(mesh, spec) for spec in cut))
    program = jax.jit(_sample).lower(*placed).compile()
    np.testing.assert_array_equal(program(*placed), _sample(weights, uniforms))
    moved = re.findall(r"\w+\[2,6,(\d+)\]\S* (?:all-|collective-)\w+", program.as_text())
    assert moved
    assert max(map(int, moved)) <= 128
