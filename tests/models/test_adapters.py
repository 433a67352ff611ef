"""Adapters: the model without them where their second factor is zero, formulas written out, shared sets, decoding."""

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
from t5x_ext.models import EncoderDecoder, LayerParts, LayerSharing, houlsby, lora, mam, parallel, pfeiffer
from t5x_ext.models.adapters import AdapterResidual, LoraProjection, PrefixAttention, merged_lora
from t5x_ext.models.sublayers import Norm, Residual

PRESETS = {
    "houlsby": functools.partial(houlsby, 3),
    "pfeiffer": functools.partial(pfeiffer, 3),
    "parallel": functools.partial(parallel, 3),
    "parallel to attention": functools.partial(parallel, 3, sublayers=("self_attention", "cross_attention")),
    "lora": functools.partial(lora, 2),
    "lora everywhere": functools.partial(lora, 2, targets=("",)),
}
BOTTLENECKS = [name for name in PRESETS if "lora" not in name]
SHARED = {
    "encoder_layers": 2,
    "encoder_sharing": LayerSharing("universal"),
    "decoder_layers": 4,
    "decoder_sharing": LayerSharing("cycle_rev", 2),
}


def initialised(model, batch, seed=0):
    return nn.meta.unbox(model.init(jax.random.key(seed), batch))["params"]


def grown(model, params, batch, seed=0):
    """The parameters of a model without adapters, with those of its adapters as they are initialised."""
    return merged(initialised(model, batch, seed), params)


def merged(adapted, params):
    return {
        name: merged(value, params.get(name, {})) if isinstance(value, dict) else params.get(name, value)
        for name, value in adapted.items()
    }


def names(tree):
    return {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_zero_second_factor_changes_nothing(small_config, packed_batch, random_params, name, placement):
    config = small_config(norm_placement=placement, encoder_layers=2, decoder_layers=2)
    params, batch = random_params(config), packed_batch()
    model = EncoderDecoder(config, parts=PRESETS[name](init="lora"))
    adapted = grown(model, params, batch)
    expected = EncoderDecoder(config).apply({"params": params}, batch)
    np.testing.assert_array_equal(model.apply({"params": adapted}, batch), expected)
    other = EncoderDecoder(config, parts=PRESETS[name](init="bert"))
    changed = other.apply({"params": grown(other, params, batch)}, batch)
    assert np.abs(changed - expected).max() > 1e-4


@pytest.mark.parametrize("name", [*PRESETS, "mam"])
def test_all_and_only_new_parameters_are_called_adapter(small_config, packed_batch, name):
    config, batch = small_config(), packed_batch()
    parts = mam(4, 3) if name == "mam" else PRESETS[name]()
    plain, adapted = initialised(EncoderDecoder(config), batch), initialised(EncoderDecoder(config, parts=parts), batch)
    assert names(plain) < names(adapted)
    assert all("adapter" in new for new in names(adapted) - names(plain))
    assert not any("adapter" in old for old in names(plain))
    # What the two have in common is initialised alike.
    common = [(a, b) for a, b in zip(jax.tree.leaves(merged(adapted, plain)), jax.tree.leaves(adapted), strict=True)]
    assert all(np.array_equal(a, b) for a, b in common)


@pytest.mark.parametrize(
    ("name", "scan"), [("houlsby", True), ("pfeiffer", False), ("lora", True), ("lora", False), ("mam", True)]
)
def test_positions_that_share_a_set_share_its_adapters_unless_told_otherwise(
    small_config, packed_batch, random_params, name, scan
):
    make = functools.partial(mam, 4, 3) if name == "mam" else PRESETS[name]
    config, batch = small_config(**SHARED, scan_layers=scan), packed_batch()
    model = EncoderDecoder(config, parts=make())
    params = jax.tree.map(lambda a: a + 0.1, initialised(model, batch))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params["decoder"]["layers"])} == {2}
    own = EncoderDecoder(config, parts=make(per_position=True))
    separate = initialised(own, batch)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(separate["decoder"]["positions"])} == {4}
    assert all("adapter" in found for found in names(separate["decoder"]["positions"]))
    assert not any("adapter" in found for found in names(separate["decoder"]["layers"]))
    # Each position given what its set has, both are the same function.
    for side, layer_map in (("encoder", jnp.array([0, 0])), ("decoder", jnp.array([0, 1, 1, 0]))):
        separate[side] = merged(separate[side], params[side])
        spread = jax.tree.map(lambda a, i=layer_map: a[i], params[side]["layers"])
        separate[side]["positions"] = merged(separate[side]["positions"], spread)
    separate["embedding"] = params["embedding"]
    np.testing.assert_allclose(
        own.apply({"params": separate}, batch), model.apply({"params": params}, batch), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("form", ["sequential", "after_norm", "parallel"])
def test_bottlenecks_are_what_their_formulas_say(small_config, form, placement):
    config = small_config(norm_placement=placement, norm_epsilon=1e-3)
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(2, 3, 8)).astype(np.float32) for _ in range(2))
    settings = AdapterResidual(5, form, ("feed_forward",), scale=2.0)

    class Frame(nn.Module):
        def setup(self):
            self.feed_forward_residual = settings(config, Norm)

        def __call__(self, x, y):
            return self.feed_forward_residual.leave(jnp.asarray(x), jnp.asarray(y), True)

    params = jax.tree.map(
        lambda a: rng.normal(0.2, 0.4, a.shape).astype(np.float32),
        nn.meta.unbox(Frame().init(jax.random.key(0), x, y))["params"],
    )
    inside = params["feed_forward_residual"]
    adapter = inside["adapter"]
    outer_norm = inside.get("norm", {"scale": np.ones(8), "bias": np.zeros(8)})

    def norm(v, weights):
        v = v - v.mean(-1, keepdims=True)
        return v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-3) * weights["scale"] + weights["bias"]

    def u(v):
        hidden = np.maximum(norm(v, adapter["norm"]) @ adapter["down"]["kernel"] + adapter["down"]["bias"], 0)
        return 2.0 * (hidden @ adapter["up"]["kernel"] + adapter["up"]["bias"])

    post = placement == "post"
    outer = lambda v: norm(v, outer_norm) if post else v
    total = {
        "sequential": lambda: x + y + u(y),
        # With pre-norm `leave` alone makes no norm, so the frame has no parameters of it.
        "parallel": lambda: x + y + u(x if post else norm(x, outer_norm)),
        "after_norm": lambda: x + y + u(outer(x + y)),
    }[form]()
    np.testing.assert_allclose(
        Frame().apply({"params": jax.tree.map(jnp.asarray, params)}, x, y), outer(total), rtol=2e-5, atol=2e-5
    )


