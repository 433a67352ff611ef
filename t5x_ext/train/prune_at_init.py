"""Pruning at initialisation: a hook that masks parameters once, before the first update."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.tree_util import Partial
from jaxtyping import Array, Float

from t5x_ext import compress
from t5x_ext.contracts import Batch, Context, Frozen, Params, PyTree, UserError, path_name, select
from t5x_ext.optim import StaticMaskState, with_masks
from t5x_ext.parallel import global_batch, host_rows, is_primary
from t5x_ext.storage.files import write_json
from t5x_ext.train.log import say
from t5x_ext.train.loop import Hook, Loop, Session
from t5x_ext.train.subset import SubsetObjective, totals_of

logger = logging.getLogger(__name__)

MASKS_JSON = "masks.json"
"""The file in a run folder that says what was kept of each matrix."""


@dataclass(frozen=True)
class PruneAtInit(Hook):
    """Scores parameters on a few batches before the first update, and keeps the entries with the largest scores.

    The others become zero and stay so: the run's optimizer is `optim.static_mask(...)`, which holds the masks, so that
    they are in every checkpoint. Calibration batches are the first of the run, without dropout. What is kept of each
    matrix is in the run folder as `masks.json` and, in total, in the log.

    Attributes:
      score: what to keep the largest of, any `compress.Score`.
      sparsity: the share of entries that become zero; or
      density: the share that is kept.
      examples: calibration examples; batches are read until there are so many.
      scope: where entries compete, see `compress.Scope`; None takes what the score is meant for.
      rounds: how often to score and remove.
      schedule: how the density falls over rounds.
      allow_collapse: accept masks that keep nothing of a matrix.

    Raises:
      UserError: when the run begins, if the optimizer holds no masks, or as `compress.at_init`.

    References:
      He et al., SparseAdapter: An Easy Approach for Improving the Parameter-Efficiency of Adapters (arXiv 2210.04284).
    """

    score: compress.Score = compress.snip
    sparsity: float | Fraction | None = None
    density: float | Fraction | None = None
    examples: int = 320
    scope: compress.Scope | None = None
    rounds: int = 1
    schedule: compress.Schedule = "exponential"
    allow_collapse: bool = False

    def __post_init__(self) -> None:
        compress.as_density(density=self.density, sparsity=self.sparsity)
        if self.examples < 1:
            raise UserError(f"PruneAtInit.examples is {self.examples}; it must be at least 1")

    def begin(self, session: Session) -> None:
        """Masks the parameters of a run that has not made an update yet; a resumed one has its masks."""
        loop = session.loop
        if loop.step > 0:
            return
        with loop.clock.section("start"):
            masks, rows = self.masks(session)
            place = jax.tree.map(lambda leaf: leaf.sharding, loop.state)
            loop.state = jax.jit(_with_masks, out_shardings=place)(loop.state, masks)
        total, kept = sum(row.entries for row in rows), sum(row.kept for row in rows)
        loop.memory.hooks["prune_at_init"] = {"entries": total, "kept": kept}
        if is_primary():
            say(f"masked {len(rows)} matrices: {kept:,} of {total:,} entries are trained")
            folder = epath.Path(session.store.directory).parent
            write_json(
                folder / MASKS_JSON, {"entries": total, "kept": kept, "matrices": [row._asdict() for row in rows]}
            )

    def masks(self, session: Session) -> tuple[PyTree, list[compress.MatrixReport]]:
        """The masks, and what they keep of each matrix."""
        program, loop = session.program, session.loop
        is_trainable = bool(program.run.trainable)
        objective = SubsetObjective(program.objective) if is_trainable else program.objective
        params, has_mask = loop.state.params, _maskable(loop)
        axes = _axes_of(params, program.definition.axes)
        masks = compress.at_init(
            self.score,
            Partial(Partial(_mean_loss, objective), loop.frozen, loop.state.mutable),
            params,
            has_mask,
            self._batches(session),
            jax.random.key(program.run.seed),
            density=self.density,
            sparsity=self.sparsity,
            scope=self.scope,
            rounds=self.rounds,
            schedule=self.schedule,
            axes=axes,
            allow_collapse=self.allow_collapse,
        )
        return masks, compress.report(masks, axes)

    def _batches(self, session: Session) -> list[Batch]:
        """The first batches of the run, on the mesh, with at least `examples` examples."""
        program, source = session.program, session.prepared.batches
        sharded = {name for name, spec in program.definition.batch.items() if spec.sharded}
        rows = host_rows(program.mesh, source.rows) if sharded else (0, source.rows)
        found, count = list[Batch](), 0
        while count < self.examples:
            index = len(found)
            found.append(global_batch(program.mesh, source.read(index, *rows), sharded))
            count += max(len(source.examples(index)), 1)
        return found


def _mean_loss(objective: Any, frozen: Frozen, mutable: PyTree, params: Params, batch: Batch) -> Float[Array, ""]:
    context = Context(0, jax.random.key(0), False, frozen, mutable)
    loss = objective(params, batch, context._replace(totals=totals_of(objective, batch, context)))
    return loss.sum / jnp.maximum(loss.weight, 1.0)


def _maskable(loop: Loop) -> PyTree:
    """A tree of booleans: True where the optimizer's state has a mask for the parameter."""
    is_state = lambda node: isinstance(node, StaticMaskState)
    states = [node for node in jax.tree.leaves(loop.state.optimizer_state, is_leaf=is_state) if is_state(node)]
    if len(states) != 1:
        raise UserError("PruneAtInit needs Run.optimizer = optim.static_mask(...), which holds the masks")
    masked = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(states[0].mask)}
    return select(loop.state.params, lambda name: name in masked)


def _axes_of(params: Params, axes: PyTree) -> PyTree:
    """The axis names of some of the model's parameters."""
    return {
        name: _axes_of(value, axes[name]) if isinstance(value, dict) else axes[name] for name, value in params.items()
    }


def _with_masks(state: Any, masks: PyTree) -> Any:
    ema = compress.apply_masks(state.ema, masks) if state.ema != () else ()
    return state._replace(
        params=compress.apply_masks(state.params, masks),
        optimizer_state=with_masks(state.optimizer_state, masks),
        ema=ema,
    )
