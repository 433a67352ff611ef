"""What a Transformer layer is made of: projections, norms, dropout, attention, feed-forward, residual connections.

Parameters are float32 and carry logical axis names; activations have the config's compute dtype. `parts.LayerParts`
says which of these, or of others with the same methods, a model uses.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from t5x_ext.contracts import AnyArray, Axes
from t5x_ext.models.config import LayerConfig
from t5x_ext.models.placement import UNPLACED, Placement

Positions = Callable[[Int[AnyArray, "..."], int], Float[Array, "... embed"]]
"""`(positions, embed_dim) -> vectors`, added to embeddings."""

Factory = Callable[..., nn.Module]
"""Makes a part of a layer: a module class, or anything hashable that is called as one (see `parts.LayerParts`)."""

Aux = dict[str, Array]
"""Named side outputs beside the main one, such as a loss that balances experts; usually empty."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "gelu": functools.partial(nn.gelu, approximate=False),
}
"""Activations by the name that a config gives them; `gelu` is exact (by the error function), as in BERT."""

MASKED = -1e9
"""Attention score where attention is not allowed: finite, so that rows without any allowed key stay finite."""


class KeyValue(NamedTuple):
    """Keys and values of attention, per head."""

    key: Float[Array, "*batch length heads head_dim"]
    value: Float[Array, "*batch length heads head_dim"]


def sinusoidal_positions(positions: Int[AnyArray, "..."], embed_dim: int) -> Float[Array, "... embed"]:
    """Sines in the first half, cosines in the second, wavelengths from 2 pi to 20,000 pi (fairseq's arrangement).

    Positions count from 0 (fairseq starts at 2).
    """
    half = embed_dim // 2
    frequencies = jnp.exp(jnp.arange(half) * (-math.log(10000.0) / max(half - 1, 1)))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def compute_dtype(config: LayerConfig) -> jnp.dtype:
    """The dtype of activations and matrix products."""
    return jnp.dtype(config.compute_dtype)


def einsum_float32(subscripts: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """A product of two arrays of one dtype, summed and returned in float32.

    The products of its gradient take the dtype of `a` and `b` too. JAX alone would multiply the float32 gradient by a
    bfloat16 array, which makes both of these products float32.
    """
    if a.dtype == jnp.float32:
        return jnp.einsum(subscripts, a, b)
    return _einsum_widened(subscripts, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum_widened(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _einsum_forward(subscripts: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    # The plain product: `jvp` of a gradient (a Hessian-vector product) differentiates this, not the custom rule.
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32), (a, b)


def _einsum_backward(subscripts: str, operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    _, transpose = jax.vjp(functools.partial(jnp.einsum, subscripts), *operands)
    return transpose(gradient.astype(operands[0].dtype))


_einsum_widened.defvjp(_einsum_forward, _einsum_backward)


def named_axes(init: Callable[..., Array], axes: Axes) -> Callable[..., Any]:
    """The initialiser `init`, its result boxed with the logical names of its axes."""
    return nn.with_logical_partitioning(init, axes)


class Dropout(nn.Module):
    """Zeroes values with probability `rate` and scales the others to keep the mean; reads the rng `dropout`.

    The rate is rounded to a multiple of 1/256 (0.1 becomes 26/256), so that one random word serves four values: random
    bits are the costly part of dropout on a CPU.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "..."], deterministic: bool) -> Float[Array, "..."]:
        """Returns `x` with values dropped, or `x` itself when deterministic."""
        if deterministic or self.rate == 0.0:
            return x
        dropped = min(max(round(self.rate * 256), 1), 255)
        keep = random_bytes(self.make_rng("dropout"), x.shape) >= dropped
        return jnp.where(keep, x * (256 / (256 - dropped)), jnp.zeros_like(x))


def random_bytes(key: Array, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Independent uniform integers in [0, 256), four from each random word."""
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 4)), jnp.uint32)
    # Side by side along the last axis, so that leading axes may stay split over devices.
    parts = [(words >> shift) & 0xFF for shift in (0, 8, 16, 24)]
    return jnp.concatenate(parts, axis=-1)[..., : shape[-1]]


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, computed in float32, returned in the dtype of its input."""

    config: LayerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "... embed"]) -> Float[Array, "... embed"]:
        """Returns `x` normalised and scaled."""
        config, width = self.config, x.shape[-1]
        scale = self.param("scale", named_axes(nn.initializers.ones, ("embed",)), (width,))
        y = x.astype(jnp.float32)
        if config.norm == "layernorm":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.norm_epsilon) * scale
        if config.norm == "layernorm" and config.use_bias:
            y = y + self.param("bias", named_axes(nn.initializers.zeros, ("embed",)), (width,))
        return y.astype(x.dtype)


class Projection(nn.Module):
    """A linear map from the last axes of its input to new ones, Xavier-uniform with a gain, bias zero.

    Attributes:
      config: gives dtype and whether there is a bias.
      features: sizes of the new axes.
      axes: logical names of the kernel's axes, the contracted ones first; as many of the input's last axes are
        contracted as there are names beyond `features`.
      gain: of the uniform initialiser.
      placement: where the kernel is stored while it is used.
    """

    config: LayerConfig
    features: tuple[int, ...]
    axes: tuple[str, ...]
    gain: float = 1.0
    placement: Placement = UNPLACED

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the map of `x` in the compute dtype."""
        contracted = len(self.axes) - len(self.features)
        init = nn.initializers.variance_scaling(
            self.gain**2, "fan_avg", "uniform", range(contracted), range(contracted, len(self.axes))
        )
        leading, reduced = x.shape[:-contracted], x.shape[-contracted:]
        kernel = self.param("kernel", named_axes(init, self.axes), reduced + self.features)
        dtype = compute_dtype(self.config)
        # As a product of matrices: XLA's CPU gradient of the same contraction over several axes takes twice as long.
        width = math.prod(reduced)
        kernel = self.placement.weight(kernel.astype(dtype), self.axes)
        y = x.reshape(-1, width).astype(dtype) @ kernel.reshape(width, -1)
        if self.config.use_bias:
            zeros = named_axes(nn.initializers.zeros, self.axes[contracted:])
            y = y + self.param("bias", zeros, self.features).reshape(-1).astype(dtype)
        return y.reshape(leading + self.features)


class Attention(nn.Module):
    """Scaled dot-product attention with several heads; softmax in float32.

    Queries, keys and values start at gain 1/sqrt(2) as in fairseq, the output projection at 1.

    Attributes:
      config: gives heads, widths, dropout and dtype.
      make_projection: makes the four projections.
      placement: where arrays are stored on a mesh of devices.
    """

    config: LayerConfig
    make_projection: Factory = Projection
    placement: Placement = UNPLACED

    def setup(self) -> None:
        """Creates the four projections."""
        config, make = self.config, self.make_projection
        heads, axes = (config.num_heads, config.head_dim), ("embed", "heads", "head_dim")
        self.query = make(config, heads, axes, math.sqrt(0.5), self.placement)
        self.key = make(config, heads, axes, math.sqrt(0.5), self.placement)
        self.value = make(config, heads, axes, math.sqrt(0.5), self.placement)
        self.out = make(config, (config.embed_dim,), ("heads", "head_dim", "embed"), 1.0, self.placement)
        self.dropout = Dropout(config.attention_dropout)

    def keys_and_values(self, x: Float[Array, "batch length embed"]) -> KeyValue:
        """Keys and values of the attended sequence."""
        return KeyValue(self.key(x), self.value(x))

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        memory: KeyValue,
        mask: Bool[Array, "#batch #length memory_length"],
        deterministic: bool,
    ) -> tuple[Float[Array, "batch length embed"], Aux]:
        """What each query position reads from the `memory` positions where `mask` is True."""
        query = self.query(x) * self.config.head_dim**-0.5
        scores = einsum_float32("bqhd,bkhd->bhqk", query, memory.key)
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, MASKED), axis=-1)
        weights = self.dropout(weights.astype(query.dtype), deterministic)
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, memory.value)), {}


