"""Floating-point operations of one instruction: matrix products in the three forms that compilers use."""

from __future__ import annotations

import json
import math
import re

from t5x_ext.plan.hlo import Array, Computation, Instruction, leaves

_DIM_LABELS = re.compile(r"(\w+)_(\w+)->(\w+)")
_DOT_NUMBERS = '"dot_dimension_numbers":'


def instruction_flops(computation: Computation, instruction: Instruction) -> int:
    """FLOPs of a `dot`, a `convolution` or a GPU library's matrix product; 0 for every other instruction.

    A multiply and an add are two operations. Elementwise operations are not counted, because matrix units do not do
    them.
    """
    if instruction.opcode not in ("dot", "convolution", "custom-call"):
        return 0
    operands = [next(leaves(shape)) for shape in computation.operand_shapes(instruction)]
    result = next(leaves(instruction.shape))
    if instruction.opcode == "dot":
        return _dot(operands[0], result, instruction.numbers("lhs_contracting_dims"))
    if instruction.opcode == "convolution":
        return _convolution(operands[0], operands[1], result, instruction)
    return _library_product(operands, result, instruction)


def _dot(left: Array, result: Array, contracted: tuple[int, ...]) -> int:
    return 2 * result.elements * math.prod(left.dims[dim] for dim in contracted)


def _library_product(operands: list[Array], result: Array, instruction: Instruction) -> int:
    start = instruction.attributes.find(_DOT_NUMBERS)
    if start < 0 or not operands:
        return 0
    numbers, _ = json.JSONDecoder().raw_decode(instruction.attributes, start + len(_DOT_NUMBERS))
    return _dot(operands[0], result, tuple(map(int, numbers["lhs_contracting_dimensions"])))


def _convolution(left: Array, kernel: Array, result: Array, instruction: Instruction) -> int:
    """As in XLA's HloCostAnalysis: products with padding or with the holes of a dilation are not counted.

    The TPU compiler writes every matrix product as a convolution. Batch dimensions become window dimensions whose
    stride and dilation give each output one position of the kernel.
    """
    labels = _DIM_LABELS.search(instruction.attribute("dim_labels") or "")
    if labels is None:
        return 0
    left_labels, kernel_labels, result_labels = labels.groups()
    window = _window(instruction.attribute("window") or "")
    products = 1
    for dim in filter(str.isdigit, result_labels):
        products *= _valid_positions(
            left.dims[left_labels.index(dim)],
            kernel.dims[kernel_labels.index(dim)],
            result.dims[result_labels.index(dim)],
            **{name: values[int(dim)] for name, values in window.items()},
        )
    batch = left.dims[left_labels.index("b")] // (instruction.numbers("batch_group_count") or (1,))[0]
    features = kernel.dims[kernel_labels.index("i")] * kernel.dims[kernel_labels.index("o")]
    return 2 * batch * features * products


def _window(text: str) -> dict[str, list[int]]:
    """Parses `{size=8x1 stride=7x1 pad=0_0x1_1 lhs_dilate=8x1}`, by window dimension."""
    fields = dict(field.split("=") for field in text.strip("{}").split())
    names = {"stride": "stride", "lhs_dilate": "dilation", "rhs_dilate": "kernel_dilation"}
    window = {names[key]: list(map(int, value.split("x"))) for key, value in fields.items() if key in names}
    if "pad" in fields:
        window["padding"] = [int(pad.split("_")[0]) for pad in fields["pad"].split("x")]
    return window


def _valid_positions(
    size: int,
    kernel: int,
    outputs: int,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    kernel_dilation: int = 1,
) -> int:
    """Pairs (kernel position k, output o) that meet an input: 0 <= o s - p + k r <= (size - 1) d, a multiple of d."""
    common = math.gcd(stride, dilation)
    period = dilation // common
    inverse = pow(stride // common, -1, period)
    count = 0
    for position in range(kernel):
        offset = padding - position * kernel_dilation
        if offset % common:
            continue
        low = max(0, -(-offset // stride))
        high = min(outputs - 1, (offset + (size - 1) * dilation) // stride)
        first = low + (offset // common * inverse - low) % period
        count += max(0, (high - first) // period + 1)
    return count
