"""The device mesh: axes `data` (copies of the model), `fsdp` (parameters cut) and `tensor` (matrices cut)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import jax
from jax.sharding import AxisType, Mesh

from t5x_ext.contracts import UserError

MESH_AXES = ("data", "fsdp", "tensor")
"""Names of the mesh axes, outermost (slowest links) first."""

BATCH_AXES = ("data", "fsdp")
"""Mesh axes over which the rows of a batch are cut."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 on at most one of them means whatever is left.

    Args:
      data: replicas that hold the same parameters and see different rows.
      fsdp: devices among which parameters and optimizer state are cut; each sees different rows.
      tensor: devices among which single matrices are cut; all see the same rows.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = astuple(self)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise UserError(f"{self}: every axis must be at least 1, and at most one of them -1 (what is left)")

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """Devices along (data, fsdp, tensor), whose product is `num_devices`.

        >>> MeshConfig(data=-1, fsdp=2).sizes(8)
        (4, 2, 1)
        """
        sizes = astuple(self)
        fixed = math.prod(size for size in sizes if size != -1)
        if num_devices % fixed or (-1 not in sizes and fixed != num_devices):
            raise UserError(f"{self} does not fit {num_devices} devices: the axes must multiply to {num_devices}")
        data, fsdp, tensor = (num_devices // fixed if size == -1 else size for size in sizes)
        return data, fsdp, tensor


def make_mesh(config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `MESH_AXES` over `devices` (default: all, of every process).

    Raises:
      UserError: if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = (config or MeshConfig()).sizes(len(devices))
    # Auto: shardings are derived from arguments and propagated by the compiler, not carried in types.
    return jax.make_mesh(sizes, MESH_AXES, devices=devices, axis_types=(AxisType.Auto,) * len(MESH_AXES))
