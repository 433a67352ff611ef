"""Main-memory (HBM) traffic of one instruction: what it reads and writes, with a fusion as one unit.

Conventions, which follow XLA's HloCostAnalysis as far as text allows:

- only arrays in memory space 0 count: arrays in on-chip memory cost nothing, and a copy from or to it counts once;
- the size of an array is that of its tiled layout;
- slices and gathers read as much as their result; updates in place read and write as much as their update;
- instructions that only rename (tuple, bitcast, ...) cost nothing.
"""

from __future__ import annotations

from t5x_ext.plan.hlo import Array, Computation, Instruction, Module, Shape, leaves

RENAMES = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "optimization-barrier"}) | {
    *("after-all", "add-dependency", "domain", "partition-id", "replica-id", "get-dimension-size"),
    *("while", "conditional", "call", "async"),
}
"""Opcodes without traffic of their own; computations that they call may have some."""

RENAMING_CALLS = frozenset(
    {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding", "SPMDFullToShardShape"}
)
"""Custom calls without traffic."""

CHAIN_START = "AsyncCollectiveStart"
"""The custom call in the fusion that starts an all-gather, which later fusions continue beside their own work."""

_CHAIN = '"async_collective_fusion_config"'
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
_PASSES = frozenset({"bitcast", "reshape", "transpose", "convert", "copy", "negate"})


def carries_on(computation: Computation, instruction: Instruction) -> bool:
    """Whether a collective continues one that an earlier fusion of its chain started.

    The TPU compiler prints such a collective in every fusion of the chain; it is executed once and counted at the
    start.
    """
    if _CHAIN not in instruction.attributes:
        return False
    users = computation.users[instruction.name]
    return not any(user.attribute("custom_call_target") == f'"{CHAIN_START}"' for user, _ in users)


def instruction_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes that one execution of an instruction moves between HBM and the cores.

    An asynchronous instruction counts at its start.
    """
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in RENAMES or opcode.endswith(("-done", "-update")):
        return 0
    operands = computation.operand_shapes(instruction)
    result = _result(instruction)
    if opcode == "fusion":
        return _fusion_bytes(module, module.computations[instruction.called["calls"][0]], operands, result)
    if opcode == "custom-call" and (instruction.attribute("custom_call_target") or "").strip('"') in RENAMING_CALLS:
        return 0
    if opcode in ("send", "recv"):
        return _hbm(result[0] if isinstance(result, tuple) else result)
    if opcode in _SLICES:
        return _portion(operands[0], _elements(result)) + sum(map(_hbm, [*operands[1:], result]))
    if opcode == "dynamic-update-slice":
        return _hbm(operands[1]) + _portion(result, _elements(operands[1]))
    if opcode == "scatter":
        return sum(map(_hbm, operands[1:])) + 2 * _portion(result, _elements(operands[-1]))
    return sum(map(_hbm, operands)) + _hbm(result)


def _result(instruction: Instruction) -> Shape:
    """The result of an instruction. The start of an asynchronous one has the shape (operands, result, contexts...).

    For a copy it is (result, operand, context), for an all-reduce the result.
    """
    shape = instruction.shape
    if instruction.opcode == "copy-start" and isinstance(shape, tuple):
        return shape[0]
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start" and isinstance(shape, tuple):
        return shape[1]
    return shape


def _hbm(shape: Shape) -> int:
    return sum(array.padded_bytes for array in leaves(shape) if array.memory_space == 0)


def _elements(shape: Shape) -> int:
    return sum(array.elements for array in leaves(shape))


def _portion(shape: Shape, elements: int) -> int:
    """Bytes of this number of elements of an array in HBM, at most all."""
    total = _elements(shape)
    return _hbm(shape) * min(elements, total) // total if total else 0


def _fusion_bytes(module: Module, inner: Computation, operands: list[Shape], result: Shape) -> int:
    if any(user.opcode == "custom-call" and CHAIN_START in user.attributes for user in inner.instructions.values()):
        gathered = result[1] if isinstance(result, tuple) else result
        return sum(map(_hbm, operands)) + _hbm(gathered)
    reads = sum(
        _portion(shape, _elements_read(module, inner, inner.parameters[number]))
        for number, shape in enumerate(operands)
        if number in inner.parameters
    )
    return reads + _fusion_writes(module, inner, result)


def _elements_read(module: Module, computation: Computation, value: Instruction) -> int:
    """Elements of a value that the rest of a fused computation reads, at most all."""
    total = _elements(value.shape)
    read = 0
    for user, position in computation.users[value.name]:
        if user.opcode in _PASSES:
            read += _elements_read(module, computation, user) if user is not computation.root else total
        elif user.opcode in _SLICES and position == 0:
            read += _elements(user.shape)
        elif user.opcode == "scatter" and position == 0:
            read += _elements(computation.instructions[user.operands[-1]].shape)
        elif user.opcode == "fusion":
            nested = module.computations[user.called["calls"][0]]
            read += _elements_read(module, nested, nested.parameters[position])
        elif not _untouched(computation, user, position):
            return total
    return min(read, total)


def _untouched(computation: Computation, user: Instruction, position: int) -> bool:
    """Whether a use of a value does not read it: passes it on, or updates it in place."""
    if user.opcode == "dynamic-update-slice":
        return position == 0
    if user.opcode == "custom-call" and "AsyncCollectiveDone" in user.attributes:
        return True
    return user.opcode in ("tuple", "get-tuple-element") or carries_on(computation, user)


def _fusion_writes(module: Module, inner: Computation, shape: Shape) -> int:
    root = inner.root
    if root.opcode != "tuple" or not isinstance(shape, tuple):
        return _portion(shape, _elements_written(module, inner, root))
    return sum(
        _portion(element, _elements_written(module, inner, inner.instructions[name]))
        for name, element in zip(root.operands, shape)
    )


def _elements_written(module: Module, computation: Computation, value: Instruction) -> int:
    """Elements of a fusion's result that it writes; the rest is a parameter's buffer, updated in place."""
    operands = [computation.instructions[name] for name in value.operands]
    match value.opcode:
        case "parameter":
            return 0
        case "bitcast" | "reshape":
            return _elements_written(module, computation, operands[0])
        case "dynamic-update-slice" if _is_parameter(computation, operands[0]):
            return _elements(operands[1].shape)
        case "scatter" if _is_parameter(computation, operands[0]):
            return _elements(operands[-1].shape)
        case "fusion" if isinstance(value.shape, Array):
            nested = module.computations[value.called["calls"][0]]
            return _elements_written(module, nested, nested.root)
        case "custom-call" if "AsyncCollectiveDone" in value.attributes:
            return 0
    return 0 if carries_on(computation, value) else _elements(value.shape)


def _is_parameter(computation: Computation, value: Instruction) -> bool:
    while value.opcode in ("bitcast", "reshape"):
        value = computation.instructions[value.operands[0]]
    return value.opcode == "parameter"
