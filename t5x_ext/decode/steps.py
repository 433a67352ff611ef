"""Incremental decoding: a model's steps over several rows for each source, and rollouts of one hypothesis a row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from t5x_ext.contracts import Cache, Params, TokensToLogits, UserError
from t5x_ext.decode.batching import encoder_inputs, mesh_of
from t5x_ext.decode.ensemble import Ensemble
from t5x_ext.decode.penalties import LengthPenalty
from t5x_ext.decode.search import Hypotheses, Search, SearchInputs
from t5x_ext.parallel import BATCH_AXES, batch_devices

Choose: TypeAlias = Callable[[Float[Array, "rows vocab"], Int[Array, ""]], Int[Array, " rows"]]
"""`(logits, position) -> tokens`: how a rollout picks the next token of each row."""

TopK: TypeAlias = Callable[[Float[Array, "rows n"], int], tuple[Float[Array, "rows k"], Int[Array, "rows k"]]]
"""The k largest of each row and their indices, largest first: `jax.lax.top_k`, or a form of it for many devices."""

DECODABLE = ("encode", "cross_memory", "empty_cache", "decode_step")
"""The methods of a model that decodes one position after the other."""


def require_methods(search: Search, model: Any, methods: tuple[str, ...] = DECODABLE) -> None:
    """Checks that a model has the methods that a search calls.

    Raises:
      UserError: naming those that it lacks.
    """
    module = model.model if isinstance(model, Ensemble) else model
    lacking = [name for name in methods if not callable(getattr(module, name, None))]
    if lacking:
        raise UserError(
            f"{type(search).__name__} cannot search with {type(module).__name__}, which has no "
            f"{' and no '.join(lacking)}; choose a search for such models"
        )


def decoding_steps(search: Search, model: Any, params: Params, inputs: SearchInputs) -> tuple[TokensToLogits, Cache]:
    """Encodes the sources; returns the model's decoding step and its empty cache.

    Both have `rows_per_source` rows for each source: hypothesis i of source r is row `r * rows_per_source + i`.

    Raises:
      UserError: where the model does not decode step by step.
    """
    require_methods(search, model)
    rows = inputs.source.shape[0] * search.rows_per_source
    step = step_function(model, params, inputs.source, inputs.source_lengths, search.rows_per_source)
    return step, model.apply({"params": params}, rows, inputs.max_length, method="empty_cache")


def step_function(
    model: Any,
    params: Params,
    source: Int[Array, "rows source_length"],
    source_lengths: Int[Array, " rows"],
    hypotheses: int,
) -> TokensToLogits:
    """A `TokensToLogits` over `rows * hypotheses` rows; all hypotheses of a source read one memory.

    The hypotheses are a mapped axis of their own: keys and values of cross-attention exist once a source, and its
    matrix products take all hypotheses of a source at once.
    """
    segment_ids, positions = encoder_inputs(source, source_lengths)
    encoded = model.apply({"params": params}, source, segment_ids, positions, method="encode")
    memory = model.apply({"params": params}, encoded, method="cross_memory")
    mask = segment_ids > 0

    def step(tokens: Int[Array, " rows"], position: Int[Array, ""], cache: Cache) -> Any:
        return model.apply({"params": params}, tokens, position, cache, memory, mask, method="decode_step")

    def step_all(tokens: Int[Array, " rows"], position: Int[Array, ""], cache: Cache) -> tuple[Array, Cache]:
        rows = tokens.shape[0] // hypotheses
        split = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], rows, hypotheses, *leaf.shape[2:]), cache)
        mapped = jax.vmap(step, in_axes=(1, None, 2), out_axes=(1, 2))
        logits, split = mapped(tokens.reshape(rows, hypotheses), position, split)
        joined = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], rows * hypotheses, *leaf.shape[3:]), split)
        return logits.reshape(rows * hypotheses, -1), joined

    return step if hypotheses == 1 else step_all


def row_top_k(model: Any) -> TopK:
    """`jax.lax.top_k` in which every device sees to its own rows, and to all of the vocabulary.

    Compilers for CPUs and TPUs gather the logits of all devices for it, at every step. Without sharded rows it is left
    to them: some find the best of each shard of the vocabulary first.
    """
    mesh = mesh_of(model)
    if mesh is None or batch_devices(mesh) == 1:
        return jax.lax.top_k
    rows = PartitionSpec(BATCH_AXES)
    return lambda x, k: jax.shard_map(partial(jax.lax.top_k, k=k), mesh=mesh, in_specs=rows, out_specs=rows)(x)


class _Rollout(NamedTuple):
    position: Int[Array, ""]
    inputs: Int[Array, " rows"]
    cache: Cache
    tokens: Int[Array, "rows max_length"]
    lengths: Int[Array, " rows"]
    log_probs: Float[Array, " rows"]
    done: Bool[Array, " rows"]


def rollout(
    choose: Choose, step: TokensToLogits, cache: Cache, inputs: SearchInputs, penalty: LengthPenalty
) -> Hypotheses:
    """One hypothesis a row, token by token as `choose` says; it ends with the end of sentence or at its maximum.

    A row also ends where its constraints leave no token to choose.

    Args:
      choose: picks tokens from the logits, constraints applied.
      step: one decoding step over the rows of `inputs.prefix`.
      cache: leaves [layers, rows, ...].
      inputs: of `prefix` and `max_lengths` the rows; the source is not read.
      penalty: divides the score.

    Returns:
      `Hypotheses` with n_best 1. Scores are the model's own log-probabilities and do not depend on how `choose` picks.

    Raises:
      UserError: where `max_length` leaves no room behind the prefix.
    """
    rows, prefix, eos_id = inputs.prefix.shape[0], inputs.prefix, inputs.eos_id
    limits = length_limits(inputs)

    def advance(state: _Rollout) -> _Rollout:
        logits, cache = step(state.inputs, state.position, state.cache)
        allowed = constrained(inputs, logits, state.tokens, state.position)
        must_end = state.position + 1 >= limits
        if inputs.constraints:
            must_end |= ~jnp.any(allowed > -jnp.inf, axis=-1)
        tokens = jnp.where(must_end, eos_id, choose(allowed, state.position))
        if prefix.shape[1]:
            tokens = jnp.where(state.position < prefix.shape[1], prefix_token(prefix, state.position), tokens)
        tokens = jnp.where(state.done, eos_id, tokens)
        return _Rollout(
            position=state.position + 1,
            inputs=tokens,
            cache=cache,
            tokens=state.tokens.at[:, state.position].set(tokens),
            lengths=jnp.where(state.done, state.lengths, state.position + 1),
            log_probs=state.log_probs + jnp.where(state.done, 0.0, _chosen_log_prob(logits, allowed, tokens)),
            done=state.done | (tokens == eos_id),
        )

    start = _Rollout(
        position=jnp.zeros((), jnp.int32),
        inputs=jnp.full(rows, eos_id, jnp.int32),
        cache=cache,
        tokens=jnp.full((rows, inputs.max_length), eos_id, jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        log_probs=jnp.zeros(rows),
        done=jnp.zeros(rows, bool),
    )
    end = jax.lax.while_loop(lambda state: ~jnp.all(state.done), advance, start)
    return Hypotheses(end.tokens[:, None], end.lengths[:, None], (end.log_probs / penalty(end.lengths))[:, None])


def constrained(
    inputs: SearchInputs,
    logits: Float[Array, "rows vocab"],
    tokens: Int[Array, "rows max_length"],
    position: Int[Array, ""],
) -> Float[Array, "rows vocab"]:
    """The logits as the constraints leave them; within the forced prefix none applies.

    Args:
      inputs: gives constraints and prefix; its rows do not matter.
      logits: scores of the token at `position`.
      tokens: hypotheses so far, prefix included; the end of sentence from `position` on.
      position: tokens that are there already.
    """
    if not inputs.constraints:
        return logits
    forced, allowed = inputs.prefix.shape[1], logits
    for constraint in inputs.constraints:
        allowed = constraint(allowed, tokens[:, forced:], position - forced)
    return jnp.where(position < forced, logits, allowed)


def length_limits(inputs: SearchInputs) -> Int[Array, " rows"]:
    """The maximum length of each row, with room for the prefix and the end of sentence.

    Raises:
      UserError: where `max_length` has no such room.
    """
    forced = inputs.prefix.shape[1]
    if inputs.max_length <= forced:
        raise UserError(f"max_length = {inputs.max_length}: must exceed the forced prefix of {forced} tokens")
    return jnp.clip(jnp.asarray(inputs.max_lengths), forced + 1, inputs.max_length)


def prefix_token(prefix: Int[Array, "rows prefix"], position: Int[Array, ""]) -> Int[Array, " rows"]:
    """The forced tokens of a position; beyond the prefix they mean nothing."""
    return jnp.take(prefix, position, axis=1, mode="clip")


def log_normaliser(logits: Float[Array, "rows vocab"]) -> Float[Array, " rows"]:
    """What is subtracted from logits to get log-probabilities, float32."""
    return jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)


def log_prob_of(logits: Float[Array, "rows vocab"], tokens: Int[Array, " rows"]) -> Float[Array, " rows"]:
    """Log-probability of one token in each row, float32."""
    return _value_of(logits, tokens).astype(jnp.float32) - log_normaliser(logits)


def _chosen_log_prob(
    logits: Float[Array, "rows vocab"], allowed: Float[Array, "rows vocab"], tokens: Int[Array, " rows"]
) -> Float[Array, " rows"]:
    """Log-probability of the tokens that were chosen; of one that no constraint allows it is the model's own."""
    if allowed is logits:
        return log_prob_of(logits, tokens)
    value, own = _value_of(allowed, tokens), _value_of(logits, tokens)
    return jnp.where(value > -jnp.inf, value, own).astype(jnp.float32) - log_normaliser(logits)


def _value_of(logits: Float[Array, "rows vocab"], tokens: Int[Array, " rows"]) -> Float[Array, " rows"]:
    return jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
