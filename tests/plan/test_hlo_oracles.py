"""HLO text written from a known program: what is read of groups, shapes, products and loops is what went in."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from t5x_ext.plan.hlo import Array, leaves, parse_module, parse_shape
from t5x_ext.plan.hlo_flops import instruction_flops
from t5x_ext.plan.hlo_groups import mesh_axes, parse_groups

BITS = {"pred": 8, "s4": 4, "u8": 8, "bf16": 16, "f16": 16, "f32": 32, "s32": 32, "f64": 64, "f8e5m2": 8, "c64": 64}


def one_instruction(line, *parameters):
    """The root of a program with these parameters, whose line is `line`."""
    arguments = ", ".join(f"p{number}: {shape}" for number, shape in enumerate(parameters))
    lines = [f"  %p{number} = {shape} parameter({number})" for number, shape in enumerate(parameters)]
    text = "\n".join(["HloModule m", "", f"ENTRY %e ({arguments}) -> f32[] {{", *lines, f"  ROOT %r = {line}", "}"])
    entry = parse_module(text).entry
    return entry, entry.root


def flops(line, *parameters):
    return instruction_flops(*one_instruction(line, *parameters))


def numbers(values):
    return ",".join(map(str, values))


# Groups of devices


@st.composite
def meshes(draw):
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    mesh = {f"axis{number}": size for number, size in enumerate(sizes)}
    return mesh, tuple(name for name in mesh if draw(st.booleans()))


def rows_along(mesh, axes):
    """Groups along some axes of a mesh, whose devices are numbered in its order."""
    coordinates = list(itertools.product(*map(range, mesh.values())))
    groups = {}
    for device, place in enumerate(coordinates):
        fixed = tuple(index for index, name in zip(place, mesh) if name not in axes)
        groups.setdefault(fixed, []).append(device)
    return tuple(map(tuple, groups.values()))


@settings(max_examples=50)
@given(meshes())
def test_all_forms_of_groups_mean_the_same_and_give_their_axes_back(drawn):
    mesh, axes = drawn
    expected, devices = rows_along(mesh, axes), math.prod(mesh.values())
    explicit = "{" + ",".join("{" + numbers(group) + "}" for group in expected) + "}"
    assert parse_groups(explicit, devices) == expected
    names = list(mesh)
    order = [names.index(name) for name in names if name not in axes] + [names.index(name) for name in axes]
    shape = f"[{len(expected)},{len(expected[0])}]"
    iota = f"{shape}<=[{numbers(mesh.values())}]T({numbers(order)})"
    assert parse_groups(iota, devices) == expected
    if axes:
        grid = ",".join(f"'{name}'={size}" for name, size in mesh.items())
        reduced = ",".join(f"'{name}'" for name in axes)
        assert parse_groups(f"mesh[{grid}] {{{reduced}}}", devices) == expected
        assert parse_groups(f"mesh[{grid}], device_ids=([{devices}]) {{{reduced}}}", devices) == expected
    assert mesh_axes(expected, mesh) == tuple(name for name in axes if mesh[name] > 1)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
def test_a_part_of_an_axis_is_an_axis_of_the_finer_mesh(before, part, after, other):
    fine = {"before": before, "part": part, "after": after, "other": other}
    text = f"mesh['a'={before * part * after},'b'={other}] {{'a':({before}){part}}}"
    assert parse_groups(text, before * part * after * other) == rows_along(fine, ("part",))


@given(st.permutations(range(6)), st.sampled_from(["a", "b"]))
def test_a_mesh_of_listed_devices_groups_them_in_its_order(ids, axis):
    text = f"mesh['a'=2,'b'=3], device_ids=({numbers(ids)}) {{'{axis}'}}"
    grid = np.array(ids).reshape(2, 3)
    assert parse_groups(text, 6) == tuple(map(tuple, (grid.T if axis == "a" else grid).tolist()))


# Shapes

DIMS = st.lists(st.integers(0, 9), max_size=4)


@given(st.sampled_from(sorted(BITS)), DIMS)
def test_an_array_without_a_layout_has_the_bytes_of_its_elements(dtype, dims):
    array = parse_shape(f"{dtype}[{numbers(dims)}]")
    assert (array.dtype, array.dims, array.elements) == (dtype, tuple(dims), np.zeros(dims).size)
    assert array.bytes == array.padded_bytes == math.ceil(array.elements * BITS[dtype] / 8)


@settings(max_examples=40)
@given(st.data(), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from(sorted(BITS)))
def test_a_tiled_layout_takes_whole_tiles(data, dims, dtype):
    """Padded as an array of the layout's order, whose last dimensions are split into tiles."""
    order = data.draw(st.permutations(range(len(dims))))
    tile = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=len(dims)))
    array = parse_shape(f"{dtype}[{numbers(dims)}]{{{numbers(order)}:T({numbers(tile)})S(1)}}")
    stored = np.zeros([dims[dim] for dim in reversed(order)])
    whole = [-size % step for size, step in zip(stored.shape[::-1], tile[::-1])] + [0] * (len(dims) - len(tile))
    padded = np.pad(stored, [(0, more) for more in whole[::-1]])
    assert array.padded_bytes == math.ceil(padded.size * BITS[dtype] / 8)
    assert array.memory_space == 1


