"""How sharp the training loss is where a run has ended: its largest curvature, and its rise around the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from t5x_ext.checkpoints import CheckpointStore, RunFolder
from t5x_ext.contracts import Batch, Context, Objective, Params
from t5x_ext.models import UNPLACED
from t5x_ext.study.measurements import MeasuredRun
from t5x_ext.train import Run


@dataclass(frozen=True)
class Sharpness:
    """Sharpness at a run's last weights, of its objective on training batches, without dropout.

    Its values are `sharpness/loss`; `sharpness/eigenvalue`, the largest eigenvalue of the Hessian of the mean loss; and
    the rise of that loss at a distance of `radius` (over all weights together) in random directions and uphill,
    `sharpness/random` and `sharpness/uphill`. Near a loss of zero curvatures are near zero, too: compare arms with
    similar losses only.

    Attributes:
      batches: training batches, from the first one on, whose mean loss is looked at.
      radius: of the rises, as SAM's rho.
      lanczos_steps: Hessian products; 20 are enough for three digits of the largest eigenvalue. Their vectors are kept:
        so many times the parameters, in float32.
      directions: random ones.
    """

    batches: int = 1
    radius: float = 0.05
    lanczos_steps: int = 20
    directions: int = 10

    def __call__(self, run: MeasuredRun) -> dict[str, float]:
        """Measures on one device."""
        objective, params, batch = _opened(run, self.batches)
        found = jax.jit(partial(self.around, objective))(params, batch, run.seed)
        return {f"sharpness/{name}": float(value) for name, value in found.items()}

    def around(self, objective: Objective, params: Params, batches: Batch, seed: Int[Array, ""]) -> dict[str, Array]:
        """The measures, traced: `loss`, `eigenvalue`, `random` and `uphill`.

        Args:
          objective: whose mean loss is looked at.
          params: where.
          batches: arrays [batches, rows, ...].
          seed: of random directions.
        """
        weights, unravel = ravel_pytree(params)

        def loss(weights: Float[Array, " weights"]) -> Float[Array, ""]:
            totals = jax.lax.map(lambda batch: objective(unravel(weights), batch, Context(step=0))[:2], batches)
            return totals[0].sum() / totals[1].sum()

        gradient = jax.grad(loss)
        here, uphill = loss(weights), gradient(weights)
        directions = jax.random.normal(jax.random.key(seed), (self.directions, weights.size))
        directions /= jnp.linalg.norm(directions, axis=1, keepdims=True)
        hessian = lambda vector: jax.jvp(gradient, (weights,), (vector,))[1]
        return {
            "loss": here,
            "eigenvalue": largest_eigenvalue(hessian, directions[0], self.lanczos_steps),
            "random": jnp.mean(jax.lax.map(loss, weights + self.radius * directions)) - here,
            "uphill": loss(weights + self.radius * uphill / jnp.linalg.norm(uphill)) - here,
        }


def _opened(run: MeasuredRun, batches: int) -> tuple[Objective, Params, Batch]:
    """The objective of a run, its last weights, and its first batches, stacked."""
    config, folder = run.config, RunFolder(run.folder)
    assert isinstance(config, Run)
    with CheckpointStore(folder.checkpoints) as store:
        params = store.restore_params("last")
    prepared = config.task.prepare(folder, run.cache_dir, config.seed)
    model = config.task.define(prepared.sizes, UNPLACED).model
    first = [prepared.batches.read(index, 0, prepared.batches.rows) for index in range(batches)]
    return config.objective(model), params, jax.tree.map(lambda *arrays: jnp.stack(arrays), *first)


def largest_eigenvalue(
    product: Callable[[Float[Array, " dim"]], Float[Array, " dim"]], start: Float[Array, " dim"], steps: int
) -> Float[Array, ""]:
    """The largest eigenvalue of a symmetric matrix by Lanczos' method, every vector orthogonalised against all before.

    Args:
      product: multiplies a vector with the matrix.
      start: any vector that is not orthogonal to the eigenvector.
      steps: products that are taken; the eigenvalue is that of the matrix in the space that they span.
    """

    def step(basis: Array, number: Array) -> tuple[Array, Array]:
        image = product(basis[number])
        rest = image
        for _ in range(2):  # once leaves rounding errors that grow from step to step
            rest = rest - basis.T @ (basis @ rest)
        norm = jnp.linalg.norm(rest)
        basis = basis.at[number + 1].set(jnp.where(norm > 1e-6 * jnp.linalg.norm(image), rest / norm, 0.0))
        return basis, basis @ image

    basis = jnp.zeros((steps + 1, start.size)).at[0].set(start / jnp.linalg.norm(start))
    _, rows = jax.lax.scan(step, basis, jnp.arange(steps))
    matrix = rows[:, :steps]
    return jnp.linalg.eigvalsh((matrix + matrix.T) / 2)[-1]
