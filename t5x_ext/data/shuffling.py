"""A random order of very many things, asked for a stretch at a time, without holding it."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Int

# Two half rounds make a round; three are more than the two that make every place depend on every bit of a number.
_ROUNDS = 3


class Shuffle:
    """A random permutation of 0 to size - 1 that takes memory of the square root of `size`.

    A Feistel network over pairs (Luby and Rackoff, 1988): a number is written as two digits, and in turns each digit
    has a random function of the other one added to it, modulo its base. The functions are tables of random numbers.
    The digits can write a few numbers of `size` or more; where one of these comes out it is put in again until one
    below comes out, which keeps the map one-to-one (cycle walking, Black and Rogaway, 2002).
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

    def __call__(self, places: Int[np.ndarray, " places"]) -> Int[np.ndarray, " places"]:
        """What stands in these places (0 to size - 1) of the order, int64."""
        numbers = self._permute(np.asarray(places, dtype=np.int64))
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
