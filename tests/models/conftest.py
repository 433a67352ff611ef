from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ext.models import TransformerConfig, init_params

SMALL = TransformerConfig(
    vocab_size=23, embed_dim=8, mlp_dim=12, num_heads=2, encoder_layers=1, decoder_layers=1, dropout=0.0
)


@pytest.fixture
def small_config():
    """A config as small as a Transformer can be, with fields replaced."""
    return lambda **changes: dataclasses.replace(SMALL, **changes)


@pytest.fixture
def golden():
    """Compares scores, and initial parameters from key 0, with those that were stored before models had parts.

    The first and the last number of each parameter tell another key; compilers decide the last bit.
    """
    stored = np.load(Path(__file__).parent / "golden.npz")

    def compare(model, variant, logits):
        np.testing.assert_allclose(logits, stored[f"logits/{variant}"], rtol=1e-5, atol=1e-5)
        leaves = jax.tree.leaves(init_params(model, jax.random.key(0)))
        ends = np.stack([[leaf.ravel()[0], leaf.ravel()[-1]] for leaf in leaves])
        np.testing.assert_allclose(ends, stored[f"initial/{variant}"], rtol=1e-5, atol=1e-7)

    return compare


@pytest.fixture
def random_params():
    """Parameters sampled everywhere, so that zero biases and unit scales cannot hide a mistake."""

    def make(model, seed=0):
        """Of a module or of a config."""
        rng = np.random.default_rng(seed)
        shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        return jax.tree.map(lambda a: jnp.asarray(rng.normal(0.1, 0.3, a.shape), jnp.float32), shapes)

    return make


def pack(rows, length, vocab_size, rng):
    """Rows of (segment lengths) as (tokens, segment ids, positions); tokens at padding are random too."""
    tokens = rng.integers(3, vocab_size, (len(rows), length)).astype(np.int32)
    segment_ids, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, lengths in enumerate(rows):
        start = 0
        for segment, size in enumerate(lengths, 1):
            segment_ids[row, start : start + size] = segment
            positions[row, start : start + size] = np.arange(size)
            start += size
    return tokens, segment_ids, positions


@pytest.fixture
def packed_batch():
    """Two packed rows with padding: (source lengths; target lengths) = (3, 2; 2, 3) and (4; 5)."""

    def make(vocab_size=23, seed=0, source=((3, 2), (4,)), target=((2, 3), (5,)), lengths=(6, 7)):
        rng = np.random.default_rng(seed)
        source_tokens, source_ids, source_positions = pack(source, lengths[0], vocab_size, rng)
        inputs, target_ids, target_positions = pack(target, lengths[1], vocab_size, rng)
        labels = rng.integers(3, vocab_size, inputs.shape).astype(np.int32)
        return {
            "source_tokens": source_tokens,
            "source_segment_ids": source_ids,
            "source_positions": source_positions,
            "target_inputs": inputs,
            "target_labels": labels,
            "target_segment_ids": target_ids,
            "target_positions": target_positions,
        }

    return make
