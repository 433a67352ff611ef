"""Peak speed, memory and links of accelerators, each figure with its source; threads of a CPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

_GIB = 2**30
_CLOUD = "peak, HBM bandwidth: docs.cloud.google.com/tpu/docs"
_BOOK = (
    "links, wrap-around, data-center network: jax-ml.github.io/scaling-book/tpus (2025), which gives 90% of the "
    "nominal rate of a link"
)
_COMPILER = "HBM: what libtpu 0.0.42.1 says is available when a program needs more"
_NETWORK = "one network adapter a GPU, NVIDIA"


@dataclass(frozen=True)
class Hardware:
    """One kind of accelerator, as its maker or its compiler describes it.

    TPUs of a slice form a torus, with two links (one a direction) along each of its dimensions. GPUs of a node are
    connected by a switch, through which each sends at `link_bandwidth` to any other.

    Attributes:
      name: the key of `HARDWARE`.
      peak_flops: dense bfloat16 FLOP/s of a device.
      hbm_bytes: bytes of memory of a device that a program may use.
      hbm_bandwidth: bytes/s between that memory and the cores.
      link_bandwidth: bytes/s one way over one link.
      torus_dimensions: of the network inside a slice; 0 for a switch.
      wrap_multiple: an axis of the torus is a closed ring if its size is a multiple of this; 0 for a switch.
      slice_devices: the most devices that the fast network joins.
      slice_network_bandwidth: bytes/s a device can send to other slices or nodes.
      source: where the figures come from.
    """

    name: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    torus_dimensions: int
    wrap_multiple: int
    slice_devices: int
    slice_network_bandwidth: float
    source: str

    def wraps(self, topology: Sequence[int]) -> tuple[bool, ...]:
        """Whether each axis of a slice of this shape is a closed ring, which has twice the bandwidth.

        A 2D pod closes axes of full length. A 3D one closes axes by optical switches, which only whole 4x4x4 cubes
        have.

        >>> HARDWARE["v5e"].wraps((8, 16)), HARDWARE["v4"].wraps((4, 4, 8)), HARDWARE["v4"].wraps((2, 2, 4))
        ((False, True), (True, True, True), (False, False, False))
        """
        if not self.torus_dimensions:
            return (False,) * len(topology)
        closed = tuple(size % self.wrap_multiple == 0 for size in topology)
        return closed if self.torus_dimensions == 2 else (all(closed),) * len(topology)


_ALL = (
    Hardware(
        name="v4",
        peak_flops=275e12,
        hbm_bytes=int(30.75 * _GIB),
        hbm_bandwidth=1200e9,
        link_bandwidth=45e9,
        torus_dimensions=3,
        wrap_multiple=4,
        slice_devices=4096,
        slice_network_bandwidth=6.25e9,
        source=f"{_CLOUD}/v4 (32 GiB a chip); {_BOOK}; {_COMPILER}",
    ),
    Hardware(
        name="v5e",
        peak_flops=197e12,
        hbm_bytes=int(15.75 * _GIB),
        hbm_bandwidth=819e9,
        link_bandwidth=45e9,
        torus_dimensions=2,
        wrap_multiple=16,
        slice_devices=256,
        slice_network_bandwidth=3.125e9,
        source=f"{_CLOUD}/v5e (16 GB, 4 links with 400 GB/s both ways in all, 6.4 Tbit/s a pod); {_BOOK}; {_COMPILER}",
    ),
    Hardware(
        name="v5p",
        peak_flops=459e12,
        hbm_bytes=int(95.74 * _GIB),
        hbm_bandwidth=2765e9,
        link_bandwidth=90e9,
        torus_dimensions=3,
        wrap_multiple=4,
        slice_devices=6144,
        slice_network_bandwidth=6.25e9,
        source=f"{_CLOUD}/v5p (95 GiB, 6 links with 1,200 GB/s both ways in all, 50 Gbit/s); {_BOOK}; {_COMPILER}",
    ),
    Hardware(
        name="v6e",
        peak_flops=918e12,
        hbm_bytes=int(31.25 * _GIB),
        hbm_bandwidth=1638e9,
        link_bandwidth=90e9,
        torus_dimensions=2,
        wrap_multiple=16,
        slice_devices=256,
        slice_network_bandwidth=12.5e9,
        source=f"{_CLOUD}/v6e (32 GB, 4 links with 800 GB/s both ways in all, 25.6 Tbit/s a pod); {_BOOK}; {_COMPILER}",
    ),
    Hardware(
        name="a100",
        peak_flops=312e12,
        hbm_bytes=80 * 10**9,
        hbm_bandwidth=2039e9,
        link_bandwidth=300e9,
        torus_dimensions=0,
        wrap_multiple=0,
        slice_devices=8,
        slice_network_bandwidth=25e9,
        source=f"NVIDIA A100 80GB SXM data sheet (NVLink 600 GB/s both ways); {_NETWORK} DGX A100: 200 Gbit/s",
    ),
    Hardware(
        name="h100",
        peak_flops=989e12,
        hbm_bytes=80 * 10**9,
        hbm_bandwidth=3350e9,
        link_bandwidth=450e9,
        torus_dimensions=0,
        wrap_multiple=0,
        slice_devices=8,
        slice_network_bandwidth=50e9,
        source=f"NVIDIA H100 SXM data sheet (dense; NVLink 900 GB/s both ways); {_NETWORK} DGX H100: 400 Gbit/s",
    ),
    Hardware(
        name="h200",
        peak_flops=989e12,
        hbm_bytes=141 * 10**9,
        hbm_bandwidth=4800e9,
        link_bandwidth=450e9,
        torus_dimensions=0,
        wrap_multiple=0,
        slice_devices=8,
        slice_network_bandwidth=50e9,
        source=f"NVIDIA H200 SXM data sheet (dense; NVLink 900 GB/s both ways); {_NETWORK} DGX H200: 400 Gbit/s",
    ),
)

HARDWARE = {hardware.name: hardware for hardware in _ALL}
"""Accelerators that planning and MFU support, by short name."""

_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def hardware_of(device_kind: str) -> Hardware | None:
    """The accelerator that `jax.Device.device_kind` names; None if it is unknown, as for CPUs.

    Cards of one name differ (an H100 in a PCIe slot is slower), so only kinds known in full are matched.

    >>> hardware_of("TPU v5 lite").name, hardware_of("cpu")
    ('v5e', None)
    """
    name = _KINDS.get(device_kind)
    return None if name is None else HARDWARE[name]


def cpu_threads() -> int:
    """Threads of XLA's CPU client: NPROC if it is set, else the number of cores that this process may use."""
    if os.environ.get("NPROC", "").isdecimal():
        return int(os.environ["NPROC"])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
