"""Adapters: small trainable parts beside the frozen parts of a layer. Their parameters have `adapter` in their names.

Three kinds of `LayerParts` carry them: `AdapterResidual` puts a bottleneck around sub-layers (Houlsby, Pfeiffer and
parallel adapters), `LoraProjection` a low-rank product beside projections, `PrefixAttention` learned keys and values
before those of attention. `adapter_presets` has the usual combinations. Everything else of a layer keeps its names, so
that the weights of a model without adapters fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from t5x_ext.contracts import Params, UserError, path_predicate
from t5x_ext.models.config import LayerConfig
from t5x_ext.models.placement import UNPLACED, Placement
from t5x_ext.models.sublayers import (
    Attention,
    Aux,
    Dropout,
    Factory,
    KeyValue,
    Projection,
    Residual,
    compute_dtype,
    named_axes,
)

AdapterForm = Literal["sequential", "after_norm", "parallel"]
"""Where a bottleneck reads and adds, y being the sub-layer's output for x: `sequential` adds u(y) to y, `after_norm`
u(norm(x + y)) to x + y, `parallel` u(what the sub-layer reads) to y."""

AdapterInit = Literal["bert", "lora"]
"""`bert`: both factors normal with deviation 0.02. `lora`: the first Kaiming-uniform, the second zero, so that a new
adapter changes nothing; scores that multiply weights and gradients are then zero."""

SUBLAYERS = ("self_attention", "cross_attention", "feed_forward")

_KAIMING = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # bound 1/sqrt(fan_in), as a = sqrt(5)


def _check_width(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name} is {value!r}; it must be a positive integer")


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def _check_sublayers(name: str, sublayers: Sequence[str]) -> None:
    for one in sublayers:
        _check_choice(f"{name}.sublayers", one, SUBLAYERS)


@dataclass(frozen=True)
class AdapterResidual:
    """A bottleneck at the residual connection of sub-layers: u(x) = scale * up(dropout(relu(down(norm(x))))).

    A factory for `LayerParts.residual`. Parameters of a layer: `<sub-layer>_residual/adapter/{down,up}/{kernel,bias}`,
    and `adapter/norm`.

    Attributes:
      bottleneck: width.
      form: where it reads and adds.
      sublayers: which of `self_attention`, `cross_attention` and `feed_forward` have one.
      scale: of its output.
      init: of its two matrices; biases are zero.
      norm: whether it has a norm of its own before `down`.
      dropout: rate before `up`.

    References:
      Houlsby et al. (arXiv 1902.00751), Pfeiffer et al. (arXiv 2005.00247), He et al. (arXiv 2110.04366).
    """

    bottleneck: int = 64
    form: AdapterForm = "sequential"
    sublayers: tuple[str, ...] = SUBLAYERS
    scale: float = 1.0
    init: AdapterInit = "bert"
    norm: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_width("AdapterResidual.bottleneck", self.bottleneck)
        _check_choice("AdapterResidual.form", self.form, get_args(AdapterForm))
        _check_choice("AdapterResidual.init", self.init, get_args(AdapterInit))
        _check_sublayers("AdapterResidual", self.sublayers)
        if not 0 <= self.dropout < 1:
            raise UserError(f"AdapterResidual.dropout is {self.dropout}; it must be in [0, 1)")

    def __call__(self, config: LayerConfig, make_norm: Factory, placement: Placement = UNPLACED) -> Residual:
        """Makes the residual connection of a sub-layer."""
        return AdaptedResidual(config, make_norm, placement, self)


@dataclass(frozen=True)
class LoraProjection:
    """A low-rank product beside projections: y = W x + (alpha / rank) up(down(x)), both without bias.

    A factory for `LayerParts.projection`. Parameters: `<projection>/adapter/{down,up}/kernel`. `merged_lora` folds them
    into W.

    Attributes:
      rank: of the product.
      alpha: its scale, times the rank.
      targets: regular expressions, searched in a projection's path in its layer, such as `self_attention/query` or
        `feed_forward/up`: which projections have one.
      init: of the two matrices.

    References:
      Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685).
    """

    rank: int = 8
    alpha: float = 32.0
    targets: tuple[str, ...] = ("query$", "value$")
    init: AdapterInit = "bert"

    def __post_init__(self) -> None:
        _check_width("LoraProjection.rank", self.rank)
        _check_choice("LoraProjection.init", self.init, get_args(AdapterInit))

    def __call__(
        self,
        config: LayerConfig,
        features: tuple[int, ...],
        axes: tuple[str, ...],
        gain: float = 1.0,
        placement: Placement = UNPLACED,
    ) -> Projection:
        """Makes a projection."""
        return AdaptedProjection(config, features, axes, gain, placement, self)


@dataclass(frozen=True)
class PrefixAttention:
    """Learned keys and values that every query reads beside those of the text.

    A factory for `LayerParts.attention`. Parameters: `<sub-layer>/prefix_adapter/{key,value}`, [length, heads,
    head_dim], normal with deviation 0.02; they are trained as they are, without the network that the paper computes
    them by during training. A new prefix takes a share of attention: it is no identity.

    Attributes:
      length: number of keys.
      sublayers: which of `self_attention` and `cross_attention` have a prefix.

    References:
      Li and Liang, Prefix-Tuning (arXiv 2101.00190).
    """

    length: int = 30
    sublayers: tuple[str, ...] = ("self_attention",)

    def __post_init__(self) -> None:
        _check_width("PrefixAttention.length", self.length)
        _check_sublayers("PrefixAttention", self.sublayers)

    def __call__(self, config: LayerConfig, make_projection: Factory, placement: Placement = UNPLACED) -> Attention:
        """Makes the attention of a sub-layer."""
        return PrefixedAttention(config, make_projection, placement, self)


class Factor(nn.Module):
    """One matrix of an adapter, as a linear map from the last axes of its input to new ones.

    Attributes:
      config: gives dtype and whether there may be biases.
      features: sizes of the new axes.
      axes: logical names of the kernel's axes, the contracted ones first; None for the bottleneck.
      kernel_init: of the kernel.
      use_bias: whether there is a bias, where the config has biases.
      placement: where the kernel is stored while it is used.
    """

    config: LayerConfig
    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    kernel_init: nn.initializers.Initializer
    use_bias: bool = True
    placement: Placement = UNPLACED

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the map of `x` in the compute dtype."""
        contracted = len(self.axes) - len(self.features)
        leading, reduced = x.shape[:-contracted], x.shape[-contracted:]
        init = lambda key, shape, dtype=jnp.float32: self.kernel_init(key, _matrix(shape, contracted), dtype).reshape(
            shape
        )
        kernel = self.param("kernel", named_axes(init, self.axes), reduced + self.features)
        dtype = compute_dtype(self.config)
        kernel = self.placement.weight(kernel.astype(dtype), self.axes).reshape(_matrix(kernel.shape, contracted))
        y = x.reshape(-1, kernel.shape[0]).astype(dtype) @ kernel
        if self.use_bias and self.config.use_bias:
            zeros = named_axes(nn.initializers.zeros, self.axes[contracted:])
            y = y + self.param("bias", zeros, self.features).reshape(-1).astype(dtype)
        return y.reshape(leading + self.features)


