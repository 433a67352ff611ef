"""Sampling with temperature, top-k and top-p."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_ext.contracts import Params, UserError
from t5x_ext.decode.checks import at_least
from t5x_ext.decode.penalties import length_penalty
from t5x_ext.decode.search import Hypotheses, SearchInputs
from t5x_ext.decode.steps import TopK, decoding_steps, rollout, row_top_k


@dataclass(frozen=True)
class Sample:
    """Independent samples from the model's truncated distribution.

    Sample i of a row depends on the seed, the row's id, i and the row's own logits, so that it changes neither with
    its neighbours in the batch nor with the number of samples. Samples are returned in this order, not by score, and
    several may be equal. Scores are log-probabilities of the whole model, at temperature 1 and untruncated, over the
    length penalty.

    Attributes:
      n_best: samples of each source.
      temperature: divides the logits, before truncation; above 0.
      top_k: sample from the k most probable tokens; 0 is all (arXiv 1805.04833).
      top_p: sample from the fewest most probable tokens that reach this probability; 1 is all (arXiv 1904.09751).
      seed: of the random numbers.
      length_penalty: what a score is divided by, see `Beam`.
      alpha: exponent of the length penalty.

    Raises:
      UserError: for values that no distribution follows from, at construction.
    """

    n_best: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    length_penalty: Literal["fairseq", "gnmt"] = "fairseq"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        at_least("n_best", self.n_best, 1)
        if not self.temperature > 0:
            raise UserError(
                f"temperature = {self.temperature}: must be above 0; for the most probable token use Greedy"
            )
        if self.top_k < 0:
            raise UserError(f"top_k = {self.top_k}: must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: must be above 0 and at most 1")
        length_penalty(self.length_penalty, self.alpha)

    @property
    def rows_per_source(self) -> int:
        """One for each sample."""
        return self.n_best

    def __call__(self, model: Any, params: Params, inputs: SearchInputs) -> Hypotheses:
        """Samples, see `Search`."""
        step, cache = decoding_steps(self, model, params, inputs)
        keys = self._keys(inputs)
        find_top = row_top_k(model)

        def choose(logits: Float[Array, "rows vocab"], position: Int[Array, ""]) -> Int[Array, " rows"]:
            kept = truncate_logits(logits.astype(jnp.float32) / self.temperature, self.top_k, self.top_p, find_top)
            return jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, position), row))(keys, kept)

        repeat = partial(jnp.repeat, repeats=self.n_best, axis=0)
        each = inputs._replace(prefix=repeat(inputs.prefix), max_lengths=repeat(inputs.max_lengths))
        samples = rollout(choose, step, cache, each, length_penalty(self.length_penalty, self.alpha))
        rows = inputs.prefix.shape[0]
        return jax.tree.map(lambda leaf: leaf.reshape(rows, self.n_best, *leaf.shape[2:]), samples)

    def _keys(self, inputs: SearchInputs) -> Array:
        """A random key for each sample, [rows * n_best]."""
        fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        of_rows = fold_in(inputs.key, inputs.row_ids)
        return jax.vmap(fold_in, in_axes=(0, None))(of_rows, jnp.arange(self.n_best)).reshape(-1)


def truncate_logits(
    logits: Float[Array, "rows vocab"], top_k: int, top_p: float, find_top: TopK = jax.lax.top_k
) -> Float[Array, "rows vocab"]:
    """Puts -inf where a token is neither among the k best nor needed to reach probability `top_p` among those.

    The best token always stays. Tokens tied with the last one kept stay too.
    """
    if top_k:
        worst = find_top(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < worst, -jnp.inf, logits)
    if top_p < 1.0:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ranked, axis=-1)
        needed = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
        worst = jnp.min(jnp.where(needed, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < worst, -jnp.inf, logits)
    return logits
