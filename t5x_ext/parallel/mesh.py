"""The device mesh: axes `slices` and `data` (replicas), `fsdp` (sharded parameters), `tensor` (sharded matrices)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from t5x_ext.contracts import UserError

MESH_AXES = ("slices", "data", "fsdp", "tensor")
"""Names of the mesh axes, outermost (slowest links) first."""

BATCH_AXES = ("slices", "data", "fsdp")
"""Mesh axes over which the rows of a batch are sharded."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 on at most one of them means all remaining devices.

    Attributes:
      data: replicas with the same parameters and different rows.
      fsdp: devices over which parameters and optimizer state are sharded; each has different rows.
      tensor: devices over which single matrices are sharded; all have the same rows.
      slices: TPU slices or GPU nodes joined by a slow network. They are replicas, and exchange only gradients, once an
        update.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 1

    def __post_init__(self) -> None:
        sizes = astuple(self)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise UserError(
                f"{self}: every axis must be at least 1, and at most one of them -1 (all remaining devices)"
            )

    def sizes(self, num_devices: int) -> tuple[int, int, int, int]:
        """Devices along `MESH_AXES`, whose product is `num_devices`.

        >>> MeshConfig(data=-1, fsdp=2).sizes(8)
        (1, 4, 2, 1)
        """
        sizes = (self.slices, self.data, self.fsdp, self.tensor)
        fixed = math.prod(size for size in sizes if size != -1)
        if num_devices % fixed or (-1 not in sizes and fixed != num_devices):
            raise UserError(f"{self} does not fit {num_devices} devices: the axes must multiply to {num_devices}")
        slices, data, fsdp, tensor = (num_devices // fixed if size == -1 else size for size in sizes)
        return slices, data, fsdp, tensor


def make_mesh(config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `MESH_AXES` over `devices` (default: all, of every process).

    Neighbours on the inner axes are neighbours on the fast network. Every index on `slices` is one TPU slice, or one
    process, if the devices belong to as many of those.

    Raises:
      UserError: if the axes do not multiply to the number of devices, or there are more TPU slices than `slices`.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices, *inner = (config or MeshConfig()).sizes(len(devices))
    if _count(devices, "slice_index") == slices > 1:
        arranged = _hybrid(slices, inner, devices, by_process=False)
    elif _count(devices, "process_index") == slices > 1:
        arranged = _hybrid(slices, inner, devices, by_process=True)
    elif devices[0].platform == "tpu" and _count(devices, "slice_index") > 1:
        count = _count(devices, "slice_index")
        raise UserError(f"the devices are in {count} slices and MeshConfig.slices is {slices}: set it to {count}")
    else:
        # If the axes do not match those of the torus, splitting one of the torus' axes is better than an error.
        arranged = mesh_utils.create_device_mesh((slices, *inner), devices, allow_split_physical_axes=True)
    # Auto: shardings are derived from arguments and propagated by the compiler, not carried in types.
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def batch_devices(mesh: Mesh) -> int:
    """Number of shards of the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def _count(devices: Sequence[jax.Device], attribute: str) -> int:
    return len({getattr(device, attribute, None) for device in devices})


def _hybrid(slices: int, inner: Sequence[int], devices: Sequence[jax.Device], *, by_process: bool) -> np.ndarray:
    return mesh_utils.create_hybrid_device_mesh(
        (1, *inner),
        (slices, *(1 for _ in inner)),
        devices,
        process_is_granule=by_process,
        allow_split_physical_axes=True,
    )