def test_lora_is_a_low_rank_change_of_its_targets(small_config, packed_batch, random_params):
    config, batch = small_config(encoder_layers=2), packed_batch()
    parts = lora(2, alpha=6.0, targets=("self_attention/(query|out)$", "feed_forward/up$"))
    model = EncoderDecoder(config, parts=parts)
    params = grown(model, random_params(config), batch)
    params = jax.tree_util.tree_map_with_path(lambda path, a: a * 10 if "adapter" in path_name(path) else a, params)
    changed = {name.split("/adapter/")[0] for name in names(params) if "adapter" in name}
    assert changed == {
        f"{side}/layers/{where}"
        for side in ("encoder", "decoder")
        for where in ("self_attention/query", "self_attention/out", "feed_forward/up")
    }
    layer = params["encoder"]["layers"]["self_attention"]["query"]
    down, up = layer["adapter"]["down"]["kernel"], layer["adapter"]["up"]["kernel"]
    dense = layer["kernel"] + 3.0 * jnp.einsum("ler,lrhd->lehd", down, up)
    folded = merged_lora(params, parts.projection)
    np.testing.assert_allclose(folded["encoder"]["layers"]["self_attention"]["query"]["kernel"], dense, rtol=1e-6)
    assert not any("adapter" in name for name in names(folded))
    np.testing.assert_allclose(
        EncoderDecoder(config).apply({"params": folded}, batch),
        model.apply({"params": params}, batch),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_prefix_is_more_keys_and_values(small_config):
    config = small_config()
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.float32)

    class Frame(nn.Module):
        prefix: int

        def setup(self):
            from t5x_ext.models.sublayers import Attention, Projection

            factory = PrefixAttention(self.prefix) if self.prefix else Attention
            self.self_attention = factory(config, Projection)

        def __call__(self, x, memory=None, mask=None):
            memory = memory or self.self_attention.keys_and_values(x)
            mask = jnp.tril(jnp.ones((1, x.shape[1], memory.key.shape[1]), bool)) if mask is None else mask
            return self.self_attention(x, memory, mask, True)[0], memory

    params = nn.meta.unbox(Frame(3).init(jax.random.key(0), x))["params"]
    prefix = params["self_attention"].pop("prefix_adapter")
    plain = {"self_attention": params["self_attention"]}
    _, memory = Frame(0).apply({"params": plain}, x)
    longer = jax.tree.map(
        lambda one, rest: jnp.concatenate([jnp.broadcast_to(one, (2, *one.shape)), rest], 1),
        type(memory)(prefix["key"], prefix["value"]),
        memory,
    )
    mask = jnp.concatenate([jnp.ones((1, 4, 3), bool), jnp.tril(jnp.ones((1, 4, 4), bool))], -1)
    expected, _ = Frame(0).apply({"params": plain}, x, longer, mask)
    adapted = {"self_attention": {**params["self_attention"], "prefix_adapter": prefix}}
    got, _ = Frame(3).apply({"params": adapted}, x)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer", "parallel to attention", "lora everywhere", "mam"])
