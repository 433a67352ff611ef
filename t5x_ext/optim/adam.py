"""Adam with the settings of translation recipes, decoupled weight decay and clipping by the global norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from t5x_ext.contracts import Params, PyTree, UserError, path_predicate, select
from t5x_ext.optim.learning_rate import with_learning_rate


def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-9,
    weight_decay: float = 0.0,
    no_decay: Sequence[str] = (),
    clip_norm: float | None = None,
    l2: float = 0.0,
) -> optax.GradientTransformation:
    r"""Adam (AdamW when `weight_decay` is set) as an Optax chain: clip, moments (float32), decay, learning rate.

    .. math::
      m_t &= b_1 m_{t-1} + (1-b_1) g_t, \qquad v_t = b_2 v_{t-1} + (1-b_2) g_t^2 \\
      w_t &= w_{t-1} - \eta_t \left( \frac{m_t / (1-b_1^t)}{\sqrt{v_t / (1-b_2^t)} + \epsilon}
             + \text{weight\_decay} \cdot w_{t-1} \right)

    Args:
      learning_rate: a constant or an `optax.Schedule`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled decay, multiplied by the learning rate.
      no_decay: regular expressions on paths of parameters without decay, for example `["bias$", "norm/"]`.
      clip_norm: gradients with a larger global norm are scaled down to it; None clips nothing.
      l2: coupled decay: so much of the weights is added to the (clipped) gradient before the moments, as PyTorch's Adam
        does; spared are the parameters of `no_decay`.

    Returns:
      An `optax.GradientTransformation`; its `update` needs `params` when `weight_decay` or `l2` is set.

    Raises:
      UserError: if a number is out of its range.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = adam(learning_rate=0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = optimizer.update(jnp.array([0.5, -8.0]), optimizer.init(params), params)
      >>> [round(float(w), 4) for w in optax.apply_updates(params, updates)]
      [0.9, -1.9]

    References:
      Kingma and Ba (arXiv 1412.6980); decoupled decay: Loshchilov and Hutter (arXiv 1711.05101); the defaults are those
      of Attention Is All You Need (arXiv 1706.03762), section 5.3.
    """
    _check(learning_rate, b1, b2, eps, {"weight_decay": weight_decay, "l2": l2}, clip_norm)
    spared = path_predicate(*no_decay)

    def decayed(params: Params) -> PyTree:
        return select(params, lambda name: not spared(name))

    first = optax.clip_by_global_norm(clip_norm) if clip_norm is not None else optax.identity()
    chain = optax.chain(
        optax.chain(first, optax.add_decayed_weights(l2, mask=decayed)) if l2 else first,
        _in_float32(optax.scale_by_adam(b1=b1, b2=b2, eps=eps)),
        optax.add_decayed_weights(weight_decay, mask=decayed) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )
    return with_learning_rate(chain, learning_rate)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps moments in float32: Optax stores them in the parameters' dtype, where bfloat16 would hardly change them."""
    wide = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def init(params: Params) -> PyTree:
        return inner.init(wide(params))

    def update(updates: PyTree, state: PyTree, params: Params | None = None) -> tuple[PyTree, PyTree]:
        return inner.update(wide(updates), state, params)

    return optax.GradientTransformation(init, update)


def _check(
    learning_rate: optax.ScalarOrSchedule,
    b1: float,
    b2: float,
    eps: float,
    decay: Mapping[str, float],
    clip_norm: float | None,
) -> None:
    # Under optax.inject_hyperparams it is a traced array.
    if isinstance(learning_rate, int | float) and learning_rate < 0:
        raise UserError(f"adam: learning_rate = {learning_rate} must not be negative")
    for name, value in (("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise UserError(f"adam: {name} = {value} must be at least 0 and below 1")
    for name, value in (("eps", eps), *decay.items()):
        if value < 0:
            raise UserError(f"adam: {name} = {value} must not be negative")
    if clip_norm is not None and not clip_norm > 0:
        raise UserError(f"adam: clip_norm = {clip_norm} must be positive, or None for no clipping")
