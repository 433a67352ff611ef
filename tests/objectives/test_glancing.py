from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import TRAINING, gradient_of, loss_of

from t5x_ext.contracts import Context, Likelihood, UserError
from t5x_ext.models import ParallelConfig, ParallelDecoder, init_params
from t5x_ext.objectives import Glancing, LabelSmoothedCrossEntropy, ParallelCrossEntropy
from t5x_ext.objectives.glancing import reveal

CONFIG = ParallelConfig(
    vocab_size=13, embed_dim=8, mlp_dim=12, num_heads=2, encoder_layers=1, decoder_layers=1, dropout=0.0,
    max_target_length=9,
)  # fmt: skip


def batch_of(source_ids, target_ids, seed=0):
    """A batch with these segment ids on both sides, random tokens."""
    rng = np.random.default_rng(seed)
    batch = {}
    for side, ids in (("source", np.asarray(source_ids)), ("target", np.asarray(target_ids))):
        positions = np.zeros_like(ids)
        for row in range(len(ids)):
            for number in range(1, ids[row].max() + 1):
                positions[row, ids[row] == number] = np.arange((ids[row] == number).sum())
        batch |= {f"{side}_segment_ids": ids, f"{side}_positions": positions}
    batch["source_tokens"] = rng.integers(3, 13, np.shape(source_ids))
    batch["target_labels"] = rng.integers(3, 13, np.shape(target_ids))
    return jax.tree.map(jnp.asarray, batch)


@pytest.fixture
def batch():
    """A row of two examples, with 3 and 2 source and 4 and 1 target tokens, and a row of one, with 4 and 6."""
    return batch_of([[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]], [[1, 1, 1, 1, 2, 0, 0], [1, 1, 1, 1, 1, 1, 0]])


def new(objective=Glancing, config=CONFIG, **options):
    """An objective with its model's parameters."""
    model = ParallelDecoder(config)
    return objective(model, **options), init_params(model, jax.random.key(0))


def logits_of(objective, params, batch):
    return jax.jit(lambda params, batch: objective.logits(params, batch, TRAINING))(params, batch)


def test_share_falls_linearly_and_then_stays():
    objective, _ = new(total_steps=100)
    assert [round(float(objective.share(step)), 4) for step in (0, 50, 100, 1000)] == [0.5, 0.4, 0.3, 0.3]


def test_reveal_takes_its_share_of_the_wrong_tokens_of_each_example_from_all_tokens():
    ids = jnp.asarray([[1] * 10 + [2] * 4 + [0] * 2])
    wrong = jnp.asarray([[True] * 7 + [False] * 3 + [True] * 4 + [True] * 2])
    for share, counts in ((0.5, (3, 2)), (0.3, (2, 1)), (0.0, (0, 0)), (1.0, (7, 4))):
        chosen = np.asarray(reveal(jax.random.key(3), wrong, ids, share))[0]
        assert (chosen[:10].sum(), chosen[10:14].sum(), chosen[14:].sum()) == (*counts, 0)
    keys = jax.random.split(jax.random.key(0), 600)
    often = np.asarray(jax.vmap(lambda key: reveal(key, wrong, ids, 0.5)[0])(keys)).mean(0)
    # Right tokens as often as wrong ones: the standard error is 0.02.
    np.testing.assert_allclose(often[:10], 0.3, atol=0.08)
    np.testing.assert_allclose(often[10:14], 0.5, atol=0.08)


def test_a_right_prediction_reveals_nothing_and_has_the_plain_loss(batch):
    glancing, params = new()
    plain, _ = new(ParallelCrossEntropy)
    labels = jnp.argmax(logits_of(plain, params, batch), axis=-1)
    right = {**batch, "target_labels": labels}
    expected, found = loss_of(plain, params, right), loss_of(glancing, params, right)
    assert float(found.metrics["revealed"][0]) == 0
    np.testing.assert_allclose(found.sum, expected.sum, rtol=1e-6)
    assert float(found.weight) == float(expected.weight) == 11


def test_evaluation_reveals_nothing(batch):
    glancing, params = new()
    plain, _ = new(ParallelCrossEntropy)
    context = Context(5, jax.random.key(0), train=False)
    expected = loss_of(plain, params, batch, context).sum
    np.testing.assert_allclose(loss_of(glancing, params, batch, context).sum, expected)


def test_revealed_labels_have_no_part_in_the_loss(batch):
    """The loss counts unrevealed labels alone, whose weights are zero elsewhere."""
    objective, params = new(label_smoothing=0.0, length_weight=0.0, first_share=1.0)

    @jax.jit
    def first_pass(params, batch):
        encoded, inputs = objective._encoded(params, batch, TRAINING), objective._inputs(params, batch)
        return encoded, inputs, objective._revealed(params, batch, TRAINING, encoded, inputs)

    @jax.jit
    def second_pass(params, batch, encoded, inputs, revealed):
        targets = objective._apply(params, "embed_targets", batch["target_labels"])
        fused = jnp.where(revealed[:, :, None], targets, inputs)
        return objective._decode(params, batch, TRAINING, encoded, fused)

    encoded, inputs, revealed = first_pass(params, batch)
    assert 0 < int(revealed.sum()) <= 11
    loss = loss_of(objective, params, batch)
    there = np.asarray(batch["target_segment_ids"] > 0)
    assert float(loss.metrics["nll"][1]) == (there & ~np.asarray(revealed)).sum()

    hidden = second_pass(params, batch, encoded, inputs, revealed)
    weights = jnp.float32(there & ~np.asarray(revealed))
    tokens = lambda hidden: objective._tokens.sums(params, hidden, batch["target_labels"], weights)[0]
    gradient = np.abs(jax.jit(jax.grad(tokens))(hidden)).max(-1)
    assert np.all(gradient[np.asarray(revealed) | ~there] == 0)
    assert np.all(gradient[there & ~np.asarray(revealed)] > 0)
    np.testing.assert_allclose(loss.sum, tokens(hidden), rtol=1e-6)


