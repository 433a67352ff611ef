from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from t5x_ext.contracts import Context, Objective, UserError
from t5x_ext.models import EncoderDecoder, TransformerConfig
from t5x_ext.objectives import LabelSmoothedCrossEntropy

ROWS, LENGTH, EMBED, VOCAB = 3, 10, 6, 11


class Toy(nn.Module):
    """A decoder that reads one vector per input token; dropout shows whether it is deterministic."""

    vocab: int = VOCAB
    embed: int = EMBED

    def setup(self):
        self.inputs = self.param("inputs", nn.initializers.normal(1.0), (self.vocab, self.embed))
        self.table = self.param("table", nn.initializers.normal(1.0), (self.vocab, self.embed))
        self.dropout = nn.Dropout(0.5)

    def hidden(self, batch, deterministic=True):
        return self.dropout(jnp.take(self.inputs, batch["target_inputs"], axis=0), deterministic=deterministic)

    def project(self, hidden):
        return jnp.einsum("...e,ve->...v", hidden, self.table)

    def __call__(self, batch):
        return self.project(self.hidden(batch))


def make_batch(rows=ROWS, length=LENGTH, vocab=VOCAB):
    rng = np.random.default_rng(0)
    draw = lambda: rng.integers(0, vocab, (rows, length)).astype(np.int32)
    segment_ids = (np.arange(length) < rng.integers(1, length + 1, (rows, 1))).astype(np.int32) * 2
    return {"target_inputs": draw(), "target_labels": draw(), "target_segment_ids": segment_ids}


@pytest.fixture
def batch():
    return make_batch()


@pytest.fixture
def params(batch):
    return Toy().init(jax.random.key(0), batch)["params"]


def closed_form(params, batch, smoothing, z_loss):
    """Sums of loss, nll and hits over labels in float64, label by label."""
    inputs, table = (np.asarray(params[name], np.float64) for name in ("inputs", "table"))
    total = np.zeros(3)
    for row, position in np.argwhere(batch["target_segment_ids"] > 0):
        scores = table @ inputs[batch["target_inputs"][row, position]]
        log_normaliser = np.log(np.exp(scores).sum())
        log_probs = scores - log_normaliser
        label = batch["target_labels"][row, position]
        target = (1 - smoothing) * np.eye(VOCAB)[label] + smoothing / VOCAB
        total += [-target @ log_probs + z_loss * log_normaliser**2, -log_probs[label], scores.argmax() == label]
    return total


@pytest.mark.parametrize("chunk_tokens", [1, 6, 9, 15, 1000])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.3, 0.01)])
def test_loss_is_the_closed_form(params, batch, smoothing, z_loss, chunk_tokens):
    objective = LabelSmoothedCrossEntropy(Toy(), smoothing, z_loss, chunk_tokens)
    loss = objective(params, batch, Context(0))
    labels = (batch["target_segment_ids"] > 0).sum()
    expected = closed_form(params, batch, smoothing, z_loss)
    np.testing.assert_allclose(loss.sum, expected[0], rtol=1e-5)
    np.testing.assert_allclose(loss.metrics["nll"][0], expected[1], rtol=1e-5)
    assert loss.metrics["accuracy"][0] == expected[2]
    assert loss.weight == loss.metrics["nll"][1] == loss.metrics["accuracy"][1] == labels


def test_chunks_change_neither_value_nor_gradient(params, batch):
    def value_and_grads(chunk_tokens, remainder):
        objective = LabelSmoothedCrossEntropy(Toy(), 0.1, 0.01, chunk_tokens)
        return jax.value_and_grad(lambda p: objective(p, remainder, Context(0)).sum)(params)

    whole, whole_grads = value_and_grads(1000, batch)
    for chunk_tokens in (1, 6, 12):
        value, grads = value_and_grads(chunk_tokens, batch)
        np.testing.assert_allclose(value, whole, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, whole_grads)


