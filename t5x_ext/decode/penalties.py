"""Length penalties: what the log-probability of a hypothesis is divided by."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_ext.contracts import UserError

LengthPenalty: TypeAlias = Callable[[Int[Array, "..."]], Float[Array, "..."]]
"""Length in tokens -> divisor of the log-probability; never falls as the length grows, and is positive."""


def fairseq_penalty(alpha: float) -> LengthPenalty:
    """The divisor `length ** alpha`; `alpha=1` scores by the mean log-probability of a token, `alpha=0` by the sum.

    As in fairseq (`SequenceGenerator.finalize_hypos`) the length counts the end-of-sentence token and the forced
    prefix, whose log-probabilities the numerator holds too.

    >>> float(fairseq_penalty(0.5)(jnp.array(16)))
    4.0
    """
    return lambda length: jnp.asarray(length, jnp.float32) ** alpha


def gnmt_penalty(alpha: float) -> LengthPenalty:
    """The divisor `((5 + length) / 6) ** alpha` of GNMT (arXiv 1609.08144, equation 14); same length as fairseq's.

    >>> float(gnmt_penalty(1.0)(jnp.array(7)))
    2.0
    """
    return lambda length: ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** alpha


_PENALTIES: dict[str, Callable[[float], LengthPenalty]] = {"fairseq": fairseq_penalty, "gnmt": gnmt_penalty}


def length_penalty(name: str, alpha: float) -> LengthPenalty:
    """The penalty of a name and its exponent.

    Raises:
      UserError: for another name, and for an exponent below 0.
    """
    if name not in _PENALTIES:
        raise UserError(f"length_penalty = {name!r}: must be one of {', '.join(_PENALTIES)}")
    if not alpha >= 0:
        raise UserError(f"alpha = {alpha}: the length penalty's exponent must be 0 or more")
    return _PENALTIES[name](alpha)
