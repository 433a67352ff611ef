"""A parser of optimized HLO text (`compiled.as_text()`): computations, instructions, shapes, loops.

Only what `t5x_ext.plan.hlo_cost` needs is interpreted. All else is kept as text in `Instruction.attributes`, so that an
unknown form of instruction still has a name, a shape, an opcode and operands. The grammar:
https://openxla.org/xla/operation_semantics and XLA's `hlo_instruction.cc`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"(ENTRY )?%?([^\s(]+) (?:\(.*\) -> .* |)\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?(\S+) = ")
_OPCODE = re.compile(r"\s*([A-Za-z][\w.$-]*)\(")
_OPERAND = re.compile(r"%([^\s,(){}]+)")
_BARE_OPERAND = re.compile(r"(?:^|[\s,])([A-Za-z_][\w.-]*)(?=,|$)")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[^\s,{}]+)"
)
_KNOWN_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_DIGITS = re.compile(r"\d+")
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Array:
    """One array.

    Attributes:
      dtype: element type, as `bf16`.
      dims: its shape.
      bytes: of its elements.
      padded_bytes: what its tiled layout allocates: `bf16[8,100]` in tiles of (8, 128) takes as much as `bf16[8,128]`.
      memory_space: 0 is the device's main memory (HBM); the TPU compiler marks its on-chip memories 1 (VMEM) and
        above, and host memory 5.
    """

    dtype: str
    dims: tuple[int, ...]
    bytes: int
    padded_bytes: int
    memory_space: int = 0

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)


Shape = Array | tuple["Shape", ...]
"""An array or a tuple of shapes."""


def leaves(shape: Shape) -> Iterator[Array]:
    """The arrays of a shape, in order, tuples flattened."""
    if isinstance(shape, Array):
        yield shape
    else:
        for element in shape:
            yield from leaves(element)


@dataclass(frozen=True)
class Instruction:
    """One instruction: `%name = shape opcode(operands), attributes`.

    Attributes:
      name: without %.
      shape: of the result.
      opcode: as `dot`.
      arguments: the text between the parentheses (a constant's literal, a parameter's number).
      operands: the names in `arguments`.
      attributes: the text after it, metadata and backend configuration included.
      called: names of the computations that it calls, by the attribute that names them.
    """

    name: str
    shape: Shape
    opcode: str
    arguments: str
    operands: tuple[str, ...]
    attributes: str
    called: dict[str, tuple[str, ...]]

    def attribute(self, name: str) -> str | None:
        """The printed value of attribute `name` (`dimensions` -> `{0,1}`), None if it is absent."""
        start = re.search(rf"(?:^|[ ,]){re.escape(name)}=", self.attributes)
        if start is None:
            return None
        return self.attributes[start.end() : _end_of_value(self.attributes, start.end())]

    def numbers(self, name: str) -> tuple[int, ...]:
        """The integers in attribute `name`; empty if it is absent."""
        return tuple(map(int, _DIGITS.findall(self.attribute(name) or "")))

    @property
    def op_name(self) -> str:
        """Its origin in the traced program (`jit(step)/encoder/dot_general`), or empty."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""


@dataclass(frozen=True)
class Computation:
    """A named list of instructions.

    Attributes:
      name: without %.
      instructions: by name, in the order of the text, which after compilation is the schedule.
      root: the instruction whose result is the computation's.
    """

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameter number -> parameter."""
        return {int(i.arguments): i for i in self.instructions.values() if i.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Instruction name -> (instruction that reads it, operand index) of every use."""
        users: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for position, operand in enumerate(instruction.operands):
                users.setdefault(operand, []).append((instruction, position))
        return users

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """The shapes of an instruction's operands."""
        return [self.instructions[name].shape for name in instruction.operands if name in self.instructions]


@dataclass(frozen=True)
class Module:
    """A parsed module.

    Attributes:
      name: of the module.
      computations: by name.
      entry: the computation that runs first.
      partitions: from the header; there are partitions * replicas devices.
      replicas: from the header.
    """

    name: str
    computations: dict[str, Computation]
    entry: Computation
    partitions: int
    replicas: int

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """Iterations of a `while` of `computation`; None if the text does not tell.

        From the compiler's `known_trip_count` or, if that is absent, from the condition's comparison of a counter with
        a constant, the counter's first value and its step. For a conjunction (`i < n and not done`) the first part that
        can be read is used, which gives the maximum number of iterations.
        """
        known = _KNOWN_TRIP_COUNT.search(loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called["condition"][0]]
        body = self.computations[loop.called["body"][0]]
        return _Counter(self, computation, loop, body).trips(condition, condition.root, {})