SHAPES = st.recursive(
    st.tuples(st.sampled_from(sorted(BITS)), DIMS), lambda inner: st.lists(inner, max_size=3), max_leaves=6
)


@settings(max_examples=40)
@given(SHAPES)
def test_nested_tuples_keep_their_structure(shape):
    def written(shape, number=0):
        if isinstance(shape, tuple):
            return f"{shape[0]}[{numbers(shape[1])}]"
        return (
            "("
            + ", ".join(f"/*index={i}*/{written(part)}" if i else written(part) for i, part in enumerate(shape))
            + ")"
        )

    def built(shape):
        if isinstance(shape, list):
            return tuple(map(built, shape))
        size = math.ceil(math.prod(shape[1]) * BITS[shape[0]] / 8)
        return Array(shape[0], tuple(shape[1]), size, size)

    found = parse_shape(written(shape))
    assert found == built(shape)
    assert all(isinstance(array, Array) for array in leaves(found))


@pytest.mark.parametrize("text", ["", "8,128]", "[8]", "(f32[2]"])
def test_what_is_no_shape_is_refused(text):
    with pytest.raises((ValueError, IndexError)):
        parse_shape(text)


# Products


@settings(max_examples=40)
@given(st.data(), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2))
def test_a_dot_of_any_dimensions_multiplies_and_adds_once_for_each_of_them(data, batch, contracted, left, right):
    kinds = ["b"] * batch + ["k"] * contracted + ["l"] * left + ["r"] * right
    sizes = {f"{kind}{number}": data.draw(st.integers(1, 5)) for number, kind in enumerate(kinds)}
    of = lambda letters: [name for name in sizes if name[0] in letters]
    lhs, rhs = data.draw(st.permutations(of("bkl"))), data.draw(st.permutations(of("bkr")))
    result = of("b") + [name for name in lhs if name[0] == "l"] + [name for name in rhs if name[0] == "r"]
    shapes = [f"f32[{numbers(sizes[name] for name in names)}]" for names in (lhs, rhs, result)]
    at = lambda names, letter: numbers(names.index(name) for name in of(letter))
    attributes = (
        f"lhs_batch_dims={{{at(lhs, 'b')}}}, lhs_contracting_dims={{{at(lhs, 'k')}}}, "
        f"rhs_batch_dims={{{at(rhs, 'b')}}}, rhs_contracting_dims={{{at(rhs, 'k')}}}"
    )
    expected = 2 * math.prod(sizes.values())
    assert flops(f"{shapes[2]} dot(%p0, %p1), {attributes}", *shapes[:2]) == expected
    listed = ",".join(f'"{lhs.index(name)}"' for name in of("k"))
    config = f'{{"gemm_backend_config":{{"dot_dimension_numbers":{{"lhs_contracting_dimensions":[{listed}]}}}}}}'
    call = f'({shapes[2]}, s8[64]) custom-call(%p0, %p1), custom_call_target="__cublas$gemm", backend_config={config}'
    assert flops(call, *shapes[:2]) == expected


