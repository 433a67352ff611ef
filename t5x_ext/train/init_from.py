"""Weights of another run: to start from, or to read while training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from t5x_ext.checkpoints import CheckpointStore, Reference, RunFolder, run_params
from t5x_ext.contracts import Params, UserError


class InitFrom(NamedTuple):
    """A run to start from, for fine-tuning; from its EMA of the weights, where it kept one."""

    run_dir: str
    checkpoint: str | int = "best"  # "best", "last" or a step
    keep_optimizer: bool = False  # resume optimizer state and EMA too, instead of starting again
    only: tuple[str, ...] = ()  # patterns on names of this run's parameters: those it takes; empty: all
    rename: Mapping[str, str] = {}  # from a regular expression on names of the other run to what replaces it, in order
    transform: Callable[[Params], Params] | None = None  # of the other run's weights, before they are renamed


def read_weights(init_from: InitFrom, where: str) -> tuple[dict[str, Any], Reference | None]:
    """The weights of another run by the names that this run knows them by.

    Args:
      init_from: which.
      where: what the message of an error begins with.

    Returns:
      NumPy arrays by name, and the reference that finds them again; None where they were transformed.

    Raises:
      UserError: if there is no such checkpoint, `rename` or `only` finds nothing, or two weights get one name.
    """
    folder = RunFolder(init_from.run_dir)
    try:
        with CheckpointStore(folder.checkpoints) as store:
            step = store.step_of(init_from.checkpoint)
        reference, weights = Reference.to_run(folder, step, init_from.rename, init_from.only)
        if init_from.transform is None:
            return weights, reference
        transformed = init_from.transform(run_params(folder, step))
        return reference.taken(transformed), None
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
