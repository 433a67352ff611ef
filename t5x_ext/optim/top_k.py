"""The k largest scores of a parameter tree, exactly, by counting, without sorting or gathering."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from numbers import Rational
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from t5x_ext.contracts import PyTree, UserError

WORD = 32
"""Bits of the integers that devices count in; larger counts are pairs of words."""


def num_kept(sparsity: float | np.floating | Fraction, total: int) -> int:
    """floor((1 - sparsity) * total), with `sparsity` taken as the decimal that was written.

    In floating point (1 - 0.9) * 580 is 57.99999999999999, one entry short. A float is rounded to the nearest decimal
    of 15 digits, so that 0.9 is nine tenths, and `1 - 0.7` three tenths.

    Args:
      sparsity: from 0 to 1; a `fractions.Fraction` if no decimal is exact.
      total: number of entries.

    >>> num_kept(0.9, 580), num_kept(Fraction(2, 3), 3)
    (58, 1)
    """
    if not isinstance(sparsity, Rational):
        sparsity = Fraction(format(float(str(sparsity)), ".15f"))
    return math.floor((1 - sparsity) * total)


def top_k_mask(scores: PyTree, k: int | Count, *, magnitude: bool = False) -> PyTree:
    """True at the k largest scores of all arrays of a tree together, and exactly k of them.

    Equal scores are taken in order: of leaves, then row by row within an array, as by a stable sort. -0.0 equals 0.0,
    denormal numbers count, infinity is largest and NaN is smaller than all others.

    The k-th largest score is found by bisection over the 32 bits of a float, highest first: each bit by counting the
    scores above a threshold. If scores are tied there, the last one taken is found by bisection over leaves and
    indices. So arrays are not moved, for any sharding, and devices exchange some tens of integers. Instead of a sort
    this takes 32 passes over the scores at memory speed and, with ties, as many more as the number of entries has bits.

    Args:
      scores: arrays of floats, any shapes; compared in float32. The tree may have more than 2^32 entries, one axis may
        not.
      k: a Python integer from 0 to the number of entries, or a `Count` that is known on the device only and in that
        range, which is not checked.
      magnitude: compare absolute values, without storing them.

    Returns:
      A tree of booleans shaped like `scores`.

    Raises:
      ValueError: if k is out of range.
      UserError: if an axis has 2^32 entries or more.

    Example:
      >>> import jax.numpy as jnp
      >>> mask = top_k_mask({"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 3.0, 2.0])}, 3)
      >>> mask["a"].tolist(), mask["b"].tolist()
      ([True, False], [True, True, False])
    """
    leaves, structure = jax.tree.flatten(scores)
    total = sum(leaf.size for leaf in leaves)
    if isinstance(k, int) and not 0 <= k <= total:
        raise ValueError(f"top_k_mask: k = {k} of {total} entries")
    if any(size >= 2**WORD for leaf in leaves for size in leaf.shape):
        raise UserError("top_k_mask: an axis has 2^32 entries or more; split it into two axes")
    if total == 0 or (isinstance(k, int) and k in (0, total)):
        return jax.tree.unflatten(structure, [jnp.full(leaf.shape, k != 0) for leaf in leaves])
    numbered = _numbered(leaves, magnitude)
    last = _last_taken(numbered, as_count(k) if isinstance(k, int) else k)
    masks = [_not_after(leaf, last) for leaf in numbered]
    return jax.tree.unflatten(structure, masks)


class Count(NamedTuple):
    """An unsigned 64-bit integer in two words; JAX has 64-bit integers only if enabled for the whole process."""

    high: UInt32[Array, ""]
    low: UInt32[Array, ""]


def as_count(value: int) -> Count:
    """A constant count."""
    return Count(jnp.uint32(value >> WORD), jnp.uint32(value & (2**WORD - 1)))


def add(a: Count, b: Count) -> Count:
    """Sum of two counts below 2^64."""
    low = a.low + b.low
    return Count(a.high + b.high + (low < a.low), low)


def subtract(a: Count, b: Count) -> Count:
    """Difference, for a >= b."""
    return Count(a.high - b.high - (a.low < b.low), a.low - b.low)


def less(a: Count, b: Count) -> Bool[Array, ""]:
    """Whether a is smaller than b."""
    return (a.high < b.high) | ((a.high == b.high) & (a.low < b.low))


def multiply(a: UInt32[Array, ""], b: UInt32[Array, ""]) -> Count:
    """The product of two words, from the four products of their halves."""
    half, low_half = WORD // 2, 2 ** (WORD // 2) - 1
    a_high, a_low, b_high, b_low = a >> half, a & low_half, b >> half, b & low_half
    low, left, right = a_low * b_low, a_high * b_low, a_low * b_high
    middle = (low >> half) + (left & low_half) + (right & low_half)
    high = a_high * b_high + (left >> half) + (right >> half) + (middle >> half)
    return Count(high, (middle << half) | (low & low_half))


def ceil_share(count: Count, share: UInt32[Array, ""]) -> Count:
    """ceil(count * share / 2^32): a part of a count, without floating point."""
    of_low, of_high = multiply(count.low, share), multiply(count.high, share)
    return add(of_high, Count(jnp.uint32(0), of_low.high + (of_low.low > 0)))


def sum_words(words: UInt32[Array, "..."]) -> Count:
    """The sum of fewer than 2^31 words, added in groups of few enough bits that no partial sum overflows."""
    bits = WORD - max(words.size, 1).bit_length()
    total = as_count(0)
    for shift in range(0, WORD, bits):
        partial = jnp.sum((words >> shift) & (2**bits - 1), dtype=jnp.uint32)
        high = partial >> (WORD - shift) if shift else jnp.uint32(0)
        total = add(total, Count(high, partial << shift))
    return total


def count_true(mask: Bool[Array, "..."]) -> Count:
    """The number of True entries, which may exceed 2^32."""
    inner = _inner_axes(mask.shape)
    words = jnp.sum(mask, axis=tuple(range(inner, mask.ndim)), dtype=jnp.uint32)
    return sum_words(words) if inner else Count(jnp.uint32(0), words)


def _inner_axes(shape: tuple[int, ...]) -> int:
    """The first axis such that this and the following ones have fewer than 2^32 entries: 0 for all but huge arrays."""
    return next(axis for axis in range(len(shape) + 1) if math.prod(shape[axis:]) < 2**WORD)


def _rank(scores: Float[Array, "..."], magnitude: bool = False) -> UInt32[Array, "..."]:
    """Integers in descending order of the scores or their magnitudes, equal for equal ones.

    Only bits are compared, because a CPU may treat denormal numbers as zero when it compares floats.
    """
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    unsigned = bits & 0x7FFFFFFF
    rank = 0x7FFFFFFF - unsigned
    if not magnitude:
        rank = jnp.where((bits != unsigned) & (unsigned != 0), bits, rank)
    return jnp.where(unsigned > 0x7F800000, jnp.uint32(0xFFFFFFFF), rank)


class _Leaf(NamedTuple):
    """An array and its index, as rows of fewer than 2^32 entries, which are numbered through the whole tree."""

    scores: Array
    first_row: int
    magnitude: bool

    @property
    def rows(self) -> int:
        return math.prod(self.scores.shape[: _inner_axes(self.scores.shape)])

    def digits(self) -> tuple[Array, Array, Array]:
        """The digits by which entries are ordered, most significant first: rank, row, column."""
        inner = _inner_axes(self.scores.shape)
        row = self._flat_index(range(inner)) + jnp.uint32(self.first_row)
        return _rank(self.scores, self.magnitude), row, self._flat_index(range(inner, self.scores.ndim))

    def _flat_index(self, axes: range) -> Array:
        index: Array = jnp.uint32(0)
        for axis in axes:
            along = jax.lax.broadcasted_iota(jnp.uint32, self.scores.shape, axis)
            index = index * jnp.uint32(self.scores.shape[axis]) + along
        return index


def _numbered(leaves: list[Array], magnitude: bool) -> list[_Leaf]:
    numbered: list[_Leaf] = []
    for leaf in leaves:
        first_row = numbered[-1].first_row + numbered[-1].rows if numbered else 0
        numbered.append(_Leaf(leaf, first_row, magnitude))
    return numbered


def _last_taken(leaves: list[_Leaf], k: Count) -> tuple[Array, ...]:
    """The digits of the entry that is k-th in their order."""
    rows = leaves[-1].first_row + leaves[-1].rows
    columns = max(leaf.scores.size // max(leaf.rows, 1) for leaf in leaves)
    rank, missing = _next_digit(leaves, (), WORD, k)

    def among_ties() -> tuple[Array, ...]:
        row, wanted = _next_digit(leaves, (rank,), (rows - 1).bit_length(), missing)
        column, _ = _next_digit(leaves, (rank, row), (columns - 1).bit_length(), wanted)
        return rank, row, column

    def all_ties() -> tuple[Array, ...]:
        return rank, jnp.uint32(rows), jnp.uint32(0)

    ties = _count(leaves, (rank,), lambda row: row < rows)
    return jax.lax.cond(less(missing, ties), among_ties, all_ties)


def _next_digit(leaves: list[_Leaf], last: tuple[Array, ...], bits: int, wanted: Count) -> tuple[Array, Count]:
    """Of entries that begin with the digits `last`: the next digit of the wanted one, and its index among equal ones.

    That is the smallest digit that at least `wanted` entries do not exceed, found from its highest bit on.
    """

    def halve(step: Array, found: tuple[Array, Count]) -> tuple[Array, Count]:
        middle = found[0] + (jnp.uint32(1) << (bits - 1 - step).astype(jnp.uint32))
        # Depends on the step; otherwise XLA hoists the ranks out of the loop and keeps a copy of all scores.
        scores, middle = jax.lax.optimization_barrier(([leaf.scores for leaf in leaves], middle))
        at_hand = [leaf._replace(scores=array) for leaf, array in zip(leaves, scores, strict=True)]
        count = _count(at_hand, last, lambda other: other < middle)
        return jax.tree.map(lambda upper, lower: jnp.where(less(count, wanted), upper, lower), (middle, count), found)

    digit, below = jax.lax.fori_loop(0, bits, halve, (jnp.uint32(0), as_count(0)))
    return digit, subtract(wanted, below)


def _count(leaves: list[_Leaf], last: tuple[Array, ...], condition: Callable[[Array], Array]) -> Count:
    """How many entries begin with the digits `last` and have a next digit that satisfies the condition."""
    total = as_count(0)
    for leaf in leaves:
        digits = leaf.digits()
        chosen = jnp.broadcast_to(condition(digits[len(last)]), leaf.scores.shape)
        for digit, wanted in zip(digits, last, strict=False):
            chosen &= digit == wanted
        total = add(total, count_true(chosen))
    return total


def _not_after(leaf: _Leaf, last: tuple[Array, ...]) -> Bool[Array, "..."]:
    """Whether entries come no later than the last one in the order of their digits."""
    rank, row, column = leaf.digits()
    last_rank, last_row, last_column = last
    earlier_tie = (row < last_row) | ((row == last_row) & (column <= last_column))
    return (rank < last_rank) | ((rank == last_rank) & earlier_tie)
