from __future__ import annotations

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ext.contracts import UserError, path_name
from t5x_ext.models import EncoderDecoder, LayerParts, LayerSharing, parts
from t5x_ext.models.sublayers import Attention, FeedForward, Norm, Projection, Residual


class RecordedFeedForward(nn.Module):
    """The default with side outputs: the mean of its input, and how it is called."""

    inner: FeedForward
    tag: float

    def __call__(self, x, deterministic):
        y, _ = self.inner(x, deterministic)
        return y, {"mean": x.mean((1, 2)), "tag": jnp.full((), self.tag)}


@dataclasses.dataclass(frozen=True)
class Recorded:
    tag: float = 1.0

    def __call__(self, config, projection, placement):
        return RecordedFeedForward(FeedForward(config, projection, placement), self.tag)


class AddedResidual(Residual):
    """Adds a bias of its own before the sum: the smallest adapter."""

    def setup(self):
        super().setup()
        self.extra = self.param("extra", nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)), (8,))

    def leave(self, x, y, deterministic):
        return super().leave(x, y + self.extra, deterministic)


class HalfProjection(Projection):
    def __call__(self, x):
        assert self.path[-2:] in {
            *((attention, name) for attention in ("self_attention", "cross_attention") for name in ("query", "key")),
            *((attention, name) for attention in ("self_attention", "cross_attention") for name in ("value", "out")),
            *(("feed_forward", name) for name in ("up", "down")),
        }
        return super().__call__(x) / 2


SHARED = {
    "encoder_layers": 3,
    "encoder_sharing": LayerSharing("universal"),
    "decoder_layers": 4,
    "decoder_sharing": LayerSharing("cycle_rev", 2),
}


def test_defaults_are_today_s_classes():
    assert LayerParts() == LayerParts(Attention, FeedForward, Residual, Norm, Projection, ())
    assert LayerParts().to_json() == {}
    assert LayerParts.from_json({}) == LayerParts()


def test_equal_parts_share_a_compiled_program(small_config, packed_batch, random_params):
    config, traced = small_config(), []

    @functools.partial(jax.jit, static_argnums=0)
    def logits(model, params, batch):
        traced.append(model)
        return model.apply({"params": params}, batch)

    params = random_params(config)
    for tag in (1.0, 1.0, 2.0):
        logits(EncoderDecoder(config, parts=LayerParts(feed_forward=Recorded(tag))), nested(params), packed_batch())
    assert len(traced) == 2


def nested(params):
    """The default's parameters as those of `Recorded`, whose feed-forward sub-layer is one deeper."""
    move = lambda layers: {**layers, "feed_forward": {"inner": layers["feed_forward"]}}
    return {
        name: {**tree, "layers": move(tree["layers"])} if "layers" in tree else tree for name, tree in params.items()
    }


@pytest.mark.parametrize("scan", [False, True])
def test_side_outputs_are_stacked_in_the_order_of_positions(small_config, packed_batch, random_params, scan):
    config = small_config(**SHARED, scan_layers=scan, norm_placement="post")
    params, batch = random_params(config), packed_batch()
    model = EncoderDecoder(config, parts=LayerParts(feed_forward=Recorded(3.0)))
    hidden, aux = model.apply({"params": nested(params)}, batch, method="hidden_and_aux")
    plain = EncoderDecoder(config).apply({"params": params}, batch, method="hidden")
    np.testing.assert_allclose(hidden, plain, rtol=1e-5, atol=1e-5)
    assert {name: value.shape for name, value in aux.items()} == {
        "encoder/feed_forward/mean": (3, 2),
        "encoder/feed_forward/tag": (3,),
        "decoder/feed_forward/mean": (4, 2),
        "decoder/feed_forward/tag": (4,),
    }
    # The first k positions of a stack alone record what the whole stack records there.
    alone = dataclasses.replace(config, encoder_layers=2, decoder_layers=1, decoder_sharing=LayerSharing())
    first = jax.tree.map(lambda a: a, nested(params))
    first["decoder"]["layers"] = jax.tree.map(lambda a: a[:1], first["decoder"]["layers"])
    _, shorter = EncoderDecoder(alone, parts=model.parts).apply({"params": first}, batch, method="hidden_and_aux")
    mean = "encoder/feed_forward/mean"
    np.testing.assert_allclose(aux[mean][:2], shorter[mean], rtol=1e-5)
    assert len({tuple(row) for row in np.asarray(aux[mean]).tolist()}) == 3


def test_default_parts_have_no_side_outputs(small_config, packed_batch, random_params):
    config = small_config()
    _, aux = EncoderDecoder(config).apply({"params": random_params(config)}, packed_batch(), method="hidden_and_aux")
    assert aux == {}


