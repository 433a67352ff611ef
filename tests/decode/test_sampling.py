"""Sampling: frequencies against probabilities, truncation, and independence of the neighbours."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.decode import Greedy, Sample
from t5x_ext.decode.sampling import truncate_logits

EOS = 1
LOGITS = np.log([0.1, 0.15, 0.4, 0.3, 0.05])


def first_tokens(search, model, draws: int, **options) -> np.ndarray:
    result = search(model, Sample(**options), rows=draws, max_length=2)
    return np.bincount(np.asarray(result.tokens[:, 0, 0]), minlength=5) / draws


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.15, 0.4, 0.3, 0.05]),
        ({"temperature": 0.5}, np.square([0.1, 0.15, 0.4, 0.3, 0.05]) / 0.285),
        ({"top_k": 2}, [0, 0, 4 / 7, 3 / 7, 0]),
        ({"top_p": 0.69}, [0, 0, 4 / 7, 3 / 7, 0]),
        ({"top_p": 0.71}, [0, 0.15 / 0.85, 0.4 / 0.85, 0.3 / 0.85, 0]),
        ({"top_k": 2, "top_p": 0.5}, [0, 0, 1, 0, 0]),
    ],
)
def test_frequencies_are_the_probabilities(search, fixed, options, expected):
    draws = 20_000
    frequencies = first_tokens(search, fixed(np.tile(LOGITS, (2, 1))), draws, **options)
    expected = np.asarray(expected)
    # Five standard errors of a binomial frequency.
    assert np.all(np.abs(frequencies - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws))


def test_truncation_keeps_the_least_that_is_needed():
    logits = jnp.asarray(np.log([[0.5, 0.2, 0.2, 0.1], [0.97, 0.01, 0.01, 0.01]]))
    kept = np.isfinite(truncate_logits(logits, top_k=0, top_p=0.6))
    assert kept.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert np.isfinite(truncate_logits(logits, top_k=1, top_p=1.0)).sum() == 2
    np.testing.assert_array_equal(truncate_logits(logits, top_k=0, top_p=1.0), logits)


def test_a_sample_does_not_depend_on_its_neighbours(toy, search):
    model = toy(3, vocab_size=20, sharpness=0.7)
    states = np.random.default_rng(0).normal(size=(12, 5))
    draw = lambda rows: search(model, Sample(), states[rows], row_ids=rows, max_length=10, key=jax.random.key(4))
    everything = draw(np.arange(12))
    order = np.array([7, 2, 11, 5])
    some = draw(order)
    np.testing.assert_array_equal(everything.tokens[order], some.tokens)
    np.testing.assert_allclose(everything.scores[order], some.scores, rtol=1e-5)
    assert len({tuple(tokens) for tokens in everything.tokens[:, 0].tolist()}) > 6


def test_samples_do_not_depend_on_how_many_there_are(toy, search):
    model = toy(3, vocab_size=20, sharpness=0.7)
    states = np.random.default_rng(0).normal(size=(6, 5))
    many, few = (search(model, Sample(n_best=n, top_k=9), states, max_length=10) for n in (5, 2))
    np.testing.assert_array_equal(many.tokens[:, :2], few.tokens)
    np.testing.assert_allclose(many.scores[:, :2], few.scores, rtol=1e-5)
    assert len({tuple(tokens) for row in many.tokens.tolist() for tokens in row}) > 20


def test_cold_sampling_is_greedy_and_scores_are_the_models_own(toy, search):
    model = toy(8, vocab_size=10)
    states = np.random.default_rng(6).normal(size=(8, 5))
    options = {"max_length": 7, "prefix": np.full((8, 1), 4)}
    cold = search(model, Sample(temperature=1e-4), states, **options)
    best = search(model, Greedy(), states, **options)
    np.testing.assert_array_equal(cold.tokens, best.tokens)
    for row in range(8):
        sequence = cold.tokens[row, 0, : cold.lengths[row, 0]].tolist()
        assert sequence[0] == 4
        expected = np.mean(model.log_probs(sequence, states[row]))
        np.testing.assert_allclose(cold.scores[row, 0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"n_best": 0}]
)
def test_options_without_a_distribution_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Sample(**options)
