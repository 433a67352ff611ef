"""Searches with models that write all tokens at once (`models.ParallelDecoder`): no token waits for another one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_ext.contracts import Batch, Params, UserError
from t5x_ext.decode.batching import encoder_inputs
from t5x_ext.decode.beam import Beam
from t5x_ext.decode.checks import at_least
from t5x_ext.decode.search import Hypotheses, OneHypothesis, Search, SearchInputs
from t5x_ext.decode.steps import length_limits, require_methods
from t5x_ext.models import ParallelConfig

CHUNK_TOKENS = 4096
"""Positions, over all rows and candidates, whose scores of the vocabulary are held at once."""

_WITH_LENGTH = ("encode", "length_logits", "decoder_inputs", "decode", "project")
_WITH_FRAMES = ("target_layout", "hidden", "project")


@dataclass(frozen=True)
class LengthBeam:
    """A translation for each of several lengths, all at once; the model's own score picks the best.

    Noisy parallel decoding over lengths, as ParaGen does it (bytedance/ParaGen @ 4e33a90): with L the most probable
    length, the lengths L - 3 to L + 3 for `beam_size=7`, each translated by the best token at every position, scored
    by the mean log-probability of its tokens. The model scores itself; Gu et al. (arXiv 1711.02281) let an
    autoregressive teacher do it.

    A hypothesis of length T has its end of sentence at position T - 1 and nowhere else, and starts with the forced
    prefix. Lengths that leave no room for both, or exceed the row's maximum, are not tried, but L is moved into that
    range. `beam_size=1` is `ParallelGreedy`.

    Attributes:
      beam_size: lengths that are tried: L, L - 1, L + 1, L - 2, ...
      n_best: hypotheses returned for each source, of different lengths; at most `beam_size`.
      raw_logit_score: rank by the mean of the chosen tokens' unnormalised scores, as the released code does; then
        scores are no log-probabilities.

    Raises:
      UserError: for values outside their range, at construction.
    """

    beam_size: int = 7
    n_best: int = 1
    raw_logit_score: bool = False

    def __post_init__(self) -> None:
        at_least("beam_size", self.beam_size, 1)
        at_least("n_best", self.n_best, 1)
        if self.n_best > self.beam_size:
            raise UserError(f"n_best = {self.n_best}: a beam_size of {self.beam_size} gives at most {self.beam_size}")

    @property
    def rows_per_source(self) -> int:
        """One for each length."""
        return self.beam_size

    def __call__(self, model: Any, params: Params, inputs: SearchInputs) -> Hypotheses:
        """Searches, see `Search`.

        Raises:
          UserError: for a model that predicts no length, and for constraints, which need one token after the other.
        """
        _check_inputs(self, model, inputs, _WITH_LENGTH, upsampled=False)
        found = _of_lengths(model, params, inputs, self.beam_size, self.raw_logit_score)
        scores, order = jax.lax.top_k(found.scores, self.n_best)
        tokens = jnp.take_along_axis(found.tokens, order[:, :, None], axis=1)
        return Hypotheses(tokens, jnp.take_along_axis(found.lengths, order, axis=1), scores)


@dataclass(frozen=True)
class ParallelGreedy(OneHypothesis):
    """The best token at every position of the most probable length: one pass. `LengthBeam(beam_size=1)`."""

    def __call__(self, model: Any, params: Params, inputs: SearchInputs) -> Hypotheses:
        """Searches, see `LengthBeam`."""
        _check_inputs(self, model, inputs, _WITH_LENGTH, upsampled=False)
        return _of_lengths(model, params, inputs, 1, raw_logit_score=False)


@dataclass(frozen=True)
class CtcGreedy(OneHypothesis):
    """The best token or blank at every position; runs of a token are merged, then blanks dropped. One pass.

    The score is the mean log-probability over all positions of this one alignment, not that of the translation, which
    sums over alignments. What follows an end of sentence is dropped; a forced prefix is put in front where the model
    did not write it.
    """

    def __call__(self, model: Any, params: Params, inputs: SearchInputs) -> Hypotheses:
        """Searches, see `Search`.

        Raises:
          UserError: for a model that is not upsampled, and for constraints.
        """
        _check_inputs(self, model, inputs, _WITH_FRAMES, upsampled=True)
        batch = _source_batch(inputs)
        hidden: Any = model.apply({"params": params}, batch, method="hidden")
        segment_ids, _ = model.apply({"params": params}, batch, method="target_layout")
        best = _in_chunks(model, params, lambda scores, _: _best(scores), hidden[:, None])
        there = segment_ids > 0
        tokens, lengths = collapse(best.tokens[:, 0], there, model.config.unk_id, inputs.eos_id)
        log_probs = jnp.where(there, best.values[:, 0] - best.normalisers[:, 0], 0.0)
        scores = jnp.sum(log_probs, axis=1) / jnp.maximum(jnp.sum(there, axis=1), 1)
        tokens, lengths = _ended(*_with_prefix(tokens, lengths, inputs), inputs)
        return Hypotheses(tokens[:, None], lengths[:, None], scores[:, None])


def default_search(model: Any) -> Search:
    """How to search with a model where nothing is said: a beam, over lengths where the model writes all at once."""
    config = getattr(model, "config", None)
    if not isinstance(config, ParallelConfig):
        return Beam()
    return LengthBeam() if config.upsample is None else CtcGreedy()


def collapse(
    tokens: Int[Array, "rows frames"], there: Bool[Array, "rows frames"], blank: int, padding: int
) -> tuple[Int[Array, "rows frames"], Int[Array, " rows"]]:
    """Merges runs of a token, then drops blanks.

    Args:
      tokens: one at every position.
      there: False at padding, which is behind the other positions.
      blank: its id.
      padding: what follows the tokens that remain.

    Returns:
      Tokens that remain, in front, and their number.
    """
    before = jnp.pad(tokens[:, :-1], [(0, 0), (1, 0)], constant_values=-1)
    keep = there & (tokens != before) & (tokens != blank)
    rows, frames = tokens.shape
    to = jnp.where(keep, jnp.cumsum(keep, axis=1) - 1, frames)
    empty = jnp.full(tokens.shape, padding, tokens.dtype)
    return empty.at[jnp.arange(rows)[:, None], to].set(tokens, mode="drop"), jnp.sum(keep, axis=1)


class _Best(NamedTuple):
    """The best token at every position."""

    tokens: Int[Array, "..."]
    values: Float[Array, "..."]  # its score
    normalisers: Float[Array, "..."]  # logsumexp of all scores


def _best(scores: Float[Array, "... vocab"], forced: Int[Array, "..."] | None = None) -> _Best:
    """The best tokens, and `forced` ones where these are not negative."""
    tokens = jnp.argmax(scores, axis=-1)
    if forced is not None:
        tokens = jnp.where(forced >= 0, forced, tokens)
    values = jnp.take_along_axis(scores, tokens[..., None], axis=-1)[..., 0]
    return _Best(tokens.astype(jnp.int32), values, jax.nn.logsumexp(scores, axis=-1))


def _in_chunks(
    model: Any,
    params: Params,
    choose: Callable[[Float[Array, "..."], Int[Array, " positions"]], _Best],
    hidden: Float[Array, "rows candidates length embed"],
) -> _Best:
    """`choose(scores, positions)` over all positions, a chunk of them at a time; leaves [rows, candidates, length].

    Chunks divide the length, so that rows that are sharded over devices stay so.
    """
    rows, candidates, length, _ = hidden.shape
    size = max(1, min(length, CHUNK_TOKENS // (rows * candidates)))
    padded = jnp.pad(hidden, [(0, 0), (0, 0), (0, -length % size), (0, 0)])
    chunks = jnp.moveaxis(padded.reshape(rows, candidates, -1, size, hidden.shape[-1]), 2, 0)
    positions = jnp.arange(chunks.shape[0] * size).reshape(-1, size)

    def of_chunk(chunk: tuple[Array, Array]) -> _Best:
        return choose(jnp.asarray(model.apply({"params": params}, chunk[0], method="project")), chunk[1])

    best = jax.lax.map(of_chunk, (chunks, positions))
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 2).reshape(rows, candidates, -1)[:, :, :length], best)


def _of_lengths(model: Any, params: Params, inputs: SearchInputs, candidates: int, raw_logit_score: bool) -> Hypotheses:
    """A hypothesis for each of the lengths around the most probable one, in the order of `_offsets`."""
    variables = {"params": params}
    source = _source_batch(inputs)
    encoded = model.apply(
        variables, source["source_tokens"], source["source_segment_ids"], source["source_positions"], method="encode"
    )
    length_scores = model.apply(variables, encoded, source["source_segment_ids"], method="length_logits")
    shortest, limits = inputs.prefix.shape[1] + 1, length_limits(inputs)
    centre = jnp.clip(jnp.argmax(length_scores[:, 0], axis=-1), shortest, limits)
    lengths = centre[:, None] + _offsets(candidates)
    allowed = (lengths >= shortest) & (lengths <= limits[:, None])
    # A candidate that is not allowed is computed for the length L, and dropped.
    lengths = jnp.where(allowed, lengths, centre[:, None])
    all_positions = jnp.arange(inputs.max_length)

    def hidden_of(lengths: Int[Array, " rows"]) -> Float[Array, "rows length embed"]:
        segment_ids = (all_positions < lengths[:, None]).astype(jnp.int32)
        positions = jnp.broadcast_to(all_positions, segment_ids.shape)
        batch = {**source, "target_segment_ids": segment_ids, "target_positions": positions}
        copied = model.apply(variables, batch, method="decoder_inputs")
        hidden: Any = model.apply(variables, encoded, batch, copied, method="decode")
        return hidden

    # The lengths are a mapped axis: keys and values of cross-attention exist once a source.
    hidden = jax.vmap(hidden_of, in_axes=1, out_axes=1)(lengths)

    def choose(scores: Float[Array, "rows candidates positions vocab"], positions: Int[Array, " positions"]) -> _Best:
        normalisers = jax.nn.logsumexp(scores, axis=-1)
        last = positions == lengths[:, :, None] - 1
        forced = jnp.where(last, inputs.eos_id, -1)
        if prefix := inputs.prefix.shape[1]:
            given = jnp.take(inputs.prefix, positions, axis=1, mode="clip")[:, None]
            forced = jnp.where(positions < prefix, given, forced)
        no_end = jnp.where(jnp.arange(scores.shape[-1]) == inputs.eos_id, -jnp.inf, 0.0)
        best = _best(jnp.where(last[..., None], scores, scores + no_end), forced)
        return best._replace(normalisers=normalisers)

    best = _in_chunks(model, params, choose, hidden)
    there = all_positions < lengths[:, :, None]
    values = best.values if raw_logit_score else best.values - best.normalisers
    scores = jnp.sum(jnp.where(there, values, 0.0), axis=-1) / lengths
    return Hypotheses(
        tokens=jnp.where(there, best.tokens, inputs.eos_id),
        lengths=jnp.where(allowed, lengths, 0).astype(jnp.int32),
        scores=jnp.where(allowed, scores, -jnp.inf),
    )


def _offsets(candidates: int) -> Int[Array, " candidates"]:
    """0, -1, 1, -2, 2, ..., so that of equal scores the one nearest to the most probable length is first."""
    number = jnp.arange(candidates)
    return jnp.where(number % 2 == 1, -1, 1) * ((number + 1) // 2)


def _source_batch(inputs: SearchInputs) -> Batch:
    segment_ids, positions = encoder_inputs(inputs.source, inputs.source_lengths)
    return {"source_tokens": inputs.source, "source_segment_ids": segment_ids, "source_positions": positions}


def _with_prefix(
    tokens: Int[Array, "rows frames"], lengths: Int[Array, " rows"], inputs: SearchInputs
) -> tuple[Int[Array, "rows length"], Int[Array, " rows"]]:
    """The tokens with the forced prefix in front, where they do not start with it."""
    prefix, width = inputs.prefix.astype(tokens.dtype), inputs.prefix.shape[1]
    if not width:
        return tokens, lengths
    extended = jnp.concatenate([prefix, tokens], axis=1)
    starts = jnp.pad(tokens, [(0, 0), (0, width)], constant_values=inputs.eos_id)
    written = jnp.all(starts[:, :width] == prefix, axis=1)
    return jnp.where(written[:, None], starts, extended), jnp.where(written, lengths, lengths + width)


def _ended(
    tokens: Int[Array, "rows frames"], lengths: Int[Array, " rows"], inputs: SearchInputs
) -> tuple[Int[Array, "rows max_length"], Int[Array, " rows"]]:
    """Tokens up to the first end of sentence or the row's limit, the end of sentence from there to `max_length`."""
    tokens = jnp.pad(tokens, [(0, 0), (0, inputs.max_length)], constant_values=inputs.eos_id)[:, : inputs.max_length]
    positions = jnp.arange(inputs.max_length)
    ends = (tokens == inputs.eos_id) | (positions >= jnp.minimum(lengths, length_limits(inputs) - 1)[:, None])
    length = jnp.argmax(ends, axis=1)
    return jnp.where(positions < length[:, None], tokens, inputs.eos_id), (length + 1).astype(jnp.int32)


def _check_inputs(
    search: Search, model: Any, inputs: SearchInputs, methods: tuple[str, ...], *, upsampled: bool
) -> None:
    name = type(search).__name__
    require_methods(search, model, methods)
    if inputs.constraints:
        raise UserError(f"{name} writes all tokens at once; constraints need a search that goes from token to token")
    if (model.config.upsample is not None) != upsampled:
        other = "LengthBeam or ParallelGreedy" if upsampled else "CtcGreedy"
        has = "predicts lengths" if upsampled else "is upsampled, and predicts no length"
        raise UserError(f"{name}: the model {has}; take {other}")
