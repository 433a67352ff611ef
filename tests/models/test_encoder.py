from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from t5x_ext.contracts import path_name
from t5x_ext.models import Encoder, EncoderConfig, LayerSharing, MiniLM, logical_axes

PLAIN = EncoderConfig(vocab_size=23, embed_dim=8, mlp_dim=12, num_heads=2, layers=2, dropout=0.0)
BERT = MiniLM(
    vocab_size=23, embed_dim=8, mlp_dim=12, num_heads=2, layers=2, dropout=0.0, attention_dropout=0.0, max_positions=9
)


def make_batch(lengths, length, rng, token_types=False):
    """Padded rows; tokens at padding are random too."""
    segment_ids = (np.arange(length) < np.array(lengths)[:, None]).astype(np.int32)
    batch = {
        "tokens": rng.integers(0, 23, segment_ids.shape).astype(np.int32),
        "segment_ids": segment_ids,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), segment_ids.shape),
    }
    return batch | ({"token_types": rng.integers(0, 2, segment_ids.shape).astype(np.int32)} if token_types else {})


def bert(config, params, tokens, token_types):
    """One unpadded text through BERT in float64, written from arXiv 1810.04805 and 1706.03762."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def norm(x, p):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_epsilon)
        return x * p["scale"] + p["bias"]

    def attention(x, p):
        query, key, value = (np.einsum("te,ehd->htd", x, p[n]["kernel"]) + p[n]["bias"][:, None] for n in (
            "query", "key", "value"
        ))  # fmt: skip
        scores = np.exp(query @ key.swapaxes(1, 2) / np.sqrt(config.head_dim))
        read = scores / scores.sum(-1, keepdims=True) @ value
        return np.einsum("htd,hde->te", read, p["out"]["kernel"]) + p["out"]["bias"]

    def feed_forward(x, p):
        inner = x @ p["up"]["kernel"] + p["up"]["bias"]
        return (inner * 0.5 * (1 + erf(inner / np.sqrt(2)))) @ p["down"]["kernel"] + p["down"]["bias"]

    x = params["embedding"]["table"][tokens] + params["position_embedding"]["table"][: len(tokens)]
    x = norm(x + params["type_embedding"]["table"][token_types], params["embedding_norm"])
    for index in config.sharing.layer_map(config.layers):
        layer = jax.tree.map(lambda a, i=index: a[i], params["encoder"]["layers"])
        for name, sublayer in (("self_attention", attention), ("feed_forward", feed_forward)):
            x = norm(x + sublayer(x, layer[name]), layer[f"{name}_residual"]["norm"])
    return x


@pytest.mark.parametrize("scan", [False, True])
def test_bert_s_vectors_are_those_of_the_float64_reference(random_params, scan):
    config = dataclasses.replace(BERT, scan_layers=scan, layers=4, sharing=LayerSharing("cycle", 2))
    params = random_params(config)
    batch = make_batch((5, 7), 7, np.random.default_rng(0), token_types=True)
    vectors = Encoder(config).apply({"params": params}, batch)
    for row, length in enumerate((5, 7)):
        expected = bert(config, params, batch["tokens"][row, :length], batch["token_types"][row, :length])
        np.testing.assert_allclose(vectors[row, :length], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("config", [PLAIN, BERT], ids=["plain", "bert"])
def test_padding_changes_nothing_and_every_token_sees_the_last(random_params, config):
    params, rng = random_params(config), np.random.default_rng(1)
    apply = lambda batch: np.asarray(Encoder(config).apply({"params": params}, batch))
    batch = make_batch((4, 6), 6, rng, token_types=config.token_types > 0)
    vectors = apply(batch)
    other = dict(batch, tokens=np.where(batch["segment_ids"] > 0, batch["tokens"], 5))
    np.testing.assert_array_equal(apply(other)[batch["segment_ids"] > 0], vectors[batch["segment_ids"] > 0])
    longer = {name: np.pad(values, ((0, 0), (0, 2))) for name, values in batch.items()}
    valid = batch["segment_ids"] > 0
    np.testing.assert_allclose(apply(longer)[:, :6][valid], vectors[valid], rtol=1e-5, atol=1e-5)
    last = batch["tokens"].copy()
    last[0, 3] = (last[0, 3] + 1) % 23
    assert (np.abs(apply(dict(batch, tokens=last)) - vectors)[0, :4].max(-1) > 1e-3).all()


def test_packed_texts_do_not_see_each_other(random_params):
    params, rng = random_params(PLAIN), np.random.default_rng(2)
    apply = lambda batch: np.asarray(Encoder(PLAIN).apply({"params": params}, batch))
    alone = make_batch((3,), 3, rng)
    packed = {name: np.concatenate([values, values], axis=1) for name, values in alone.items()}
    packed["segment_ids"] = np.array([[1, 1, 1, 2, 2, 2]], np.int32)
    packed["tokens"][:, 3:] = 7
    np.testing.assert_allclose(apply(packed)[:, :3], apply(alone), rtol=1e-5, atol=1e-5)


def test_parameters_are_those_that_the_config_asks_for():
    assert set(Encoder(PLAIN).abstract_params()) == {"embedding", "encoder"}
    params = Encoder(BERT).abstract_params()
    assert set(params) == {"embedding", "position_embedding", "type_embedding", "embedding_norm", "encoder"}
    assert set(params["encoder"]) == {"layers"}
    assert params["position_embedding"]["table"].shape == (9, 8)
    assert params["type_embedding"]["table"].shape == (2, 8)
    axes = logical_axes(Encoder(BERT))
    assert axes["position_embedding"]["table"] == (None, "embed")
    named = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert named == {
        path_name(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda node: isinstance(node, tuple))
    }


def test_scores_of_masked_tokens_come_from_the_table(random_params):
    params, rng = random_params(PLAIN), np.random.default_rng(3)
    model, batch = Encoder(PLAIN), make_batch((4,), 4, rng)
    vectors = model.apply({"params": params}, batch)
    scores = model.apply({"params": params}, vectors, method="project")
    np.testing.assert_allclose(scores, vectors @ params["embedding"]["table"].T, rtol=1e-5, atol=1e-5)
    assert scores.dtype == jnp.float32


def test_bfloat16_and_dropout(random_params):
    config = dataclasses.replace(BERT, compute_dtype="bfloat16", dropout=0.5)
    params, batch = random_params(config), make_batch((4,), 4, np.random.default_rng(4), token_types=True)
    model = Encoder(config)
    plain = model.apply({"params": params}, batch)
    assert plain.dtype == jnp.bfloat16
    dropped = model.apply({"params": params}, batch, False, rngs={"dropout": jax.random.key(0)})
    assert not np.allclose(dropped.astype(np.float32), plain.astype(np.float32))
