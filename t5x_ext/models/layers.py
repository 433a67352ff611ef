"""The layer of every Transformer here: self-attention, attention to an encoder's output if asked for, feed-forward.

A layer is a module without neighbours: `Stack` holds the parameters of many and applies one template to each.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_ext.models.config import LayerConfig
from t5x_ext.models.parts import LayerParts
from t5x_ext.models.placement import UNPLACED, Placement
from t5x_ext.models.sublayers import Aux, KeyValue


class Layer(nn.Module):
    """Self-attention, attention to an encoder's output if `with_cross_attention`, and feed-forward, each residual.

    Side outputs of sub-layers are named `self_attention/...`, `cross_attention/...` and `feed_forward/...`.

    Attributes:
      config: sizes and switches.
      parts: what the sub-layers are.
      placement: where arrays are stored on a mesh of devices.
      with_cross_attention: True in the decoder of an encoder-decoder.
    """

    config: LayerConfig
    parts: LayerParts = LayerParts()
    placement: Placement = UNPLACED
    with_cross_attention: bool = False

    def setup(self) -> None:
        """Creates the sub-layers."""
        config, parts, placement = self.config, self.parts, self.placement
        self.self_attention = parts.attention(config, parts.projection, placement)
        self.self_attention_residual = parts.residual(config, parts.norm, placement)
        if self.with_cross_attention:
            self.cross_attention = parts.attention(config, parts.projection, placement)
            self.cross_attention_residual = parts.residual(config, parts.norm, placement)
        self.feed_forward = parts.feed_forward(config, parts.projection, placement)
        self.feed_forward_residual = parts.residual(config, parts.norm, placement)

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        mask: Bool[Array, "#batch length length"],
        deterministic: bool,
        encoded: Float[Array, "batch source_length embed"] | None = None,
        cross_mask: Bool[Array, "#batch #length source_length"] | None = None,
    ) -> tuple[Float[Array, "batch length embed"], Aux]:
        """The layer over whole sequences.

        Args:
          x: the layer's input.
          mask: `mask[b, q, k]` allows query q to read key k of its own sequence.
          deterministic: False turns dropout on.
          encoded: what cross-attention reads; with `with_cross_attention` only.
          cross_mask: `cross_mask[b, q, k]` allows query q to read position k of `encoded`.

        Returns:
          The layer's output, and the side outputs of its sub-layers.
        """
        memory = None if encoded is None else self.cross_memory(encoded)
        x, _, aux = self._sublayers(x, lambda own: own, mask, memory, cross_mask, deterministic)
        return x, aux

    def cross_memory(self, encoded: Float[Array, "batch source_length embed"]) -> KeyValue:
        """Keys and values of cross-attention, which stay the same for a whole decoding."""
        memory: KeyValue = self.cross_attention.keys_and_values(encoded)
        return memory

    def step(
        self,
        x: Float[Array, "rows 1 embed"],
        cache: KeyValue,
        position: Int[Array, ""],
        memory: KeyValue | None = None,
        cross_mask: Bool[Array, "rows 1 source_length"] | None = None,
    ) -> tuple[Float[Array, "rows 1 embed"], KeyValue]:
        """One position, given the keys and values of those before it.

        Returns:
          The layer's output, and key and value of this position (length 1) for the caller to store: the cache of the
          whole stack is then written once.
        """

        def earlier_and(own: KeyValue) -> KeyValue:
            write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, position, 1)
            return KeyValue(write(cache.key, own.key), write(cache.value, own.value))

        mask = jnp.arange(cache.key.shape[1])[None, None] <= position
        x, own, _ = self._sublayers(x, earlier_and, mask, memory, cross_mask, deterministic=True)
        return x, own

    def initialise(self) -> None:
        """Runs the layer on one position of zeros, which creates its parameters."""
        x, mask = jnp.zeros((1, 1, self.config.embed_dim)), jnp.ones((1, 1, 1), bool)
        self(x, mask, True, *((x, mask) if self.with_cross_attention else ()))

    def _sublayers(
        self,
        x: Array,
        visible: Callable[[KeyValue], KeyValue],
        mask: Array,
        memory: KeyValue | None,
        cross_mask: Array | None,
        deterministic: bool,
    ) -> tuple[Array, KeyValue, Aux]:
        """The output, the keys and values of `x` in self-attention, and side outputs.

        `visible` gives what self-attention reads, from the keys and values of `x`.
        """
        y = self.self_attention_residual.enter(x)
        own = self.self_attention.keys_and_values(y)
        y, self_aux = self.self_attention(y, visible(own), mask, deterministic)
        x = self.self_attention_residual.leave(x, y, deterministic)
        cross_aux: Aux = {}
        if self.with_cross_attention:
            y = self.cross_attention_residual.enter(x)
            y, cross_aux = self.cross_attention(y, memory, cross_mask, deterministic)
            x = self.cross_attention_residual.leave(x, y, deterministic)
        y, feed_forward_aux = self.feed_forward(self.feed_forward_residual.enter(x), deterministic)
        x = self.feed_forward_residual.leave(x, y, deterministic)
        sides = {"self_attention": self_aux, "cross_attention": cross_aux, "feed_forward": feed_forward_aux}
        return x, own, {f"{name}/{key}": value for name, aux in sides.items() for key, value in aux.items()}