class FeedForward(nn.Module):
    """Two projections with the config's activation between.

    Attributes:
      config: gives widths, activation, dropout and dtype.
      make_projection: makes the two projections.
      placement: where arrays are stored on a mesh of devices.
    """

    config: LayerConfig
    make_projection: Factory = Projection
    placement: Placement = UNPLACED

    def setup(self) -> None:
        """Creates the two projections."""
        config = self.config
        self.up = self.make_projection(config, (config.mlp_dim,), ("embed", "mlp"), 1.0, self.placement)
        self.down = self.make_projection(config, (config.embed_dim,), ("mlp", "embed"), 1.0, self.placement)
        self.dropout = Dropout(config.activation_dropout)

    def __call__(
        self, x: Float[Array, "batch length embed"], deterministic: bool
    ) -> tuple[Float[Array, "batch length embed"], Aux]:
        """Returns the sub-layer's output."""
        inner = ACTIVATIONS[self.config.activation](self.up(x))
        inner = self.placement.activation(inner, ("batch", "length", "mlp"))
        return self.down(self.dropout(inner, deterministic)), {}


class Residual(nn.Module):
    """The residual connection around a sub-layer: a norm before it or after the sum, dropout before the sum.

    With pre-norm x + dropout(sublayer(norm(x))), with post-norm norm(x + dropout(sublayer(x))).

    Attributes:
      config: says where the norm is, and the dropout rate.
      make_norm: makes the norm.
      placement: where arrays are stored on a mesh of devices.
    """

    config: LayerConfig
    make_norm: Factory = Norm
    placement: Placement = UNPLACED

    def setup(self) -> None:
        """Creates norm and dropout."""
        self.norm = self.make_norm(self.config)
        self.dropout = Dropout(self.config.dropout)

    def enter(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        """What the sub-layer reads."""
        return self.norm(x) if self.config.norm_placement == "pre" else x

    def leave(
        self, x: Float[Array, "batch length embed"], y: Float[Array, "batch length embed"], deterministic: bool
    ) -> Float[Array, "batch length embed"]:
        """What follows the sub-layer, `x` being what `enter` was given and `y` the sub-layer's output."""
        total = self.placement.activation(x + self.dropout(y, deterministic), ("batch", "length", "embed"))
        return total if self.config.norm_placement == "pre" else self.norm(total)
