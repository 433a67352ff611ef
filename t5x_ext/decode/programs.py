"""The compiled program of one batch: encode, search, return token ids."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from t5x_ext.contracts import Cache, Decodable, Params, TokensToLogits, UserError
from t5x_ext.decode.batching import mesh_of
from t5x_ext.decode.config import DecodeConfig
from t5x_ext.decode.ensemble import Ensemble
from t5x_ext.decode.sampling import sample
from t5x_ext.decode.scoring import encoder_inputs
from t5x_ext.decode.search import Hypotheses, TopK, beam_search, greedy
from t5x_ext.parallel import BATCH_AXES, batch_devices


@partial(jax.jit, static_argnames=("model", "eos_id", "max_length", "config"))
def decode_batch(
    model: nn.Module | Ensemble,
    params: Params,
    source: Int[Array, "rows source_length"],
    source_lengths: Int[Array, " rows"],
    prefix: Int[Array, "rows prefix"],
    max_lengths: Int[Array, " rows"],
    row_ids: Int[Array, " rows"],
    key: Array,
    *,
    eos_id: int,
    max_length: int,
    config: DecodeConfig,
) -> Hypotheses:
    """Decodes a padded batch by the strategy of `config`.

    Compiled once for each model (compared by its fields, so that two equal models share), config and shape. Where the
    model is placed on a mesh, the devices must divide the rows.

    Args:
      model: any module with the methods `encode`, `cross_memory`, `empty_cache` and `decode_step`.
      params: its parameters.
      source: encoder input, tag and end of sentence included.
      source_lengths: real tokens of each row.
      prefix: forced first tokens.
      max_lengths: most tokens of each row's result, prefix and end of sentence included.
      row_ids: what sampling folds into its key; other strategies ignore it.
      key: of sampling.
      eos_id: end of sentence, and the decoder's first input.
      max_length: static bound of `max_lengths`.
      config: strategy and penalties; its seed and batch size are not read here.
    """
    rows, n_best = source.shape[0], config.n_best
    hypotheses = {"beam": config.beam_size, "greedy": 1, "sample": n_best}[config.strategy]
    tokens_to_logits = step_function(model, params, source, source_lengths, hypotheses)
    cache = model.apply({"params": params}, rows * hypotheses, max_length, method="empty_cache")
    options: dict[str, Any] = {"max_length": max_length, "eos_id": eos_id, "length_penalty": config.penalty()}
    if config.strategy == "beam":
        return beam_search(
            tokens_to_logits,
            cache,
            rows,
            beam_size=config.beam_size,
            n_best=n_best,
            prefix=prefix,
            max_lengths=max_lengths,
            top_k=_row_top_k(model),
            **options,
        )
    if config.strategy == "greedy":
        return greedy(tokens_to_logits, cache, rows, prefix=prefix, max_lengths=max_lengths, **options)
    repeat = partial(jnp.repeat, repeats=n_best, axis=0)
    drawn = sample(
        tokens_to_logits,
        cache,
        rows * n_best,
        key=key,
        row_ids=(row_ids[:, None] * n_best + jnp.arange(n_best)).reshape(-1),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        prefix=repeat(prefix),
        max_lengths=repeat(max_lengths),
        find_top=_row_top_k(model),
        **options,
    )
    return _best_first(drawn, rows, n_best)


def step_function(
    model: nn.Module | Ensemble,
    params: Params,
    source: Int[Array, "rows source_length"],
    source_lengths: Int[Array, " rows"],
    hypotheses: int,
) -> TokensToLogits:
    """A `TokensToLogits` over `rows * hypotheses` rows, several hypotheses of a sentence reading one memory.

    The hypotheses are a mapped axis of their own: keys and values of cross-attention exist once a sentence, and its
    matrix products take all hypotheses of a sentence at once.

    Raises:
      UserError: for a model that translates nothing.
    """
    member = model.model if isinstance(model, Ensemble) else model
    if not isinstance(member, Decodable):
        raise UserError(f"a {type(member).__name__} translates nothing: it has no encoder and no decoding steps")
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


def _row_top_k(model: nn.Module | Ensemble) -> TopK:
    """`jax.lax.top_k` in which every device sees to its own rows, and to all of the vocabulary.

    Compilers for CPUs and TPUs gather the logits of all devices for it, at every step. Where no rows are cut it is left
    to them: some find the best of each piece of the vocabulary first.
    """
    mesh = mesh_of(model)
    if mesh is None or batch_devices(mesh) == 1:
        return jax.lax.top_k
    rows = PartitionSpec(BATCH_AXES)
    return lambda x, k: jax.shard_map(partial(jax.lax.top_k, k=k), mesh=mesh, in_specs=rows, out_specs=rows)(x)


def _best_first(drawn: Hypotheses, rows: int, n_best: int) -> Hypotheses:
    """Single draws of `rows * n_best` rows as the sorted draws of `rows` rows."""
    order = jnp.argsort(-drawn.scores.reshape(rows, n_best), axis=1)

    def arrange(leaf: Array) -> Array:
        leaf = leaf.reshape(rows, n_best, *leaf.shape[2:])
        return jnp.take_along_axis(leaf, order.reshape(rows, n_best, *[1] * (leaf.ndim - 2)), axis=1)

    return jax.tree.map(arrange, drawn)
