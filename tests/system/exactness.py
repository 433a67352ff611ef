"""Trains the same run on many meshes and stores what came out; `test_multi_process.py` starts it, on any processes.

python tests/system/exactness.py FOLDER RESULT MESH[,MESH...] [HOST:PORT PROCESSES PROCESS]
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_ext.contracts import PyTree
from t5x_ext.corpora import ParallelText
from t5x_ext.data import BatchConfig, DataConfig, PreparedData, VocabularyConfig, batch_iterator, prepare
from t5x_ext.models import LayerSharing, TransformerConfig
from t5x_ext.optim import adam
from t5x_ext.parallel import (
    DistributedConfig,
    MeshConfig,
    data_parallel,
    fsdp,
    fsdp_tensor,
    global_batch,
    host_rows,
    initialize_distributed,
    is_primary,
    make_mesh,
    primary_first,
)
from t5x_ext.tasks import Translation
from t5x_ext.train import Run
from t5x_ext.train.program import make_program

STEPS = 20
MESHES = {
    "data_parallel": (MeshConfig(), data_parallel()),
    "fsdp": (MeshConfig(data=1, fsdp=-1), fsdp()),
    "fsdp_tensor": (MeshConfig(data=1, fsdp=-1, tensor=2), fsdp_tensor()),
    "multislice": (MeshConfig(slices=2, data=1, fsdp=-1), fsdp()),
    "tensor": (MeshConfig(tensor=4), fsdp_tensor()),
    "one_device": (MeshConfig(), data_parallel()),
}
"""The shipped presets, and a mesh along which the processes of the test read the same rows."""


def tiny_run(folder: Path, name: str) -> Run:
    """Shared layers, packed rows, dropout, two microbatches, and an average of the weights."""
    mesh, rules = MESHES[name]
    model = TransformerConfig(
        embed_dim=16, mlp_dim=32, num_heads=4, encoder_layers=2, decoder_layers=1, scan_layers=True,
        encoder_sharing=LayerSharing("universal"), norm="rmsnorm", use_bias=False, dropout=0.1,
    )  # fmt: skip
    data = DataConfig(
        train=(ParallelText(str(folder / "train.en"), str(folder / "train.es"), "en", "es"),),
        vocabulary=VocabularyConfig(size=300),
        batch=BatchConfig(rows=16, source_length=32, target_length=32),
    )
    # Where a gradient is nothing but rounding, Adam must not divide by so little.
    optimizer = adam(0.01, eps=1e-4)
    return Run(
        task=Translation(data, model), optimizer=optimizer, steps=STEPS, num_microbatches=2, ema_decay=0.9,
        mesh=mesh, axis_rules=rules,
    )  # fmt: skip


def train(run: Run, data: PreparedData, devices: list[jax.Device]) -> dict[str, np.ndarray]:
    """Losses by step, and every array of the last state."""
    mesh = make_mesh(run.mesh, devices)
    program = make_program(run, {"vocab_size": data.vocabulary.size}, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.template)
    create = lambda key: program.create(program.definition.init(key))
    state = jax.jit(create, out_shardings=shardings)(jax.random.key(run.seed))
    step, losses = program.compile(), []
    rows = host_rows(mesh, run.task.data.batch.rows)
    for index, host_batch in enumerate(islice(batch_iterator(data.batches, 0, *rows), STEPS)):
        batch = global_batch(mesh, host_batch)
        if index < 2:
            jax.tree.map(np.testing.assert_array_equal, whole(batch, mesh), dict(data.batches[index]))
        state, metrics = step(state, {}, batch)
        loss = jax.device_get(metrics.loss)
        losses.append(float(loss.sum) / float(loss.weight))
    leaves = jax.tree_util.tree_leaves_with_path(whole(state, mesh))
    return {"losses": np.array(losses)} | {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def check_rows(data: PreparedData) -> None:
    """Batches are those of one host where two processes see the same rows, and where each sees rows here and there."""
    strewn = sorted(jax.devices(), key=lambda device: (device.id % 2, device.process_index))
    for mesh, ranges in (
        (make_mesh(MeshConfig(tensor=4)), ((0, 16), (0, 16))),
        (make_mesh(MeshConfig(data=2, fsdp=2), strewn), ((0, 12), (4, 16))),
    ):
        rows = host_rows(mesh, 16)
        assert rows == ranges[jax.process_index()]
        batch = global_batch(mesh, data.batches.read(0, *rows))
        jax.tree.map(np.testing.assert_array_equal, whole(batch, mesh), dict(data.batches[0]))


def whole(tree: PyTree, mesh: Mesh) -> PyTree:
    """All arrays on the host, from wherever their parts lie."""
    return jax.device_get(jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree))


def main(folder: str, result: str, names: str, *processes: str) -> None:
    """Trains on each mesh; process 0 stores the arrays as `RESULT/MESH.npz`."""
    if processes:
        address, count, number = processes
        initialize_distributed(DistributedConfig("explicit", address, int(count), int(number), 60))
    jax.config.update("jax_disable_most_optimizations", True)
    for name in names.split(","):
        run = tiny_run(Path(folder), name)
        with primary_first("data"):
            data = prepare(run.task.data, folder, str(Path(folder) / "cache"), run.seed)
        arrays = train(run, data, jax.devices()[:1] if name == "one_device" else jax.devices())
        if processes:
            check_rows(data)
        if is_primary():
            np.savez(Path(result) / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