def test_gradient_is_probability_minus_smoothed_label(params, batch):
    smoothing, z_loss = 0.2, 0.05
    objective = LabelSmoothedCrossEntropy(Toy(), smoothing, z_loss)
    hidden = np.asarray(params["inputs"], np.float64)[batch["target_inputs"]]
    scores = hidden @ np.asarray(params["table"], np.float64).T
    log_normaliser = np.log(np.exp(scores).sum(-1, keepdims=True))
    target = (1 - smoothing) * np.eye(VOCAB)[batch["target_labels"]] + smoothing / VOCAB
    slope = (1 + 2 * z_loss * log_normaliser) * np.exp(scores - log_normaliser) - target
    slope = slope * (batch["target_segment_ids"] > 0)[..., None]
    grads = jax.grad(lambda p: objective(p, batch, Context(0)).sum)(params)
    np.testing.assert_allclose(grads["table"], np.einsum("blv,ble->ve", slope, hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_uniform_scores_cost_log_vocab(params, batch, smoothing):
    flat = jax.tree.map(jnp.zeros_like, params)
    loss = LabelSmoothedCrossEntropy(Toy(), smoothing)(flat, batch, Context(0))
    np.testing.assert_allclose(loss.sum / loss.weight, np.log(VOCAB), rtol=1e-6)


def test_large_scores_stay_finite(params, batch):
    large = jax.tree.map(lambda a: 1e3 * a, params)
    objective = LabelSmoothedCrossEntropy(Toy())
    value, grads = jax.value_and_grad(lambda p: objective(p, batch, Context(0)).sum)(large)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((value, grads)))


def test_a_batch_without_labels_weighs_nothing(params, batch):
    empty = {**batch, "target_segment_ids": np.zeros_like(batch["target_segment_ids"])}
    objective = LabelSmoothedCrossEntropy(Toy(), chunk_tokens=6)
    value, grads = jax.value_and_grad(lambda p: objective(p, empty, Context(0)).sum)(params)
    assert value == 0
    assert objective(params, empty, Context(0)).weight == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


def test_dropout_is_on_when_there_are_rngs(params, batch):
    objective = LabelSmoothedCrossEntropy(Toy())
    still = objective(params, batch, Context(0)).sum
    noisy = [objective(params, batch, Context(0, jax.random.key(i), train=True)).sum for i in (0, 0, 1)]
    assert noisy[0] == noisy[1]
    assert len({float(value) for value in (still, *noisy)}) == 3


def test_it_is_an_objective(params, batch):
    objective = LabelSmoothedCrossEntropy(Toy())
    assert isinstance(objective, Objective)
    weights = objective.label_weights(batch, Context(0))
    np.testing.assert_array_equal(weights, batch["target_segment_ids"] == 2)
    logits = objective.logits(params, batch, Context(0))
    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs, batch["target_labels"][..., None], -1)[..., 0]
    np.testing.assert_allclose(
        objective(params, batch, Context(0)).metrics["nll"][0], -(weights * picked).sum(), rtol=1e-5
    )


def largest_array(jaxpr):
    """Elements of the largest float32 array that a traced function makes."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [v.aval.size for v in equation.outvars if getattr(v.aval, "dtype", None) == jnp.float32]
        sizes += [largest_array(inner) for inner in jaxprs_in_params(equation.params)]
    return max(sizes)


@pytest.mark.parametrize(
    ("chunk_tokens", "scored"), [(1024, 1024), (9600, 8192), (1 << 20, 16384)], ids=["many", "two even ones", "one"]
)
def test_no_more_scores_than_those_of_a_chunk_exist(chunk_tokens, scored):
    config = TransformerConfig(embed_dim=64, mlp_dim=64, num_heads=1, encoder_layers=1, decoder_layers=1)
    rows, length = 32, 512
    objective = LabelSmoothedCrossEntropy(EncoderDecoder(config), 0.1, 1e-4, chunk_tokens)
    cells = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    names = [f"source_{n}" for n in ("tokens", "segment_ids", "positions")]
    batch = dict.fromkeys([*names, *(f"target_{n}" for n in ("inputs", "labels", "segment_ids", "positions"))], cells)
    params = jax.eval_shape(
        lambda: EncoderDecoder(config).init(
            jax.random.key(0), jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), batch)
        )
    )["params"]
    step = jax.value_and_grad(lambda p, b: objective(p, b, Context(0)).sum)
    largest = largest_array(jax.make_jaxpr(step)(params, batch).jaxpr)
    assert largest == scored * config.vocab_size > rows * length * length


def test_compiled_memory_is_that_of_a_chunk():
    rows, length, vocab, embed = 16, 256, 4096, 8
    batch = make_batch(rows, length, vocab)
    model = Toy(vocab, embed)
    params = model.init(jax.random.key(0), batch)["params"]

    def temporaries(chunk_tokens):
        objective = LabelSmoothedCrossEntropy(model, chunk_tokens=chunk_tokens)
        step = jax.jit(jax.value_and_grad(lambda p: objective(p, batch, Context(0)).sum))
        return step.lower(params).compile().memory_analysis().temp_size_in_bytes

    scores = 4 * rows * length * vocab
    assert temporaries(rows * length) >= scores
    assert temporaries(128) < scores / 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing is 1.0; it must be in \[0, 1\)"),
        ({"z_loss": -1.0}, "z_loss is -1.0"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
    ],
)
def test_mistakes_are_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(LabelSmoothedCrossEntropy(Toy()), **changes)
