"""The translator over a tiny random model: order, empty lines, buckets, directions, and its parts against the model."""

from __future__ import annotations

import dataclasses
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.data.tags import TagPolicy
from t5x_ext.decode import Beam, DecodeConfig, Greedy, Sample, Translator, perplexity
from t5x_ext.decode.batching import pad, plan_batches
from t5x_ext.decode.programs import decode_batch
from t5x_ext.decode.steps import step_function
from t5x_ext.models import EncoderDecoder


def whole_logits(translator, batch):
    """Logits of the teacher-forced pass, the reference for everything incremental."""
    return jax.jit(lambda params, batch: translator.model.apply({"params": params}, batch))(translator.params, batch)


LINES = ["a b c", "", "d", "a dog and a cat are here and there today", "   ", "cat dog", "e f g h i j k l m n o p q r"]


def test_lines_keep_their_order_and_empty_lines_stay_empty(translator):
    together = translator.translate_n_best(LINES, "en", "de")
    assert [h[0].text for h in together] == translator.translate(LINES, "en", "de")
    assert [i for i, h in enumerate(together) if h[0].num_tokens == 0] == [1, 4]
    assert together[1] == [("", 0.0, 0)]
    # One by one: other batches, other buckets, the same results.
    for line, expected in zip(LINES[:4], together):
        alone = translator.translate_n_best([line], "en", "de")[0]
        assert alone[0].text == expected[0].text
        assert alone[0].score == pytest.approx(expected[0].score, rel=1e-4)
    assert translator.translate([], "en", "de") == []


def test_batches_hold_every_sentence_once_in_few_shapes():
    lengths = np.random.default_rng(0).integers(1, 90, size=300).tolist()
    batches = plan_batches(lengths, batch_tokens=512)
    assert sorted(itertools.chain.from_iterable(b.indices.tolist() for b in batches)) == list(range(300))
    assert len({(b.rows, b.length) for b in batches}) == 4
    for batch in batches:
        own = [lengths[i] for i in batch.indices]
        assert own == sorted(own, reverse=True)
        assert len(own) <= batch.rows
        assert batch.length / 2 < own[0] <= batch.length or batch.length == 16
        assert batch.rows * batch.length <= 512
    # A single line is not padded to a whole batch.
    assert [(b.rows, b.length) for b in plan_batches([5])] == [(1, 16)]
    assert [(b.rows, b.length) for b in plan_batches([5] * 9, batch_tokens=4096)] == [(64, 16)]


def test_cached_steps_equal_the_whole_forward_pass(translator):
    """Every position reads its own cache slot: N positions over fewer parameter sets, several hypotheses a row."""
    model, params = translator.model, translator.params
    rng = np.random.default_rng(1)
    source = rng.integers(3, 60, size=(2, 6)).astype(np.int32)
    source_lengths = np.array([6, 4])
    inputs = rng.integers(3, 60, size=(2, 3, 5)).astype(np.int32)
    step = jax.jit(lambda params, *arguments: step_function(model, params, source, source_lengths, 3)(*arguments))
    cache = model.apply({"params": params}, 6, 5, method="empty_cache")
    stepped = []
    for position in range(5):
        logits, cache = step(params, inputs[:, :, position].reshape(-1), jnp.int32(position), cache)
        stepped.append(logits)
    flat = inputs.reshape(6, 5)
    positions = lambda n: np.broadcast_to(np.arange(n), (6, n))
    whole = whole_logits(
        translator,
        {
            "source_tokens": np.repeat(source, 3, axis=0),
            "source_segment_ids": positions(6) < np.repeat(source_lengths, 3)[:, None],
            "source_positions": positions(6),
            "target_inputs": flat,
            "target_labels": flat,
            "target_segment_ids": np.ones_like(flat),
            "target_positions": positions(5),
        },
    )
    np.testing.assert_allclose(np.stack(stepped, axis=1), whole, atol=2e-5)


