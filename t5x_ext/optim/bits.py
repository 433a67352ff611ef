"""Masks of parameters with one bit an entry, in shapes that can be sharded like the parameters."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt8

BYTE = 8


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a packed mask: that of the parameter with one axis divided by 8, rounded up.

    The axis is the one for which rounding wastes least, of equal ones the longest. If a mesh divides it into whole
    bytes, as it does for all but tiny arrays, the mask is sharded like the parameter, and no bit leaves its device.

    >>> packed_shape((6, 512, 2048)), packed_shape((64, 3)), packed_shape(())
    ((6, 512, 256), (8, 3), (1,))
    """
    shape = shape or (1,)
    axis = _packed_axis(shape)
    return *shape[:axis], -(-shape[axis] // BYTE), *shape[axis + 1 :]


def pack(mask: Bool[Array, "..."]) -> UInt8[Array, "..."]:
    """Packs eight neighbours along one axis into a byte, the first in its lowest bit; see `packed_shape`."""
    mask = jnp.atleast_1d(mask)
    return jnp.packbits(mask, axis=_packed_axis(mask.shape), bitorder="little")


def unpack(words: UInt8[Array, "..."], shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """The inverse of `pack` for a mask of this shape."""
    axis = _packed_axis(shape or (1,))
    count = (shape or (1,))[axis]
    return jnp.unpackbits(words, axis=axis, count=count, bitorder="little").astype(bool).reshape(shape)


def _packed_axis(shape: tuple[int, ...]) -> int:
    waste = lambda axis: -shape[axis] % BYTE / max(shape[axis], 1)
    return min(range(len(shape)), key=lambda axis: (waste(axis), -shape[axis], -axis))
