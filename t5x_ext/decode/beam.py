"""Beam search, in one `lax.while_loop` that ends as soon as every row has its hypotheses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_ext.contracts import Cache, Params, TokensToLogits, UserError
from t5x_ext.decode.checks import at_least
from t5x_ext.decode.penalties import LengthPenalty, length_penalty
from t5x_ext.decode.search import Hypotheses, SearchInputs
from t5x_ext.decode.steps import (
    TopK,
    constrained,
    decoding_steps,
    length_limits,
    log_normaliser,
    log_prob_of,
    prefix_token,
    row_top_k,
)


@dataclass(frozen=True)
class Beam:
    """Beam search close to fairseq's rules, with an early stop that cannot change its result.

    At each step the `beam_size` best unfinished continuations survive. A continuation that ends with the end of
    sentence is finished if it ranks among the `beam_size` best of all continuations, finished or not. A source is done
    when it has `beam_size` finished hypotheses and no unfinished one scores above the best of them (each divided by
    the penalty of its present length), or at its maximum length, where all unfinished hypotheses are finished. Hence
    `beam_size=1` is greedy search, and a beam as wide as the number of sequences finds the best one.

    fairseq stops at the count alone: improbable early endings, which label smoothing keeps in the beam, can then use it
    up while a far better hypothesis is unfinished.

    The early stop: log-probabilities only fall as a hypothesis grows, and the penalty only rises, so that nothing that
    grows from an unfinished hypothesis of log-probability s scores above `s / penalty(maximum length)`. A source is
    done as soon as this bound is no better than the last of its `n_best` hypotheses. When it is done otherwise does not
    depend on `n_best`, so that the hypotheses of a smaller `n_best` are the first of those of a larger one.

    If constraints leave a source without a continuation before any hypothesis is finished, the unfinished ones are
    finished there against the constraints, so that every source has a translation.

    Attributes:
      beam_size: unfinished hypotheses that survive a step.
      n_best: hypotheses returned for each source, all distinct; at most `beam_size`.
      length_penalty: what a score is divided by: `fairseq`, length**alpha, or `gnmt`, ((5 + length) / 6)**alpha.
      alpha: exponent of the length penalty.

    Raises:
      UserError: for values outside their range, at construction.
    """

    beam_size: int = 5
    n_best: int = 1
    length_penalty: Literal["fairseq", "gnmt"] = "fairseq"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        at_least("beam_size", self.beam_size, 1)
        at_least("n_best", self.n_best, 1)
        if self.n_best > self.beam_size:
            raise UserError(f"n_best = {self.n_best}: a beam_size of {self.beam_size} gives at most {self.beam_size}")
        length_penalty(self.length_penalty, self.alpha)

    @property
    def rows_per_source(self) -> int:
        """One for each unfinished hypothesis."""
        return self.beam_size

    def __call__(self, model: Any, params: Params, inputs: SearchInputs) -> Hypotheses:
        """Searches, see `Search`."""
        step, cache = decoding_steps(self, model, params, inputs)
        penalty = length_penalty(self.length_penalty, self.alpha)
        return _search(step, cache, inputs, self.beam_size, self.n_best, penalty, row_top_k(model))


class _Beam(NamedTuple):
    position: Int[Array, ""]
    inputs: Int[Array, "rows beam"]
    cache: Cache
    live_tokens: Int[Array, "rows beam max_length"]
    live_log_probs: Float[Array, "rows beam"]
    finished: Hypotheses
    num_finished: Int[Array, " rows"]
    done: Bool[Array, " rows"]


class _Candidates(NamedTuple):
    log_probs: Float[Array, "rows beam"]
    parents: Int[Array, "rows beam"]
    tokens: Int[Array, "rows beam"]


def _search(
    step: TokensToLogits,
    cache: Cache,
    inputs: SearchInputs,
    beam_size: int,
    n_best: int,
    penalty: LengthPenalty,
    top_k: TopK,
) -> Hypotheses:
    """See `Beam`; `step` and `cache` are those of `decoding_steps`."""
    prefix, limits = inputs.prefix, length_limits(inputs)

    def advance(state: _Beam) -> _Beam:
        logits, cache = step(state.inputs.reshape(-1), state.position, state.cache)
        at_end = state.position + 1 >= limits
        live, ends = _continuations(logits, state, inputs, at_end, top_k)
        if prefix.shape[1]:
            live, ends = _force(prefix, logits, state, live, ends)
        finished, num_admitted = _admit(state, live, ends, penalty, top_k)
        num_finished = state.num_finished + num_admitted
        best_live = live.log_probs[:, 0]
        behind = best_live / penalty(state.position + 1) <= finished.scores[:, 0]
        hopeless = best_live / penalty(limits) <= finished.scores[:, -1]
        done = state.done | at_end | ((num_finished >= beam_size) & behind) | hopeless
        # A row that is done need not move any more; leaving it in place lets a step pass without reordering.
        parents = jnp.where(done[:, None], jnp.arange(beam_size), live.parents)
        live_tokens = jnp.take_along_axis(state.live_tokens, parents[:, :, None], axis=1)
        return _Beam(
            position=state.position + 1,
            inputs=live.tokens,
            cache=_reorder(cache, parents),
            live_tokens=live_tokens.at[:, :, state.position].set(live.tokens),
            live_log_probs=live.log_probs,
            finished=finished,
            num_finished=num_finished,
            done=done,
        )

    start = _start(cache, inputs, beam_size, n_best)
    return jax.lax.while_loop(lambda state: ~jnp.all(state.done), advance, start).finished


def _start(cache: Cache, inputs: SearchInputs, beam_size: int, n_best: int) -> _Beam:
    """One unfinished hypothesis a row, the empty one: the others have no probability until it branches."""
    rows, max_length, eos_id = inputs.prefix.shape[0], inputs.max_length, inputs.eos_id
    return _Beam(
        position=jnp.zeros((), jnp.int32),
        inputs=jnp.full((rows, beam_size), eos_id, jnp.int32),
        cache=cache,
        live_tokens=jnp.full((rows, beam_size, max_length), eos_id, jnp.int32),
        live_log_probs=jnp.full((rows, beam_size), -jnp.inf).at[:, 0].set(0.0),
        finished=Hypotheses(
            tokens=jnp.full((rows, n_best, max_length), eos_id, jnp.int32),
            lengths=jnp.zeros((rows, n_best), jnp.int32),
            scores=jnp.full((rows, n_best), -jnp.inf),
        ),
        num_finished=jnp.zeros(rows, jnp.int32),
        done=jnp.zeros(rows, bool),
    )


def _continuations(
    logits: Float[Array, "rows_beam vocab"],
    state: _Beam,
    inputs: SearchInputs,
    at_end: Bool[Array, " rows"],
    top_k: TopK,
) -> tuple[_Candidates, Float[Array, "rows beam"]]:
    """The best continuations that do not end, best first, and the log-probability of ending each live hypothesis.

    The best of a row are among the best of its beams, so that no [rows, beam * vocab] array is sorted; one more than
    the beam size is taken of each, because one of them may be the end of sentence.
    """
    rows, beam_size = state.live_log_probs.shape
    eos_id = inputs.eos_id
    allowed = constrained(inputs, logits, state.live_tokens.reshape(rows * beam_size, -1), state.position)
    offsets = state.live_log_probs - log_normaliser(logits).reshape(rows, beam_size)
    ends = offsets + allowed[:, eos_id].reshape(rows, beam_size)
    values, tokens = top_k(allowed, min(beam_size + 1, logits.shape[-1]))
    log_probs = offsets[:, :, None] + values.reshape(rows, beam_size, -1)
    ending = (tokens == eos_id).reshape(log_probs.shape) | at_end[:, None, None]
    log_probs = jnp.where(ending, -jnp.inf, log_probs).reshape(rows, -1)
    best, order = top_k(log_probs, beam_size)
    best_tokens = jnp.take_along_axis(tokens.reshape(rows, -1), order, axis=1)
    if inputs.constraints:
        nothing = ~jnp.any(jnp.maximum(best, ends) > -jnp.inf, axis=1) & (state.num_finished == 0)
        ends = jnp.where(nothing[:, None], offsets + logits[:, eos_id].reshape(rows, beam_size), ends)
    return _Candidates(best, order // values.shape[-1], best_tokens), ends


def _force(
    prefix: Int[Array, "rows prefix"],
    logits: Float[Array, "rows_beam vocab"],
    state: _Beam,
    live: _Candidates,
    ends: Float[Array, "rows beam"],
) -> tuple[_Candidates, Float[Array, "rows beam"]]:
    """Within the prefix every hypothesis takes the given token, with its log-probability, and none ends."""
    forced = state.position < prefix.shape[1]
    tokens = jnp.broadcast_to(prefix_token(prefix, state.position)[:, None], live.tokens.shape)
    log_probs = state.live_log_probs + log_prob_of(logits, tokens.reshape(-1)).reshape(tokens.shape)
    parents = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    chosen = jax.tree.map(lambda new, old: jnp.where(forced, new, old), _Candidates(log_probs, parents, tokens), live)
    return chosen, jnp.where(forced, -jnp.inf, ends)


def _admit(
    state: _Beam, live: _Candidates, ends: Float[Array, "rows beam"], penalty: LengthPenalty, top_k: TopK
) -> tuple[Hypotheses, Int[Array, " rows"]]:
    """Merges the endings that the beam admits into the n best; also their number in each row."""
    beam_size, n_best = ends.shape[1], state.finished.scores.shape[1]
    log_probs, order = top_k(jnp.concatenate([live.log_probs, ends], axis=1), beam_size)
    ending = (order >= beam_size) & (log_probs > -jnp.inf) & ~state.done[:, None]
    length = state.position + 1
    scores = jnp.where(ending, log_probs / penalty(length), -jnp.inf)
    # The live tokens are filled up with the end of sentence already, so an ended hypothesis is its parent's row.
    tokens = jnp.take_along_axis(state.live_tokens, (order % beam_size)[:, :, None], axis=1)
    ended = Hypotheses(tokens, jnp.where(ending, length, 0), scores)
    merged = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), state.finished, ended)
    scores, best = top_k(merged.scores, n_best)
    tokens = jnp.take_along_axis(merged.tokens, best[:, :, None], axis=1)
    lengths = jnp.take_along_axis(merged.lengths, best, axis=1)
    return Hypotheses(tokens, lengths, scores), ending.sum(axis=1, dtype=jnp.int32)


def _reorder(cache: Cache, parents: Int[Array, "rows beam"]) -> Cache:
    """Each hypothesis takes its parent's entries along axis 1.

    Rows stay an axis of their own, so that a compiler sees that none takes anything from another: caches whose rows
    are sharded over devices stay where they are.
    """
    rows, beam_size = parents.shape

    def reorder(leaf: Array) -> Array:
        split = leaf.reshape(leaf.shape[0], rows, beam_size, *leaf.shape[2:])
        index = parents.reshape(1, rows, beam_size, *[1] * (leaf.ndim - 2))
        return jnp.take_along_axis(split, index, axis=2, mode="clip").reshape(leaf.shape)

    return jax.tree.map(reorder, cache)
