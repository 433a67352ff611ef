"""The mesh axes of a collective, from the device groups in its HLO text, which have four forms."""

from __future__ import annotations

import itertools
import math
import re
from functools import lru_cache

import numpy as np

_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, ?device_ids=\((.*)\))? ?\{(.*)\}$")
_MESH_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$")
_AXIS_SIZE = re.compile(r"'?([\w.-]+)'?=(\d+)")
_AXIS_PART = re.compile(r"'?([\w.-]+)'?(?::\((\d+)\)(\d+))?(?:,|$)")


@lru_cache(maxsize=4096)
def parse_groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Groups of device numbers from the value of `replica_groups` or `source_target_pairs`.

    The forms: `{{0,1},{2,3}}`; `{}` for one group of all; `[2,4]<=[4,2]T(1,0)`, an iota of the second shape,
    transposed and split into rows; and `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`, the named axes of a grid of
    devices, where `'b':(2)2` is the part of `b` that remains after a factor 2 and has size 2. Any other form gives no
    groups.

    >>> parse_groups("[2,2]<=[2,2]T(1,0)", 4)
    ((0, 2), (1, 3))
    """
    text = text.strip()
    iota = _IOTA.match(text)
    mesh = _MESH.match(text)
    if iota:
        return _rows(_iota(iota[2], iota[3]).reshape(_dims(iota[1])))
    if mesh:
        return _rows(_mesh_groups(mesh[1], mesh[2], mesh[3], devices))
    if text == "{}":
        return (tuple(range(devices)),)
    return tuple(tuple(map(int, re.findall(r"\d+", group))) for group in re.findall(r"\{([\d, ]+)\}", text))


def mesh_axes(groups: tuple[tuple[int, ...], ...], mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """The axes along which the members of a group differ, outermost first; devices are numbered in mesh order.

    >>> mesh_axes(((0, 2), (1, 3)), {"data": 2, "fsdp": 2})
    ('data',)
    """
    sizes = tuple(mesh_shape.values())
    differs = np.zeros(len(sizes), bool)
    for group in groups:
        if max(group) >= math.prod(sizes):
            return ()
        coordinates = np.stack(np.unravel_index(np.asarray(group), sizes))
        differs |= (coordinates != coordinates[:, :1]).any(axis=1)
    return tuple(itertools.compress(mesh_shape, differs))


def _dims(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _iota(dims: str, order: str | None) -> np.ndarray:
    shape = _dims(dims)
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_dims(order)) if order else ids


def _rows(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, groups.reshape(-1, groups.shape[-1]).tolist()))


def _mesh_groups(axes: str, device_ids: str | None, reduced: str, devices: int) -> np.ndarray:
    """[groups, members] of a grid of devices with named axes, grouped along the `reduced` ones."""
    sizes = {name: int(size) for name, size in _AXIS_SIZE.findall(axes)}
    parts = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in _AXIS_PART.findall(reduced)}
    # Every axis becomes three: before the part, the part, after the part.
    split = [
        (before, part, size // (before * part))
        for size, (before, part) in ((size, parts.get(name, (1, 1))) for name, size in sizes.items())
    ]
    order = _MESH_ORDER.search(device_ids) if device_ids else None
    explicit = np.array(re.findall(r"\d+", device_ids), int) if device_ids and not order else np.arange(devices)
    ids = (_iota(order[1], order[2]) if order else explicit).reshape([n for sizes in split for n in sizes])
    inner = [3 * list(sizes).index(name) + 1 for name in parts]
    outer = [axis for axis in range(ids.ndim) if axis not in inner]
    members = math.prod(ids.shape[axis] for axis in inner)
    return ids.transpose(outer + inner).reshape(-1, members)