def parse_module(text: str) -> Module:
    """Parses a module.

    Raises:
      ValueError: if there is no ENTRY computation, or a line inside a computation is not an instruction.
    """
    header = text[: text.find("\n")]
    computations: dict[str, Computation] = {}
    entry = None
    shapes: dict[str, Shape] = {}
    lines = iter(text.splitlines())
    for line in lines:
        found = None if line[:1].isspace() or not line.endswith("{") else _HEADER.match(line)
        if found:
            computation = _parse_computation(found[2], lines, shapes)
            computations[computation.name] = computation
            entry = computation if found[1] else entry
    if entry is None:
        raise ValueError(f"no ENTRY computation in the HLO text that begins with {header[:80]!r}")
    module_name = header.removeprefix("HloModule ").partition(",")[0]
    return Module(module_name, computations, entry, _count(header, "num_partitions"), _count(header, "replica_count"))


def _count(header: str, name: str) -> int:
    found = re.search(rf"\b{name}=(\d+)", header)
    return int(found[1]) if found else 1


def _parse_computation(name: str, lines: Iterator[str], shapes: dict[str, Shape]) -> Computation:
    instructions = {}
    root = None
    for line in lines:
        if line.startswith("}"):
            break
        if not line or line.isspace():
            continue
        found = _INSTRUCTION.match(line)
        if found is None:
            raise ValueError(f"computation {name}: not an HLO instruction: {line.strip()[:120]}")
        instruction = _parse_instruction(found[2], line, found.end(), shapes)
        instructions[instruction.name] = instruction
        root = instruction if found[1] or root is None else root
    if root is None:
        raise ValueError(f"computation {name} has no instruction")
    return Computation(name, instructions, root)


def _parse_instruction(name: str, line: str, start: int, shapes: dict[str, Shape]) -> Instruction:
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        raise ValueError(f"{name}: no opcode in {line.strip()[:120]}")
    close = _closing(line, opcode.end() - 1)
    arguments = line[opcode.end() : close]
    attributes = line[close + 1 :].removeprefix(", ")
    called = {
        kind: tuple(part.strip().lstrip("%") for part in names.strip("{}").split(","))
        for kind, names in _CALLED.findall(_before_metadata(attributes))
    }
    # Before optimization names are printed without %.
    operand = _OPERAND if "%" in arguments else _BARE_OPERAND
    operands = () if opcode[1] in ("constant", "parameter") else tuple(operand.findall(arguments))
    printed = line[start:end]
    if printed not in shapes:
        shapes[printed] = parse_shape(printed)
    return Instruction(name, shapes[printed], opcode[1], arguments, operands, attributes, called)


