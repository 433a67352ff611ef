"""A stack of N positions over M stacked parameter sets, executed unrolled or scanned with the same result."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Float

from t5x_ext.contracts import Params, PyTree
from t5x_ext.models.config import TransformerConfig
from t5x_ext.models.layers import Activation, Norm
from t5x_ext.models.placement import UNPLACED, Placement
from t5x_ext.models.sharing import LayerSharing, Run

LayerCall = Callable[[Callable[..., Any], PyTree, PyTree], tuple[PyTree, PyTree]]
"""`(layer, carry, values) -> (carry, output)` at one position; `layer(*args, method=...)` applies its parameters."""

Step = Callable[[PyTree, tuple[Params, PyTree]], tuple[PyTree, PyTree]]
"""`(carry, (parameters of a set, values of a position)) -> (carry, output)`: the body of a scan."""


class Stack(nn.Module):
    """N positions over M parameter sets, then the final norm.

    The parameter `layers` is the tree of one layer with a leading axis `layers` of length M, however it is executed.
    What belongs to a position and not to a set (dropout key, caches) is passed along an axis of length N.

    Attributes:
      config: of the model; says whether to scan, what to recompute, and whether there is a final norm.
      layer_type: class of the layers: `layer_type(config, activation, placement)`, with a method `touch` that creates
        parameters.
      activation: of the feed-forward sub-layers.
      num_layers: N.
      sharing: the map from positions to sets.
      placement: where the layers' arrays lie.
    """

    config: TransformerConfig
    layer_type: Callable[..., nn.Module]
    activation: Activation
    num_layers: int
    sharing: LayerSharing
    placement: Placement = UNPLACED

    def setup(self) -> None:
        """Creates the stacked parameters and the final norm."""
        self.sets = self.param("layers", self._init_layers)
        if self.config.final_norm:
            self.final_norm = Norm(self.config)

    def __call__(
        self, call: LayerCall, carry: PyTree, values: PyTree = None, deterministic: bool = True
    ) -> tuple[PyTree, PyTree]:
        """Goes through the positions in order.

        Args:
          call: what to do at one position.
          carry: what the first position receives.
          values: a tree of arrays [N, ...], one slice a position, or None.
          deterministic: False gives each position a dropout key of its own, even where it shares its set.

        Returns:
          What the last position hands on, and the outputs of all positions stacked to [N, ...].
        """
        layer = self._make_layer()

        def step(carry: PyTree, inputs: tuple[Params, PyTree]) -> tuple[PyTree, PyTree]:
            params, (key, values) = inputs
            rngs = None if key is None else {"dropout": key}
            return call(functools.partial(layer.apply, {"params": params}, rngs=rngs), carry, values)

        body = _rematerialised(step, self.config)
        values = (None if deterministic else self._position_keys(), values)
        if not self.config.scan_layers:
            return unroll_positions(body, self.sharing.layer_map(self.num_layers), self.sets, carry, values)
        return scan_runs(body, self.sharing.runs(self.num_layers), self.sets, carry, values)

    def normalize(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        """The final norm, or nothing where the config has none."""
        return self.final_norm(x) if self.config.final_norm else x

    def _make_layer(self) -> nn.Module:
        return self.layer_type(self.config, self.activation, self.placement, parent=None)

    def _position_keys(self) -> Array:
        key = self.make_rng("dropout")
        return jax.vmap(lambda position: jax.random.fold_in(key, position))(jnp.arange(self.num_layers))

    def _init_layers(self, key: Array) -> Params:
        layer = self._make_layer()
        keys = jax.random.split(key, self.sharing.num_sets(self.num_layers))
        params = jax.vmap(lambda one: layer.init(one, method="touch")["params"])(keys)
        return meta.add_axis(params, 0, {meta.PARTITION_NAME: "layers"})


def unroll_positions(
    step: Step, layer_map: tuple[int, ...], sets: Params, carry: PyTree, values: PyTree
) -> tuple[PyTree, PyTree]:
    """Applies `step` position by position, each with the set that the map gives it."""
    unstacked = _unstack(sets, max(layer_map) + 1)
    outputs = []
    for position, index in enumerate(layer_map):
        carry, output = step(carry, (unstacked[index], jax.tree.map(lambda a, i=position: a[i], values)))
        outputs.append(output)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)


def scan_runs(step: Step, runs: tuple[Run, ...], sets: Params, carry: PyTree, values: PyTree) -> tuple[PyTree, PyTree]:
    """Applies `step` with one scan per run of the map, and a scan of repeats within where a set is used in a row."""
    outputs = []
    for run in runs:
        carry, output = _scan_run(step, run, sets, carry, values)
        outputs.append(output)
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)


def _scan_run(step: Step, run: Run, sets: Params, carry: PyTree, values: PyTree) -> tuple[PyTree, PyTree]:
    def in_set_order(a: Array) -> Array:
        blocks = a.reshape(-1, run.repeat, *a.shape[1:])
        return blocks[::-1] if run.reverse else blocks

    def in_position_order(a: Array) -> Array:
        blocks = a[::-1] if run.reverse else a
        return blocks.reshape(-1, *a.shape[2:])

    def repeat(carry: PyTree, inputs: tuple[Params, PyTree]) -> tuple[PyTree, PyTree]:
        params, blocks = inputs
        return jax.lax.scan(lambda carry, values: step(carry, (params, values)), carry, blocks, run.repeat)

    params = jax.tree.map(lambda a: a[run.start : run.stop], sets)
    own = jax.tree.map(lambda a: in_set_order(a[run.position : run.position + run.length]), values)
    carry, outputs = jax.lax.scan(repeat, carry, (params, own), reverse=run.reverse)
    return carry, jax.tree.map(in_position_order, outputs)


def _unstack(sets: Params, count: int) -> list[Params]:
    """The sets one by one; the gradient of a split is one concatenation, that of indexing a sum of padded copies."""
    leaves, structure = jax.tree.flatten(sets)
    parts = [jax.lax.split(leaf, (1,) * count) for leaf in leaves]
    return [jax.tree.unflatten(structure, [part[i][0] for part in parts]) for i in range(count)]


def _rematerialised(step: Step, config: TransformerConfig) -> Step:
    if config.remat == "none":
        return step
    policy = None if config.remat == "full" else getattr(jax.checkpoint_policies, config.remat)
    # Inside a scan nothing can be merged across the barrier anyway; leaving it out lets XLA fuse.
    return jax.checkpoint(step, policy=policy, prevent_cse=not config.scan_layers)
