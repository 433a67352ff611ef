"""A search and a model from outside: what a translator asks of them, and what is said where they do not fit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.decode import (
    Beam,
    DecodeConfig,
    Greedy,
    Hypotheses,
    Sample,
    Search,
    SearchInputs,
    Translator,
    require_methods,
    translate_file,
)


@dataclass(frozen=True)
class Echo:
    """A search without a decoder: one pass of the encoder, and the source is its own translation."""

    n_best: int = 1
    seed: int = 0
    rows_per_source = 1

    def __call__(self, model, params, inputs):
        assert self.seed == 0
        require_methods(self, model, ("encode",))
        source, lengths, forced = inputs.source, inputs.source_lengths, inputs.prefix.shape[1]
        positions = jnp.broadcast_to(jnp.arange(source.shape[1]), source.shape)
        encoded = model.apply(
            {"params": params}, source, 1 * (positions < lengths[:, None]), positions, method="encode"
        )
        words = jnp.where(positions < lengths[:, None], source, inputs.eos_id)
        words = jnp.pad(words, ((0, 0), (0, inputs.max_length)), constant_values=inputs.eos_id)
        tokens = jnp.concatenate([inputs.prefix, words], axis=1)[:, : inputs.max_length]
        lengths = jnp.minimum(lengths + forced, inputs.max_length)
        return Hypotheses(
            *(jnp.repeat(found[:, None], self.n_best, axis=1) for found in (tokens, lengths, encoded.mean((1, 2))))
        )


@dataclass(frozen=True)
class Wrong(Echo):
    """One hypothesis more than it says."""

    def __call__(self, model, params, inputs):
        return Echo(n_best=2)(model, params, inputs)


@dataclass(frozen=True)
class Nothing(Echo):
    """It finds no hypothesis for any line."""

    def __call__(self, model, params, inputs):
        found = super().__call__(model, params, inputs)
        return Hypotheses(found.tokens, jnp.zeros_like(found.lengths), jnp.full_like(found.scores, -jnp.inf))


class EncoderOnly(nn.Module):
    """A model that cannot decode step by step."""

    def encode(self, source, segment_ids, positions):
        return source[..., None] * 1.0


LINES = ["a dog and a cat", "", "here"]


def test_searches_are_what_the_protocol_says():
    for search in (Beam(), Greedy(), Sample(), Echo()):
        assert isinstance(search, Search)
    assert not isinstance(print, Search)


def test_a_search_from_outside_translates_lines_and_files(translator, tmp_path):
    config = DecodeConfig(Echo(n_best=2, seed=5))
    found = translator.translate_n_best(LINES, "en", "de", config)
    assert [hypotheses[0].text for hypotheses in found] == LINES
    assert [len(hypotheses) for hypotheses in found] == [2, 1, 2]
    (tmp_path / "in").write_text("".join(f"{line}\n" for line in LINES))
    translate_file(translator, tmp_path / "in", tmp_path / "out", "en", "de", DecodeConfig(Echo()), show_progress=False)
    assert (tmp_path / "out").read_text().splitlines() == LINES


def test_an_ensemble_says_what_it_cannot_average(translator):
    both = Translator.ensemble([translator, translator])
    with pytest.raises(UserError, match="an ensemble cannot average lengths of its members, only empty_cache, encode,"):
        both.model.apply({"params": both.params}, method="lengths")


def test_a_line_for_which_nothing_is_found_is_an_empty_line(translator):
    found = translator.translate_n_best(LINES, "en", "de", DecodeConfig(Nothing()))
    assert [hypotheses[0].text for hypotheses in found] == ["", "", ""]
    assert [hypotheses[0].score for hypotheses in found] == [-math.inf, 0.0, -math.inf]


def test_a_search_that_breaks_its_word_is_told(translator):
    with pytest.raises(
        UserError, match=r"Wrong returned hypotheses of shape \(8, 2\), not \[rows, n_best\] = \(8, 1\)"
    ):
        translator.translate(["a", "b"], "en", "de", DecodeConfig(Wrong()))


@pytest.mark.parametrize("search", [Beam(), Greedy(), Sample()])
def test_a_model_that_a_search_cannot_use_is_refused_in_one_line(search):
    rows = jnp.zeros(2, jnp.int32)
    inputs = SearchInputs(rows[:, None], rows + 1, jnp.zeros((2, 0), jnp.int32), rows + 4, rows, None, 1, 4)
    message = f"{type(search).__name__} cannot search with EncoderOnly, which has no cross_memory and no "
    with pytest.raises(UserError, match=message) as error:
        search(EncoderOnly(), {}, inputs)
    assert "\n" not in str(error.value)
    assert Echo()(EncoderOnly(), {}, inputs).lengths.tolist() == [[1], [1]]
