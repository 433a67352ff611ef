"""Greedy and beam search over a `tokens_to_logits` callable (contracts.TokensToLogits), inside one `lax.while_loop`.

Both functions are traced: shapes are static, and the loop ends as soon as every row has its result. Position 0 reads
the end-of-sentence token as its input, as the decoder was trained. Every hypothesis ends with that token: at a row's
last position nothing else is allowed, as in fairseq.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_ext.contracts import Cache, TokensToLogits, UserError

LengthPenalty: TypeAlias = Callable[[Int[Array, "..."]], Float[Array, "..."]]
"""Length in tokens -> divisor of the log-probability; never falls as the length grows, and is positive."""

Choose: TypeAlias = Callable[[Float[Array, "rows vocab"], Int[Array, ""]], Int[Array, " rows"]]
"""`(logits, position) -> tokens`: how a rollout picks the next token of each row."""

TopK: TypeAlias = Callable[[Float[Array, "rows n"], int], tuple[Float[Array, "rows k"], Int[Array, "rows k"]]]
"""The k largest of each row and where they stand, largest first: `jax.lax.top_k`, or a form of it for many devices."""


def fairseq_penalty(alpha: float) -> LengthPenalty:
    """The divisor `length ** alpha`; `alpha=1` scores by the mean log-probability of a token, `alpha=0` by the sum.

    As in fairseq (`SequenceGenerator.finalize_hypos`) the length counts the end-of-sentence token and the forced
    prefix, whose log-probabilities the numerator holds too.

    >>> float(fairseq_penalty(0.5)(jnp.array(16)))
    4.0
    """
    _require_nonnegative(alpha)
    return lambda length: jnp.asarray(length, jnp.float32) ** alpha


def gnmt_penalty(alpha: float) -> LengthPenalty:
    """The divisor `((5 + length) / 6) ** alpha` of GNMT (arXiv 1609.08144, equation 14); same length as fairseq's.

    >>> float(gnmt_penalty(1.0)(jnp.array(7)))
    2.0
    """
    _require_nonnegative(alpha)
    return lambda length: ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** alpha


LENGTH_PENALTIES: dict[str, Callable[[float], LengthPenalty]] = {"fairseq": fairseq_penalty, "gnmt": gnmt_penalty}


def _require_nonnegative(alpha: float) -> None:
    if not alpha >= 0:
        raise UserError(f"alpha = {alpha}: the length penalty's exponent must be 0 or more")


class Hypotheses(NamedTuple):
    """The n best sequences of each row, best first."""

    tokens: Int[Array, "rows n_best max_length"]
    """Forced prefix first, end of sentence last and repeated up to `max_length`."""
    lengths: Int[Array, "rows n_best"]
    """Tokens with prefix and end of sentence; 0 where a row has fewer than `n_best` sequences."""
    scores: Float[Array, "rows n_best"]
    """Log-probability divided by the length penalty, float32; -inf where a row has fewer sequences."""


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


def beam_search(
    tokens_to_logits: TokensToLogits,
    cache: Cache,
    rows: int,
    *,
    beam_size: int,
    max_length: int,
    eos_id: int,
    prefix: Int[Array, "rows prefix"] | None = None,
    length_penalty: LengthPenalty | None = None,
    n_best: int = 1,
    max_lengths: Int[Array, " rows"] | None = None,
    top_k: TopK = jax.lax.top_k,
) -> Hypotheses:
    """Beam search close to fairseq's rules, with an early stop that cannot change its result.

    At each position the `beam_size` best continuations that do not end stay live. A live hypothesis may end where its
    ending is among the `beam_size` best of all continuations, ended or not. A row's search is over when `beam_size`
    hypotheses have ended and the best live one has fallen behind the `n_best` best of them (each divided by the
    penalty of its present length), or at the row's maximum length, where every live hypothesis is made to end. Hence
    `beam_size=1` is greedy search, and a beam as wide as the number of sequences finds the best one.

    fairseq stops at the count alone: improbable early endings, which label smoothing keeps in the beam, can then use it
    up while a far better hypothesis is still live.

    The early stop: log-probabilities only fall as a hypothesis grows, and the penalty only rises, so that nothing
    that grows from a live hypothesis of log-probability s can score above `s / length_penalty(max_length)`. A row
    stops when the best live hypothesis stays under this bound at or below the worst of its `n_best` ended ones.

    Args:
      tokens_to_logits: one decoding step over `rows * beam_size` rows; beam b of row r is row `r * beam_size + b`.
      cache: leaves [layers, rows * beam_size, ...]; axis 1 is reordered as hypotheses branch.
      rows: sentences searched side by side.
      beam_size: live hypotheses a row.
      max_length: tokens of the longest result, prefix and end of sentence included.
      eos_id: the end-of-sentence token, also the first decoder input.
      prefix: tokens that every hypothesis of a row starts with. They count in length and log-probability (fairseq's
        `prefix_tokens`), and may not contain `eos_id`.
      length_penalty: `fairseq_penalty(1.0)` where left out.
      n_best: sequences to return for each row, at most `beam_size`.
      max_lengths: a maximum for each row, at most `max_length`, which stays the static size.
      top_k: how the best are found, see `TopK`.

    Returns:
      `Hypotheses`, distinct within a row.
    """
    if not 1 <= n_best <= beam_size:
        raise UserError(f"n_best = {n_best}: must lie between 1 and the beam size, {beam_size}")
    prefix, limits = _prefix_and_limits(rows, max_length, prefix, max_lengths)
    penalty = length_penalty or fairseq_penalty(1.0)

    def advance(state: _Beam) -> _Beam:
        logits, cache = tokens_to_logits(state.inputs.reshape(-1), state.position, state.cache)
        at_end = state.position + 1 >= limits
        live, ends = _expand(logits, state, eos_id, at_end, top_k)
        if prefix.shape[1]:
            live, ends = _force(prefix, logits, state, live, ends)
        finished, num_admitted = _admit(state, live, ends, penalty, top_k)
        num_finished = state.num_finished + num_admitted
        best_live, worst_kept = live.log_probs[:, 0], finished.scores[:, -1]
        behind = best_live / penalty(state.position + 1) <= worst_kept
        hopeless = best_live / penalty(limits) <= worst_kept
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

    start = _start(cache, rows, beam_size, n_best, max_length, eos_id)
    return jax.lax.while_loop(lambda state: ~jnp.all(state.done), advance, start).finished


def _start(cache: Cache, rows: int, beam_size: int, n_best: int, max_length: int, eos_id: int) -> _Beam:
    """One live hypothesis a row, the empty one: the others have no probability until it branches."""
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


def _expand(
    logits: Float[Array, "rows_beam vocab"], state: _Beam, eos_id: int, at_end: Bool[Array, " rows"], top_k: TopK
) -> tuple[_Candidates, Float[Array, "rows beam"]]:
    """The best continuations that do not end, best first, and the log-probability of ending each live hypothesis.

    The best of a row are among the best of its beams, so that no [rows, beam * vocab] array is sorted; one more than
    the beam size is taken of each, because one of them may be the end of sentence.
    """
    rows, beam_size = state.live_log_probs.shape
    offsets = state.live_log_probs - _log_normaliser(logits).reshape(rows, beam_size)
    ends = offsets + logits[:, eos_id].reshape(rows, beam_size)
    values, tokens = top_k(logits, min(beam_size + 1, logits.shape[-1]))
    log_probs = offsets[:, :, None] + values.reshape(rows, beam_size, -1)
    ending = (tokens == eos_id).reshape(log_probs.shape) | at_end[:, None, None]
    log_probs = jnp.where(ending, -jnp.inf, log_probs).reshape(rows, -1)
    best, order = top_k(log_probs, beam_size)
    best_tokens = jnp.take_along_axis(tokens.reshape(rows, -1), order, axis=1)
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
    tokens = jnp.broadcast_to(_prefix_token(prefix, state.position)[:, None], live.tokens.shape)
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
    are cut over devices stay where they are.
    """
    rows, beam_size = parents.shape

    def reorder(leaf: Array) -> Array:
        split = leaf.reshape(leaf.shape[0], rows, beam_size, *leaf.shape[2:])
        index = parents.reshape(1, rows, beam_size, *[1] * (leaf.ndim - 2))
        return jnp.take_along_axis(split, index, axis=2, mode="clip").reshape(leaf.shape)

    return jax.tree.map(reorder, cache)


