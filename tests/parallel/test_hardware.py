"""The table of accelerators: figures that must hold together."""

from __future__ import annotations

import pytest

from t5x_ext.parallel import HARDWARE, hardware_of


@pytest.mark.parametrize("name", HARDWARE)
def test_figures_hold_together(name):
    """Oracle: orders of magnitude, and memory faster than links faster than the network between slices."""
    hardware = HARDWARE[name]
    assert hardware.name == name
    assert 1e14 < hardware.peak_flops < 2e15
    assert 10e9 < hardware.hbm_bytes < 200e9
    links = hardware.link_bandwidth * max(1, 2 * hardware.torus_dimensions)
    assert hardware.hbm_bandwidth > links > hardware.slice_network_bandwidth
    # Cloud TPU and NVIDIA parts need 100 to 600 FLOPs for a byte to be bound by compute.
    assert 100 < hardware.peak_flops / hardware.hbm_bandwidth < 600
    assert hardware.source


def test_devices_are_known_by_kind():
    kinds = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "NVIDIA H200": "h200"}
    assert {kind: hardware_of(kind).name for kind in kinds} == kinds
    assert hardware_of("cpu") is None
    assert hardware_of("NVIDIA H100 PCIe") is None


def test_rings_close_where_the_pod_closes_them():
    assert HARDWARE["v5e"].wraps((16, 16)) == (True, True)
    assert HARDWARE["v6e"].wraps((8, 8)) == (False, False)
    assert HARDWARE["v5e"].wraps((8, 16)) == (False, True)
    assert HARDWARE["v5p"].wraps((4, 4, 8)) == (True, True, True)
    # Optical switches join whole cubes only.
    assert HARDWARE["v4"].wraps((2, 4, 4)) == (False, False, False)
    assert HARDWARE["h100"].wraps((8,)) == (False,)
