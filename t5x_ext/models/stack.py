"""A stack of N positions over M stacked parameter sets, executed unrolled or scanned with the same result."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from t5x_ext.contracts import AnyArray, Params, PyTree, path_predicate
from t5x_ext.models.config import LayerConfig
from t5x_ext.models.layers import Layer
from t5x_ext.models.parts import LayerParts
from t5x_ext.models.placement import UNPLACED, Placement
from t5x_ext.models.sharing import LayerRun, LayerSharing

LayerCall = Callable[[Callable[..., Any], PyTree, PyTree], tuple[PyTree, PyTree]]
"""`(layer, carry, values) -> (carry, output)` at one position; `layer(*args, method=...)` applies its parameters."""

Step = Callable[[PyTree, tuple[Params, PyTree]], tuple[PyTree, PyTree]]
"""`(carry, (parameters of a set, values of a position)) -> (carry, output)`: the body of a scan."""


Materialise = Callable[[Params], Params]
"""`(stored parameters of one layer) -> arrays`: the tree that the layer's modules expect."""


def as_stored(params: Params) -> Params:
    """Gives back the parameters: they are stored as arrays."""
    return params


class Stack(nn.Module):
    """N positions over M parameter sets, then the final norm.

    The parameter `layers` is the tree of one layer with a leading axis `layers` of length M, however it is executed.
    What belongs to a position and not to a set (dropout keys, caches, `positions`: the parameters that
    `LayerParts.per_position` names) is passed along an axis of length N.

    Parameters of layers may be stored as something other than arrays, as long as each array in it has the leading axis
    and `materialise` turns the slice of one layer into arrays. That happens where a layer is used: inside the scan,
    inside what `remat` computes again, at every step of decoding.

    Attributes:
      config: of the model; says whether to scan, what to recompute, and whether there is a final norm.
      num_layers: N.
      sharing: the map from positions to sets.
      layer_type: makes a layer: `layer_type(config, parts, placement, parent=None)` with a method `initialise` that
        creates parameters.
      parts: of the layers, and the final norm.
      placement: where the layers' arrays are stored on a mesh of devices.
      materialise: turns the stored parameters of one layer into arrays.
    """

    config: LayerConfig
    num_layers: int
    sharing: LayerSharing
    layer_type: Callable[..., nn.Module] = Layer
    parts: LayerParts = LayerParts()
    placement: Placement = UNPLACED
    materialise: Materialise = as_stored

    def setup(self) -> None:
        """Creates the stacked parameters where there are none yet, and the final norm."""
        per_position = path_predicate(*self.parts.per_position)
        sets = self.sharing.num_sets(self.num_layers)
        self._create("layers", sets, lambda name: not per_position(name))
        if self.parts.per_position:
            self._create("positions", self.num_layers, per_position)
        if self.config.final_norm:
            self.final_norm = self.parts.norm(self.config)

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
        materialise = as_stored if self.is_initializing() else self.materialise

        def step(carry: PyTree, inputs: tuple[Params, PyTree]) -> tuple[PyTree, PyTree]:
            shared, (own, key, values) = inputs
            params = materialise(_merged(shared, own) if own else shared)
            rngs = None if key is None else {"dropout": key}
            return call(functools.partial(layer.apply, {"params": params}, rngs=rngs), carry, values)

        body = _rematerialised(step, self.config)
        sets = self._stored("layers")
        own = self._stored("positions") if self.parts.per_position else {}
        values = (own, None if deterministic else self._position_keys(), values)
        if not self.config.scan_layers:
            return unroll_positions(body, self.sharing.layer_map(self.num_layers), sets, carry, values)
        return scan_runs(body, self.sharing.runs(self.num_layers), sets, carry, values)

    def normalize(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        """The final norm, or nothing where the config has none."""
        normalized: Array = self.final_norm(x) if self.config.final_norm else x
        return normalized

    def _make_layer(self) -> nn.Module:
        return self.layer_type(self.config, self.parts, self.placement, parent=None)

    def _position_keys(self) -> Array:
        key = self.make_rng("dropout")
        return jax.vmap(lambda position: jax.random.fold_in(key, position))(jnp.arange(self.num_layers))

    def _create(self, name: str, count: int, keep: Callable[[str], bool]) -> None:
        # Stored parameters are read and not declared: Flax would refuse any but plain arrays of the initial shape.
        if not self.has_variable("params", name):
            self.param(name, self._init_layers, count, keep)

    def _stored(self, name: str) -> Params:
        return meta.unbox(self.get_variable("params", name))

    def _init_layers(self, key: Array, count: int, keep: Callable[[str], bool]) -> Params:
        """Parameters of `count` layers, those whose path `keep` takes."""
        layer = self._make_layer()
        keys = jax.random.split(key, count)
        params = jax.vmap(lambda one: layer.init(one, method="initialise")["params"])(keys)
        kept = {name: leaf for name, leaf in flatten_dict(params, sep="/").items() if keep(name)}
        return meta.add_axis(unflatten_dict(kept, sep="/"), 0, {meta.PARTITION_NAME: "layers"})


def _merged(first: Params, second: Params) -> Params:
    """Two trees of dictionaries without a common leaf as one."""
    return unflatten_dict({**flatten_dict(first), **flatten_dict(second)})


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


def scan_runs(
    step: Step, runs: tuple[LayerRun, ...], sets: Params, carry: PyTree, values: PyTree
) -> tuple[PyTree, PyTree]:
    """Applies `step` with one scan per run of the map, and a scan of repeats within where a set is used in a row."""
    outputs = []
    for run in runs:
        carry, output = _scan_run(step, run, sets, carry, values)
        outputs.append(output)
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)


def _scan_run(step: Step, run: LayerRun, sets: Params, carry: PyTree, values: PyTree) -> tuple[PyTree, PyTree]:
    def in_set_order(a: AnyArray) -> AnyArray:
        blocks = a.reshape(-1, run.repeat, *a.shape[1:])
        return blocks[::-1] if run.reverse else blocks

    def in_position_order(a: AnyArray) -> AnyArray:
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


def _rematerialised(step: Step, config: LayerConfig) -> Step:
    if config.remat == "none":
        return step
    policy = None if config.remat == "full" else getattr(jax.checkpoint_policies, config.remat)
    # Inside a scan nothing can be merged across the barrier anyway; without it XLA can fuse.
    return jax.checkpoint(step, policy=policy, prevent_cse=not config.scan_layers)
