"""A lower bound on the time of a compiled step: operations, memory traffic and network, each at full speed.

**Compute** is `flops / peak`, **memory** `bytes_accessed / hbm_bandwidth`. **Network**, from "How To Scale Your Model"
(Austin et al. 2025, jax-ml.github.io/scaling-book, chapters "TPUs" and "Sharded matrices"), for a payload of `V` bytes
(an all-gather's result, a reduce-scatter's operand) in groups of `n` devices, `w` being one link's bandwidth one way:

- a group spans one or more axes of the torus. Along a closed axis a device has two links that carry payload, so the
  axis has `W = 2 w`; along an open one the device at the end has one, so `W = w`. If `k` groups interleave on one axis,
  each gets `W / k`. Axes add up;
- all-gather and reduce-scatter: `V (n - 1) / n / sum(W)`; all-reduce is one after the other, so twice that;
- all-to-all of `b` bytes a device: a quarter of the time to gather the array (`V = n b`): `n b / (4 W)` along an axis
  of `n` devices; over several axes, of which each half of the data takes another one first, that of the slowest;
- permutation of `b` bytes: `b / w`, a step to a neighbour.

Through a switch (GPUs of one node) a device sends to any other at `w`: as above with `W = w`, an all-to-all
`b (n - 1) / n / w`. Between slices or nodes (mesh axis `slices`, of size `s`) a device sends at
`slice_network_bandwidth`, as through a switch, and only its own part of the payload, `V / n`.

Latency is not counted, so this is a bound, and small collectives take longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from t5x_ext.parallel.hardware import Hardware
from t5x_ext.plan.hlo_cost import Collective, HloReport

SLICES = "slices"
"""The mesh axis over slices (TPU) or nodes (GPU), which the slow network joins."""

_PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}


@dataclass(frozen=True)
class Ring:
    """One axis of the network for a group of devices: how many of them it connects, and bytes/s a device (`W`)."""

    size: int
    bandwidth: float


@dataclass(frozen=True)
class CollectiveTime:
    """Seconds a step that a collective keeps each network busy: the one inside a slice and the one between slices."""

    collective: Collective
    seconds: float
    slice_seconds: float


@dataclass(frozen=True)
class Roofline:
    """Seconds a step that each resource is busy, at least.

    `network_seconds` is the network inside a slice or node, `slice_network_seconds` the one between them.
    """

    compute_seconds: float
    hbm_seconds: float
    network_seconds: float
    slice_network_seconds: float
    collectives: tuple[CollectiveTime, ...]

    @property
    def overlapped(self) -> float:
        """Seconds if everything overlaps: `max(compute, hbm, network, slice network)`."""
        return max(self.compute_seconds, self.hbm_seconds, self.network_seconds, self.slice_network_seconds)

    @property
    def serial(self) -> float:
        """Seconds if no communication overlaps: `max(compute, hbm) + network + slice network`."""
        return max(self.compute_seconds, self.hbm_seconds) + self.network_seconds + self.slice_network_seconds


def roofline(
    report: HloReport,
    hardware: Hardware,
    mesh_shape: dict[str, int],
    coordinates: Sequence[Sequence[int]] | None = None,
) -> Roofline:
    """The bound for a program on a mesh of devices.

    Args:
      report: from `analyse` with the same mesh.
      hardware: of every device.
      mesh_shape: axis -> size, outermost first.
      coordinates: of every device on the torus of its slice, in mesh order (`device.coords`), the same in all slices.
        Not needed for devices that are connected by a switch.

    Raises:
      ValueError: if coordinates are missing for a torus, or there are more devices than a switch connects.
    """
    network = _Network(hardware, mesh_shape, coordinates)
    times = tuple(network.time(collective) for collective in report.collectives)
    return Roofline(
        compute_seconds=report.flops / hardware.peak_flops,
        hbm_seconds=report.bytes_accessed / hardware.hbm_bandwidth,
        network_seconds=sum(time.seconds for time in times),
        slice_network_seconds=sum(time.slice_seconds for time in times),
        collectives=times,
    )


def mfu_bound(model_flops: float, seconds: float, hardware: Hardware, num_devices: int) -> float:
    """Model FLOPs utilisation of a step of `seconds`: `model_flops / (num_devices peak seconds)`.

    `model_flops` are those of the model for the whole batch, forward and backward, without recomputation.
    """
    return model_flops / (num_devices * hardware.peak_flops * seconds)


class _Network:
    def __init__(
        self, hardware: Hardware, mesh_shape: dict[str, int], coordinates: Sequence[Sequence[int]] | None
    ) -> None:
        self.hardware = hardware
        self.mesh_shape = mesh_shape
        inside = math.prod(size for name, size in mesh_shape.items() if name != SLICES)
        if not hardware.torus_dimensions:
            if inside > hardware.slice_devices:
                raise ValueError(
                    f"{inside} {hardware.name} devices in a node, at most {hardware.slice_devices} are joined by a "
                    f"switch: put nodes on the mesh axis {SLICES!r}"
                )
            return
        if coordinates is None:
            raise ValueError(f"{hardware.name} devices are joined by a torus: their coordinates are needed")
        self.coordinates = np.asarray(coordinates).reshape(*mesh_shape.values(), -1)
        self.topology = tuple(int(size) for size in self.coordinates.reshape(-1, self.coordinates.shape[-1]).max(0) + 1)
        self.closed = hardware.wraps(self.topology)

    def time(self, collective: Collective) -> CollectiveTime:
        """Seconds of all executions of a collective in a step."""
        # Groups that are not those of mesh axes are treated as groups of all devices.
        axes = collective.axes or tuple(name for name, size in self.mesh_shape.items() if size > 1)
        slices = self.mesh_shape[SLICES] if SLICES in axes else 1
        fast = tuple(name for name in axes if name != SLICES)
        devices = max(1, collective.group_size // slices)
        own_part = collective.bytes / devices if collective.kind in _PASSES else collective.bytes
        return CollectiveTime(
            collective,
            self._inside(collective.kind, collective.bytes, devices, fast) if fast else 0.0,
            _through_switch(collective.kind, own_part, slices, self.hardware.slice_network_bandwidth),
        )

    def _inside(self, kind: str, payload: float, devices: int, axes: tuple[str, ...]) -> float:
        link = self.hardware.link_bandwidth
        if not self.hardware.torus_dimensions:
            return _through_switch(kind, payload, devices, link)
        rings = self.rings(axes)
        if not rings:  # the devices of a group are cores of one chip
            return 0.0
        if kind in _PASSES:
            return _PASSES[kind] * payload * (devices - 1) / devices / sum(ring.bandwidth for ring in rings)
        if kind == "all-to-all":
            return max(ring.size * payload / (4 * ring.bandwidth) for ring in rings)
        return payload / link

    def rings(self, axes: tuple[str, ...]) -> tuple[Ring, ...]:
        """The axes of the torus that a group over mesh axes `axes` spans."""
        index = tuple(slice(None) if name in axes else 0 for name in self.mesh_shape)
        coordinates = self.coordinates[index].reshape(-1, self.coordinates.shape[-1])
        rings = []
        for dim, (size, closed) in enumerate(zip(self.topology, self.closed)):
            used = np.unique(coordinates[:, dim])
            if len(used) > 1:
                interleaved = math.ceil((used[-1] - used[0]) / (len(used) - 1))
                directions = 2 if closed and len(used) * interleaved == size else 1
                rings.append(Ring(len(used), directions * self.hardware.link_bandwidth / interleaved))
        return tuple(rings)


def _through_switch(kind: str, payload: float, devices: int, bandwidth: float) -> float:
    if devices == 1:
        return 0.0
    if kind == "collective-permute":
        return payload / bandwidth
    return _PASSES.get(kind, 1) * payload * (devices - 1) / devices / bandwidth
