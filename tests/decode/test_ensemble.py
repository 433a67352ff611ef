from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.data import TagPolicy
from t5x_ext.decode import Beam, DecodeConfig, Greedy, NoRepeatNgrams, Sample, Translator
from t5x_ext.decode.batching import pad
from t5x_ext.models import EncoderDecoder, init_params

LINES = ["a dog and a cat", "", "here and there today", "cat"]
COMBINES = ["log_prob", "probability"]


@pytest.fixture(scope="module")
def other(translator) -> Translator:
    """A model like `translator` with other weights."""
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.3, leaf.shape).astype(np.float32), translator.params)
    return Translator(translator.model, params, translator.vocabulary, translator.tags, translator.directions)


def log_probs(translator: Translator, source: list[int], labels: list[int]) -> np.ndarray:
    """[labels, vocab] of one sentence, from the model's whole forward pass."""
    inputs = [translator.vocabulary.eos_id, *labels[:-1]]
    batch = {}
    for side, names, ids in (("source", ["tokens"], source), ("target", ["inputs", "labels"], inputs)):
        tokens = pad([ids], 1, len(ids))[0]
        batch |= {f"{side}_{name}": tokens for name in names}
        batch |= {f"{side}_segment_ids": np.ones_like(tokens), f"{side}_positions": np.arange(len(ids))[None]}
    logits = translator.model.apply({"params": translator.params}, batch)
    return np.asarray(jax.nn.log_softmax(logits[0]), np.float64)


@pytest.mark.parametrize("combine", COMBINES)
def test_combined_scores_are_those_of_the_definition(translator, other, combine):
    vocabulary = translator.vocabulary
    source = [*vocabulary.encode([LINES[0]])[0].tolist(), vocabulary.eos_id]
    labels = [vocabulary.tag_id("de"), *vocabulary.encode([LINES[2]])[0].tolist(), vocabulary.eos_id]
    each = np.stack([log_probs(member, source, labels) for member in (translator, other)])
    if combine == "log_prob":
        product = each.mean(axis=0)
        combined = product - np.log(np.exp(product).sum(axis=-1, keepdims=True))
    else:
        combined = np.log(np.exp(each).mean(axis=0))
    both = Translator.ensemble([translator, other], combine)
    (score,) = both.score_tokens([source], [labels])
    np.testing.assert_allclose(score.token_log_probs, combined[np.arange(len(labels)), labels], atol=1e-5)


@pytest.mark.parametrize(
    ("members", "combine", "config"),
    [
        (1, "log_prob", DecodeConfig(Beam(beam_size=3, n_best=2))),
        (3, "probability", DecodeConfig(Beam(beam_size=3, n_best=2), (NoRepeatNgrams(1),))),
        (2, "log_prob", DecodeConfig(Greedy())),
        (2, "probability", DecodeConfig(Sample(n_best=2))),
    ],
)
def test_the_same_model_several_times_decodes_as_it_does_alone(translator, members, combine, config):
    together = Translator.ensemble([translator] * members, combine)
    alone = translator.translate_n_best(LINES, "en", "de", config)
    for expected, found in zip(alone, together.translate_n_best(LINES, "en", "de", config), strict=True):
        assert [hypothesis.text for hypothesis in found] == [hypothesis.text for hypothesis in expected]
        np.testing.assert_allclose([h.score for h in found], [h.score for h in expected], atol=1e-5)


@pytest.mark.parametrize("search", [Beam(beam_size=3, alpha=0.0), Sample(alpha=0.0)])
def test_a_cached_search_scores_its_result_as_forced_scoring_does(translator, other, monkeypatch, search):
    both = Translator.ensemble([translator, other])
    seen = []
    decode = both.vocabulary.decode
    monkeypatch.setattr(both.vocabulary, "decode", lambda ids: seen.append(ids) or decode(ids))
    (hypotheses,) = both.translate_n_best(LINES[:1], "en", "de", DecodeConfig(search))
    vocabulary = both.vocabulary
    source = [*vocabulary.encode(LINES[:1])[0].tolist(), vocabulary.eos_id]
    labels = [vocabulary.tag_id("de"), *seen[0][0].tolist()]
    assert both.score_tokens([source], [labels])[0].log_prob == pytest.approx(hypotheses[0].score, abs=1e-4)
    assert hypotheses[0].score != pytest.approx(translator.score_tokens([source], [labels])[0].log_prob, abs=1e-3)


def test_an_ensemble_is_told_apart_from_its_members(translator, other):
    prints = [t.fingerprint() for t in (translator, other, *map(Translator.ensemble, ([translator], [other])))]
    prints.append(Translator.ensemble([translator], "probability").fingerprint())
    assert len(set(prints)) == 5


def test_members_that_do_not_fit_are_refused_in_one_line(translator, other):
    def changed(**fields):
        model = EncoderDecoder(dataclasses.replace(translator.model.config, **fields.pop("model", {})))
        given = {
            "model": model,
            "vocabulary": translator.vocabulary,
            "tags": translator.tags,
            "directions": translator.directions,
            **fields,
        }
        shapes = jax.eval_shape(lambda: init_params(model.config, jax.random.key(0)))
        return Translator(params=jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes), **given)

    for member, message in (
        (changed(model={"mlp_dim": 64}), "model 2 has another model than the first"),
        (changed(tags=TagPolicy(encoder="target")), "model 2 has another tag policy than the first"),
        (changed(directions=["de-en-x"]), "no direction in common"),
    ):
        with pytest.raises(UserError, match=message):
            Translator.ensemble([translator, member])
    with pytest.raises(UserError, match="a member is an ensemble itself"):
        Translator.ensemble([Translator.ensemble([other])])
    both = Translator.ensemble([translator, other])
    too_many = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), translator.params)
    with pytest.raises(UserError, match="the checkpoint"):
        Translator(both.model, too_many, both.vocabulary, both.tags, ["en-de"])
