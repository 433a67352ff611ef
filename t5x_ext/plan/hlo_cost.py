"""What a compiled program costs one device, from its HLO text: operations, memory traffic, collectives, arrays.

A compiler's `cost_analysis()` counts the body of a loop once; here it is counted once an iteration. A conditional
counts as its branch with the most operations (of equal ones, with the most traffic).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from t5x_ext.plan.hlo import Array, Computation, Instruction, Module, leaves, parse_module
from t5x_ext.plan.hlo_bytes import RENAMES, RENAMING_CALLS, carries_on, instruction_bytes
from t5x_ext.plan.hlo_flops import instruction_flops
from t5x_ext.plan.hlo_groups import mesh_axes, parse_groups

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
"""Kinds of collective."""

_MESH_GROUPS = re.compile(r"replica_groups=(mesh\[.*?\{[^}]*\})")
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_MEGASCALE_KINDS = {
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_REDUCE": "all-reduce",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
_OPCODE_KINDS = {
    **{kind: kind for kind in KINDS},
    "ragged-all-to-all": "all-to-all",
}


@dataclass(frozen=True)
class CollectiveOp:
    """One collective instruction.

    Attributes:
      kind: one of `KINDS`.
      axes: mesh axes along which the devices of a group differ, outermost first; empty if the groups are not those of
        mesh axes.
      group_size: devices in a group; less than the product of `axes` if a group has only some of them.
      dtype: of the (first) array.
      dims: of an all-gather's result, or of another kind's operand.
      bytes: payload of one execution on one device: an all-gather's result, a reduce-scatter's operand, the array for
        the other kinds; the sum over the arrays of a variadic instruction.
      times: executions a step.
      name: of the instruction.
      op_name: its origin in the traced program.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    dtype: str
    dims: tuple[int, ...]
    bytes: int
    times: float
    name: str
    op_name: str


