"""Beam search against enumeration, against a plain reimplementation, and against greedy search."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.decode.search import beam_search, fairseq_penalty, gnmt_penalty, greedy

EOS = 1
PENALTIES = {
    "sum": (fairseq_penalty(0.0), lambda n: 1.0),
    "mean": (fairseq_penalty(1.0), lambda n: float(n)),
    "fairseq_0.6": (fairseq_penalty(0.6), lambda n: n**0.6),
    "gnmt_1": (gnmt_penalty(1.0), lambda n: (5 + n) / 6),
    "gnmt_0.6": (gnmt_penalty(0.6), lambda n: ((5 + n) / 6) ** 0.6),
}


def run(model, rows, *, beam_size, states=None, **options):
    search = partial(beam_search, model.tokens_to_logits, rows=rows, beam_size=beam_size, eos_id=EOS, **options)
    return jax.tree.map(np.asarray, jax.jit(search)(model.cache(rows, beam_size, states)))


def sequences(result, row):
    return [tuple(t[:n].tolist()) for t, n in zip(result.tokens[row], result.lengths[row]) if n]


def plain_search(model, state, *, beam_size, max_length, divisor, n_best, prefix=()):
    """The rules of `beam_search` with lists, in float64, and without the early stop by the bound."""
    live, finished = [(0.0, ())], []
    for position in range(max_length):
        candidates = []
        for _, tokens in live:
            allowed = range(model.vocab_size) if position + 1 < max_length else [EOS]
            if position < len(prefix):
                allowed = [prefix[position]]
            for token in allowed:
                sequence = (*tokens, token)
                candidates.append((sum(model.log_probs(sequence, state)), sequence))
        candidates.sort(reverse=True)
        for log_prob, sequence in candidates[:beam_size]:
            if sequence[-1] == EOS:
                finished.append((log_prob / divisor(len(sequence)), sequence))
        finished.sort(reverse=True)
        live = [item for item in candidates if item[1][-1] != EOS][:beam_size]
        if len(finished) >= beam_size and live and live[0][0] / divisor(position + 1) <= finished[n_best - 1][0]:
            break
    return finished[:n_best]


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_beam_as_wide_as_the_space_ranks_every_sequence_exactly(toy, penalty):
    model, (length_penalty, divisor) = toy(0, vocab_size=3), PENALTIES[penalty]
    states = np.random.default_rng(4).normal(size=(4, 5))
    # 1 + 2 + 4 + 8 + 16 sequences of at most five tokens.
    result = run(model, 4, beam_size=31, n_best=31, max_length=5, length_penalty=length_penalty, states=states)
    for row, state in enumerate(states):
        expected = model.ranking(5, divisor, state=state)
        assert sequences(result, row) == [sequence for _, sequence in expected]
        np.testing.assert_allclose(result.scores[row], [score for score, _ in expected], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("penalty", "beam_size", "n_best"),
    [("sum", 4, 1), ("mean", 2, 1), ("mean", 4, 4), ("fairseq_0.6", 4, 2), ("gnmt_1", 4, 1), ("gnmt_0.6", 5, 5)],
)
def test_the_early_stop_changes_nothing(toy, penalty, beam_size, n_best):
    length_penalty, divisor = PENALTIES[penalty]
    model = toy(7, vocab_size=9)
    states = np.random.default_rng(3).normal(size=(6, 5))
    result = run(
        model, 6, beam_size=beam_size, n_best=n_best, max_length=8, length_penalty=length_penalty, states=states
    )
    for row, state in enumerate(states):
        expected = plain_search(model, state, beam_size=beam_size, max_length=8, divisor=divisor, n_best=n_best)
        assert sequences(result, row) == [sequence for _, sequence in expected]
        np.testing.assert_allclose(result.scores[row], [score for score, _ in expected], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix_length", [1, 2])
def test_a_forced_prefix_comes_first_and_counts(toy, prefix_length):
    model = toy(11, vocab_size=6)
    rng = np.random.default_rng(5)
    states = rng.normal(size=(4, 5))
    prefix = rng.choice([0, 2, 3, 4, 5], size=(4, prefix_length))
    result = run(model, 4, beam_size=3, n_best=3, max_length=7, prefix=jnp.asarray(prefix), states=states)
    for row, state in enumerate(states):
        expected = plain_search(
            model, state, beam_size=3, max_length=7, divisor=float, n_best=3, prefix=tuple(prefix[row].tolist())
        )
        assert sequences(result, row) == [sequence for _, sequence in expected]
        np.testing.assert_allclose(result.scores[row], [score for score, _ in expected], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("penalty", ["sum", "mean"])
def test_a_beam_of_one_is_greedy(toy, penalty):
    model = toy(2, vocab_size=12, ending=2.5)
    states = np.random.default_rng(0).normal(size=(16, 5))
    options = {"max_length": 9, "length_penalty": PENALTIES[penalty][0]}
    beam = run(model, 16, beam_size=1, states=states, **options)
    single = greedy(model.tokens_to_logits, model.cache(16, 1, states), 16, eos_id=EOS, **options)
    np.testing.assert_array_equal(beam.tokens, single.tokens)
    np.testing.assert_array_equal(beam.lengths, single.lengths)
    np.testing.assert_allclose(beam.scores, single.scores, rtol=1e-6)
    assert len(set(beam.lengths[:, 0].tolist())) > 1


def test_n_best_is_sorted_and_distinct(toy):
    model = toy(4, vocab_size=8)
    states = np.random.default_rng(1).normal(size=(5, 5))
    result = run(model, 5, beam_size=6, n_best=6, max_length=6, states=states)
    assert np.all(np.diff(result.scores, axis=1) <= 0)
    for row in range(5):
        found = sequences(result, row)
        assert len(set(found)) == len(found) == 6
        assert all(sequence.index(EOS) == len(sequence) - 1 for sequence in found)


def test_each_row_keeps_its_own_maximum_length(toy):
    model = toy(6, vocab_size=8)
    states = np.random.default_rng(2).normal(size=(3, 5))
    limits = np.array([2, 4, 6])
    together = run(model, 3, beam_size=3, n_best=3, max_length=9, max_lengths=jnp.asarray(limits), states=states)
    for row, limit in enumerate(limits):
        alone = run(model, 1, beam_size=3, n_best=3, max_length=int(limit), states=states[row : row + 1])
        assert sequences(together, row) == sequences(alone, 0)
        np.testing.assert_allclose(together.scores[row], alone.scores[0], rtol=1e-6)


def test_fewer_sequences_than_asked_for_leave_empty_places(toy):
    result = run(toy(0, vocab_size=3), 1, beam_size=4, n_best=4, max_length=2)
    assert sorted(sequences(result, 0)) == [(0, EOS), (1,), (2, EOS)]
    assert result.lengths[0, 3] == 0
    assert result.scores[0, 3] == -np.inf


def test_the_loop_ends_when_every_row_is_done(toy):
    """With all probability on the end of sentence, one step is enough however long the maximum is."""
    steps = []

    def ending(tokens, position, cache):
        jax.debug.callback(lambda: steps.append(1))
        return jnp.zeros((tokens.shape[0], 5)).at[:, EOS].set(50.0), cache

    result = beam_search(ending, {}, 3, beam_size=4, max_length=30, eos_id=EOS)
    jax.effects_barrier()
    assert len(steps) == 1
    assert result.lengths.tolist() == [[1], [1], [1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_best": 5}, "n_best = 5"),
        ({"max_length": 2, "prefix": jnp.zeros((1, 2), jnp.int32)}, "max_length = 2"),
    ],
)
def test_impossible_options_are_said_in_one_line(toy, options, message):
    with pytest.raises(UserError, match=message):
        run(toy(0, 4), 1, beam_size=4, **{"max_length": 5, **options})


def test_a_negative_alpha_is_refused():
    with pytest.raises(UserError, match="alpha"):
        fairseq_penalty(-0.1)


def test_improbable_early_endings_do_not_use_up_the_search():
    """Ending is second best at every position but the last: five endings come long before the good one."""
    goal = (4, 5, 6, 7, 4, 5, 6, 7)
    probabilities = np.full((len(goal) + 1, 9), 1e-3)
    probabilities[np.arange(len(goal)), goal] = 0.9
    probabilities[:-1, EOS] = 0.09
    probabilities[-1, EOS] = 0.99
    logits = jnp.log(jnp.asarray(probabilities))

    def tokens_to_logits(tokens, position, cache):
        return jnp.broadcast_to(logits[jnp.minimum(position, len(goal))], (tokens.shape[0], 9)), cache

    cache = jnp.zeros((1, 5, 1))
    found = beam_search(tokens_to_logits, cache, 1, beam_size=5, max_length=12, eos_id=EOS)
    assert sequences(jax.tree.map(np.asarray, found), 0) == [(*goal, EOS)]
