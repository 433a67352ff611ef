"""Constraints against enumeration: all sequences of a toy model but those that are forbidden, ranked."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.decode import Beam, DecodeConfig, ForbidTokens, Greedy, MinimumLength, NoRepeatNgrams, Sample

EOS = 1
TAG = 2


def repeats(sequence, n):
    grams = [sequence[i : i + n] for i in range(len(sequence) - n + 1)]
    return len(set(grams)) < len(grams)


@dataclass(frozen=True)
class Alternate:
    """A constraint from outside: odd ids follow even ones only, and the other way round."""

    def __call__(self, logits, tokens, position):
        last = jnp.take(tokens, position - 1, axis=1, mode="clip")
        same = jnp.arange(logits.shape[1]) % 2 == last[:, None] % 2
        is_end = jnp.arange(logits.shape[1]) == EOS
        return jnp.where(same & ~is_end & (position > 0), -jnp.inf, logits)


def alternates(words):
    return all(a % 2 != b % 2 for a, b in itertools.pairwise(words))


CASES = {
    "minimum": ((MinimumLength(2),), lambda words: len(words) >= 2),
    "forbid": ((ForbidTokens((0, 3)),), lambda words: not {0, 3} & set(words)),
    "unigrams": ((NoRepeatNgrams(1),), lambda words: not repeats(words, 1)),
    "bigrams": ((NoRepeatNgrams(2),), lambda words: not repeats(words, 2)),
    "outside": ((Alternate(),), alternates),
    "several": (
        (MinimumLength(3), ForbidTokens((0,)), NoRepeatNgrams(2)),
        lambda words: len(words) >= 3 and 0 not in words and not repeats(words, 2),
    ),
}


@pytest.mark.parametrize("forced", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_a_wide_beam_finds_the_best_of_what_is_allowed(toy, search, sequences, case, forced):
    """The scores are the model's own: nothing is normalised again."""
    constraints, allowed = CASES[case]
    model = toy(5, vocab_size=4, sharpness=1.0)
    states = np.random.default_rng(1).normal(size=(3, 5))
    # 1 + 3 + 9 + 27 + 81 sequences of at most four words; the tag is no word.
    beam, prefix = Beam(beam_size=121, n_best=8), np.full((3, forced), TAG)
    found = search(model, beam, states, max_length=5 + forced, prefix=prefix, constraints=constraints)
    for row, state in enumerate(states):
        ranking = model.ranking(5 + forced, float, (TAG,) * forced, state)
        expected = [(score, sequence) for score, sequence in ranking if allowed(sequence[forced:-1])][:8]
        assert sequences(found, row) == [sequence for _, sequence in expected]
        np.testing.assert_allclose(found.scores[row, : len(expected)], [score for score, _ in expected], rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_greedy_takes_the_best_that_is_allowed_and_a_beam_of_one_is_greedy(toy, search, sequences, case):
    constraints, allowed = CASES[case]
    model = toy(5, vocab_size=6, sharpness=1.0)
    states = np.random.default_rng(2).normal(size=(16, 5))
    single, beam = (
        search(model, one, states, max_length=8, constraints=constraints) for one in (Greedy(), Beam(beam_size=1))
    )
    np.testing.assert_array_equal(single.tokens, beam.tokens)
    np.testing.assert_allclose(single.scores, beam.scores, rtol=1e-5)
    for row, state in enumerate(states):
        (found,) = sequences(single, row)
        assert allowed(found[:-1])
        assert single.scores[row, 0] == pytest.approx(np.mean(model.log_probs(found, state)), rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_samples_are_of_what_is_allowed(toy, search, sequences, case):
    constraints, allowed = CASES[case]
    model = toy(5, vocab_size=6, sharpness=0.3)
    found = search(model, Sample(n_best=20, top_p=0.9), rows=4, max_length=8, constraints=constraints)
    drawn = [sequence for row in range(4) for sequence in sequences(found, row)]
    assert len(drawn) == 80
    assert len(set(drawn)) > 15
    assert all(allowed(sequence[:-1]) for sequence in drawn)


@pytest.mark.parametrize("strategy", [Beam(beam_size=3, n_best=3), Greedy(), Sample(n_best=2)])
@pytest.mark.parametrize(
    ("constraints", "length"),
    [
        ((MinimumLength(50),), 6),  # the maximum length comes first
        ((NoRepeatNgrams(1), MinimumLength(50)), 4),  # three words, and then there is none
        ((ForbidTokens((0, 1, 2, 3)),), 1),
    ],
)
def test_where_nothing_is_allowed_a_hypothesis_ends(toy, search, sequences, strategy, constraints, length):
    found = search(toy(1, vocab_size=4), strategy, rows=2, max_length=6, constraints=constraints)
    assert np.all(found.lengths[:, 0] == length)
    assert np.all(np.isfinite(found.scores[:, 0]))


def test_what_is_lowered_counts_in_the_score(toy, search, sequences):
    """A soft constraint: every word costs one, in all searches alike."""
    model, words = toy(1, vocab_size=4), np.arange(4) != EOS
    found, single = (
        search(model, one, max_length=4, constraints=(lambda logits, tokens, position: logits - words,))
        for one in (Beam(beam_size=40, n_best=40), Greedy())
    )
    for score, sequence in model.ranking(4, float):
        lowered = score - (len(sequence) - 1) / len(sequence)
        rank = sequences(found, 0).index(sequence)
        assert found.scores[0, rank] == pytest.approx(lowered, rel=1e-5)
    rank = sequences(found, 0).index(*sequences(single, 0))
    assert single.scores[0, 0] == pytest.approx(found.scores[0, rank], rel=1e-5)


def test_constraints_that_cannot_be_are_refused(toy, search):
    for make, message in (
        (lambda: MinimumLength(0), "n = 0"),
        (lambda: NoRepeatNgrams(0), "n = 0"),
        (lambda: ForbidTokens(()), "ids = "),
        (lambda: ForbidTokens((3, -1)), "ids = "),
        (lambda: search(toy(0, 4), Greedy(), max_length=3, constraints=(ForbidTokens((9,)),)), "beyond the vocabulary"),
        (lambda: DecodeConfig(constraints=(MinimumLength,)), "is no Constraint"),
        (lambda: DecodeConfig(constraints=(3,)), "3 is no Constraint"),
        (lambda: DecodeConfig(constraints=(ForbidTokens([3]),)), "cannot be hashed"),
    ):
        with pytest.raises(UserError, match=message):
            make()


def test_a_translator_applies_them(translator):
    lines = ["a dog and a cat", "here"]
    short = DecodeConfig(Greedy(), max_length_ratio=0.0, max_length_extra=9)
    for hypotheses in translator.translate_n_best(lines, "en", "de", DecodeConfig(constraints=(MinimumLength(7),))):
        assert hypotheses[0].num_tokens >= 1 + 7 + 1
    free = translator.translate_n_best(lines, "en", "de", short)
    held = DecodeConfig(Greedy(), (NoRepeatNgrams(1),), max_length_ratio=0.0, max_length_extra=9)
    assert translator.translate_n_best(lines, "en", "de", held) != free
