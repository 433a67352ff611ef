"""The loss on held-out batches, for any task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from t5x_ext.contracts import Frozen, Loss, Params, PyTree
from t5x_ext.parallel import global_batch, host_rows
from t5x_ext.train.program import Program
from t5x_ext.train.step import make_evaluation_step


class HeldOutLoss:
    """Mean loss of the objective and its metrics over all batches: `valid/loss`, `valid/nll`, ...

    Attributes:
      name: of the evaluator.
      every: updates between measurements; None: as the run says.
    """

    name = "held-out loss"

    def __init__(
        self,
        program: Program,
        batches: Callable[[int, int], Iterable[Mapping[str, np.ndarray]]],
        *,
        rows: int,
        every: int | str | None = None,
        prefix: str = "valid",
    ):
        """Prepares the measurement; the program is compiled when first used.

        Args:
          program: the run on its mesh.
          batches: from the first row of this host and the one after its last to the batches, one pass.
          rows: rows of a batch, over all hosts.
          every: see the attribute.
          prefix: of the values' names.
        """
        self.every = every
        self._program, self._batches, self._prefix = program, batches, prefix
        self._step = jax.jit(make_evaluation_step(program.objective))
        self._sharded = {name for name, spec in program.definition.batch.items() if spec.sharded}
        self._rows = host_rows(program.mesh, rows) if self._sharded else (0, rows)

    def __call__(self, params: Params, frozen: Frozen, mutable: PyTree, step: int) -> dict[str, float]:
        """Measures; an empty dictionary if there are no batches."""
        total: Loss | None = None
        for batch in self._batches(*self._rows):
            self._program.check_interrupt()
            placed = global_batch(self._program.mesh, batch, self._sharded)
            loss = jax.device_get(self._step(params, frozen, mutable, np.int32(step), placed))
            total = loss if total is None else jax.tree.map(np.add, total, loss)
        if total is None:
            return {}
        values = {"loss": float(total.sum) / float(total.weight)}
        values |= {name: float(value) / float(weight) for name, (value, weight) in total.metrics.items()}
        return {f"{self._prefix}/{name}": value for name, value in values.items()}
