"""Decoding on several devices: what one device gives for every sharding."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.decode import Beam, DecodeConfig, MinimumLength, NoRepeatNgrams, Sample, Translator
from t5x_ext.decode.batching import mesh_of, plan_batches
from t5x_ext.decode.programs import decode_batch
from t5x_ext.decode.scoring import label_log_probs
from t5x_ext.models import EncoderDecoder
from t5x_ext.parallel import MeshConfig, MeshPlacement, fsdp_tensor, make_mesh
from t5x_ext.parallel.batches import batch_sharding

MESHES = {"copies": MeshConfig(), "sharded": MeshConfig(data=2, fsdp=2, tensor=2)}
# Eight rows are one for each device; with the empty line there are fewer lines than rows.
LINES = ["a dog", "", "cat and dog", "here", "there are cats today", "x y z"]
SETTINGS = {
    "beam": DecodeConfig(Beam(beam_size=3, n_best=2), max_length_ratio=1.0, max_length_extra=0),
    "sample": DecodeConfig(Sample(n_best=2, seed=4), max_length_ratio=1.0, max_length_extra=0),
    "constrained": DecodeConfig(
        Beam(beam_size=3), (MinimumLength(3), NoRepeatNgrams(2)), max_length_ratio=1.0, max_length_extra=0
    ),
}


def on_mesh(translator: Translator, mesh: MeshConfig) -> Translator:
    """The same weights, placed by the rules; NumPy arrays, as a checkpoint gives them."""
    model = EncoderDecoder(translator.model.config, placement=MeshPlacement(make_mesh(mesh), fsdp_tensor()))
    params = jax.tree.map(np.asarray, translator.params)
    return Translator(model, params, translator.vocabulary, translator.tags, translator.directions)


def check_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert [(h.text, h.num_tokens) for h in ours] == [(h.text, h.num_tokens) for h in theirs]
        np.testing.assert_allclose([h.score for h in ours], [h.score for h in theirs], rtol=1e-5)


@pytest.mark.devices(8)
@pytest.mark.parametrize(("mesh", "settings"), [("copies", "sample"), ("sharded", "beam"), ("sharded", "constrained")])
def test_eight_devices_give_what_one_gives(translator, mesh, settings):
    placed = on_mesh(translator, MESHES[mesh])
    sharded = [not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed.params)]
    assert all(sharded) if mesh == "sharded" else not any(sharded)
    assert placed.fingerprint() == translator.fingerprint()
    config = SETTINGS[settings]
    check_equal(
        placed.translate_n_best(LINES, "en", "de", config, first_line=70),
        translator.translate_n_best(LINES, "en", "de", config, first_line=70),
    )


@pytest.mark.devices(8)
def test_eight_devices_score_as_one_does(translator):
    both = (on_mesh(translator, MESHES["sharded"]), translator)
    scores, expected = ([score.log_prob for score in t.score(LINES, LINES[::-1], "en", "de")] for t in both)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


@pytest.mark.devices(8)
def test_a_device_works_on_its_own_rows_only(translator):
    """Copies of the model exchange nothing while they score, and whether all are done while they search.

    The operations of one device of eight are those of an eighth of the rows, vocabulary projection included.
    """

    def score(model, rows):
        arrays = np.ones((rows, 16), np.int32), np.ones(rows, np.int32)
        mesh = mesh_of(model)
        if mesh is not None:
            arrays = jax.device_put(arrays, batch_sharding(mesh))
        return label_log_probs.lower(model, translator.params, *arrays, *arrays, 1).compile()

    placed = on_mesh(translator, MESHES["copies"])
    ours, alone = score(placed.model, 16), score(translator.model, 2)
    assert ours.cost_analysis()["flops"] == pytest.approx(alone.cost_analysis()["flops"], rel=0.01)
    assert not re.search("all-|permute", ours.as_text())

    exchanges = re.findall(r"= (.*) (all-\S+|\S+permute\S*)\(", searched(placed))
    assert [kind for _, kind in exchanges] == ["all-reduce"]


@pytest.mark.devices(8)
def test_no_device_has_the_scores_of_all_rows(translator):
    """Also where the vocabulary may be sharded."""
    vocab_size = translator.vocabulary.size
    text = searched(on_mesh(translator, MESHES["sharded"]))
    assert f"f32[6,{vocab_size}]" in text
    assert f"f32[24,{vocab_size}]" not in text


def searched(placed: Translator) -> str:
    """The compiled search of 8 rows with 3 hypotheses each."""
    shapes = ((8, 16), (8,), (8, 1), (8,), (8,))
    arrays = jax.device_put([np.ones(shape, np.int32) for shape in shapes], batch_sharding(mesh_of(placed.model)))
    search = decode_batch.lower(
        placed.model,
        placed.params,
        *arrays,
        jax.random.key(0),
        eos_id=1,
        max_length=17,
        search=Beam(beam_size=3, n_best=2),
    )
    return search.compile().as_text()


@pytest.mark.devices(8)
def test_an_ensemble_on_a_mesh_keeps_its_members_where_they_are(translator):
    placed = on_mesh(translator, MESHES["sharded"])
    both = Translator.ensemble([placed, placed])
    for one, stacked in zip(jax.tree.leaves(placed.params), jax.tree.leaves(both.params)):
        assert stacked.sharding.is_equivalent_to(
            jax.sharding.NamedSharding(one.sharding.mesh, jax.P(None, *one.sharding.spec)), stacked.ndim
        )
    config = SETTINGS["beam"]
    check_equal(
        both.translate_n_best(LINES, "en", "de", config), translator.translate_n_best(LINES, "en", "de", config)
    )


@pytest.mark.devices(8)
def test_batches_of_a_mesh_are_sharded_evenly():
    """Each copy of the model has the tokens of one device; rows divide among the devices that share them."""
    copies, sharded = (make_mesh(mesh) for mesh in MESHES.values())
    shapes = lambda lengths, mesh: {(b.rows, b.length) for b in plan_batches(lengths, 64, mesh)}
    assert shapes([5] * 100, None) == {(4, 16)}
    assert shapes([5] * 100, copies) == {(32, 16)}
    assert shapes([5] * 100, sharded) == {(8, 16)}
    assert shapes([60] * 100, None) == {(1, 64)}
    assert shapes([60] * 100, copies) == {(8, 64)}
    assert shapes([60] * 100, sharded) == {(4, 64)}
    assert shapes([5], copies) == {(8, 16)}


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="does not fit 1 devices"):
        make_mesh(MeshConfig(fsdp=2), jax.local_devices()[:1])