def test_first_pass_has_no_gradient_and_drops_what_the_second_drops(batch):
    objective, params = new(config=dataclasses.replace(CONFIG, dropout=0.5))

    @jax.jit
    def passes(params, batch):
        encoded, inputs = objective._encoded(params, batch, TRAINING), objective._inputs(params, batch)
        contexts = (TRAINING, TRAINING, TRAINING._replace(train=False))
        return [objective._decode(params, batch, context, encoded, inputs) for context in contexts]

    first, second, without_dropout = passes(params, batch)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, without_dropout)
    gradient = gradient_of(objective, params, batch)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_everything_revealed_leaves_a_finite_loss():
    """One token an example and a share of 1: a wrong prediction reveals all, and the loss of tokens is empty."""
    objective, params = new(first_share=1.0, last_share=1.0)
    batch = batch_of([[1, 1]], [[1]])
    worst = jnp.argmin(logits_of(objective, params, batch), axis=-1)
    loss = loss_of(objective, params, {**batch, "target_labels": worst})
    assert float(loss.metrics["nll"][1]) == 0
    length_nll = loss.metrics["length_nll"][0]
    np.testing.assert_allclose(loss.sum / loss.weight, 0.05 * length_nll, rtol=1e-6)


def test_a_batch_of_padding_has_no_loss():
    objective, params = new()
    loss = loss_of(objective, params, batch_of([[0, 0]], [[0, 0]]))
    assert float(loss.sum) == float(loss.weight) == 0


def test_plain_loss_is_the_mean_over_labels_and_a_mean_over_lengths(batch):
    objective, params = new(ParallelCrossEntropy)
    loss = loss_of(objective, params, batch)
    tokens = loss_of(LabelSmoothedCrossEntropy(objective.model, 0.1), params, batch)

    @jax.jit
    def length_log_probs(params, batch):
        encoded = objective._encoded(params, batch, TRAINING)
        return jax.nn.log_softmax(objective._apply(params, "length_logits", encoded, batch["source_segment_ids"]))

    log_probs = length_log_probs(params, batch)
    # Lengths 4 and 1 in the first row, whose examples start at 0 and 3, and 6 in the second.
    lengths = -(log_probs[0, 0, 4] + log_probs[0, 3, 1] + log_probs[1, 0, 6])
    np.testing.assert_allclose(loss.sum / loss.weight, tokens.sum / tokens.weight + 0.05 * lengths / 3, rtol=1e-5)
    np.testing.assert_allclose(loss.metrics["length_nll"], (lengths, 3), rtol=1e-5)
    assert isinstance(objective, Likelihood)


def test_targets_beyond_the_classes_count_as_the_last(batch):
    objective, params = new(config=dataclasses.replace(CONFIG, max_target_length=4))
    loss = loss_of(objective, params, batch)
    assert np.isfinite(loss.metrics["length_nll"][0])
    gradient = gradient_of(objective, params, batch)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_auxiliary_decoder_adds_its_loss_over_all_labels(batch):
    config = dataclasses.replace(CONFIG, auxiliary_layers=1)
    objective, params = new(config=config, auxiliary_weight=0.5)
    without = dataclasses.replace(objective, auxiliary_weight=0.0)
    with_it, base = loss_of(objective, params, batch), loss_of(without, params, batch)

    @jax.jit
    def auxiliary(params, batch):
        encoded, inputs = objective._encoded(params, batch, TRAINING), objective._inputs(params, batch)
        hidden = objective._decode(params, batch, TRAINING, encoded, inputs, "auxiliary_hidden")
        there = (batch["target_segment_ids"] > 0).astype(jnp.float32)
        return objective._tokens.sums(params, hidden, batch["target_labels"], there)[0]

    loss = auxiliary(params, batch) / 11
    difference = (with_it.sum - base.sum) / with_it.weight
    np.testing.assert_allclose(difference, 0.5 * loss, rtol=1e-4)
    assert float(with_it.metrics["auxiliary_nll"][1]) == 11


def test_uniform_scores_have_the_logarithm_of_the_vocabulary(batch):
    objective, params = new(ParallelCrossEntropy, length_weight=0.0)
    params = {**params, "embedding": {"table": jnp.zeros_like(params["embedding"]["table"])}}
    loss = loss_of(objective, params, batch)
    np.testing.assert_allclose(loss.sum / loss.weight, np.log(13), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps"),
        ({"first_share": 1.5}, "first_share"),
        ({"length_weight": -1}, "length_weight"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"auxiliary_weight": -1}, "auxiliary_weight"),
        ({"config": dataclasses.replace(CONFIG, upsample=2)}, "no length head"),
    ],
)
def test_values_that_are_not_allowed_are_refused(options, message):
    model = ParallelDecoder(options.pop("config", CONFIG))
    with pytest.raises(UserError, match=message):
        Glancing(model, **options)
