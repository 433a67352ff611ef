"""Toy models: one whose logits depend on everything said so far, through a recurrent state kept in the cache, one whose
logits depend on the position alone. Both are models as searches see them: nothing but their methods.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ext.data.tags import TagPolicy
from t5x_ext.data.vocabulary import train_vocabulary
from t5x_ext.decode import SearchInputs, Translator
from t5x_ext.models import EncoderDecoder, LayerSharing, TransformerConfig, init_params

EOS = 1


class Model:
    """Source i is the sentence of state i. All numbers are parameters, so that one program serves many models."""

    @classmethod
    def apply(cls, variables, *arguments, method):
        return getattr(cls, method)(variables["params"], *arguments)

    @staticmethod
    def encode(params, source, segment_ids, positions):
        return params["states"][source[:, 0]]

    @staticmethod
    def cross_memory(params, encoded):
        return encoded

    @staticmethod
    def empty_cache(params, rows, max_length):
        return {"state": jnp.zeros((1, rows, params["states"].shape[1]))}


@dataclass(frozen=True)
class FixedModel(Model):
    """Logits [position, vocab] that do not depend on the tokens before."""

    logits: np.ndarray

    @property
    def params(self):
        return {"logits": self.logits}

    @staticmethod
    def decode_step(params, tokens, position, cache, memory, mask):
        return jnp.broadcast_to(params["logits"][position], (tokens.shape[0], params["logits"].shape[1])), cache


@dataclass(frozen=True)
class ToyModel(Model):
    recurrence: np.ndarray
    embedding: np.ndarray
    output: np.ndarray
    bias: np.ndarray

    @property
    def vocab_size(self) -> int:
        return self.output.shape[1]

    @property
    def params(self):
        return vars(self)

    @staticmethod
    def decode_step(params, tokens, position, cache, memory, mask):
        before = jnp.where(position == 0, memory, cache["state"][0])
        state = jnp.tanh(before @ params["recurrence"] + params["embedding"][tokens] + 0.3 * position)
        return (state @ params["output"] + params["bias"]).astype(jnp.float32), {"state": state[None]}

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


@functools.cache
def compiled(model, search, max_length, constraints):
    @jax.jit
    def run(params, source, prefix, max_lengths, row_ids, key):
        lengths = jnp.ones(len(source), jnp.int32)
        inputs = SearchInputs(source, lengths, prefix, max_lengths, row_ids, key, EOS, max_length, constraints)
        return search(model, params, inputs)

    return run


def run_search(
    model, search, states=None, *, rows=1, max_length, prefix=None, max_lengths=None, constraints=(), **more
):
    """Hypotheses of a toy model as NumPy arrays; `states` [rows, 5] are those in which its sentences begin."""
    states = np.zeros((rows, 5)) if states is None else states
    rows = len(states)
    found = compiled(type(model), search, max_length, tuple(constraints))(
        {name: np.asarray(array, np.float32) for name, array in {**model.params, "states": states}.items()},
        np.arange(rows)[:, None],
        np.zeros((rows, 0), np.int32) if prefix is None else np.asarray(prefix, np.int32),
        np.full(rows, max_length) if max_lengths is None else max_lengths,
        more.get("row_ids", np.arange(rows)),
        more.get("key", jax.random.key(0)),
    )
    return jax.tree.map(np.asarray, found)


def listed(result, row):
    """The hypotheses of a row as tuples of tokens."""
    return [tuple(tokens[:n].tolist()) for tokens, n in zip(result.tokens[row], result.lengths[row]) if n]


@pytest.fixture(scope="session")
def search() -> Callable:
    return run_search


@pytest.fixture(scope="session")
def sequences() -> Callable:
    return listed


@pytest.fixture(scope="session")
def fixed() -> type[FixedModel]:
    return FixedModel


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