@dataclass(frozen=True)
class Collective:
    """All collectives of a step of one kind, axes, groups and dtype.

    Attributes:
      kind: see `CollectiveOp`, like the next three.
      axes: mesh axes of a group.
      group_size: devices in a group.
      dtype: of the (first) array.
      count: executions a step.
      bytes: the sum of their payloads.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    dtype: str
    count: float
    bytes: float


@dataclass(frozen=True)
class Buffer:
    """An array that an instruction writes to HBM.

    Attributes:
      dtype: element type.
      dims: its shape.
      bytes: of its elements.
      padded_bytes: of its tiled layout.
      name: of the instruction.
      opcode: of the instruction.
      op_name: the instruction's origin in the traced program.
      computation: that the instruction is in.
    """

    dtype: str
    dims: tuple[int, ...]
    bytes: int
    padded_bytes: int
    name: str
    opcode: str
    op_name: str
    computation: str


@dataclass(frozen=True)
class HloReport:
    """The cost of one execution of a program on one device.

    Attributes:
      flops: of matrix products and convolutions (multiply and add are two).
      bytes_accessed: estimate of the traffic between HBM and the cores; see `t5x_ext.plan.hlo_bytes`.
      collective_ops: every collective instruction that sends to another device.
      buffers: every array in HBM, largest first: arguments and results of fusions, not arrays inside fusions.
      unknown_loops: `while` instructions whose number of iterations is not in the text; counted as `unknown_trips`.
    """

    flops: float
    bytes_accessed: float
    collective_ops: tuple[CollectiveOp, ...]
    buffers: tuple[Buffer, ...]
    unknown_loops: tuple[str, ...]

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """The collectives by kind, axes, group size and dtype; the largest payload first."""
        totals: dict[tuple[str, tuple[str, ...], int, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for op in self.collective_ops:
            total = totals[op.kind, op.axes, op.group_size, op.dtype]
            total[0] += op.times
            total[1] += op.times * op.bytes
        collectives = [Collective(*key, count=count, bytes=bytes_) for key, (count, bytes_) in totals.items()]
        return tuple(sorted(collectives, key=lambda collective: -collective.bytes))

    def find(
        self, dtype: str | None = None, predicate: Callable[[tuple[int, ...]], bool] = lambda dims: True
    ) -> tuple[Buffer, ...]:
        """The buffers of a dtype (None: any) whose dims satisfy `predicate`."""
        return tuple(b for b in self.buffers if dtype in (None, b.dtype) and predicate(b.dims))

    def arrays_of_shape(self, dims: Iterable[int], dtype: str | None = None) -> tuple[Buffer, ...]:
        """The buffers with these dims in any order; dims of 1 are ignored, because layouts add, drop or move them."""
        wanted = _significant(dims)
        return self.find(dtype, lambda found: _significant(found) == wanted)


def analyse(text: str, mesh_shape: dict[str, int], unknown_trips: int = 1) -> HloReport:
    """The cost of a program on one device, from its optimized HLO text (`compiled.as_text()`).

    Args:
      text: the HLO of the partitioned program.
      mesh_shape: axis -> size, outermost first, of the mesh it was compiled for; partition numbers are indices of
        devices in this order. If the program is that of one of several slices, the outermost axes span the slices.
      unknown_trips: iterations of loops whose number is not in the text, such as a search that ends by its data.

    Raises:
      ValueError: if the number of partitions is not that of the devices of the mesh, or of one slice of it.
    """
    module = parse_module(text)
    walk = _Walk(module, _Network(module, mesh_shape), unknown_trips)
    cost = walk.computation(module.entry, fused=False)
    buffers = sorted(walk.buffers, key=lambda buffer: -buffer.bytes)
    return HloReport(cost.flops, cost.bytes, tuple(cost.collectives), tuple(buffers), tuple(walk.unknown_loops))


def _significant(dims: Iterable[int]) -> list[int]:
    return sorted(dim for dim in dims if dim != 1)


class _Network:
    """Finds the collectives among instructions, for the devices of one mesh."""

    def __init__(self, module: Module, mesh_shape: dict[str, int]) -> None:
        devices = module.partitions * module.replicas
        self.devices = devices
        self.partitions = module.partitions
        self.inside = dict(mesh_shape)
        self.between: dict[str, int] = {}
        while math.prod(self.inside.values()) > devices:
            name = next(iter(self.inside))
            self.between[name] = self.inside.pop(name)
        if math.prod(self.inside.values()) != devices:
            raise ValueError(f"the program is for {devices} devices, the mesh has {mesh_shape}")

    def collective(self, computation: Computation, instruction: Instruction, fused: bool) -> CollectiveOp | None:
        """The collective of an instruction; None if it is none, or does not send to another device."""
        megascale = _MEGASCALE.search(instruction.attributes) if instruction.opcode == "send" else None
        if megascale:
            axes = tuple(name for name, size in self.between.items() if size > 1)
            size = math.prod(self.between.values())
            between = _MEGASCALE_KINDS.get(megascale[1], "all-reduce")
            return _collective_op(between, axes, size, computation, instruction)
        kind = _OPCODE_KINDS.get(instruction.opcode.removesuffix("-start"))
        if kind is None or carries_on(computation, instruction):
            return None
        if kind == "all-reduce" and fused and _only_sliced(computation, instruction):
            kind = "reduce-scatter"
        groups = self._groups(kind, instruction)
        axes = mesh_axes(groups, self.inside)
        size = max(map(len, groups), default=self.devices)
        if kind == "collective-permute":
            size = math.prod(self.inside[axis] for axis in axes)
        return _collective_op(kind, axes, size, computation, instruction) if size > 1 else None

    def _groups(self, kind: str, instruction: Instruction) -> tuple[tuple[int, ...], ...]:
        if kind == "collective-permute":
            return parse_groups(instruction.attribute("source_target_pairs") or "", self.devices)
        printed = _MESH_GROUPS.search(instruction.attributes)
        groups = parse_groups(printed[1] if printed else instruction.attribute("replica_groups") or "", self.devices)
        partitions_by_number = kind == "all-to-all" or instruction.attribute("use_global_device_ids") == "true"
        if self.partitions == 1 or partitions_by_number or instruction.attribute("channel_id") is None:
            return groups
        # Without global numbers the groups are of replicas, and every partition takes part.
        replicas = [{number % (self.devices // self.partitions) for number in group} for group in groups]
        return tuple(
            tuple(replica * self.partitions + partition for replica in group for partition in range(self.partitions))
            for group in replicas
        )


def _only_sliced(computation: Computation, instruction: Instruction) -> bool:
    """Whether only slices of an instruction's result are used; of a fused all-reduce: whether it scatters."""
    users = [user for user, _ in computation.users[instruction.name]]
    while len(users) == 1 and users[0].opcode in ("bitcast", "reshape", "get-tuple-element"):
        users = [user for user, _ in computation.users[users[0].name]]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _collective_op(
    kind: str, axes: tuple[str, ...], size: int, computation: Computation, instruction: Instruction
) -> CollectiveOp:
    shapes = computation.operand_shapes(instruction)
    arrays = [array for array in leaves(tuple(shapes)) if array.dtype not in ("token", "opaque")]
    first = max(arrays, key=lambda array: array.bytes)
    payload = sum(array.bytes for array in arrays)
    dims = first.dims
    if kind == "all-gather":
        payload *= size
        gathered = instruction.numbers("dimensions")[:1]
        dims = tuple(n * size if dim in gathered else n for dim, n in enumerate(dims))
    return CollectiveOp(
        kind, axes, size, first.dtype, dims, payload, times=1.0, name=instruction.name, op_name=instruction.op_name
    )