def test_projections_know_where_they_are(small_config, packed_batch, random_params):
    config = small_config()
    params, batch = random_params(config), packed_batch()
    halved = jax.tree_util.tree_map_with_path(
        lambda path, a: a / 2 if path[-2].key in {"query", "key", "value", "out", "up", "down"} else a, params
    )
    model = EncoderDecoder(config, parts=LayerParts(projection=HalfProjection))
    np.testing.assert_allclose(
        model.apply({"params": params}, batch), EncoderDecoder(config).apply({"params": halved}, batch), rtol=1e-5
    )


@pytest.mark.parametrize("scan", [False, True])
def test_parameters_of_positions_differ_where_sets_are_shared(small_config, packed_batch, random_params, scan):
    config = small_config(**SHARED, scan_layers=scan)
    per_position = LayerParts(residual=AddedResidual, per_position=(r"/extra$",))
    model, batch = EncoderDecoder(config, parts=per_position), packed_batch()
    shapes = nn.meta.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), batch)))["params"]
    own = {path_name(p): a.shape for p, a in jax.tree_util.tree_leaves_with_path(shapes) if "extra" in path_name(p)}
    assert own == {
        **{f"encoder/positions/{part}_residual/extra": (3, 8) for part in ("self_attention", "feed_forward")},
        **{
            f"decoder/positions/{part}_residual/extra": (4, 8)
            for part in ("self_attention", "cross_attention", "feed_forward")
        },
    }
    params, rng = random_params(config), np.random.default_rng(5)
    positions = jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32), {
        side: shapes[side]["positions"] for side in ("encoder", "decoder")
    })  # fmt: skip
    added = {**params, **{side: {**params[side], "positions": positions[side]} for side in positions}}
    # The same model without sharing: every position has its set.
    unshared = dataclasses.replace(config, encoder_sharing=LayerSharing(), decoder_sharing=LayerSharing())
    copied = dict(params)
    for side, layer_map in (("encoder", np.array([0, 0, 0])), ("decoder", np.array([0, 1, 1, 0]))):
        layers = jax.tree.map(lambda a, i=layer_map: a[i], params[side]["layers"])
        layers = {name: {**tree, **positions[side].get(name, {})} for name, tree in layers.items()}
        copied[side] = {**params[side], "layers": layers}
    expected = EncoderDecoder(unshared, parts=LayerParts(residual=AddedResidual)).apply({"params": copied}, batch)
    np.testing.assert_allclose(model.apply({"params": added}, batch), expected, rtol=1e-5, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class Sized:
    width: int = 4
    names: tuple[str, ...] = ()

    def __call__(self, config, norm, placement):
        return Residual(config, norm, placement)


def test_parts_are_data(monkeypatch):
    monkeypatch.setitem(parts.KINDS["residual"], "sized", Sized)
    given = LayerParts(residual=Sized(7, ("query", "value")), per_position=("extra",))
    record = json.loads(json.dumps(given.to_json()))
    assert record == {
        "residual": {"kind": "sized", "width": 7, "names": ["query", "value"]},
        "per_position": ["extra"],
    }
    assert LayerParts.from_json(record) == given
    assert hash(LayerParts.from_json(record)) == hash(given)


def test_parts_from_elsewhere_are_named_but_not_opened():
    record = LayerParts(residual=AddedResidual, feed_forward=Recorded(2.0)).to_json()
    assert {name: factory["kind"].split(".")[-1] for name, factory in record.items()} == {
        "residual": "AddedResidual",
        "feed_forward": "Recorded",
    }
    with pytest.raises(UserError, match=r"feed_forward is of the unknown kind '.*Recorded'; built in are default"):
        LayerParts.from_json(record)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"residua": {"kind": "default"}}, "unknown part 'residua'; a layer has attention, feed_forward, residual"),
        ({"residual": {"kind": "adaptor"}}, "residual is of the unknown kind 'adaptor'; built in are default"),
        ({"residual": {"width": 7}}, "unknown kind None"),
        ({"residual": {"kind": "default", "width": 7}}, "residual 'default' has no field 'width'; it has none"),
        ({"residual": {"kind": "sized", "widht": 7}}, "residual 'sized' has no field 'widht'; it has width, names"),
    ],
)
def test_mistakes_in_records_are_one_line(monkeypatch, record, message):
    monkeypatch.setitem(parts.KINDS["residual"], "sized", Sized)
    with pytest.raises(UserError, match=message) as error:
        LayerParts.from_json(record)
    assert "\n" not in str(error.value)
