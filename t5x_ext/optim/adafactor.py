"""Adafactor for stacked layers and attention kernels, and the chain that it shares with Flora."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_ext.contracts import Params, PyTree, path_predicate, select
from t5x_ext.optim.checks import check_integer, check_number
from t5x_ext.optim.factored import clip_by_matrix_rms, scale_by_factored_rms, scale_by_param_rms
from t5x_ext.optim.learning_rate import with_learning_rate


def adafactor(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | None = None,
    *,
    mu_dtype: Any = None,
    min_dim_size_to_factor: int = 128,
    axes: PyTree = None,
    decay_rate: float = 0.8,
    eps: float = 1e-30,
    clipping_threshold: float | None = 1.0,
    multiply_by_parameter_scale: bool = True,
    weight_decay: float = 0.0,
    no_decay: Sequence[str] = (),
) -> optax.GradientTransformation:
    r"""Adafactor: second moments as row and column means, steps relative to the size of the weights.

    .. math::
      y = g / \sqrt{\hat v}, \quad u_t = b_1 u_{t-1} + (1 - b_1) y_t, \quad
      w \leftarrow w - \eta_t \max(\text{rms}(w), 10^{-3}) \,
        \left(\frac{u}{\max(1, \text{rms}(u) / \text{clipping\_threshold})} + \text{weight\_decay} \cdot w\right)

    This is `flora` with momentum that is not compressed, or without momentum. Every layer of a stack is factored,
    clipped and scaled by itself. Without momentum and decay, and for parameters of one or two axes, this is
    `optax.adafactor`, which applies momentum last, decays without the learning rate and treats a stack as one block.

    Args:
      learning_rate: a constant or an `optax.Schedule`, relative to the size of the weights: 1e-2 is a common peak.
      b1: decay of the momentum, which takes as much memory as the parameters; None: no momentum and no memory.
      mu_dtype: dtype of the momentum, None is float32; second moments are float32.
      min_dim_size_to_factor: matrices with a shorter side below this keep the full second moment.
      axes: tree of axis names, such as `models.logical_axes` gives. None: the last two axes are the matrix.
      decay_rate: of the second moment, see `factored.scale_by_factored_rms`.
      eps: added to squared gradients.
      clipping_threshold: largest root mean square of an update before scaling; None clips nothing.
      multiply_by_parameter_scale: False makes learning rates absolute.
      weight_decay: decoupled; multiplied by the learning rate and, as updates are, by the scale of the weights.
      no_decay: regular expressions on paths of parameters without decay.

    Returns:
      An `optax.GradientTransformation` whose `update` needs `params`. Under `optax.inject_hyperparams` all arguments
      but `learning_rate` and `b1` are static.

    Raises:
      UserError: if a number is out of its range, or `axes` do not fit the parameters.

    Example:
      >>> params = {"kernel": jnp.ones((256, 512))}
      >>> optimizer = adafactor(learning_rate=1e-2)
      >>> gradients = {"kernel": jnp.full((256, 512), 3.0)}
      >>> state = optimizer.init(params)
      >>> updates, _ = optimizer.update(gradients, state, params)
      >>> round(float(updates["kernel"][0, 0]), 6), sum(leaf.size for leaf in jax.tree.leaves(state))
      (-0.01, 769)

    References:
      Shazeer and Stern, Adafactor (arXiv 1804.04235). Momentum is applied before clipping, as in Flora's code (arXiv
      2402.03293), so that the two optimizers differ in compression only.
    """
    if b1 is not None:
        check_number("adafactor", "b1", b1, at_least=0, below=1)
    check_integer("adafactor", "min_dim_size_to_factor", min_dim_size_to_factor, at_least=1)
    return factored_chain(
        "adafactor",
        learning_rate,
        optax.identity() if b1 is None else _momentum(b1, mu_dtype),
        min_dim_size_to_factor=min_dim_size_to_factor,
        axes=axes,
        decay_rate=decay_rate,
        eps=eps,
        clipping_threshold=clipping_threshold,
        multiply_by_parameter_scale=multiply_by_parameter_scale,
        weight_decay=weight_decay,
        no_decay=no_decay,
    )


def factored_chain(
    owner: str,
    learning_rate: optax.ScalarOrSchedule,
    momentum: optax.GradientTransformation,
    *,
    min_dim_size_to_factor: int,
    axes: PyTree,
    decay_rate: float,
    eps: float,
    clipping_threshold: float | None,
    multiply_by_parameter_scale: bool,
    weight_decay: float,
    no_decay: Sequence[str],
) -> optax.GradientTransformation:
    """The chain that `adafactor` and `flora` share, with `momentum` between second moments and clipping.

    Errors name the optimizer `owner`; the other arguments are those of `adafactor`.

    Raises:
      UserError: if a number is out of its range.
    """
    check_number(owner, "learning_rate", learning_rate, at_least=0)
    check_number(owner, "decay_rate", decay_rate, above=0)
    check_number(owner, "eps", eps, above=0)
    check_number(owner, "weight_decay", weight_decay, at_least=0)
    if clipping_threshold is not None:
        check_number(owner, "clipping_threshold", clipping_threshold, above=0)
    spared = path_predicate(*no_decay)
    decay_mask = lambda params: select(params, lambda name: not spared(name))
    chain = optax.chain(
        scale_by_factored_rms(decay_rate, eps, min_dim_size_to_factor, axes),
        momentum,
        clip_by_matrix_rms(clipping_threshold, axes) if clipping_threshold is not None else optax.identity(),
        optax.add_decayed_weights(weight_decay, mask=decay_mask) if weight_decay else optax.identity(),
        scale_by_param_rms(axes=axes) if multiply_by_parameter_scale else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )
    return with_learning_rate(chain, learning_rate)


class MomentumState(NamedTuple):
    """State of the momentum."""

    mu: PyTree  # mu_dtype, the shape of the parameters


def _momentum(b1: float, mu_dtype: Any) -> optax.GradientTransformation:
    """An EMA without bias correction; `optax.ema` would compute in the dtype that it stores."""

    def init(params: Params) -> MomentumState:
        return MomentumState(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, mu_dtype or jnp.float32), params))

    def update(updates: PyTree, state: MomentumState, params: Params | None = None) -> tuple[PyTree, MomentumState]:
        del params

        mix = lambda mu, leaf: b1 * mu.astype(jnp.float32) + (1 - b1) * leaf.astype(jnp.float32)
        wide = jax.tree.map(mix, state.mu, updates)
        like = lambda tree: jax.tree.map(lambda leaf, other: leaf.astype(other.dtype), wide, tree)
        return like(updates), MomentumState(like(state.mu))

    return optax.GradientTransformation(init, update)
