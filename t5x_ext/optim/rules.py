"""Per-parameter rules by regular expressions on parameter paths: learning-rate multipliers and freezing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from t5x_ext.contracts import Params, PyTree, UserError, path_name, path_predicate


def scale_by_path(
    multipliers: Mapping[str, float | Sequence[float] | Float[Array, " layers"]],
) -> optax.GradientTransformation:
    """Multiplies the updates of parameters whose path matches a pattern: learning-rate multipliers.

    Put it last in a chain, after the learning rate. The first matching pattern applies; updates of other paths do not
    change.

    Args:
      multipliers: from a regular expression (searched in names such as `encoder/layers/mlp/kernel`) to a number, or to
        one number a layer for parameters with a leading `layers` axis.

    Returns:
      A stateless `optax.GradientTransformation`.

    Raises:
      UserError: at `init`, if a pattern matches no parameter or a value per layer does not fit the leading axis.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"embedding": jnp.ones(2), "layers": {"kernel": jnp.ones((2, 1))}}
      >>> optimizer = optax.chain(optax.sgd(1.0), scale_by_path({"embedding": 0.5, "layers/": [0.0, 2.0]}))
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> updates["embedding"].tolist(), updates["layers"]["kernel"].tolist()
      ([-0.5, -0.5], [[-0.0], [-2.0]])
    """
    rules = [(path_predicate(pattern), jnp.asarray(value, jnp.float32)) for pattern, value in multipliers.items()]

    def factor(path: tuple, leaf: Array) -> Array:
        name = path_name(path)
        value = next((value for matches, value in rules if matches(name)), jnp.float32(1.0))
        if value.ndim and value.shape != leaf.shape[:1]:
            raise UserError(f"scale_by_path: {value.size} values for {name} of shape {leaf.shape}: want one a layer")
        return value.reshape(value.shape + (1,) * (leaf.ndim - value.ndim)).astype(leaf.dtype)

    def init(params: Params) -> optax.EmptyState:
        _check_matched("scale_by_path", multipliers, params)
        jax.tree_util.tree_map_with_path(factor, params)
        return optax.EmptyState()

    def update(updates: PyTree, state: optax.EmptyState, params: Params | None = None) -> tuple[PyTree, PyTree]:
        del params
        return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf * factor(path, leaf), updates), state

    return optax.GradientTransformation(init, update)


def freeze(patterns: Sequence[str]) -> optax.GradientTransformation:
    """Sets the updates of parameters whose path matches any pattern to zero, also if they are NaN.

    Put it last in a chain, after weight decay.

    Args:
      patterns: regular expressions, searched in names such as `encoder/layers/mlp/kernel`.

    Returns:
      A stateless `optax.GradientTransformation`.

    Raises:
      UserError: at `init`, if a pattern matches no parameter.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"embedding": jnp.ones(1), "kernel": jnp.ones(1)}
      >>> optimizer = optax.chain(optax.sgd(1.0), freeze(["embedding"]))
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> updates["embedding"].tolist(), updates["kernel"].tolist()
      ([0.0], [-1.0])
    """
    frozen = path_predicate(*patterns)

    def init(params: Params) -> optax.EmptyState:
        _check_matched("freeze", patterns, params)
        return optax.EmptyState()

    def update(updates: PyTree, state: optax.EmptyState, params: Params | None = None) -> tuple[PyTree, PyTree]:
        del params
        zero_if_frozen = lambda path, leaf: jnp.zeros_like(leaf) if frozen(path_name(path)) else leaf
        return jax.tree_util.tree_map_with_path(zero_if_frozen, updates), state

    return optax.GradientTransformation(init, update)


def _check_matched(rule: str, patterns: Mapping[str, object] | Sequence[str], params: Params) -> None:
    """Refuses patterns that match nothing: a typing mistake would silently train the wrong parameters."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        if not any(map(path_predicate(pattern), names)):
            raise UserError(f"{rule}: pattern {pattern!r} matches no parameter; names look like {names[0]!r}")