class Bottleneck(nn.Module):
    """The network of an adapter, see `AdapterResidual`."""

    config: LayerConfig
    settings: AdapterResidual
    make_norm: Factory
    placement: Placement = UNPLACED

    def setup(self) -> None:
        """Creates norm and matrices."""
        config, settings = self.config, self.settings
        down, up = _initializers(settings.init)
        if settings.norm:
            self.norm = self.make_norm(config)
        self.down = Factor(config, (settings.bottleneck,), ("embed", None), down, placement=self.placement)
        self.up = Factor(config, (config.embed_dim,), (None, "embed"), up, placement=self.placement)
        self.dropout = Dropout(settings.dropout)

    def __call__(
        self, x: Float[Array, "batch length embed"], deterministic: bool
    ) -> Float[Array, "batch length embed"]:
        """What the adapter adds."""
        x = self.norm(x) if self.settings.norm else x
        inner = self.dropout(nn.relu(self.down(x)), deterministic)
        return self.up(inner) * self.settings.scale


class AdaptedResidual(Residual):
    """A residual connection with an adapter, if its sub-layer is among those that have one."""

    settings: AdapterResidual = AdapterResidual()

    def setup(self) -> None:
        """Creates norm, dropout and adapter."""
        super().setup()
        if (self.name or "").removesuffix("_residual") in self.settings.sublayers:
            self.adapter = Bottleneck(self.config, self.settings, self.make_norm, self.placement)

    def leave(
        self, x: Float[Array, "batch length embed"], y: Float[Array, "batch length embed"], deterministic: bool
    ) -> Float[Array, "batch length embed"]:
        """See `Residual`."""
        if (self.name or "").removesuffix("_residual") not in self.settings.sublayers:
            return super().leave(x, y, deterministic)
        y, form, is_post = self.dropout(y, deterministic), self.settings.form, self.config.norm_placement == "post"
        if form == "sequential":
            y = y + self.adapter(y, deterministic)
        elif form == "parallel":
            y = y + self.adapter(self.enter(x), deterministic)
        total = self.placement.activation(x + y, ("batch", "length", "embed"))
        if form == "after_norm":
            total = total + self.adapter(self.norm(total) if is_post else total, deterministic)
        left: Array = self.norm(total) if is_post else total
        return left