def test_scores_are_gathered_from_the_whole_logits(translator):
    sources, targets = ["a b c", "", "dog"], ["cat dog", "e", ""]
    scores = translator.score(sources, targets, "en", "de")
    vocabulary = translator.vocabulary
    inputs = [[*ids, vocabulary.eos_id] for ids in vocabulary.encode(sources)]
    labels = [[vocabulary.tag_id("de"), *ids, vocabulary.eos_id] for ids in vocabulary.encode(targets)]
    source_tokens, source_lengths = pad(inputs, 3, 8)
    target_labels, lengths = pad(labels, 3, 8)
    positions = np.broadcast_to(np.arange(8), (3, 8))
    batch = {
        "source_tokens": source_tokens,
        "source_segment_ids": positions < source_lengths[:, None],
        "source_positions": positions,
        "target_inputs": pad([[vocabulary.eos_id, *ids[:-1]] for ids in labels], 3, 8)[0],
        "target_labels": target_labels,
        "target_segment_ids": positions < lengths[:, None],
        "target_positions": positions,
    }
    log_probs = jax.nn.log_softmax(whole_logits(translator, batch))
    for row, score in enumerate(scores):
        expected = [float(log_probs[row, i, label]) for i, label in enumerate(labels[row])]
        np.testing.assert_allclose(score.token_log_probs, expected, atol=1e-5)
        assert score.log_prob == pytest.approx(sum(expected), abs=1e-4)
        assert score.perplexity == pytest.approx(np.exp(-np.mean(expected)), rel=1e-4)
    total = sum(score.log_prob for score in scores) / sum(score.num_tokens for score in scores)
    assert perplexity(scores) == pytest.approx(np.exp(-total))


@pytest.mark.parametrize("search", [Beam(beam_size=3, alpha=0.0), Greedy(alpha=0.0), Sample(alpha=0.0)])
def test_a_search_scores_its_own_result_as_forced_scoring_does(translator, monkeypatch, search):
    """With alpha 0 the score is the log-probability; ids are taken before text, which may encode otherwise."""
    seen = []
    decode = translator.vocabulary.decode
    monkeypatch.setattr(translator.vocabulary, "decode", lambda ids: seen.append(ids) or decode(ids))
    config = DecodeConfig(search)
    line = "a dog and a cat"
    hypothesis = translator.translate_n_best([line], "en", "de", config)[0][0]
    vocabulary = translator.vocabulary
    labels = [vocabulary.tag_id("de"), *seen[0][0].tolist()]
    assert len(labels) == hypothesis.num_tokens
    inputs = [*vocabulary.encode([line])[0].tolist(), vocabulary.eos_id]
    score = translator.score_tokens([inputs], [labels])[0]
    assert hypothesis.score == pytest.approx(score.log_prob, rel=1e-5)


def test_n_best_hypotheses_are_sorted_and_the_first_is_the_translation(translator):
    config = DecodeConfig(Beam(beam_size=4, n_best=3))
    for hypotheses in translator.translate_n_best(["a b c", "dog"], "en", "de", config):
        scores = [h.score for h in hypotheses]
        assert scores == sorted(scores, reverse=True)
        assert len(hypotheses) == 3


def test_samples_follow_the_line_and_not_its_neighbours(translator):
    sample = Sample(n_best=2, seed=5, temperature=0.8, top_k=30, top_p=0.95)
    config = DecodeConfig(sample)
    lines = ["a b c", "dog", "a b c", "cat here"]
    together = translator.translate_n_best(lines, "en", "de", config)
    assert together[0] != together[2]
    rest = translator.translate_n_best(lines[2:], "en", "de", config, first_line=2)
    assert [[h.text for h in found] for found in rest] == [[h.text for h in found] for found in together[2:]]
    programs = decode_batch._cache_size()
    other = translator.translate_n_best(lines, "en", "de", DecodeConfig(dataclasses.replace(sample, seed=6)))
    assert other != together
    assert decode_batch._cache_size() == programs  # another seed is no other program


def test_long_lines_are_cut_and_counted(translator, caplog):
    line = "cat dog " * 30
    config = DecodeConfig(Greedy(), max_source_length=12)
    with caplog.at_level(logging.WARNING):
        cut = translator.translate_n_best([line, "a"], "en", "de", config)
    assert "1 of 2 lines are longer than 12 tokens" in caplog.text
    assert cut[0] == translator.translate_n_best([line + line, "a"], "en", "de", config)[0]


