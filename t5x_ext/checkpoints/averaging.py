"""Averaging the parameters of several checkpoints of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from t5x_ext.checkpoints.references import read_references, write_references
from t5x_ext.checkpoints.run_folder import RunFolder
from t5x_ext.checkpoints.store import CheckpointStore
from t5x_ext.checkpoints.trees import LeafSpec, specs
from t5x_ext.contracts import Params, UserError
from t5x_ext.storage.folders import whole_folder


def average_params(checkpoints: Iterable[Params]) -> Params:
    """The mean of several parameter trees, leaf by leaf, in their own dtypes.

    Sums are float64, in which k times a float32 (or narrower) number is exact: the mean of equal checkpoints has the
    same bits. Only one tree is in memory besides the sum, so pass a generator for large models.

    Args:
      checkpoints: trees of numpy arrays with the same structure, from `CheckpointStore.restore_params`.

    Returns:
      A tree of numpy arrays.

    Raises:
      UserError: if there is no tree, or two of them differ in names, shapes or dtypes.

    Example:
      >>> import numpy as np
      >>> average_params([{"w": np.float32([1.0, 2.0])}, {"w": np.float32([2.0, 4.0])}])["w"].tolist()
      [1.5, 3.0]
    """
    remaining = iter(checkpoints)
    first = next(remaining, None)
    if first is None:
        raise UserError("cannot average checkpoints: none was given")
    first_specs = specs(first)
    # Starting from the first tree instead of zeros keeps the sign of -0.0.
    total = jax.tree.map(lambda leaf: np.array(leaf, np.float64), first)
    count = 1
    for count, params in enumerate(remaining, start=2):
        _check_same(specs(params), first_specs, count)
        total = jax.tree.map(lambda old, new: np.add(old, new, out=old, dtype=np.float64), total, params)
    return jax.tree.map(lambda leaf, like: np.asarray(leaf / count, like.dtype), total, first)


def average_run(source: RunFolder, steps: Sequence[int], output: str | Path) -> None:
    """Writes a run folder whose weights are the mean over checkpoints of another; it appears when it is complete.

    Of several processes only one may call it.

    Args:
      source: the run, local or remote.
      steps: its checkpoints.
      output: a local folder that does not exist, or is empty; its only checkpoint has the newest of `steps`.

    Raises:
      UserError: if a checkpoint is missing or damaged, or `output` exists.
    """
    with whole_folder(Path(output), None, "the averaged run") as draft:
        target = RunFolder(draft)
        target.write_record(source.read_record())
        write_references(target, read_references(source))
        if source.vocabulary.exists():
            target.vocabulary.mkdir()
            for path in source.vocabulary.iterdir():
                path.copy(target.vocabulary / path.name)
        with CheckpointStore(source.checkpoints) as store:
            params = average_params(store.restore_params(step) for step in steps)
        with CheckpointStore(target.checkpoints, alone=True) as store:
            store.save(max(steps), {"params": params}, {"averaged_steps": list(steps)})


def _check_same(these: Mapping[str, LeafSpec], first: Mapping[str, LeafSpec], number: int) -> None:
    for name in {**first, **these}:
        if these.get(name) != first.get(name):
            raise UserError(
                f"cannot average checkpoint {number} with the first: {name} is {these.get(name)} there, "
                f"{first.get(name)} in the first"
            )
