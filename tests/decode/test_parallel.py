"""Searches with models that write all tokens at once, against the model's own scores and written-out collapses."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.decode import (
    Beam,
    CtcGreedy,
    DecodeConfig,
    Ensemble,
    LengthBeam,
    MinimumLength,
    ParallelGreedy,
    SearchInputs,
    default_search,
)
from t5x_ext.decode import parallel as parallel_module
from t5x_ext.decode.ensemble import stack_members
from t5x_ext.decode.parallel import collapse
from t5x_ext.models import EncoderDecoder, ParallelConfig, ParallelDecoder, TransformerConfig, init_params

EOS, BLANK, MAX_LENGTH = 1, 0, 9
CONFIG = ParallelConfig(
    vocab_size=7, embed_dim=8, mlp_dim=8, num_heads=2, encoder_layers=1, decoder_layers=1, dropout=0.0,
    max_target_length=8,
)  # fmt: skip
SOURCE = np.asarray([[3, 4, 5, 1], [6, 1, 0, 0], [5, 5, 1, 0]])
LENGTHS = np.asarray([4, 2, 3])


def search_inputs(prefix=(), max_lengths=(9, 9, 9), constraints=()):
    forced = np.tile(np.asarray(prefix, np.int32), (3, 1))
    key, row_ids = jax.random.key(0), np.arange(3)
    return SearchInputs(
        *map(jnp.asarray, (SOURCE, LENGTHS, forced, np.asarray(max_lengths), row_ids)),
        key,
        EOS,
        MAX_LENGTH,
        constraints,
    )


@pytest.fixture(scope="module")
def model():
    return ParallelDecoder(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    """Sharp enough that tokens and lengths of the three sources differ."""
    return jax.tree.map(lambda leaf: 3.0 * leaf, init_params(model, jax.random.key(2)))


@pytest.fixture(scope="module")
def translation(model, params):
    """The model's own log-probabilities of a source's target with a given length, and of the lengths."""

    @jax.jit
    def scores(source, target_ids):
        ones, positions = jnp.ones_like(source), jnp.arange(source.shape[1])[None]
        batch = {
            "source_tokens": source,
            "source_segment_ids": ones,
            "source_positions": positions,
            "target_segment_ids": target_ids,
            "target_positions": jnp.arange(MAX_LENGTH)[None],
        }
        encoded = model.apply({"params": params}, source, ones, positions, method="encode")
        lengths = model.apply({"params": params}, encoded, ones, method="length_logits")[0, 0]
        logits = model.apply({"params": params}, batch)[0]
        return logits, jax.nn.log_softmax(logits), lengths

    def of(row, length):
        ids = (np.arange(MAX_LENGTH) < length).astype(np.int32)[None]
        return [np.asarray(found) for found in scores(SOURCE[row : row + 1, : LENGTHS[row]], ids)]

    return of


def expected(translation, row, length, prefix=()):
    """Tokens and mean log-probability of a source's translation of that length, token by token."""
    logits, log_probs, _ = translation(row, length)
    tokens = []
    for position in range(length):
        inner = np.where(np.arange(7) == EOS, -np.inf, log_probs[position])
        tokens.append(EOS if position == length - 1 else int(inner.argmax()))
        if position < len(prefix):
            tokens[-1] = prefix[position]
    steps = range(length)
    return tokens, np.mean([log_probs[t, tokens[t]] for t in steps]), np.mean([logits[t, tokens[t]] for t in steps])


def listed(found, row, rank):
    return found.tokens[row, rank, : found.lengths[row, rank]].tolist()


@pytest.mark.parametrize("prefix", [(), (5,)])
def test_one_length_is_plain_decoding(model, params, translation, prefix):
    found = ParallelGreedy()(model, params, search_inputs(prefix))
    beam = LengthBeam(beam_size=1)(model, params, search_inputs(prefix))
    assert all(np.array_equal(one, other) for one, other in zip(found, beam))
    for row in range(3):
        length = max(int(np.argmax(translation(row, 3)[2])), len(prefix) + 1)
        tokens, score, _ = expected(translation, row, length, prefix)
        assert listed(found, row, 0) == tokens
        np.testing.assert_allclose(found.scores[row, 0], score, rtol=1e-4)
        assert np.all(found.tokens[row, 0, length:] == EOS)


@pytest.mark.parametrize("raw", [False, True])
def test_the_lengths_around_the_best_one_are_ranked_by_score(model, params, translation, raw):
    found = LengthBeam(beam_size=7, n_best=7, raw_logit_score=raw)(model, params, search_inputs())
    for row in range(3):
        best = int(np.argmax(translation(row, 3)[2]))
        lengths = [length for length in range(best - 3, best + 4) if 1 <= length <= MAX_LENGTH]
        ranked = sorted((expected(translation, row, length) for length in lengths), key=lambda one: -one[1 + raw])
        assert [listed(found, row, rank) for rank in range(len(lengths))] == [one[0] for one in ranked]
        np.testing.assert_allclose(found.scores[row, : len(lengths)], [one[1 + raw] for one in ranked], rtol=1e-4)
        assert np.all(found.lengths[row, len(lengths) :] == 0)
        assert np.all(found.scores[row, len(lengths) :] == -np.inf)