@dataclass
class _Cost:
    flops: float = 0.0
    bytes: float = 0.0
    collectives: list[CollectiveOp] = field(default_factory=list)

    def add(self, other: _Cost, times: float = 1.0) -> None:
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.collectives += [replace(op, times=op.times * times) for op in other.collectives]


class _Walk:
    """Recursion through called computations; every computation is visited once."""

    def __init__(self, module: Module, network: _Network, unknown_trips: int) -> None:
        self.module = module
        self.network = network
        self.unknown_trips = unknown_trips
        self.costs: dict[tuple[str, bool], _Cost] = {}
        self.buffers: list[Buffer] = []
        self.unknown_loops: list[str] = []

    def computation(self, computation: Computation, fused: bool) -> _Cost:
        """The cost of one execution; inside a fusion there is no HBM traffic."""
        key = computation.name, fused
        if key not in self.costs:
            cost = _Cost()
            for instruction in computation.instructions.values():
                self._add(cost, computation, instruction, fused)
            self.costs[key] = cost
        return self.costs[key]

    def _add(self, cost: _Cost, computation: Computation, instruction: Instruction, fused: bool) -> None:
        cost.flops += instruction_flops(computation, instruction)
        collective = self.network.collective(computation, instruction, fused)
        if collective:
            cost.collectives.append(collective)
        if not fused:
            cost.bytes += instruction_bytes(self.module, computation, instruction)
            self._note_buffers(computation, instruction)
        self._add_called(cost, computation, instruction, fused)

    def _add_called(self, cost: _Cost, computation: Computation, instruction: Instruction, fused: bool) -> None:
        called = {
            kind: [self.module.computations[name] for name in names if name in self.module.computations]
            for kind, names in instruction.called.items()
        }
        opcode = instruction.opcode.removesuffix("-start")
        if opcode == "while":
            trips = self.module.trip_count(computation, instruction)
            if trips is None:
                self.unknown_loops.append(instruction.name)
            for part in (*called["condition"], *called["body"]):
                cost.add(self.computation(part, fused), self.unknown_trips if trips is None else trips)
        elif opcode == "conditional":
            branches = [self.computation(branch, fused) for names in called.values() for branch in names]
            cost.add(max(branches, key=lambda branch: (branch.flops, branch.bytes)))
        elif opcode in ("fusion", "call", "async"):
            for part in (part for names in called.values() for part in names):
                cost.add(self.computation(part, fused or opcode == "fusion"))

    def _note_buffers(self, computation: Computation, instruction: Instruction) -> None:
        if not _allocates(self.module, computation, instruction):
            return
        self.buffers += [
            _buffer(array, computation, instruction)
            for array in leaves(instruction.shape)
            if array.memory_space == 0 and array.bytes
        ]


def _allocates(module: Module, computation: Computation, instruction: Instruction) -> bool:
    opcode = instruction.opcode
    if opcode == "parameter":
        return computation is module.entry
    if opcode == "custom-call":
        target = (instruction.attribute("custom_call_target") or "").strip('"')
        return target == "AllocateBuffer" or target not in RENAMING_CALLS
    return opcode not in RENAMES and not opcode.endswith(("-start", "-update"))


def _buffer(array: Array, computation: Computation, instruction: Instruction) -> Buffer:
    return Buffer(
        array.dtype,
        array.dims,
        array.bytes,
        array.padded_bytes,
        instruction.name,
        instruction.opcode,
        instruction.op_name,
        computation.name,
    )