class AdaptedProjection(Projection):
    """A projection with a low-rank product beside it, if its path is among those that have one."""

    settings: LoraProjection = LoraProjection()

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """See `Projection`."""
        y = Projection.__call__(self, x)
        settings = self.settings
        if not path_predicate(*settings.targets)("/".join(self.path)):
            return y
        product = LowRank(self.config, settings, self.features, self.axes, self.placement, name="adapter")
        return y + product(x) * (settings.alpha / settings.rank)


class LowRank(nn.Module):
    """The two matrices of `LoraProjection`."""

    config: LayerConfig
    settings: LoraProjection
    features: tuple[int, ...]
    axes: tuple[str, ...]
    placement: Placement = UNPLACED

    def setup(self) -> None:
        """Creates the matrices."""
        contracted, rank = len(self.axes) - len(self.features), self.settings.rank
        into, out = (*self.axes[:contracted], None), (None, *self.axes[contracted:])
        down, up = _initializers(self.settings.init)
        self.down = Factor(self.config, (rank,), into, down, False, self.placement)
        self.up = Factor(self.config, self.features, out, up, False, self.placement)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns their product with `x`."""
        y: Array = self.up(self.down(x))
        return y


class Prefix(nn.Module):
    """Keys and values of `PrefixAttention`."""

    config: LayerConfig
    length: int

    @nn.compact
    def __call__(self) -> KeyValue:
        """The keys and values, [length, heads, head_dim] in the compute dtype."""
        shape, axes = (self.length, self.config.num_heads, self.config.head_dim), (None, "heads", "head_dim")
        init, dtype = named_axes(nn.initializers.normal(0.02), axes), compute_dtype(self.config)
        key, value = (self.param(name, init, shape).astype(dtype) for name in ("key", "value"))
        return KeyValue(key, value)


class PrefixedAttention(Attention):
    """Attention with a prefix, if its sub-layer is among those that have one."""

    settings: PrefixAttention = PrefixAttention()

    def setup(self) -> None:
        """Creates projections and prefix."""
        super().setup()
        if self.name in self.settings.sublayers:
            self.prefix_adapter = Prefix(self.config, self.settings.length)

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        memory: KeyValue,
        mask: Bool[Array, "#batch #length memory_length"],
        deterministic: bool,
    ) -> tuple[Float[Array, "batch length embed"], Aux]:
        """See `Attention`."""
        if self.name in self.settings.sublayers:
            prefix: KeyValue = self.prefix_adapter()
            memory = KeyValue(*(_before(one, rest) for one, rest in zip(prefix, memory, strict=True)))
            mask = jnp.pad(mask, ((0, 0), (0, 0), (self.settings.length, 0)), constant_values=True)
        return super().__call__(x, memory, mask, deterministic)


def merged_lora(params: Params, lora: LoraProjection) -> Params:
    """Parameters of a model without adapters that computes what one with low-rank products does.

    Args:
      params: with `<projection>/adapter/{down,up}/kernel`; stacked layers and positions are told by their shapes.
      lora: gives the scale of the products.
    """
    if not isinstance(params, dict):
        return params
    if set(params.get("adapter", ())) != {"down", "up"} or "kernel" not in params:
        return {name: merged_lora(value, lora) for name, value in params.items()}
    kernel, (down, up) = params["kernel"], (params["adapter"][name]["kernel"] for name in ("down", "up"))
    leading = down.ndim + up.ndim - 2 - kernel.ndim  # axes `layers`: in down, in up and in the kernel
    stacked = kernel.shape[:leading]
    into, out = down.reshape(*stacked, -1, lora.rank), up.reshape(*stacked, lora.rank, -1)
    change = (into @ out).reshape(kernel.shape) * (lora.alpha / lora.rank)
    rest = {name: value for name, value in params.items() if name not in ("adapter", "kernel")}
    return {"kernel": kernel + change.astype(kernel.dtype), **rest}


def _before(prefix: Float[Array, "prefix heads head_dim"], memory: Array) -> Float[Array, "batch all heads head_dim"]:
    shared = jnp.broadcast_to(prefix, (memory.shape[0], *prefix.shape)).astype(memory.dtype)
    return jnp.concatenate([shared, memory], axis=1)


def _matrix(shape: Sequence[int], contracted: int) -> tuple[int, int]:
    width = 1
    for size in shape[:contracted]:
        width *= size
    out = 1
    for size in shape[contracted:]:
        out *= size
    return width, out


def _initializers(init: AdapterInit) -> tuple[nn.initializers.Initializer, nn.initializers.Initializer]:
    normal = nn.initializers.normal(0.02)
    return (normal, normal) if init == "bert" else (_KAIMING, nn.initializers.zeros)
