"""Greedy search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp

from t5x_ext.contracts import Params
from t5x_ext.decode.penalties import length_penalty
from t5x_ext.decode.search import Hypotheses, OneHypothesis, SearchInputs
from t5x_ext.decode.steps import decoding_steps, rollout


@dataclass(frozen=True)
class Greedy(OneHypothesis):
    """The most probable token at every position: `Beam(beam_size=1)` without its bookkeeping.

    Attributes:
      length_penalty: what a score is divided by, see `Beam`.
      alpha: exponent of the length penalty.

    Raises:
      UserError: for values outside their range, at construction.
    """

    length_penalty: Literal["fairseq", "gnmt"] = "fairseq"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        length_penalty(self.length_penalty, self.alpha)

    def __call__(self, model: Any, params: Params, inputs: SearchInputs) -> Hypotheses:
        """Searches, see `Search`."""
        step, cache = decoding_steps(self, model, params, inputs)
        choose = lambda logits, _: jnp.argmax(logits, axis=-1)
        return rollout(choose, step, cache, inputs, length_penalty(self.length_penalty, self.alpha))
