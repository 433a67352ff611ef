from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import gradient_of, loss_of

from t5x_ext.contracts import UserError
from t5x_ext.models import ParallelConfig, ParallelDecoder, init_params
from t5x_ext.objectives import Ctc
from t5x_ext.objectives.ctc import ctc_log_likelihood, is_possible

BLANK = 0


def collapsed(path):
    """Runs merged, then blanks dropped, by itertools."""
    return tuple(token for token, _ in itertools.groupby(path) if token != BLANK)


def likelihoods(log_probs, cases, pad_frames=0, pad_labels=0):
    """Of label sequences over the same frames, padded with what must not matter."""
    padded = np.pad(log_probs, [(0, pad_frames), (0, 0)], constant_values=-7.0)
    lengths = np.asarray([len(labels) for labels in cases])
    labels = np.ones((len(cases), lengths.max() + pad_labels), np.int32)
    for row, case in zip(labels, cases, strict=True):
        row[: len(case)] = case
    blanks = np.broadcast_to(padded[:, BLANK], (len(cases), len(padded)))
    emitted = np.moveaxis(padded[:, labels], 0, 1)
    return jax.jit(ctc_log_likelihood)(blanks, emitted, labels, np.full(len(cases), len(log_probs)), lengths)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6])
def test_likelihood_is_the_sum_over_all_paths(frames):
    log_probs = np.asarray(
        jax.nn.log_softmax(np.random.default_rng(frames).normal(size=(frames, 3)).astype(np.float32))
    )
    totals: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(3), repeat=frames):
        probability = np.exp(sum(log_probs[t, token] for t, token in enumerate(path)))
        totals[collapsed(path)] = totals.get(collapsed(path), 0.0) + probability
    cases = [labels for labels in totals if labels]
    expected = [totals[labels] for labels in cases]
    np.testing.assert_allclose(np.exp(likelihoods(log_probs, cases)), expected, rtol=1e-4)
    np.testing.assert_allclose(np.exp(likelihoods(log_probs, cases, 2, 3)), expected, rtol=1e-4)


def test_labels_are_possible_if_a_path_gives_them():
    for frames, length in itertools.product(range(1, 5), range(1, 5)):
        outputs = {collapsed(path) for path in itertools.product(range(3), repeat=frames)}
        for labels in itertools.product((1, 2), repeat=length):
            found = is_possible(*map(jnp.asarray, ([labels], [frames], [length])))
            assert bool(found[0]) == (labels in outputs)


@pytest.fixture
def objective():
    """CTC without label smoothing, over frames twice the source."""
    config = ParallelConfig(
        vocab_size=5, embed_dim=8, mlp_dim=8, num_heads=2, encoder_layers=1, decoder_layers=1, dropout=0.0, upsample=2
    )
    return Ctc(ParallelDecoder(config), label_smoothing=0.0, chunk_tokens=5)


@pytest.fixture
def batch():
    """Targets of 3 tokens, of 5 for 2 frames, and of none."""
    there = lambda lengths, width: (np.arange(width) < np.asarray(lengths)[:, None]).astype(np.int32)
    positions = lambda width: np.broadcast_to(np.arange(width), (3, width))
    return {
        "source_tokens": np.full((3, 3), 4),
        "source_segment_ids": there([3, 1, 0], 3),
        "source_positions": positions(3),
        "target_labels": np.asarray([[1, 2, 2, 3, 3], [1, 2, 3, 1, 2], [0, 0, 0, 0, 0]]),
        "target_segment_ids": there([3, 5, 0], 5),
        "target_positions": positions(5),
    }


def log_probs_of(model, params, batch):
    logits = jax.jit(lambda params, batch: model.apply({"params": params}, batch))(params, batch)
    return np.asarray(jax.nn.log_softmax(logits))


def test_loss_is_normalised_by_labels_and_zero_where_no_path_fits(objective, batch):
    params = init_params(objective.model, jax.random.key(0))
    loss = loss_of(objective, params, batch)
    log_probs = log_probs_of(objective.model, params, batch)
    np.testing.assert_allclose(loss.sum, -likelihoods(log_probs[0], [(1, 2, 2)])[0], rtol=1e-4)
    assert float(loss.weight) == 8
    assert [float(value) for value in loss.metrics["possible"]] == [3, 8]
    assert float(loss.metrics["nll"][1]) == 3
    gradient = gradient_of(objective, params, batch)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_impossible_examples_alone_have_neither_loss_nor_gradient(objective, batch):
    params = init_params(objective.model, jax.random.key(0))
    only = {name: value[1:] for name, value in batch.items()}
    assert loss_of(objective, params, only).sum == 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient_of(objective, params, only)))


def test_label_smoothing_mixes_in_the_uniform_distribution_over_real_frames(objective, batch):
    params = init_params(objective.model, jax.random.key(0))
    smoothed = loss_of(Ctc(objective.model, label_smoothing=0.25), params, batch).sum
    log_probs = log_probs_of(objective.model, params, batch)
    expected = 0.75 * loss_of(objective, params, batch).sum - 0.25 * log_probs[0, :6].mean(-1).sum()
    np.testing.assert_allclose(smoothed, expected, rtol=1e-4)


def test_a_model_with_a_length_head_is_refused():
    with pytest.raises(UserError, match="upsample = 2"):
        Ctc(ParallelDecoder(ParallelConfig()))
