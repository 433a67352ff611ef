"""The bound: formulas against worked examples and against routing every byte by hand."""

from __future__ import annotations

import itertools

import pytest

from t5x_ext.parallel.hardware import HARDWARE
from t5x_ext.plan import Collective, CollectiveOp, HloReport, mfu_bound, roofline
from t5x_ext.plan.roofline import Ring, _Network

V5E = HARDWARE["v5e"]
GB = 10**9


def _report(*collectives, flops=0.0, bytes_accessed=0.0):
    return HloReport(flops, bytes_accessed, collectives, (), ())


def _grid(*sizes):
    return list(itertools.product(*map(range, sizes)))


def _seconds(kind, axes, group_size, mesh_shape, coordinates=None, hardware=V5E, payload=GB):
    collective = Collective(kind, axes, group_size, "bf16", 1, payload)
    return _Network(hardware, mesh_shape, coordinates).time(collective)


def test_rings_of_mesh_axes_that_take_whole_axes_of_the_torus():
    network = _Network(V5E, {"data": 8, "fsdp": 8}, _grid(8, 8, 1))
    assert network.rings(("fsdp",)) == (Ring(8, 45e9),)
    assert network.rings(("data", "fsdp")) == (Ring(8, 45e9), Ring(8, 45e9))
    closed = _Network(V5E, {"fsdp": 256}, _grid(16, 16))
    assert closed.rings(("fsdp",)) == (Ring(16, 90e9), Ring(16, 90e9))


def test_groups_that_interleave_share_links():
    places = [[*place] for place in _grid(8, 8)]
    # fsdp takes the first axis and every fourth place of the second; tensor four neighbours on the second.
    mesh = {"fsdp": 16, "tensor": 4}
    ordered = [[x, 4 * half + y] for x in range(8) for half in range(2) for y in range(4)]
    assert sorted(ordered) == places
    network = _Network(V5E, mesh, ordered)
    assert network.rings(("fsdp",)) == (Ring(8, 45e9), Ring(2, 45e9 / 4))
    assert network.rings(("tensor",)) == (Ring(4, 45e9),)
    # Two interleaved groups of 8 on a closed ring of 16 are closed too, and have half of it each.
    interleaved = _Network(V5E, {"fsdp": 8, "tensor": 2}, [[x, 0] for x in range(16)])
    assert interleaved.rings(("fsdp",)) == (Ring(8, 45e9),)


def test_gathers_and_reductions_are_those_of_the_book():
    mesh, places = {"data": 1, "fsdp": 64}, _grid(8, 8)
    gather = _seconds("all-gather", ("fsdp",), 64, mesh, places).seconds
    assert gather == pytest.approx(GB * 63 / 64 / 90e9)
    assert _seconds("reduce-scatter", ("fsdp",), 64, mesh, places).seconds == gather
    assert _seconds("all-reduce", ("fsdp",), 64, mesh, places).seconds == 2 * gather
    # Along a closed axis the book's V / W_bidirectional, apart from its leaving out (n - 1) / n.
    ring = _seconds("all-gather", ("fsdp",), 16, {"fsdp": 16}, [[x, 0] for x in range(16)]).seconds
    assert ring == pytest.approx(15 / 16 * GB / 9e10)


def _busiest_link(size, closed, payload):
    """Bytes over the busiest link one way when every device sends `payload / size` to each, by the shortest way."""
    loads = {}
    for source, target in itertools.permutations(range(size), 2):
        forward = (target - source) % size
        ways = [(1, target - source)] if target > source else [(-1, source - target)]
        if closed:
            shortest = min(forward, size - forward)
            ways = [way for way in ((1, forward), (-1, size - forward)) if way[1] == shortest]
        for direction, steps in ways:
            for step in range(steps):
                link = (source + direction * step) % size, direction
                loads[link] = loads.get(link, 0) + payload / size / len(ways)
    return max(loads.values())


@pytest.mark.parametrize(("size", "closed"), [(2, False), (4, False), (8, False), (16, True), (32, True)])
def test_all_to_all_is_the_busiest_link(size, closed):
    time = _seconds("all-to-all", ("fsdp",), size, {"fsdp": size}, [[x, 0] for x in range(size)])
    assert time.seconds == pytest.approx(_busiest_link(size, closed, GB) / 45e9)


def test_a_permutation_takes_one_link():
    time = _seconds("collective-permute", ("fsdp",), 8, {"fsdp": 8}, [[x, 0] for x in range(8)])
    assert time.seconds == GB / 45e9


def test_gpus_send_through_a_switch():
    h100, mesh = HARDWARE["h100"], {"slices": 2, "fsdp": 8}
    for kind, share in (("all-gather", 7 / 8), ("all-reduce", 7 / 4), ("all-to-all", 7 / 8), ("collective-permute", 1)):
        time = _seconds(kind, ("fsdp",), 8, mesh, hardware=h100)
        assert (time.seconds, time.slice_seconds) == (pytest.approx(GB * share / 450e9), 0)
    with pytest.raises(ValueError, match="put nodes on the mesh axis 'slices'"):
        roofline(_report(), h100, {"slices": 1, "fsdp": 16})
    with pytest.raises(ValueError, match="coordinates are needed"):
        roofline(_report(), V5E, {"fsdp": 8})


def test_slices_exchange_only_what_each_device_holds():
    mesh, places = {"slices": 2, "fsdp": 16}, 2 * _grid(4, 4)
    whole = _seconds("all-reduce", ("slices", "fsdp"), 32, mesh, places)
    part = _seconds("all-reduce", ("slices",), 2, mesh, places, payload=GB / 16)
    assert whole.slice_seconds == part.slice_seconds == pytest.approx(2 * GB / 16 / 2 / V5E.slice_network_bandwidth)
    assert (part.seconds, whole.seconds) == (0, pytest.approx(2 * GB * 15 / 16 / 90e9))


def test_groups_unknown_to_the_mesh_are_taken_for_all_devices():
    mesh, places = {"data": 2, "fsdp": 4}, _grid(2, 4)
    unknown, known = (_seconds("all-gather", axes, 8, mesh, places) for axes in ((), ("data", "fsdp")))
    assert unknown.seconds == known.seconds


def test_overlapped_and_serial_bounds():
    gather = CollectiveOp("all-gather", ("fsdp",), 8, "bf16", (8, 8), 45 * GB, 2.0, "g", "")
    report = _report(gather, flops=1.97e14, bytes_accessed=819e9 / 2)
    bound = roofline(report, V5E, {"fsdp": 8}, _grid(8, 1))
    assert (bound.compute_seconds, bound.hbm_seconds, bound.slice_network_seconds) == (1, 0.5, 0)
    assert bound.network_seconds == pytest.approx(2 * 7 / 8)
    assert bound.overlapped == pytest.approx(1.75)
    assert bound.serial == pytest.approx(2.75)
    assert mfu_bound(8 * 1.97e14 / 2, bound.overlapped, V5E, 8) == pytest.approx(0.5 / 1.75)
