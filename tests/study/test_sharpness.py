"""Sharpness of losses whose curvature is known."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ext.contracts import Loss
from t5x_ext.study.sharpness import Sharpness, largest_eigenvalue


@pytest.mark.parametrize("steps", [6, 40])
def test_largest_eigenvalue_is_that_of_the_matrix(steps):
    """Also beyond the dimension, where the space of the products is exhausted."""
    eigenvalues = np.array([-9.0, -1.0, 0.0, 0.5, 2.0, 7.0])
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))
    matrix = jnp.asarray(rotation * eigenvalues @ rotation.T, jnp.float32)
    found = largest_eigenvalue(lambda x: matrix @ x, jnp.ones(6), steps)
    assert float(found) == pytest.approx(7.0, rel=1e-5)


def quadratic(params, batch, context):
    """The sum over rows of half of a squared norm with the row's curvatures."""
    assert not context.train
    value = jnp.sum(batch["curvatures"] * params["w"] ** 2) / 2
    return Loss(value, jnp.float32(len(batch["curvatures"])), {})


@pytest.mark.parametrize("radius", [0.05, 0.5])
def test_curvature_of_a_known_loss(radius):
    """Of curvatures 1 and 4 on the mean over rows, at (1, 0): gradient (1, 0), largest eigenvalue 4."""
    batches = {"curvatures": jnp.array([[[0.0, 3.0], [2.0, 5.0]], [[1.0, 4.0], [1.0, 4.0]]])}
    found = Sharpness(radius=radius).around(quadratic, {"w": jnp.array([1.0, 0.0])}, batches, 0)
    assert float(found["loss"]) == 0.5
    assert float(found["eigenvalue"]) == pytest.approx(4, rel=1e-5)
    assert float(found["uphill"]) == pytest.approx(radius + radius**2 / 2, rel=1e-4)
    assert abs(float(found["random"])) < float(found["uphill"]) + 2 * radius**2
