from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from t5x_ext.contracts import Decodable, path_name
from t5x_ext.models import DecoderConfig, LanguageModel, LayerSharing, init_params, logical_axes

SMALL = DecoderConfig(vocab_size=23, embed_dim=8, mlp_dim=12, num_heads=2, layers=1, dropout=0.0)
# As the first release had them: encoder-decoders with `encoder_layers=0`.
VARIANTS = {
    "language model": {"layers": 4, "sharing": LayerSharing("cycle_rev", 2)},
    "language model, untied, post-norm": {"tied_embeddings": "none", "norm_placement": "post", "final_norm": False},
    "language model, partly tied": {"tied_embeddings": "decoder"},
}
TARGET = ("target_inputs", "target_segment_ids", "target_positions")


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_and_parameters_are_those_of_old_language_models(random_params, packed_batch, golden, variant, scan):
    config = dataclasses.replace(SMALL, **VARIANTS[variant], scan_layers=scan)
    batch = {name: packed_batch()[name] for name in TARGET}
    golden(config, variant, LanguageModel(config).apply({"params": random_params(config)}, batch))


@pytest.mark.parametrize(
    ("tied", "tables"),
    [
        ("all", {"embedding"}),
        ("decoder", {"target_embedding"}),
        ("none", {"target_embedding", "output_embedding"}),
    ],
)
def test_parameters_have_the_names_of_a_decoder(tied, tables):
    config = dataclasses.replace(SMALL, tied_embeddings=tied)
    params = LanguageModel(config).abstract_params()
    assert set(params) == {"decoder", *tables}
    assert set(params["decoder"]["layers"]) == {
        f"{part}{end}" for part in ("self_attention", "feed_forward") for end in ("", "_residual")
    }
    axes = logical_axes(LanguageModel(config))
    assert axes["decoder"]["layers"]["feed_forward"]["up"]["kernel"] == ("layers", "embed", "mlp")


def test_no_token_sees_a_later_one_or_another_example(random_params, packed_batch):
    model, params, batch = LanguageModel(SMALL), random_params(SMALL), packed_batch()
    scores = np.asarray(model.apply({"params": params}, batch))
    changed = {name: values.copy() for name, values in batch.items()}
    changed["target_inputs"][batch["target_segment_ids"] != 1] = 3
    changed["target_inputs"][:, 1] = 4
    after = np.asarray(model.apply({"params": params}, changed))
    np.testing.assert_array_equal(after[:, 0], scores[:, 0])
    assert not np.allclose(after[:, 1], scores[:, 1])


def test_it_translates_nothing():
    assert not isinstance(LanguageModel(SMALL), Decodable)


def test_abstract_parameters_are_those_of_init():
    model = LanguageModel(SMALL)
    params = init_params(model, jax.random.key(0))
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    abstract = jax.tree_util.tree_leaves_with_path(model.abstract_params())
    assert shapes == {path_name(path): leaf.shape for path, leaf in abstract}
