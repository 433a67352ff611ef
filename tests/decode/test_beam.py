"""Beam search against enumeration, against a plain reimplementation, and against greedy search."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.decode import Beam, Greedy, SearchInputs

EOS = 1
PENALTIES = {
    "sum": ({"alpha": 0.0}, lambda n: 1.0),
    "mean": ({}, lambda n: float(n)),
    "fairseq_0.6": ({"alpha": 0.6}, lambda n: n**0.6),
    "gnmt_1": ({"length_penalty": "gnmt"}, lambda n: (5 + n) / 6),
    "gnmt_0.6": ({"length_penalty": "gnmt", "alpha": 0.6}, lambda n: ((5 + n) / 6) ** 0.6),
}


def plain_search(model, state, *, beam_size, max_length, divisor, prefix=()):
    """The rules of `Beam` with lists, in float64, and without the early stop by the bound."""
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
        if len(finished) >= beam_size and live and live[0][0] / divisor(position + 1) <= finished[0][0]:
            break
    return finished


def check(found, row, expected, sequences):
    assert sequences(found, row) == [sequence for _, sequence in expected]
    np.testing.assert_allclose(found.scores[row], [score for score, _ in expected], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_beam_as_wide_as_the_space_ranks_every_sequence_exactly(toy, search, sequences, penalty):
    model, (fields, divisor) = toy(0, vocab_size=3), PENALTIES[penalty]
    states = np.random.default_rng(4).normal(size=(4, 5))
    # 1 + 2 + 4 + 8 + 16 sequences of at most five tokens.
    found = search(model, Beam(beam_size=31, n_best=31, **fields), states, max_length=5)
    for row, state in enumerate(states):
        check(found, row, model.ranking(5, divisor, state=state), sequences)


@pytest.mark.parametrize(
    ("penalty", "beam_size", "n_best"),
    [("sum", 4, 1), ("mean", 2, 1), ("mean", 4, 4), ("fairseq_0.6", 4, 2), ("gnmt_1", 4, 1), ("gnmt_0.6", 5, 5)],
)
def test_the_early_stop_changes_nothing(toy, search, sequences, penalty, beam_size, n_best):
    fields, divisor = PENALTIES[penalty]
    model = toy(7, vocab_size=9)
    states = np.random.default_rng(3).normal(size=(6, 5))
    found = search(model, Beam(beam_size, n_best, **fields), states, max_length=8)
    for row, state in enumerate(states):
        expected = plain_search(model, state, beam_size=beam_size, max_length=8, divisor=divisor)
        check(found, row, expected[:n_best], sequences)


@pytest.mark.parametrize("prefix_length", [1, 2])
def test_a_forced_prefix_comes_first_and_counts(toy, search, sequences, prefix_length):
    model = toy(11, vocab_size=6)
    rng = np.random.default_rng(5)
    states = rng.normal(size=(4, 5))
    prefix = rng.choice([0, 2, 3, 4, 5], size=(4, prefix_length))
    found = search(model, Beam(beam_size=3, n_best=3), states, max_length=7, prefix=prefix)
    for row, state in enumerate(states):
        forced = tuple(prefix[row].tolist())
        expected = plain_search(model, state, beam_size=3, max_length=7, divisor=float, prefix=forced)
        check(found, row, expected[:3], sequences)


@pytest.mark.parametrize("penalty", ["sum", "mean"])
def test_a_beam_of_one_is_greedy(toy, search, penalty):
    model, fields = toy(2, vocab_size=12, ending=2.5), PENALTIES[penalty][0]
    states = np.random.default_rng(0).normal(size=(16, 5))
    beam = search(model, Beam(beam_size=1, **fields), states, max_length=9)
    single = search(model, Greedy(**fields), states, max_length=9)
    np.testing.assert_array_equal(beam.tokens, single.tokens)
    np.testing.assert_array_equal(beam.lengths, single.lengths)
    np.testing.assert_allclose(beam.scores, single.scores, rtol=1e-6)
    assert len(set(beam.lengths[:, 0].tolist())) > 1


def test_n_best_is_sorted_and_distinct(toy, search, sequences):
    model = toy(4, vocab_size=8)
    states = np.random.default_rng(1).normal(size=(5, 5))
    result = search(model, Beam(beam_size=6, n_best=6), states, max_length=6)
    assert np.all(np.diff(result.scores, axis=1) <= 0)
    for row in range(5):
        found = sequences(result, row)
        assert len(set(found)) == len(found) == 6
        assert all(sequence.index(EOS) == len(sequence) - 1 for sequence in found)


@pytest.mark.parametrize("penalty", ["mean", "gnmt_0.6"])
def test_what_is_found_does_not_depend_on_how_much_is_asked_for(toy, search, sequences, penalty):
    """A smaller n_best gives the first of a larger one: random models and limits, batches of another size."""
    fields, differs = PENALTIES[penalty][0], 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        model = toy(seed, vocab_size=7, sharpness=rng.uniform(0.3, 2), ending=rng.uniform(0, 2))
        states, limits = rng.normal(size=(24, 5)), rng.integers(2, 11, size=24)

        find = lambda n_best, rows, model=model, states=states, limits=limits: search(
            model, Beam(5, n_best, **fields), states[rows], max_length=10, max_lengths=limits[rows]
        )
        everything = find(5, slice(None))
        for n_best, size in ((1, 24), (1, 8), (3, 8)):
            for first in range(0, 24, size):
                found = find(n_best, slice(first, first + size))
                for row in range(size):
                    assert sequences(found, row) == sequences(everything, first + row)[:n_best]
                np.testing.assert_allclose(found.scores, everything.scores[first : first + size, :n_best], rtol=1e-5)
        differs += len({sequences(everything, row)[0] for row in range(24)})
    assert differs > 200


def test_each_row_keeps_its_own_maximum_length(toy, search, sequences):
    model = toy(6, vocab_size=8)
    states = np.random.default_rng(2).normal(size=(3, 5))
    limits, beam = np.array([2, 4, 6]), Beam(beam_size=3, n_best=3)
    together = search(model, beam, states, max_length=9, max_lengths=limits)
    for row, limit in enumerate(limits):
        alone = search(model, beam, states[row : row + 1], max_length=int(limit))
        assert sequences(together, row) == sequences(alone, 0)
        np.testing.assert_allclose(together.scores[row], alone.scores[0], rtol=1e-6)


def test_fewer_sequences_than_asked_for_leave_empty_places(toy, search, sequences):
    result = search(toy(0, vocab_size=3), Beam(beam_size=4, n_best=4), max_length=2)
    assert sorted(sequences(result, 0)) == [(0, EOS), (1,), (2, EOS)]
    assert result.lengths[0, 3] == 0
    assert result.scores[0, 3] == -np.inf


def test_the_loop_ends_when_every_row_is_done(fixed):
    """With all probability on the end of sentence, one step is enough however long the maximum is."""
    steps = []

    class Counted(fixed):
        @classmethod
        def decode_step(cls, *arguments):
            jax.debug.callback(lambda: steps.append(1))
            return fixed.decode_step(*arguments)

    logits = np.zeros((30, 5)) + 50.0 * (np.arange(5) == EOS)
    rows = jnp.zeros(3, jnp.int32)
    inputs = SearchInputs(rows[:, None], rows + 1, jnp.zeros((3, 0), jnp.int32), rows + 30, rows, None, EOS, 30)
    params = {"logits": jnp.asarray(logits), "states": jnp.zeros((1, 1))}
    for search in (Greedy(), Beam(beam_size=1)):
        steps.clear()
        result = search(Counted, params, inputs)
        jax.effects_barrier()
        assert len(steps) == 1
        assert result.lengths.tolist() == [[1], [1], [1]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_best": 6}, "n_best = 6: a beam_size of 5 gives at most 5"),
        ({"beam_size": 0}, "beam_size = 0"),
        ({"length_penalty": "none"}, "fairseq, gnmt"),
        ({"alpha": -0.1}, "alpha = -0.1"),
    ],
)
def test_impossible_options_are_said_in_one_line(fields, message):
    with pytest.raises(UserError, match=message):
        Beam(**fields)


def test_a_prefix_without_room_is_refused(toy, search):
    with pytest.raises(UserError, match="max_length = 2: must exceed the forced prefix of 2 tokens"):
        search(toy(0, 4), Beam(), max_length=2, prefix=np.zeros((1, 2)))


def test_improbable_early_endings_do_not_use_up_the_search(fixed, search, sequences):
    """Ending is second best at every position but the last: five endings come long before the good one."""
    goal = (4, 5, 6, 7, 4, 5, 6, 7)
    probabilities = np.full((12, 9), 1e-3)
    probabilities[np.arange(len(goal)), goal] = 0.9
    probabilities[: len(goal), EOS] = 0.09
    probabilities[len(goal) :, EOS] = 0.99
    found = search(fixed(np.log(probabilities)), Beam(), max_length=12)
    assert sequences(found, 0) == [(*goal, EOS)]
