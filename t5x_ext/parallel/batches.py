"""Rows of a batch across processes and devices."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_ext.contracts import Batch, UserError
from t5x_ext.parallel.mesh import BATCH_AXES


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows cut over `data` and `fsdp`; every other axis whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def host_rows(mesh: Mesh, global_rows: int) -> tuple[int, int]:
    """The rows `start <= row < stop` of a global batch that this process must read.

    Processes that share rows (cut along `tensor` only) get the same range.

    Raises:
      UserError: if the rows do not divide among the devices, or this process's devices hold rows that are not adjacent.
    """
    pieces = mesh.shape["data"] * mesh.shape["fsdp"]
    if global_rows % pieces:
        raise UserError(f"a batch of {global_rows} rows cannot be cut over {pieces} devices (data x fsdp)")
    slices = batch_sharding(mesh).addressable_devices_indices_map((global_rows,)).values()
    ranges = sorted({index[0].indices(global_rows)[:2] for index in slices if index is not None})
    if any(stop != start for (_, stop), (start, _) in pairwise(ranges)):
        raise UserError(f"process {jax.process_index()} holds rows {ranges} that are not adjacent: order the devices")
    return ranges[0][0], ranges[-1][1]


def global_batch(mesh: Mesh, host_batch: Batch) -> Batch:
    """Global arrays from this process's rows: `host_rows(mesh, rows)` of each array, rows first.

    Raises:
      UserError: if the rows do not divide among this process's devices.
    """
    sharding = batch_sharding(mesh)
    try:
        return cast(Batch, {name: _global_array(sharding, rows) for name, rows in host_batch.items()})
    except ValueError as error:
        rows = {name: len(cast(np.ndarray, array)) for name, array in host_batch.items()}
        raise UserError(f"host rows {rows} do not fit the mesh {dict(mesh.shape)}: {error}") from error


def _global_array(sharding: NamedSharding, rows: Any) -> jax.Array:
    return jax.make_array_from_process_local_data(sharding, rows)
