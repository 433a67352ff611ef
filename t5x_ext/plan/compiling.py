"""Compiles a lowered program to HLO text and memory figures, for devices with a compiler and for those without."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from t5x_ext.plan.hlo import Computation, Instruction, parse_module
from t5x_ext.plan.hlo_cost import HloReport, analyse

_BYTES = r"([\d.]+)([KMGT]?)"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# The first is the message of libtpu 0.0.42, whose "temporaries" include arguments and results. Neither has more digits.
_NEEDED = (
    re.compile(rf"total memory required for HLO temporaries \({_BYTES}\) exceeds"),
    re.compile(rf"Used {_BYTES} of [\d.]+[KMGT]? hbm"),
)
_ALLOCATION = re.compile(rf"^\s*\d+\. Size: {_BYTES}\s*$\n((?:(?!^\s*\d+\. Size).*\n?)*?)^\s*=+", re.MULTILINE)
_DETAIL = re.compile(r"^\s*(Operator|Shape|Allocation type): (.*)$", re.MULTILINE)
_SHOWN = 5


class Compiled(NamedTuple):
    """The result of a compiler: cost and bytes on one device."""

    hlo: HloReport
    arguments: int  # in their tiled layouts
    others: int  # temporaries, results that do not reuse arguments' memory, and the program itself
    seconds: float


class Refused(NamedTuple):
    """The message of a compiler for which there is too little memory."""

    total: int | None  # bytes on one device; None if the message does not tell
    largest: tuple[tuple[int, str], ...]  # (bytes, what it is)
    seconds: float


@contextmanager
def _without_cache() -> Iterator[None]:
    """Disables JAX's compilation cache: cached programs have no compile time and no output of the partitioner."""
    used = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    # JAX reads the setting once a process.
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", used)
        compilation_cache.reset_cache()


@_without_cache()
def compile_for(lowered: jax.stages.Lowered, mesh_shape: dict[str, int], unknown_trips: int = 1) -> Compiled | Refused:
    """Compiles for the devices that the program was lowered for.

    Args:
      lowered: with the shardings of a mesh.
      mesh_shape: axis -> size, outermost first.
      unknown_trips: iterations of loops that end by their data.
    """
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return read_refusal(str(error), time.perf_counter() - start)
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    others = results + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    hlo = analyse(compiled.as_text() or "", mesh_shape, unknown_trips)
    return Compiled(hlo, memory.argument_size_in_bytes, others, seconds)


def read_refusal(message: str, seconds: float = 0.0) -> Refused:
    """The figures in a compiler's message about too little memory."""
    needed = next(filter(None, (pattern.search(message) for pattern in _NEEDED)), None)
    allocations = [(_bytes(found[1], found[2]), _described(found[3])) for found in _ALLOCATION.finditer(message)]
    largest = tuple(sorted(allocations, reverse=True)[:_SHOWN])
    return Refused(_bytes(*needed.groups()) if needed else None, largest, seconds)


@_without_cache()
def partition(lowered: jax.stages.Lowered, mesh_shape: dict[str, int], unknown_trips: int = 1) -> Compiled:
    """The program of one device after the partitioner, before any device's compiler changes it.

    CPU devices stand in for others, so what the CPU compiler does afterwards (bfloat16 becomes float32, other fusions)
    is not representative. An all-reduce of which a device keeps only its slice counts as a reduce-scatter, which GPU
    compilers make of it. Memory and its traffic are unknown here and are 0.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options: Any = {
            "xla_dump_to": folder,
            "xla_dump_hlo_pass_re": "spmd-partitioning",
            "xla_dump_hlo_as_text": True,
        }
        compiled = lowered.compile(options)
        dumps = sorted(Path(folder).glob("*.after_spmd-partitioning.*.txt"))
        # On one device there is nothing to partition.
        optimized = compiled.as_text() or ""
        text = dumps[-1].read_text() if dumps else optimized
    seconds = time.perf_counter() - start
    # Operations are those of the compiled program, because the partitioner's may have duplicates.
    flops = analyse(optimized, mesh_shape, unknown_trips).flops
    report = analyse(text, mesh_shape, unknown_trips)
    scattered = _scattered(text)
    ops = tuple(replace(op, kind="reduce-scatter") if op.name in scattered else op for op in report.collective_ops)
    return Compiled(replace(report, flops=flops, bytes_accessed=0.0, collective_ops=ops), 0, 0, seconds)


def _scattered(text: str) -> set[str]:
    """Names of the all-reduces whose results are only sliced."""
    return {
        instruction.name
        for computation in parse_module(text).computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "all-reduce" and _is_sliced(computation, instruction)
    }


def _is_sliced(computation: Computation, instruction: Instruction) -> bool:
    users = [user for user, _ in computation.users[instruction.name]]
    while len(users) == 1 and users[0].opcode in ("bitcast", "reshape", "copy", "convert", "transpose"):
        users = [user for user, _ in computation.users[users[0].name]]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _described(text: str) -> str:
    details = dict(_DETAIL.findall(text))
    return " ".join(details[name].strip() for name in ("Shape", "Operator") if name in details) or "an array"


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