def test_what_is_found_depends_neither_on_the_number_asked_for_nor_on_chunks(model, params, monkeypatch):
    seven = LengthBeam(n_best=7)(model, params, search_inputs())
    one = LengthBeam()(model, params, search_inputs())
    assert np.array_equal(one.tokens[:, 0], seven.tokens[:, 0])
    assert np.all(one.scores[:, 0] >= ParallelGreedy()(model, params, search_inputs()).scores[:, 0])
    monkeypatch.setattr(parallel_module, "CHUNK_TOKENS", 84)
    chunked = LengthBeam(n_best=7)(model, params, search_inputs())
    assert np.array_equal(chunked.tokens, seven.tokens)
    np.testing.assert_allclose(chunked.scores, seven.scores, rtol=1e-5)


def test_lengths_keep_to_the_limits_of_their_rows(model, params):
    found = LengthBeam(n_best=7)(model, params, search_inputs((4, 4), max_lengths=(3, 4, 2)))
    assert np.all(found.lengths <= np.asarray([3, 4, 3])[:, None])  # the prefix and an end always have room
    assert np.all(found.tokens[:, 0, :2] == 4)


class Written:
    """Writes a given path: what it says at every position is its parameter."""

    config = dataclasses.replace(CONFIG, upsample=2, unk_id=BLANK)

    @staticmethod
    def apply(variables, *arguments, method):
        return getattr(Written, method)(variables["params"], *arguments)

    @staticmethod
    def target_layout(params, batch):
        return jnp.repeat(batch["source_segment_ids"], 2, axis=1), None

    @staticmethod
    def hidden(params, batch):
        return 4.0 * jax.nn.one_hot(params, 7)

    @staticmethod
    def project(params, hidden):
        return hidden


PATHS = [[2, 2, 0, 2, 3, 0, 1, 0], [0, 0, 0, 0, 5, 5, 5, 5], [4, 4, 3, 3, 1, 6, 2, 2]]


def test_ctc_writes_the_collapsed_path():
    found = CtcGreedy()(Written, jnp.asarray(PATHS), search_inputs())
    # The second source has two tokens, hence four positions; nothing follows an end of sentence.
    assert [listed(found, row, 0) for row in range(3)] == [[2, 2, 3, EOS], [EOS], [4, 3, EOS]]
    np.testing.assert_allclose(found.scores, 4 - np.log(np.exp(4) + 6), rtol=1e-5)


def test_ctc_puts_a_forced_prefix_in_front_once():
    found = CtcGreedy()(Written, jnp.asarray(PATHS), search_inputs((4,), max_lengths=(9, 9, 2)))
    assert [listed(found, row, 0) for row in range(3)] == [[4, 2, 2, 3, EOS], [4, EOS], [4, EOS]]


def test_collapse_is_that_of_the_definition_on_all_short_strings():
    paths = [path for length in range(7) for path in itertools.product(range(3), repeat=length)]
    padded = np.asarray([[*path, *[2] * (6 - len(path))] for path in paths])
    there = np.arange(6) < np.asarray([len(path) for path in paths])[:, None]
    tokens, lengths = map(np.asarray, collapse(jnp.asarray(padded), jnp.asarray(there), BLANK, 9))
    for row, path in enumerate(paths):
        merged = [token for token, _ in itertools.groupby(path) if token != BLANK]
        assert tokens[row].tolist() == merged + [9] * (6 - len(merged))
        assert lengths[row] == len(merged)


def test_a_search_and_a_model_that_do_not_fit_are_refused(model, params):
    upsampled = ParallelDecoder(dataclasses.replace(CONFIG, upsample=2))
    autoregressive = EncoderDecoder(TransformerConfig(vocab_size=7, embed_dim=8, mlp_dim=8, num_heads=2))
    ensemble, two = Ensemble(model, 2), stack_members([params, params])
    for search, other, weights, message in (
        (LengthBeam(), upsampled, {}, "take CtcGreedy"),
        (ParallelGreedy(), upsampled, {}, "take CtcGreedy"),
        (CtcGreedy(), model, {}, "take LengthBeam"),
        (LengthBeam(), autoregressive, {}, "EncoderDecoder, which has no length_logits"),
        (Beam(), model, {}, "ParallelDecoder, which has no cross_memory"),
        (LengthBeam(), ensemble, two, "cannot average length_logits"),
    ):
        with pytest.raises(UserError, match=message):
            search(other, weights, search_inputs())
    with pytest.raises(UserError, match="constraints need a search"):
        LengthBeam()(model, params, search_inputs(constraints=(MinimumLength(2),)))
    with pytest.raises(UserError, match="at most 3"):
        LengthBeam(beam_size=3, n_best=4)


def test_searches_are_recorded_and_a_model_has_one_that_suits_it(model):
    for search in (LengthBeam(beam_size=5, raw_logit_score=True), ParallelGreedy(), CtcGreedy()):
        config = DecodeConfig(search)
        assert DecodeConfig.from_json(config.to_json()) == config
    assert default_search(model) == LengthBeam()
    assert default_search(Written) == CtcGreedy()
    assert default_search(EncoderDecoder(TransformerConfig())) == Beam()


def test_searches_are_values():
    assert len({LengthBeam(), LengthBeam(beam_size=7), ParallelGreedy(), CtcGreedy()}) == 3
