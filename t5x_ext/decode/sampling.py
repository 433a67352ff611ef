"""Sampling with temperature, top-k and top-p over a `tokens_to_logits` callable."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_ext.contracts import Cache, TokensToLogits, UserError
from t5x_ext.decode.search import Hypotheses, LengthPenalty, TopK, rollout


def sample(
    tokens_to_logits: TokensToLogits,
    cache: Cache,
    rows: int,
    *,
    key: Array,
    row_ids: Int[Array, " rows"],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    max_length: int,
    eos_id: int,
    prefix: Int[Array, "rows prefix"] | None = None,
    length_penalty: LengthPenalty | None = None,
    max_lengths: Int[Array, " rows"] | None = None,
    find_top: TopK = jax.lax.top_k,
) -> Hypotheses:
    """Draws one sequence a row from the model's truncated distribution.

    The token at a position depends on the key, the row's id, the position and the row's own logits, so that a
    sentence's sample does not change with its neighbours in the batch.

    Args:
      tokens_to_logits: one decoding step over `rows` rows.
      cache: leaves [layers, rows, ...].
      rows: sentences sampled side by side.
      key: a random key.
      row_ids: an integer for each row, the line's number for example; equal ids draw equal noise.
      temperature: divides the logits, before truncation; above 0.
      top_k: keeps the k most probable tokens; 0 keeps all (arXiv 1805.04833).
      top_p: keeps the fewest most probable tokens that reach this probability; 1 keeps all (arXiv 1904.09751).
      max_length: as in `beam_search`, like all that follows.
      eos_id: the end-of-sentence token.
      prefix: forced tokens.
      length_penalty: divides the score.
      max_lengths: a maximum for each row.
      find_top: how the best are found, see `TopK`.

    Returns:
      `Hypotheses` with n_best 1; scores are log-probabilities of the whole model, at temperature 1 and untruncated.
    """
    check_sampling(temperature, top_k, top_p)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(row_ids)

    def choose(logits: Float[Array, "rows vocab"], position: Int[Array, ""]) -> Int[Array, " rows"]:
        kept = truncate_logits(logits.astype(jnp.float32) / temperature, top_k, top_p, find_top)
        return jax.vmap(lambda k, row: jax.random.categorical(jax.random.fold_in(k, position), row))(keys, kept)

    return rollout(
        choose,
        tokens_to_logits,
        cache,
        rows,
        max_length=max_length,
        eos_id=eos_id,
        prefix=prefix,
        length_penalty=length_penalty,
        max_lengths=max_lengths,
    )


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


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raises `UserError` for values that no distribution follows from."""
    if not temperature > 0:
        raise UserError(f"temperature = {temperature}: must be above 0; for the most probable token use greedy search")
    if top_k < 0:
        raise UserError(f"top_k = {top_k}: must be 0 (all tokens) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p = {top_p}: must lie above 0 and at most at 1")
