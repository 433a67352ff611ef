"""Rows of a batch across processes and devices."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_ext.contracts import Batch, UserError
from t5x_ext.parallel.mesh import BATCH_AXES, batch_devices


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows sharded over `BATCH_AXES`; other axes are not sharded."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def host_rows(mesh: Mesh, global_rows: int) -> tuple[int, int]:
    """The rows `start <= row < stop` of a global batch that this process must read: from its first to its last.

    Processes that share rows (on the axis `tensor`) get the same range. If a host's devices are a block of a torus,
    the range includes rows of other hosts: with `fsdp` alone at most 10 of 64 rows for 4 of its own on a v5e:8x8, and
    21 on a v5p:4x4x4.

    Raises:
      UserError: if the rows do not divide among the devices.
    """
    shards = batch_devices(mesh)
    if global_rows % shards:
        raise UserError(
            f"a batch of {global_rows} rows cannot be split over {shards} devices ({' x '.join(BATCH_AXES)})"
        )
    start, stop = _host_shards(mesh)
    return start * global_rows // shards, stop * global_rows // shards


def global_batch(mesh: Mesh, host_batch: Mapping[str, np.ndarray], sharded: Container[str] | None = None) -> Batch:
    """Global arrays from this process's rows.

    Args:
      mesh: the devices.
      host_batch: of each sharded array the rows `host_rows(mesh, rows)`, rows first; the others in full.
      sharded: names of the arrays whose rows are sharded; None: all. The others are replicated.

    Raises:
      UserError: if the rows do not divide among this process's devices.
    """
    return {
        name: _global_array(mesh, np.asarray(array))
        if sharded is None or name in sharded
        else _replicated(mesh, np.asarray(array))
        for name, array in host_batch.items()
    }


def _replicated(mesh: Mesh, array: np.ndarray) -> jax.Array:
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _global_array(mesh: Mesh, rows: np.ndarray) -> jax.Array:
    start, stop = _host_shards(mesh)
    per_shard, rest = divmod(len(rows), stop - start)
    if rest:
        raise UserError(
            f"{len(rows)} host rows do not fit the mesh {dict(mesh.shape)}: want a multiple of {stop - start}"
        )
    offset = start * per_shard

    def shard(index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(batch_devices(mesh) * per_shard)
        return rows[first - offset : last - offset]

    shape = (batch_devices(mesh) * per_shard, *rows.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(mesh), shard)


def _host_shards(mesh: Mesh) -> tuple[int, int]:
    """The first shard of a batch on this process's devices, and the one after the last."""
    shards = batch_devices(mesh)
    indices: Any = batch_sharding(mesh).addressable_devices_indices_map((shards,)).values()
    starts = [index[0].indices(shards)[0] for index in indices]
    return min(starts), max(starts) + 1