@settings(max_examples=50)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "size": st.integers(1, 5),
                "kernel": st.integers(1, 3),
                "stride": st.integers(1, 3),
                "low": st.integers(-1, 2),
                "high": st.integers(-1, 2),
                "lhs_dilate": st.integers(1, 2),
                "rhs_dilate": st.integers(1, 2),
            }
        ),
        min_size=1,
        max_size=2,
    ),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_a_convolution_counts_the_products_of_real_inputs_only(windows, batch, features, outputs):
    """Every position of the kernel on every position of the padded, dilated input, one by one."""
    products, results = 1, []
    for window in windows:
        holes = [0] * ((window["size"] - 1) * window["lhs_dilate"] + 1)
        holes[:: window["lhs_dilate"]] = [1] * window["size"]
        line = [0] * max(0, window["low"]) + holes[max(0, -window["low"]) :] + [0] * max(0, window["high"])
        line = line[: len(line) + min(0, window["high"])]
        reach = (window["kernel"] - 1) * window["rhs_dilate"]
        starts = range(0, len(line) - reach, window["stride"])
        assume(len(starts) > 0)
        results.append(len(starts))
        products *= sum(line[s + k * window["rhs_dilate"]] for s in starts for k in range(window["kernel"]))
    of = lambda name: [window[name] for window in windows]
    each = lambda name: "x".join(map(str, of(name)))
    pads = "x".join(f"{low}_{high}" for low, high in zip(of("low"), of("high")))
    dims = "01"[: len(windows)]
    line = (
        f"f32[{numbers([batch, *results, outputs])}] convolution(%p0, %p1), window={{size={each('kernel')} "
        f"stride={each('stride')} pad={pads} lhs_dilate={each('lhs_dilate')} rhs_dilate={each('rhs_dilate')}}}, "
        f"dim_labels=b{dims}f_{dims}io->b{dims}f"
    )
    left, kernel = (
        f"f32[{numbers(sizes)}]" for sizes in ([batch, *of("size"), features], [*of("kernel"), features, outputs])
    )
    assert flops(line, left, kernel) == 2 * batch * features * outputs * products


def test_what_multiplies_no_matrices_has_no_flops():
    assert flops("f32[8,8] multiply(%p0, %p0)", "f32[8,8]") == 0
    assert flops('f32[8,8] custom-call(%p0), custom_call_target="topk"', "f32[8,8]") == 0
    assert flops("f32[8,8] convolution(%p0, %p0)", "f32[8,8]") == 0


# Loops

LOOP = """HloModule loop

%body (carry: (s32[], s32[])) -> (s32[], s32[]) {{
  %carry = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %n = s32[] get-tuple-element(%carry), index=1
  %one = s32[] constant({step})
  %next = s32[] {operation}(%i, %one)
  ROOT %out = (s32[], s32[]) tuple(%next, %n)
}}

%condition (carry.1: (s32[], s32[])) -> pred[] {{
  %carry.1 = (s32[], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %n.1 = s32[] get-tuple-element(%carry.1), index=1
  %offset = s32[] constant({offset})
  %moved = s32[] add(%i.1, %offset)
  ROOT %test = pred[] compare({operands}), direction={direction}
}}

ENTRY %main () -> (s32[], s32[]) {{
  %start = s32[] constant({start})
  %bound = s32[] constant({bound})
  %init = (s32[], s32[]) tuple(%start, %bound)
  ROOT %loop = (s32[], s32[]) while(%init), condition=%condition, body=%body
}}
"""
COMPARISONS = {
    "LT": lambda i, n: i < n,
    "LE": lambda i, n: i <= n,
    "GT": lambda i, n: i > n,
    "GE": lambda i, n: i >= n,
    "NE": lambda i, n: i != n,
}
SMALL = st.integers(-6, 6)


@settings(max_examples=100)
@given(SMALL, SMALL, st.integers(-3, 3), SMALL, st.sampled_from(sorted(COMPARISONS)), st.booleans(), st.booleans())
def test_a_loop_is_counted_as_it_runs(start, bound, step, offset, direction, subtracts, swapped):
    """A loop that does not end by itself has no count."""
    i, trips = start, 0
    while trips <= 40 and COMPARISONS[direction](*((bound, i + offset) if swapped else (i + offset, bound))):
        i, trips = i + (-step if subtracts else step), trips + 1
    operation, operands = "subtract" if subtracts else "add", "%n.1, %moved" if swapped else "%moved, %n.1"
    text = LOOP.format(**locals())
    module = parse_module(text)
    assert module.trip_count(module.entry, module.entry.root) == (trips if trips <= 40 else None)
