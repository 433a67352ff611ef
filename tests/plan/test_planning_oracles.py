"""Plans against counting by hand: every layout there is, every link that groups share, figures as people read them."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_ext.models.config import Remat
from t5x_ext.parallel.hardware import HARDWARE
from t5x_ext.plan import Collective
from t5x_ext.plan.report import amount, bar, duration, table
from t5x_ext.plan.roofline import Ring, _Network
from t5x_ext.plan.search import candidates
from t5x_ext.plan.topology import Target

V5E, V4, H100 = HARDWARE["v5e"], HARDWARE["v4"], HARDWARE["h100"]
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@pytest.mark.parametrize(("rows", "heads", "devices", "slices"), [(48, 4, 8, 1), (16, 8, 16, 2), (60, 6, 12, 1)])
def test_candidates_are_all_layouts_that_divide_what_they_share(make_run, rows, heads, devices, slices):
    target = Target("h100", [None] * devices, "h100", H100, (devices // slices,), slices, 10**9, is_compiled_for=False)
    model = {"num_heads": heads, "embed_dim": 8 * heads}
    found = {
        (one.mesh.slices, one.mesh.data, one.mesh.fsdp, one.mesh.tensor, one.remat, one.num_microbatches)
        for one in candidates(make_run(rows=rows, model=model), target)
    }
    sizes, counts = range(1, devices + 1), [2**power for power in range(7)]
    assert found == {
        (slices, data, fsdp, tensor, remat, count)
        for data, fsdp, tensor in itertools.product(sizes, repeat=3)
        for remat, count in itertools.product(get_args(Remat), counts)
        if slices * data * fsdp * tensor == devices
        and heads % tensor == 0
        and tensor <= 8
        and rows % (slices * data * fsdp * count) == 0
    }


# The network


def seconds(hardware, mesh, coordinates, kind, axes, payload):
    devices = math.prod(mesh[name] for name in axes)
    time = _Network(hardware, mesh, coordinates).time(Collective(kind, axes, devices, "bf16", 1, payload))
    return time.seconds + time.slice_seconds


@st.composite
def laid_out(draw):
    """A torus whose dimensions are axes of a mesh, or products of two."""
    mesh, topology = {}, []
    for number in range(draw(st.integers(1, 3))):
        outer, inner = draw(st.sampled_from([(1, 4), (2, 2), (4, 1), (4, 4), (2, 8), (1, 2)]))
        mesh |= {f"{number}o": outer, f"{number}i": inner}
        topology.append(outer * inner)
    return mesh, list(itertools.product(*map(range, topology)))


@settings(max_examples=40)
@given(laid_out(), st.data(), st.sampled_from(KINDS))
def test_the_order_of_mesh_axes_is_only_the_order_in_which_devices_are_listed(drawn, data, kind):
    mesh, coordinates = drawn
    axes = tuple(name for name in mesh if mesh[name] > 1 and data.draw(st.booleans()))
    order = data.draw(st.permutations(list(mesh)))
    places = dict(zip(itertools.product(*map(range, mesh.values())), coordinates))
    names = list(mesh)
    listed = [
        places[tuple(place[order.index(name)] for name in names)]
        for place in itertools.product(*(range(mesh[name]) for name in order))
    ]
    other = {name: mesh[name] for name in order}
    moved = tuple(name for name in order if name in axes)
    if axes:
        one, two = seconds(V4, mesh, coordinates, kind, axes, 1e9), seconds(V4, other, listed, kind, moved, 1e9)
        assert one == pytest.approx(two)
        assert one > 0


@settings(max_examples=40)
@given(laid_out(), st.data())
def test_times_are_in_proportion_and_a_reduction_is_scattered_and_gathered(drawn, data):
    mesh, coordinates = drawn
    axes = tuple(name for name in mesh if mesh[name] > 1 and data.draw(st.booleans()))
    if not axes:
        return
    times = {kind: seconds(V5E, mesh, coordinates, kind, axes, 1e9) for kind in KINDS}
    assert times["all-reduce"] == pytest.approx(times["reduce-scatter"] + times["all-gather"])
    for kind, time in times.items():
        assert seconds(V5E, mesh, coordinates, kind, axes, 3e9) == pytest.approx(3 * time)


def busiest(members, size, closed):
    """Of groups on an axis, each joined in a line or, where it may close, a ring: groups on the busiest link."""
    loads = dict.fromkeys(range(size), 0)
    for group in members:
        end = group[0] + size if closed else group[-1]
        for link in range(group[0], end):
            loads[link % size] += 1
    return max(loads.values())


@pytest.mark.parametrize("size", [4, 8, 12, 16, 32])
def test_groups_that_interleave_share_the_links_of_their_axis(size):
    closed = size % V5E.wrap_multiple == 0
    for near in (step for step in range(1, size) if size % step == 0):
        mesh = {"far": size // near, "near": near}
        network = _Network(V5E, mesh, [[place] for place in range(size)])
        groups = [list(range(first, size, near)) for first in range(near)]
        bandwidth = (1 + closed) * V5E.link_bandwidth / busiest(groups, size, closed)
        assert network.rings(("far",)) == (Ring(size // near, bandwidth),)
        if near > 1:
            assert network.rings(("near",)) == (Ring(near, V5E.link_bandwidth),), "neighbours share nothing"


@given(st.integers(2, 8), st.integers(1, 4), st.sampled_from(KINDS))
def test_between_nodes_a_gpu_sends_its_own_part_of_what_is_gathered(gpus, nodes, kind):
    mesh = {"slices": nodes, "fsdp": gpus}
    collective = Collective(kind, ("slices", "fsdp"), nodes * gpus, "bf16", 1, 8e9)
    time = _Network(H100, mesh, None).time(collective)
    passes = {"all-reduce": 2}.get(kind, 1)
    share = lambda count: (count > 1) if kind == "collective-permute" else passes * (count - 1) / count
    part = 8e9 / gpus if kind in ("all-gather", "reduce-scatter", "all-reduce") else 8e9
    assert time.seconds == pytest.approx(8e9 * share(gpus) / H100.link_bandwidth)
    assert time.slice_seconds == pytest.approx(part * share(nodes) / H100.slice_network_bandwidth)


# Figures

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "us": 1e-6, "ms": 1e-3, "s": 1.0}


def read(text):
    number, unit = text.split()
    return float(number.replace(",", "")) * UNITS[unit], UNITS[unit]


@given(st.integers(0, 2**50))
def test_amounts_are_right_to_half_of_what_they_show(size):
    value, unit = read(amount(size))
    assert abs(value - size) <= 0.5001 * unit
    assert size == 0 or value > 0


@given(st.floats(1e-9, 1e7))
def test_durations_are_right_to_three_decimals(time):
    value, unit = read(duration(time))
    assert abs(value - time) <= 0.00051 * unit


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(1, 60))
def test_a_bar_is_full_with_an_arrow_exactly_where_the_size_is_larger(size, whole, width):
    drawn = bar(size, whole, width)
    assert drawn.endswith(">") == (size > whole)
    assert len(drawn.rstrip(">")) == width
    filled = drawn.count("#")
    assert abs(filled - min(1, size / whole) * width) <= 0.5
    assert bar(size, whole, width).startswith("#" * filled)


@given(
    st.lists(st.tuples(st.text("ab", min_size=1), st.text("0123", min_size=1), st.text("xy", min_size=1)), min_size=1)
)
def test_columns_of_a_table_are_aligned_and_nothing_is_lost(rows):
    lines = table(rows)
    assert [tuple(line.split()) for line in lines] == rows
    assert len({len(line) for line in lines}) == 1, "the last column ends every line"
    assert all(line.startswith(row[0]) for line, row in zip(lines, rows))