def test_step_by_step_decoding_gives_the_scores_of_whole_targets(small_config, packed_batch, name):
    parts = mam(4, 3) if name == "mam" else PRESETS[name]()
    config = small_config(decoder_layers=2)
    batch = packed_batch(source=((6,), (4,)), target=((7,), (7,)))
    model = EncoderDecoder(config, parts=parts)
    params = jax.tree.map(lambda a: a + 0.1, initialised(model, batch))
    apply = functools.partial(model.apply, {"params": params})
    whole = apply(batch)
    source = batch["source_tokens"], batch["source_segment_ids"], batch["source_positions"]
    memory = apply(apply(*source, method="encode"), method="cross_memory")
    step = jax.jit(functools.partial(apply, method="decode_step"))
    cache, mask = apply(2, 7, method="empty_cache"), batch["source_segment_ids"] > 0
    for position in range(7):
        tokens = batch["target_inputs"][:, position]
        scores, cache = step(tokens, jnp.int32(position), cache, memory, mask)
        np.testing.assert_allclose(scores, whole[:, position], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*PRESETS, "mam"])
def test_parts_are_data(name):
    given = mam(4, 3) if name == "mam" else PRESETS[name](per_position=True)
    assert LayerParts.from_json(json.loads(json.dumps(given.to_json()))) == given
    assert hash(LayerParts.from_json(given.to_json())) == hash(given)


def test_dropout_inside_adapters_is_on_in_training_only(small_config, packed_batch):
    config, batch = small_config(), packed_batch()
    model = EncoderDecoder(config, parts=houlsby(16, dropout=0.5))
    params = jax.tree.map(lambda a: a + 0.1, initialised(model, batch))
    apply = lambda seed: model.apply({"params": params}, batch, False, rngs={"dropout": jax.random.key(seed)})
    still = model.apply({"params": params}, batch)
    assert np.array_equal(apply(0), apply(0))
    assert not np.array_equal(apply(0), apply(1))
    assert np.array_equal(still, model.apply({"params": params}, batch))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hessian_products_reach_adapters(small_config, packed_batch, dtype):
    """GraSP differentiates forward over reverse, in bfloat16 too."""
    config, batch = small_config(compute_dtype=dtype), packed_batch()
    model = EncoderDecoder(config, parts=dataclasses.replace(houlsby(3), projection=LoraProjection(2)))
    params = initialised(model, batch)
    loss = lambda params: jnp.mean(model.apply({"params": params}, batch).astype(jnp.float32) ** 2)
    product = jax.jit(lambda params, along: jax.jvp(jax.grad(loss), (params,), (along,))[1])(
        params, jax.tree.map(jnp.ones_like, params)
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(product))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: houlsby(0), "AdapterResidual.bottleneck is 0; it must be a positive integer"),
        (
            lambda: AdapterResidual(form="serial"),
            "AdapterResidual.form is 'serial'; it must be one of sequential, after",
        ),
        (lambda: parallel(3, sublayers=("attention",)), "AdapterResidual.sublayers is 'attention'; it must be one of"),
        (lambda: lora(2, init="zero"), "LoraProjection.init is 'zero'; it must be one of bert, lora"),
        (lambda: mam(-1), "PrefixAttention.length is -1; it must be a positive integer"),
        (lambda: houlsby(3, dropout=1.0), r"AdapterResidual.dropout is 1.0; it must be in \[0, 1\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_settings_are_one_line(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.usefixtures("unchecked")
def test_adapters_are_residual_connections():
    assert issubclass(type(AdapterResidual()(None, Norm)), Residual)
