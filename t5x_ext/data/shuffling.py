"""A random permutation of very many items, computed range by range without storing it."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Int

# A round is two half rounds. Two rounds make every output depend on every bit of the input; this is one more.
_ROUNDS = 3


class Shuffle:
    """A random permutation of 0 to size - 1; its memory grows with the square root of `size`.

    A Feistel network (Luby and Rackoff, 1988): a number is written as two digits, and each digit in turn is increased
    by a random function of the other, modulo its base. The functions are tables of random numbers. The digits can also
    represent a few numbers >= `size`; such a result is permuted again until it is below `size`, which keeps the map
    one-to-one (cycle walking, Black and Rogaway, 2002).
    """

    def __init__(self, size: int, random: np.random.Generator):
        """`random` decides the order."""
        self._size = size
        self._high_base = math.isqrt(size - 1) + 1 if size > 1 else 1
        self._low_base = -(-size // self._high_base)
        self._tables = [
            (
                random.integers(0, self._high_base, self._low_base),
                random.integers(0, self._low_base, self._high_base),
            )
            for _ in range(_ROUNDS)
        ]

    def __call__(self, indices: Int[np.ndarray, " indices"]) -> Int[np.ndarray, " indices"]:
        """The items at these indices (0 to size - 1) of the permutation, int64."""
        numbers = self._permute(np.asarray(indices, dtype=np.int64))
        while len(outside := np.flatnonzero(numbers >= self._size)):
            numbers[outside] = self._permute(numbers[outside])
        return numbers

    def _permute(self, numbers: np.ndarray) -> np.ndarray:
        high, low = np.divmod(numbers, self._low_base)
        for to_high, to_low in self._tables:
            high += to_high[low]
            np.subtract(high, self._high_base, out=high, where=high >= self._high_base)
            low += to_low[high]
            np.subtract(low, self._low_base, out=low, where=low >= self._low_base)
        return high * self._low_base + low
