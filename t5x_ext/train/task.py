"""What the training floor asks of a task: a model to train, batches, measurements, and a record for readers.

A task is the only thing that knows data, models and scores together. The tasks that come with the package are in
`t5x_ext.tasks`; any object with these methods is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array

from t5x_ext.checkpoints import RunFolder
from t5x_ext.contracts import BatchSource, Frozen, Params, PyTree
from t5x_ext.models import Placement

if TYPE_CHECKING:
    from t5x_ext.train.program import Program
    from t5x_ext.train.run import Run


class ArraySpec(NamedTuple):
    """One array of a batch."""

    shape: tuple[int, ...]  # over all hosts; rows first where it is sharded
    dtype: Any = np.int32
    sharded: bool = True  # whether rows are sharded over the batch axes of the mesh; False: every device has all of it


class Definition(NamedTuple):
    """What is trained, as functions and shapes: nothing is allocated and no data is read."""

    model: Any  # what `Run.objective` is called with
    init: Callable[[Array], Params]  # from a random key to parameters; traceable
    axes: PyTree  # a tuple of logical axis names for each parameter
    batch: Mapping[str, ArraySpec]

    def abstract_params(self) -> Params:
        """Shapes and dtypes of the parameters."""
        return jax.eval_shape(self.init, jax.random.key(0))


@runtime_checkable
class Task(Protocol):
    """What is learned from what.

    A task may offer two more methods: `check(run)` raises `UserError` if settings of the run do not fit it, and is
    called when the run is built; `starting_from(folder)` gives the task of a run that starts from the weights of
    another one, whose vocabulary it takes for example.
    """

    @property
    def rows(self) -> int:
        """Rows of a batch; 1 where a batch is replicated instead of sharded."""
        ...

    def define(self, sizes: Mapping[str, int], placement: Placement) -> Definition:
        """The model and the shapes of its batches.

        Args:
          sizes: what depends on the data, as `Prepared.sizes` gives it; planning passes sizes of its own.
          placement: how the model constrains the shardings of its arrays.
        """
        ...

    def prepare(self, folder: RunFolder, cache_dir: str | None, seed: int) -> Prepared:
        """Reads and prepares data; what is there already is reused.

        Args:
          folder: of the run.
          cache_dir: where caches that runs share are kept; None: in the run folder.
          seed: decides the order of the data.

        Raises:
          UserError: for anything wrong with the input.
        """
        ...


@runtime_checkable
class Prepared(Protocol):
    """A task with its data."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """What the model takes from the data, as `{"vocab_size": 32000}`."""
        ...

    @property
    def batches(self) -> BatchSource:
        """Training batches."""
        ...

    @property
    def has_test(self) -> bool:
        """Whether there is anything to test on."""
        ...

    def evaluators(self, program: Program) -> Sequence[Evaluator]:
        """Measurements on held-out data during training."""
        ...

    def test(self, program: Program, params: Params) -> dict[str, Any]:
        """The final test, as the part of `results.json` about it; called only if `has_test`.

        All processes call it; those that show progress are `parallel.is_primary`.
        """
        ...

    def record(self) -> dict[str, Any]:
        """What a reader needs to build the model, as JSON: the contents of `model.json`, with `"task"`, its kind."""
        ...


@runtime_checkable
class Evaluator(Protocol):
    """A measurement during training, at an interval of its own and after the last update."""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        ...

    @property
    def every(self) -> int | str | None:
        """Updates between measurements, or `"2 epochs"`, `"5000 examples"`; None: `EvaluationConfig.every`."""
        ...

    def __call__(self, params: Params, frozen: Frozen, mutable: PyTree, step: int) -> Mapping[str, float]:
        """Measures.

        Args:
          params: the weights to measure: their EMA where the run keeps one; all of them, frozen ones included.
          frozen: parameters that the run only reads, by name.
          mutable: the objective's mutable state.
          step: updates done.

        Returns:
          Named values, as `valid/loss`.

        Raises:
          Interrupted: where the run was told to stop meanwhile; `program.check_interrupt` raises it between batches.
        """
        ...


def checked(run: Run) -> None:
    """Lets the task look at the settings of the run, where it wants to.

    Raises:
      UserError: where they do not fit.
    """
    check = getattr(run.task, "check", None)
    if check is not None:
        check(run)