def test_directions_are_found_or_refused(translator):
    assert translator.resolve(None, "de") == ("en", "de")
    assert translator.resolve("de", None) == ("de", "en")
    with pytest.raises(UserError, match="fits several directions; it translates en-de, de-en"):
        translator.translate(["a"])
    with pytest.raises(UserError, match=r"en-fr is not a direction of this model; it translates en-de, de-en"):
        translator.translate(["a"], "en", "fr")
    with pytest.raises(UserError, match="one string"):
        translator.translate("a line", "en", "de")
    with pytest.raises(UserError, match="2 source lines but 1 target"):
        translator.score(["a", "b"], ["a"], "en", "de")


def test_parts_that_do_not_fit_are_refused(translator):
    model = EncoderDecoder(dataclasses.replace(translator.model.config, vocab_size=7))
    arguments = (translator.vocabulary, TagPolicy(), ["en-de"])
    with pytest.raises(UserError, match="the model 7"):
        Translator(model, translator.params, *arguments)
    params = {**translator.params, "decoder": {}}
    with pytest.raises(UserError, match=r"the checkpoint belongs to another model or optimizer: .*: decoder/"):
        Translator(translator.model, params, *arguments)


def test_a_run_folder_opens(translator, tmp_path):
    from t5x_ext.checkpoints import CheckpointStore, RunFolder

    run = RunFolder(tmp_path / "run")
    tags = dataclasses.asdict(translator.tags)
    run.write_model(translator.model.config.to_json(), tags, translator.directions, translator.vocabulary.fingerprint())
    translator.vocabulary.save(str(run.vocabulary))
    with CheckpointStore(run.checkpoints) as store:
        store.save(3, {"params": translator.params, "step": 3})
    opened = Translator.from_run(tmp_path / "run", "last")
    assert opened.fingerprint() == translator.fingerprint()
    assert opened.translate(LINES[:3], "en", "de") == translator.translate(LINES[:3], "en", "de")
    assert Translator.from_run(tmp_path / "run", "3").fingerprint() == translator.fingerprint()
    for checkpoint, message in (("4", "step 4"), ("first", "must be best, last or a step")):
        with pytest.raises(UserError, match=message):
            Translator.from_run(tmp_path / "run", checkpoint)
    with pytest.raises(UserError, match="does not exist"):
        Translator.from_run(tmp_path / "nowhere")
    run.write_model(translator.model.config.to_json(), tags, translator.directions, "another")
    with pytest.raises(UserError, match="not the vocabulary that this model was trained with"):
        Translator.from_run(tmp_path / "run")


def test_the_moving_average_is_what_a_run_decodes_with(translator, tmp_path):
    from t5x_ext.checkpoints import CheckpointStore, RunFolder

    run = RunFolder(tmp_path)
    tags, fingerprint = dataclasses.asdict(translator.tags), translator.vocabulary.fingerprint()
    run.write_model(translator.model.config.to_json(), tags, ["en-de", "de-en"], fingerprint)
    translator.vocabulary.save(str(run.vocabulary))
    with CheckpointStore(run.checkpoints) as store:
        store.save(1, {"params": jax.tree.map(jnp.zeros_like, translator.params), "ema": translator.params})
    assert Translator.from_run(tmp_path).fingerprint() == translator.fingerprint()


@pytest.mark.parametrize(
    ("spelled", "line"),
    [
        ("one two", "one two"),
        ("one\ntwo", "one two"),
        ("one\r\n  two\x00\x1b\x7f\x85three", "one two three"),
        ("\ttab\t", "tab"),
        ("lines\u2028and\u2029paragraphs", "lines and paragraphs"),
        ("  kept  as  it is ", "  kept  as  it is "),
        ("\x00", ""),
    ],
)
def test_control_characters_that_byte_pieces_spell_become_spaces(translator, monkeypatch, spelled, line):
    monkeypatch.setattr(translator.vocabulary, "decode", lambda ids: [spelled for _ in ids])
    assert translator.translate(["a dog"], "en", "de", DecodeConfig(Greedy())) == [line]
