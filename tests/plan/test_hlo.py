"""Reading HLO text: forms that compilers print, each with the answer worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_ext.plan.hlo import Array, leaves, parse_module, parse_shape
from t5x_ext.plan.hlo_flops import _valid_positions
from t5x_ext.plan.hlo_groups import mesh_axes, parse_groups

LOOP = """HloModule loop, num_partitions=4, replica_count=2

%add_one (p: s32[]) -> s32[] {{
  %p = s32[] parameter(0)
  %one = s32[] constant({step})
  ROOT %sum = s32[] add(%p, %one)
}}

%less (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = pred[] compare(%a, %b), direction={direction}
}}

%body (carry: (s32[], f32[2,2], s32[])) -> (s32[], f32[2,2], s32[]) {{
  %carry = (s32[], f32[2,2]{{1,0}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %next = s32[] fusion(%i), kind=kLoop, calls=%add_one
  %x = f32[2,2]{{1,0}} get-tuple-element(%carry), index=1
  %y = f32[2,2]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %n = s32[] get-tuple-element(%carry), index=2
  ROOT %out = (s32[], f32[2,2]{{1,0}}, s32[]) tuple(%next, %y, %n)
}}

%condition (carry.1: (s32[], f32[2,2], s32[])) -> pred[] {{
  %carry.1 = (s32[], f32[2,2]{{1,0}}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %n.1 = s32[] get-tuple-element(%carry.1), index=2
  ROOT %test = pred[] fusion(%i.1, %n.1), kind=kLoop, calls=%less
}}

ENTRY %main (x.1: f32[2,2], m: s32[]) -> (s32[], f32[2,2], s32[]) {{
  %x.1 = f32[2,2]{{1,0}} parameter(0)
  %m = s32[] parameter(1)
  %start = s32[] constant({start})
  %bound = s32[] constant({bound})
  %init = (s32[], f32[2,2]{{1,0}}, /*index=2*/s32[]) tuple(%start, %x.1, {limit})
  ROOT %loop = (s32[], f32[2,2]{{1,0}}, s32[]) while(%init), condition=%condition, body=%body{known}
}}
"""


def _loop(start=0, step=1, bound=10, direction="LT", limit="%bound", known=""):
    module = parse_module(LOOP.format(**locals()))
    return module.trip_count(module.entry, module.entry.root)


@pytest.mark.parametrize(
    ("changes", "trips"),
    [
        ({}, 10),
        ({"start": 3}, 7),
        ({"start": 1, "step": 3}, 3),
        ({"direction": "LE"}, 11),
        ({"start": 10, "step": -2, "bound": 0, "direction": "GT"}, 5),
        ({"start": 12}, 0),
        ({"limit": "%m"}, None),
        ({"limit": "%m", "known": ', backend_config={"known_trip_count":{"n":"6"}}'}, 6),
    ],
)
def test_loops_tell_their_trip_count(changes, trips):
    assert _loop(**changes) == trips


def test_header_and_computations():
    module = parse_module(LOOP.format(start=0, step=1, bound=1, direction="LT", limit="%bound", known=""))
    assert (module.name, module.partitions, module.replicas) == ("loop", 4, 2)
    assert list(module.computations) == ["add_one", "less", "body", "condition", "main"]
    loop = module.entry.root
    assert (loop.name, loop.called) == ("loop", {"condition": ("condition",), "body": ("body",)})
    assert [user.name for user, _ in module.computations["body"].users["x"]] == ["y", "y"]


def test_shapes_with_layouts_tuples_and_sub_byte_types():
    assert parse_shape("bf16[8,100]{1,0:T(8,128)(2,1)S(1)}") == Array("bf16", (8, 100), 1600, 2048, memory_space=1)
    assert parse_shape("f32[3,5]{0,1:T(8,128)}").padded_bytes == 4 * 128 * 8
    assert parse_shape("s4[5]").bytes == 3
    assert parse_shape("f32[<=8,2]").dims == (8, 2)
    assert parse_shape("c64[2]").bytes == 16
    assert parse_shape("u32[]{:S(2)}") == Array("u32", (), 4, 4, memory_space=2)
    nested = parse_shape("((f8e4m3fn[4]{0}), /*index=1*/token[], pred[7])")
    assert [(array.dtype, array.bytes) for array in leaves(nested)] == [("f8e4m3fn", 4), ("token", 0), ("pred", 7)]


def test_attributes_keep_their_brackets_and_quotes():
    text = """HloModule m

ENTRY %e (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0), metadata={op_name="x[1], (y"}
  ROOT %f.1 = f32[4]{0} strange-op(%p, %p), dims={0,1}, pair={{0,1},{1,0}}, note="a,b", size=3, metadata={op_name="n"}
}
"""
    root = parse_module(text).entry.root
    assert (root.opcode, root.operands, root.op_name) == ("strange-op", ("p", "p"), "n")
    assert [root.attribute(name) for name in ("dims", "pair", "note", "size", "absent")] == [
        "{0,1}",
        "{{0,1},{1,0}}",
        '"a,b"',
        "3",
        None,
    ]
    assert root.numbers("dims") == (0, 1)


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_module("HloModule nothing\n")
    with pytest.raises(ValueError, match=r"computation e: not an HLO instruction: what\?"):
        parse_module("HloModule m\nENTRY %e () -> f32[] {\n  what?\n}\n")


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("{}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("[4,2]<=[8]", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=4] {'a','b'}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", ((3, 2), (1, 0))),
        ("mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("something new", ()),
    ],
)
def test_groups_in_every_form(text, groups):
    assert parse_groups(text, 8) == groups


def test_groups_name_mesh_axes():
    mesh = {"slices": 1, "data": 2, "fsdp": 2, "tensor": 2}
    assert mesh_axes(((0, 1), (2, 3)), mesh) == ("tensor",)
    assert mesh_axes(((0, 2, 4, 6), (1, 3, 5, 7)), mesh) == ("data", "fsdp")
    assert mesh_axes(((0, 3),), mesh) == ("fsdp", "tensor")
    assert mesh_axes(((0,), (1,)), mesh) == ()
    assert mesh_axes(((8, 9),), mesh) == ()


@given(
    st.tuples(*[st.integers(1, 7)] * 3),
    st.integers(1, 6),
    st.integers(-3, 7),
    st.integers(1, 6),
    st.integers(1, 3),
)
def test_valid_positions_of_a_window_equal_their_enumeration(sizes, stride, padding, dilation, kernel_dilation):
    size, kernel, outputs = sizes
    places = (o * stride - padding + k * kernel_dilation for k in range(kernel) for o in range(outputs))
    expected = sum(0 <= place <= (size - 1) * dilation and place % dilation == 0 for place in places)
    assert _valid_positions(size, kernel, outputs, stride, padding, dilation, kernel_dilation) == expected
