"""A toy model whose logits depend on everything said so far, through a recurrent state kept in the cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ext.data.tags import TagPolicy
from t5x_ext.data.vocabulary import train_vocabulary
from t5x_ext.decode import Translator
from t5x_ext.models import EncoderDecoder, LayerSharing, TransformerConfig, init_params

EOS = 1


@dataclass(frozen=True)
class ToyModel:
    recurrence: np.ndarray
    embedding: np.ndarray
    output: np.ndarray
    bias: np.ndarray

    @property
    def vocab_size(self) -> int:
        return self.output.shape[1]

    def cache(self, rows: int, beam_size: int = 1, states: np.ndarray | None = None) -> dict:
        """`states` [rows, d] is where each row begins: rows are different sentences."""
        states = np.zeros((rows, len(self.recurrence))) if states is None else states
        return {"state": jnp.asarray(np.repeat(states, beam_size, axis=0)[None], jnp.float32)}

    def tokens_to_logits(self, tokens, position, cache):
        state = jnp.tanh(cache["state"][0] @ self.recurrence + jnp.asarray(self.embedding)[tokens] + 0.3 * position)
        return (state @ self.output + self.bias).astype(jnp.float32), {"state": state[None]}

    def log_probs(self, sequence, state=None) -> list[float]:
        """Log-probability of every token of a sequence, in float64."""
        state = np.zeros(len(self.recurrence)) if state is None else state
        result, previous = [], EOS
        for position, token in enumerate(sequence):
            state = np.tanh(state @ self.recurrence + self.embedding[previous] + 0.3 * position)
            logits = state @ self.output + self.bias
            result.append(float(logits[token] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()))
            previous = token
        return result

    def ranking(self, max_length: int, divisor: Callable[[int], float], prefix=(), state=None):
        """Every sequence of at most `max_length` tokens that starts with `prefix` and ends once, best first."""
        inner = [token for token in range(self.vocab_size) if token != EOS]
        scored = []
        for length in range(max_length - len(prefix)):
            for middle in itertools.product(inner, repeat=length):
                sequence = (*prefix, *middle, EOS)
                scored.append((sum(self.log_probs(sequence, state)) / divisor(len(sequence)), sequence))
        return sorted(scored, reverse=True)


def make_toy(seed: int, vocab_size: int, width: int = 5, sharpness: float = 2.0, ending: float = 1.0) -> ToyModel:
    """`ending` makes the end of sentence more probable at every position."""
    rng = np.random.default_rng(seed)
    return ToyModel(
        recurrence=rng.normal(size=(width, width)),
        embedding=rng.normal(size=(vocab_size, width)),
        output=sharpness * rng.normal(size=(width, vocab_size)),
        bias=ending * (np.arange(vocab_size) == EOS),
    )


@pytest.fixture(scope="session")
def toy() -> Callable[..., ToyModel]:
    return make_toy


@pytest.fixture(scope="session")
def translator() -> Translator:
    """A random model of two positions over one set a stack, with a forced target tag."""
    words = ["dog", "cat", "here", "there", "and", "are", "today", *"abcdefghijklmnopqrstuvwxyz"]
    lines = [" ".join(np.random.default_rng(i).choice(words, size=6)) for i in range(200)]
    vocabulary = train_vocabulary(lines, 330, ["en", "de"])
    config = TransformerConfig(
        vocab_size=vocabulary.size,
        embed_dim=16,
        mlp_dim=32,
        num_heads=2,
        encoder_layers=2,
        decoder_layers=2,
        encoder_sharing=LayerSharing("universal"),
        decoder_sharing=LayerSharing("universal"),
    )
    params = init_params(config, jax.random.key(1))
    return Translator(EncoderDecoder(config), params, vocabulary, TagPolicy(decoder="target"), ["en-de", "de-en"])
