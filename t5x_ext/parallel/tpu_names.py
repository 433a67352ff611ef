"""The names of a TPU slice: `v5e:8x8` for the compiler, `v5litepod-64` for gcloud, `tpu-v5-lite-podslice` for GKE."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from t5x_ext.contracts import UserError

_CHIPS_PER_HOST = 4
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_DEFAULT_SHAPES = (
    *_SMALL,
    *("4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x24"),
)
"""The shape that gcloud takes for a number of cores; each number occurs once."""


class _Generation(NamedTuple):
    """Names and limits of one generation of chips."""

    cores_in_name: int  # factor of chips in gcloud's name: cores a chip for some generations, 1 for others
    accelerator_type: str  # gcloud's, before the number
    config_type: str  # gcloud's name if a shape is given instead of a number
    gke_accelerator: str
    runtime_version: str
    max_chips: int  # of a slice


# docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,runtimes} and /kubernetes-engine/docs/concepts/plan-tpus, read 2026-11.
_GENERATIONS = {
    "v4": _Generation(2, "v4", "v4", "tpu-v4-podslice", "tpu-ubuntu2204-base", 4096),
    "v5e": _Generation(1, "v5litepod", "v5litepod", "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite", 256),
    "v5p": _Generation(2, "v5p", "v5p", "tpu-v5p-slice", "v2-alpha-tpuv5", 6144),
    "v6e": _Generation(1, "v6e", "v6e", "tpu-v6e-slice", "v2-alpha-tpuv6e", 256),
}


class TpuSlice(NamedTuple):
    """A slice that Google Cloud offers; made by `tpu_slice`.

    >>> v5e = tpu_slice("v5e:8x8")
    >>> v5e.chips, v5e.hosts, v5e.chips_per_host, v5e.accelerator_type, v5e.gke_accelerator
    (64, 16, 4, 'v5litepod-64', 'tpu-v5-lite-podslice')
    """

    generation: str  # v4, v5e, v5p or v6e
    shape: str  # chips along each axis, as 8x8

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(map(int, self.shape.split("x")))

    @property
    def chips_per_host(self) -> int:
        """Chips of one machine, which runs one process."""
        return min(_CHIPS_PER_HOST, self.chips)

    @property
    def hosts(self) -> int:
        """Number of machines."""
        return self.chips // self.chips_per_host

    @property
    def accelerator_type(self) -> str | None:
        """Gcloud's name, which counts TensorCores for v4 and v5p; None if that name means another shape.

        >>> tpu_slice("v4:4x4x4").accelerator_type, tpu_slice("v6e:4x4").accelerator_type
        ('v4-128', 'v6e-16')
        """
        generation = _GENERATIONS[self.generation]
        if self.shape not in _FLAT + _DEFAULT_SHAPES:
            return None
        return f"{generation.accelerator_type}-{self.chips * generation.cores_in_name}"

    @property
    def gcloud_flags(self) -> tuple[str, ...]:
        """Flags of `gcloud compute tpus` for this slice.

        >>> tpu_slice("v5p:4x4x4").gcloud_flags, tpu_slice("v5p:4x4x12").gcloud_flags
        (('--accelerator-type=v5p-128',), ('--type=v5p', '--topology=4x4x12'))
        """
        if self.accelerator_type is not None:
            return (f"--accelerator-type={self.accelerator_type}",)
        return (f"--type={_GENERATIONS[self.generation].config_type}", f"--topology={self.shape}")

    @property
    def gke_accelerator(self) -> str:
        """Value of the node label `cloud.google.com/gke-tpu-accelerator`; `shape` is that of `gke-tpu-topology`."""
        return _GENERATIONS[self.generation].gke_accelerator

    @property
    def runtime_version(self) -> str:
        """The system image of Cloud TPU VMs of this generation."""
        return _GENERATIONS[self.generation].runtime_version


def tpu_slice(topology: str) -> TpuSlice:
    """The slice for a topology such as `v5e:8x8`, `v4:4x4x4`, `v5p:4x4x8` or `v6e:16x16`.

    Raises:
      UserError: if there is no such slice.
    """
    generation, _, shape = topology.partition(":")
    if generation not in _GENERATIONS:
        raise UserError(f"topology {topology!r}: give a generation and a shape, as v5e:8x8; known: {_known()}")
    flat = generation in ("v5e", "v6e")
    if flat and shape not in _FLAT:
        raise UserError(f"topology {topology!r}: {generation} has the shapes {', '.join(_FLAT)}")
    if not flat and shape not in _SMALL and not _is_cubes(shape, _GENERATIONS[generation].max_chips):
        raise UserError(
            f"topology {topology!r}: {generation} has the shapes {', '.join(_SMALL)} and AxBxC with multiples of 4, "
            f"A <= B <= C, up to {_GENERATIONS[generation].max_chips:,} chips"
        )
    return TpuSlice(generation, shape)


def _is_cubes(shape: str, max_chips: int) -> bool:
    """Whether a shape consists of 4x4x4 cubes, with ascending axes."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", shape):
        return False
    sizes = [int(size) for size in shape.split("x")]
    return sizes == sorted(sizes) and all(size % 4 == 0 for size in sizes) and math.prod(sizes) <= max_chips


def _known() -> str:
    return ", ".join(_GENERATIONS)