def _before_metadata(attributes: str) -> str:
    ends = (attributes.find("metadata={"), attributes.find("backend_config="))
    return attributes[: min((end for end in ends if end >= 0), default=len(attributes))]


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`; the end of the text if none does."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def _end_of_value(text: str, start: int) -> int:
    """The end of an attribute's value: the first comma outside brackets and quotes."""
    depth = 0
    quoted = False
    for index in range(start, len(text)):
        character = text[index]
        if character == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            return index
    return len(text)


def parse_shape(text: str) -> Shape:
    """Parses a shape: `bf16[8,128]{1,0:T(8,128)S(1)}`, or a tuple of shapes in parentheses.

    >>> parse_shape("(f32[2,3]{1,0}, s32[])")[0].bytes
    24
    """
    shape, _ = _read_shape(text, 0)
    return shape


def _read_shape(text: str, start: int) -> tuple[Shape, int]:
    if text[start] == "(":
        return _read_tuple(text, start + 1)
    found = _ARRAY.match(text, start)
    if found is None:
        raise ValueError(f"not an HLO shape: {text[start : start + 80]}")
    dtype, printed_dims, layout = found.groups()
    # A dimension of dynamic size prints its bound: `<=8`.
    dims = tuple(map(int, _DIGITS.findall(printed_dims)))
    order, tile, space = _parse_layout(layout or "", dims)
    bits = _bits(dtype)
    padded = math.prod(_padded(dims, order, tile))
    return Array(dtype, dims, -(-math.prod(dims) * bits // 8), -(-padded * bits // 8), space), found.end()


def _read_tuple(text: str, start: int) -> tuple[Shape, int]:
    elements = []
    while text[start] != ")":
        if text[start] in ", ":
            start += 1
        elif text.startswith("/*", start):
            start = text.index("*/", start) + 2
        else:
            element, start = _read_shape(text, start)
            elements.append(element)
    return tuple(elements), start + 1


def _parse_layout(layout: str, dims: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """(dims from minor to major, first tile, memory space) of `{1,0:T(8,128)(2,1)S(1)}`."""
    order_text, _, rest = layout.strip("{}").partition(":")
    order = tuple(map(int, _DIGITS.findall(order_text))) or tuple(reversed(range(len(dims))))
    tile = re.search(r"T\(([\d,]+)\)", rest)
    space = _MEMORY_SPACE.search(rest)
    return order, tuple(map(int, tile[1].split(","))) if tile else (), int(space[1]) if space else 0


def _padded(dims: tuple[int, ...], order: tuple[int, ...], tile: tuple[int, ...]) -> list[int]:
    """`dims` with the minor ones rounded up to multiples of the tile.

    Scalars keep their size: their tile is padding of the allocator, not traffic.
    """
    padded = list(dims)
    for dim, size in zip(order, reversed(tile)):
        padded[dim] = -(-dims[dim] // size) * size
    return padded


def _bits(dtype: str) -> int:
    """Bits an element: `f8e4m3fn` 8, `c64` 64, `pred` 8, tokens and opaque values 0."""
    if dtype == "pred":
        return 8
    found = _DIGITS.search(dtype)
    return int(found[0]) if found else 0


_Linear = tuple[int | None, int]
"""A scalar as (index i of a loop-carried value or None, c): carried[i] + c, or the constant c."""

_TRANSPARENT = frozenset({"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier"})


@dataclass(frozen=True)
class _Counter:
    """The number of iterations of a `while`, from the linear forms of its counter."""

    module: Module
    computation: Computation
    loop: Instruction
    body: Computation

    def trips(self, where: Computation, test: Instruction, parameters: dict[int, _Linear | None]) -> int | None:
        """Iterations while `test`, an instruction of `where`, is true."""
        if test.opcode == "and":
            parts = (self.trips(where, where.instructions[name], parameters) for name in test.operands)
            return next((count for count in parts if count is not None), None)
        if test.opcode in ("fusion", "call"):
            inner = self.module.computations[next(iter(test.called.values()))[0]]
            values = {i: self.value(where, name, parameters) for i, name in enumerate(test.operands)}
            return self.trips(inner, inner.root, values)
        if test.opcode != "compare":
            return None
        left, right = (self.value(where, name, parameters) for name in test.operands)
        direction = test.attribute("direction") or ""
        if left is not None and (left[0] is None or self._step(left[0]) == 0):  # the bound, constant or carried along
            left, right = right, left
            direction = {"GT": "LT", "GE": "LE", "LT": "GT", "LE": "GE"}.get(direction, direction)
        if left is None or left[0] is None or right is None:
            return None
        return self._count(left[0], left[1], direction, right)

    def _count(self, counter: int, offset: int, direction: str, bound: _Linear) -> int | None:
        end = bound[1] + (self._first(bound[0]) or 0) if bound[0] is not None else bound[1]
        if bound[0] is not None and self._first(bound[0]) is None:
            return None
        # JAX starts counters at 0 if the start is not in the text.
        distance = end - (self._first(counter) or 0) - offset
        step = self._step(counter)
        if direction == "NE":
            if distance == 0:
                return 0
            meets = step != 0 and distance * step > 0 and distance % step == 0
            return distance // step if meets else None
        if direction in ("GT", "GE"):
            distance, step = -distance, -step
        if direction in ("LE", "GE"):
            distance += 1
        if direction not in ("LT", "LE", "GT", "GE"):
            return None
        if distance <= 0:
            return 0
        # A loop that leads away from its bound ends by overflow only, which the text does not tell.
        return -(-distance // step) if step > 0 else None

    def _first(self, index: int) -> int | None:
        """The initial value of carried value `index`."""
        start = self.computation.instructions.get(self.loop.operands[0])
        if start is None or start.opcode != "tuple":
            return None
        value = self.value(self.computation, start.operands[index], {})
        return value[1] if value is not None and value[0] is None else None

    def _step(self, index: int) -> int:
        """What an iteration adds to carried value `index`; 1 if the body does not tell."""
        if self.body.root.opcode != "tuple":
            return 1
        value = self.value(self.body, self.body.root.operands[index], {})
        return value[1] if value is not None and value[0] == index else 1

    def value(self, where: Computation, name: str, parameters: dict[int, _Linear | None]) -> _Linear | None:
        """The linear form of a scalar instruction of `where`; `parameters` gives those of a called computation."""
        instruction = where.instructions[name]
        operands = instruction.operands
        match instruction.opcode:
            case "constant":
                return (None, int(instruction.arguments)) if re.fullmatch(r"-?\d+", instruction.arguments) else None
            case "parameter":
                return parameters.get(int(instruction.arguments))
            case "get-tuple-element":
                carried = where.instructions[operands[0]].opcode == "parameter" and not parameters
                return (instruction.numbers("index")[0], 0) if carried else None
            case "add" | "subtract":
                left, right = (self.value(where, operand, parameters) for operand in operands)
                return _sum(left, right, -1 if instruction.opcode == "subtract" else 1)
            case "fusion" | "call":
                inner = self.module.computations[next(iter(instruction.called.values()))[0]]
                values = {i: self.value(where, operand, parameters) for i, operand in enumerate(operands)}
                return self.value(inner, inner.root.name, values) if values else None
            case opcode if opcode in _TRANSPARENT:
                return self.value(where, operands[0], parameters)
        return None


def _sum(left: _Linear | None, right: _Linear | None, sign: int) -> _Linear | None:
    if left is None or right is None or (right[0] is not None and (left[0] is not None or sign < 0)):
        return None
    return left[0] if right[0] is None else right[0], left[1] + sign * right[1]
