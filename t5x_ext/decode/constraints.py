"""Constraints on what a hypothesis may say, as functions on logits (`Constraint`); any search applies them alike."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_ext.contracts import UserError
from t5x_ext.decode.checks import at_least


@dataclass(frozen=True)
class MinimumLength:
    """A hypothesis has at least `n` tokens before its end of sentence, forced prefix not counted.

    Attributes:
      n: tokens; a maximum length that leaves less room comes first.

    Raises:
      UserError: for less than 1, at construction.
    """

    n: int

    def __post_init__(self) -> None:
        at_least("n", self.n, 1)

    def __call__(
        self, logits: Float[Array, "rows vocab"], tokens: Int[Array, "rows length"], position: Int[Array, ""]
    ) -> Float[Array, "rows vocab"]:
        """Forbids the end of sentence until then."""
        end = jnp.take(tokens, position, axis=1, mode="clip")
        is_end = jnp.arange(logits.shape[-1]) == end[:, None]
        return jnp.where(is_end & (position < self.n), -jnp.inf, logits)


@dataclass(frozen=True)
class ForbidTokens:
    """No hypothesis holds any of these tokens.

    Attributes:
      ids: of the vocabulary.

    Raises:
      UserError: without ids and for ids below 0, at construction; in a search for ids beyond the vocabulary.
    """

    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.ids or min(self.ids) < 0:
            raise UserError(f"ids = {self.ids}: must be ids of tokens, 0 or more")

    def __call__(
        self, logits: Float[Array, "rows vocab"], tokens: Int[Array, "rows length"], position: Int[Array, ""]
    ) -> Float[Array, "rows vocab"]:
        """Forbids them."""
        size = logits.shape[-1]
        if max(self.ids) >= size:
            raise UserError(f"ForbidTokens: id {max(self.ids)} is beyond the vocabulary of {size}")
        return jnp.where(np.isin(np.arange(size), self.ids), -jnp.inf, logits)


@dataclass(frozen=True)
class NoRepeatNgrams:
    """No sequence of `n` tokens occurs twice in a hypothesis, forced prefix not counted.

    Attributes:
      n: tokens; 1: no token occurs twice.

    Raises:
      UserError: for less than 1, at construction.
    """

    n: int

    def __post_init__(self) -> None:
        at_least("n", self.n, 1)

    def __call__(
        self, logits: Float[Array, "rows vocab"], tokens: Int[Array, "rows length"], position: Int[Array, ""]
    ) -> Float[Array, "rows vocab"]:
        """Forbids what followed an earlier occurrence of the last `n - 1` tokens."""
        windows = tokens.shape[1] - self.n + 1
        if windows < 1:
            return logits
        # A window is a sequence of n tokens that are all chosen; its first n - 1 are compared with the last ones.
        occurs = jnp.broadcast_to(jnp.arange(windows) + self.n <= position, (tokens.shape[0], windows))
        for offset in range(self.n - 1):
            last = jnp.take(tokens, position - (self.n - 1) + offset, axis=1, mode="clip")
            occurs &= tokens[:, offset : offset + windows] == last[:, None]
        lower = lambda row, following, where: row.at[following].min(jnp.where(where, -jnp.inf, jnp.inf))
        return jax.vmap(lower)(logits, tokens[:, self.n - 1 :], occurs)
