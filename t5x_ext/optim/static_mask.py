"""Training under a mask that does not change: masked entries keep their values, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_ext.contracts import Params, PyTree, UserError, path_name, path_predicate
from t5x_ext.optim.bits import pack, unpack
from t5x_ext.optim.learning_rate import with_learning_rate

_PULLED = ("grad_fn", "curvature_grad_fn", "fisher_fn")
"""Extra arguments that give trees like the gradient."""


class StaticMaskState(NamedTuple):
    """State of `static_mask`."""

    mask: PyTree  # uint8, `bits.packed_shape` of each maskable parameter, None for others; a set bit is trained
    opt_state: PyTree  # of the base optimizer


def static_mask(
    optimizer: optax.GradientTransformation, maskable: Sequence[str] = (r"adapter.*/kernel$",)
) -> optax.GradientTransformation:
    r"""Trains the entries of parameters whose mask is 1 and leaves the others as they are.

    .. math::
      u_t = m \odot \text{optimizer}(m \odot g_t)

    The base optimizer sees zero gradients at masked entries, in what it pulls (`grad_fn` and its like) too, and its
    updates are masked again: weight decay, momentum or a projection move nothing there. All entries are trained until
    `with_masks` sets masks; what trains stores masked entries as zeros beforehand, so that the forward pass needs no
    mask. One bit is kept an entry.

    Args:
      optimizer: the base optimizer, with clipping and weight decay.
      maskable: regular expressions searched in names of parameters: which have a mask.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      UserError: at `init`, for a pattern that matches nothing.

    Example:
      >>> optimizer = static_mask(optax.sgd(1.0), ["kernel"])
      >>> params = {"kernel": jnp.array([0.0, 1.0]), "bias": jnp.array([1.0])}
      >>> state = with_masks(optimizer.init(params), {"kernel": jnp.array([False, True]), "bias": None})
      >>> updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
      >>> updates["kernel"].tolist(), updates["bias"].tolist()
      ([0.0, -1.0], [-1.0])
    """
    base = optax.with_extra_args_support(optimizer)
    patterns = (maskable,) if isinstance(maskable, str) else tuple(maskable)
    has_mask = path_predicate(*patterns)

    def init(params: Params) -> StaticMaskState:
        _check_matched(patterns, params)

        def all_trained(path: Sequence[Any], leaf: jax.Array) -> jax.Array | None:
            if not has_mask(path_name(path)):
                return None
            return pack(jnp.ones(leaf.shape, bool))

        return StaticMaskState(jax.tree_util.tree_map_with_path(all_trained, params), base.init(params))

    def update(
        updates: PyTree, state: StaticMaskState, params: Params | None = None, **extra_args: Any
    ) -> tuple[PyTree, StaticMaskState]:
        def masked(tree: PyTree) -> PyTree:
            keep = lambda leaf, words: leaf if words is None else jnp.where(unpack(words, leaf.shape), leaf, 0)
            return jax.tree.map(keep, tree, state.mask)

        def pulled(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
            return lambda *args, **kwargs: masked(function(*args, **kwargs))

        extra = {name: pulled(value) if name in _PULLED else value for name, value in extra_args.items()}
        updates, opt_state = base.update(masked(updates), state.opt_state, params, **extra)
        return masked(updates), StaticMaskState(state.mask, opt_state)

    return with_learning_rate(optax.GradientTransformationExtraArgs(init, update), optimizer)


def with_masks(optimizer_state: PyTree, masks: PyTree) -> PyTree:
    """An optimizer's state with other masks; traceable.

    Args:
      optimizer_state: with one `StaticMaskState` inside, at any depth.
      masks: a tree like the parameters of booleans, or None where a parameter has no mask.

    Raises:
      UserError: if there is no such state in it, or its masks are of other parameters.
    """
    is_state = lambda node: isinstance(node, StaticMaskState)
    found = [node for node in jax.tree.leaves(optimizer_state, is_leaf=is_state) if is_state(node)]
    if len(found) != 1:
        raise UserError(f"masks need an optimizer with one optim.static_mask(...) around it; there are {len(found)}")

    def replaced(state: StaticMaskState) -> StaticMaskState:
        words = jax.tree.map(pack, masks)
        if jax.tree.map(jnp.shape, words) != jax.tree.map(jnp.shape, state.mask):
            raise UserError("masks are of other parameters than those that optim.static_mask was told to mask")
        return state._replace(mask=words)

    return jax.tree.map(lambda node: replaced(node) if is_state(node) else node, optimizer_state, is_leaf=is_state)


def _check_matched(patterns: Sequence[str], params: Params) -> None:
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        if not any(map(path_predicate(pattern), names)):
            example = f"; names look like {names[0]!r}" if names else ""
            raise UserError(f"static_mask: pattern {pattern!r} matches no parameter{example}")
