"""Devices that are not present: TPU slices described by their compiler, GPU nodes as virtual CPU devices."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from t5x_ext.contracts import UserError
from t5x_ext.parallel import HARDWARE, Hardware, hardware_of

EXAMPLES = "v5e:8x8, v5p:4x4x4, v6e:16x16, h100:8"

_LIBTPU_SETTINGS = {
    # There is no metadata server and no device to open, so several processes may compile at once.
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Without these libtpu warns on standard error; a topology's name overrides them.
    "TPU_ACCELERATOR_TYPE": "v5litepod-64",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
_NAME = re.compile(r"(?P<generation>[a-z]\w*):(?P<shape>\d+(x\d+)*)")
_GPUS = {"gpu": "h100", **{name: name for name, hardware in HARDWARE.items() if not hardware.torus_dimensions}}
_AVAILABLE = re.compile(r"exceeds available HBM \(([\d.]+)([KMGT])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Target:
    """Devices to plan for.

    Attributes:
      name: the topology as it was asked for.
      devices: for a mesh; programs can be compiled for them, but not run.
      device_kind: as JAX names it on the machine itself.
      hardware: its figures; None for a kind that is not in `parallel.HARDWARE`.
      shape: chips along each axis of a slice; for GPUs the number in a node.
      num_slices: slices, or nodes.
      hbm_bytes: memory of one device that a program may use.
      is_compiled_for: True if the devices' own compiler is used, False if CPU devices stand in for them.
    """

    name: str
    devices: Sequence[jax.Device]
    device_kind: str
    hardware: Hardware | None
    shape: tuple[int, ...]
    num_slices: int
    hbm_bytes: int
    is_compiled_for: bool


def find_target(topology: str, num_slices: int = 1) -> Target:
    """The devices of a topology.

    Args:
      topology: `v5e:8x8` and the like: a TPU generation and the chips along each axis of a slice; or `h100:8`, the GPUs
        of a node (`gpu:8` is the same).
      num_slices: slices or nodes, joined by the data-center network.

    Raises:
      UserError: if the topology does not exist, libtpu is not installed, or JAX has started with too few CPU devices to
        stand in for the GPUs.
    """
    match = _NAME.fullmatch(topology)
    if match is None:
        raise UserError(f"topology {topology!r}: give a kind of device and how many, as in {EXAMPLES}")
    shape = tuple(map(int, match["shape"].split("x")))
    if match["generation"] in _GPUS:
        return _gpu_target(topology, _GPUS[match["generation"]], shape, num_slices)
    devices = tpu_devices(topology, num_slices)
    kind = devices[0].device_kind
    hardware = hardware_of(kind)
    if hardware and len(devices) > num_slices * hardware.slice_devices:
        most = hardware.slice_devices
        raise UserError(f"topology {topology!r}: a slice of {hardware.name} has at most {most} devices; see num_slices")
    hbm_bytes = hardware.hbm_bytes if hardware else available_hbm(devices[0])
    return Target(topology, devices, kind, hardware, shape, num_slices, hbm_bytes, is_compiled_for=True)


def tpu_devices(topology: str, num_slices: int = 1) -> Sequence[jax.Device]:
    """The devices of TPU slices, as libtpu describes them: one a chip if the chip can be used as one device.

    After this call the process can no longer use a TPU of its own machine, because libtpu is told that there is none.

    Args:
      topology: see `find_target`.
      num_slices: see there.

    Raises:
      UserError: if libtpu is not installed or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UserError(f"topology {topology!r} needs the TPU compiler: pip install 't5x_ext[tpu]' (Linux on x86-64)")
    for name, value in _LIBTPU_SETTINGS.items():
        os.environ.setdefault(name, value)
    reasons = []
    for options in _layouts(topology):
        try:
            found = topologies.get_topology_desc(
                topology_name=topology, platform="tpu", num_slices=num_slices, **options
            ).devices
        except jax.errors.JaxRuntimeError as error:
            reasons.append(str(error))
            continue
        return found
    raise UserError(f"topology {topology!r}: {_reason(reasons)}; examples: {EXAMPLES}")


def _layouts(topology: str) -> list[dict[str, Any]]:
    """Descriptions of a topology to try; the first that libtpu accepts is the right one.

    A v4 chip is two devices unless requested as one. Shapes that hosts with four chips cannot form (1x1) consist of
    hosts with one.
    """
    whole_chips: dict[str, Any] = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    return [whole_chips, {**whole_chips, "chips_per_host_bounds": [1, 1, 1]}]


def _reason(reasons: Sequence[str]) -> str:
    if any("Invalid TPU external name" in reason for reason in reasons):
        return "libtpu knows no such generation"
    return f"libtpu refuses it ({reasons[0].splitlines()[0]})"


@functools.cache
def available_hbm(device: jax.Device) -> int:
    """Bytes of memory of a device that a program may use, from the compiler's message for one that needs far more."""
    sharding = SingleDeviceSharding(device)
    huge = jax.ShapeDtypeStruct((2**19, 2**19), jnp.float32, sharding=sharding)
    try:
        jax.jit(lambda x: x @ x + jnp.cumsum(x, axis=0), out_shardings=sharding).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        found = _AVAILABLE.search(str(error))
        if found:
            return int(float(found[1]) * _UNITS[found[2]])
        raise
    raise RuntimeError(f"{device.device_kind} took a program of 3 TiB")


def _gpu_target(topology: str, name: str, shape: tuple[int, ...], num_nodes: int) -> Target:
    hardware = HARDWARE[name]
    count = math.prod(shape) * num_nodes
    if len(shape) > 1 or shape[0] > hardware.slice_devices:
        most = hardware.slice_devices
        raise UserError(
            f"topology {topology!r}: a node has up to {most} GPUs; write {name}:{most} and the nodes as num_slices"
        )
    return Target(topology, _virtual_devices(count), name, hardware, shape, num_nodes, hardware.hbm_bytes, False)


def _virtual_devices(count: int) -> Sequence[jax.Device]:
    # JAX refuses if it has started; it may have enough devices.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"{count} virtual CPU devices are needed and JAX has started with {len(devices)}: start with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:count]