class _Rollout(NamedTuple):
    position: Int[Array, ""]
    inputs: Int[Array, " rows"]
    cache: Cache
    tokens: Int[Array, "rows max_length"]
    lengths: Int[Array, " rows"]
    log_probs: Float[Array, " rows"]
    done: Bool[Array, " rows"]


def rollout(
    choose: Choose,
    tokens_to_logits: TokensToLogits,
    cache: Cache,
    rows: int,
    *,
    max_length: int,
    eos_id: int,
    prefix: Int[Array, "rows prefix"] | None = None,
    length_penalty: LengthPenalty | None = None,
    max_lengths: Int[Array, " rows"] | None = None,
) -> Hypotheses:
    """One sequence a row, token by token as `choose` says; the other arguments are those of `beam_search`.

    Returns:
      `Hypotheses` with n_best 1. Scores are the model's own log-probabilities, whatever `choose` does.
    """
    prefix, limits = _prefix_and_limits(rows, max_length, prefix, max_lengths)
    penalty = length_penalty or fairseq_penalty(1.0)

    def advance(state: _Rollout) -> _Rollout:
        logits, cache = tokens_to_logits(state.inputs, state.position, state.cache)
        tokens = jnp.where(state.position + 1 >= limits, eos_id, choose(logits, state.position))
        if prefix.shape[1]:
            tokens = jnp.where(state.position < prefix.shape[1], _prefix_token(prefix, state.position), tokens)
        tokens = jnp.where(state.done, eos_id, tokens)
        return _Rollout(
            position=state.position + 1,
            inputs=tokens,
            cache=cache,
            tokens=state.tokens.at[:, state.position].set(tokens),
            lengths=jnp.where(state.done, state.lengths, state.position + 1),
            log_probs=state.log_probs + jnp.where(state.done, 0.0, log_prob_of(logits, tokens)),
            done=state.done | (tokens == eos_id),
        )

    start = _Rollout(
        position=jnp.zeros((), jnp.int32),
        inputs=jnp.full(rows, eos_id, jnp.int32),
        cache=cache,
        tokens=jnp.full((rows, max_length), eos_id, jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        log_probs=jnp.zeros(rows),
        done=jnp.zeros(rows, bool),
    )
    end = jax.lax.while_loop(lambda state: ~jnp.all(state.done), advance, start)
    return Hypotheses(end.tokens[:, None], end.lengths[:, None], (end.log_probs / penalty(end.lengths))[:, None])


def greedy(
    tokens_to_logits: TokensToLogits,
    cache: Cache,
    rows: int,
    *,
    max_length: int,
    eos_id: int,
    prefix: Int[Array, "rows prefix"] | None = None,
    length_penalty: LengthPenalty | None = None,
    max_lengths: Int[Array, " rows"] | None = None,
) -> Hypotheses:
    """The most probable token at every position: `beam_search` with `beam_size=1`, without its bookkeeping.

    The cache holds one row a sentence; the other arguments, and the result, are those of `beam_search`.
    """
    return rollout(
        lambda logits, _: jnp.argmax(logits, axis=-1),
        tokens_to_logits,
        cache,
        rows,
        max_length=max_length,
        eos_id=eos_id,
        prefix=prefix,
        length_penalty=length_penalty,
        max_lengths=max_lengths,
    )


def _prefix_and_limits(
    rows: int, max_length: int, prefix: Int[Array, "rows prefix"] | None, max_lengths: Int[Array, " rows"] | None
) -> tuple[Int[Array, "rows prefix"], Int[Array, " rows"]]:
    """Both with their defaults; the limits leave room for the prefix and the end of sentence."""
    prefix = jnp.zeros((rows, 0), jnp.int32) if prefix is None else jnp.asarray(prefix, jnp.int32)
    if max_length <= prefix.shape[1]:
        raise UserError(f"max_length = {max_length}: must exceed the forced prefix of {prefix.shape[1]} tokens")
    limits = jnp.full(rows, max_length) if max_lengths is None else jnp.asarray(max_lengths)
    return prefix, jnp.clip(limits, prefix.shape[1] + 1, max_length)


def _prefix_token(prefix: Int[Array, "rows prefix"], position: Int[Array, ""]) -> Int[Array, " rows"]:
    return jnp.take(prefix, position, axis=1, mode="clip")


def _log_normaliser(logits: Float[Array, "rows vocab"]) -> Float[Array, " rows"]:
    return jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)


def log_prob_of(logits: Float[Array, "rows vocab"], tokens: Int[Array, " rows"]) -> Float[Array, " rows"]:
    """Log-probability of one token in each row, float32."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen.astype(jnp.float32) - _log_normaliser(logits)
