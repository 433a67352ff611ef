"""Learning-rate schedules of translation recipes: functions of the number of updates so far."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from t5x_ext.contracts import UserError


def inverse_sqrt(peak: float, warmup_steps: int) -> optax.Schedule:
    r"""Linear warm-up from 0, then decay with the inverse square root of the step.

    .. math::
      \eta(t) = \text{peak} \cdot \min(t / w, \sqrt{w / t}), \qquad w = \text{warmup\_steps}

    The rate is `peak` at `t = w`. Optax counts from 0, so the first update of a warm-up has rate 0.

    Args:
      peak: the largest learning rate, reached after `warmup_steps` updates.
      warmup_steps: length of the warm-up in updates, at least 1.

    Returns:
      An `optax.Schedule`: a step (an int or an integer array) to a float32 rate.

    Raises:
      UserError: if `peak` is not positive or `warmup_steps` is below 1.

    Example:
      >>> schedule = inverse_sqrt(7e-4, warmup_steps=4000)
      >>> [f"{float(schedule(step)):.2e}" for step in (0, 2000, 4000, 16000)]
      ['0.00e+00', '3.50e-04', '7.00e-04', '3.50e-04']

    References:
      Vaswani et al., Attention Is All You Need (arXiv 1706.03762), section 5.3, scaled so that the peak is given
      directly, as fairseq does.
    """
    _check_peak("inverse_sqrt", peak)
    if warmup_steps < 1:
        raise UserError(f"inverse_sqrt: warmup_steps = {warmup_steps} must be at least 1")

    def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
        count = jnp.asarray(step, jnp.float32)
        return peak * jnp.minimum(count / warmup_steps, jnp.sqrt(warmup_steps / jnp.maximum(count, 1.0)))

    return schedule


def linear_decay(peak: float, warmup_steps: int, total_steps: int, end: float = 0.0) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, then linear decay to `end` at `total_steps`, then constant.

    Args:
      peak: the largest learning rate, reached after `warmup_steps` updates.
      warmup_steps: length of the warm-up in updates; 0 starts at `peak`.
      total_steps: the update at which `end` is reached; may be below `warmup_steps`, for short trial runs.
      end: the final learning rate.

    Returns:
      An `optax.Schedule`: a step (an int or an integer array) to a float32 rate.

    Raises:
      UserError: if `peak` is not positive, `end` is not within 0 and `peak`, or steps are negative.

    Example:
      >>> schedule = linear_decay(1e-3, warmup_steps=100, total_steps=1100)
      >>> [f"{float(schedule(step)):.2e}" for step in (0, 50, 100, 600, 1100, 2000)]
      ['0.00e+00', '5.00e-04', '1.00e-03', '5.00e-04', '0.00e+00', '0.00e+00']

    References:
      fairseq's `polynomial_decay` of power 1; linear warm-up and decay of BERT (arXiv 1810.04805), appendix A.2.
    """
    _check_peak("linear_decay", peak)
    if not 0 <= end <= peak:
        raise UserError(f"linear_decay: end = {end} must be between 0 and peak = {peak}")
    if warmup_steps < 0 or total_steps < 1:
        raise UserError(
            f"linear_decay: warmup_steps = {warmup_steps} must be at least 0 and total_steps = {total_steps} at least 1"
        )

    def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
        count = jnp.asarray(step, jnp.float32)
        remaining = jnp.clip((total_steps - count) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
        return jnp.where(count < warmup_steps, peak * count / max(warmup_steps, 1), end + (peak - end) * remaining)

    return schedule


def _check_peak(name: str, peak: float) -> None:
    if not peak > 0:
        raise UserError(f"{name}: peak = {peak} must be positive")
