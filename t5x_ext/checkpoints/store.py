"""The checkpoints of a run: atomic, verified, and written in the background."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, Literal

import jax
import numpy as np
from etils import epath

from t5x_ext.checkpoints import orbax_io, trees
from t5x_ext.checkpoints.layout import (
    FORMAT,
    CheckpointFolders,
    Saved,
    delete,
    parse,
    read_meta,
    recorded_specs,
)
from t5x_ext.checkpoints.retention import Retention
from t5x_ext.contracts import Params, PyTree, UserError
from t5x_ext.storage.digests import find_damage, recorded_files, write_digests, write_part_of_digests
from t5x_ext.storage.processes import ALONE, TIMEOUT_SECONDS, Processes, barrier

logger = logging.getLogger(__name__)

Which = Literal["best", "last"] | int
"""A checkpoint: the best by metric (the newest if no metric was recorded), the newest, or that of a step."""

_SYSTEM_ERROR = re.compile(r": ([A-Z][^:\[\]]*) \[(?:\w+=.*)?os_error_code=", re.DOTALL)
"""The end of TensorStore's messages: that of the operating system, then notes in brackets with its number."""


class SaveError(UserError):
    """A checkpoint could not be saved, for example because the disk is full; earlier checkpoints are untouched."""


class CheckpointStore:
    """Checkpoints in one directory, a folder a step, through Orbax.

    A save blocks only for the copy from device to host. In the background the folder is written under a temporary name,
    renamed, and then given `digests.json` (size and SHA-256 of every file). Only then it counts as complete, and older
    ones are deleted. A load verifies the digests first. Folders of interrupted saves are deleted when the next save
    begins.

    One run at a time writes to a directory; any number may read. If a run has several processes, all of them must see
    the directory, and call `save`, `wait`, `restore` and `discard_after` in the same order; every process writes,
    digests and verifies its share. The other methods may be called by each process independently.

    Args:
      directory: a local path or a bucket (`gs://...`); made by the first save.
      retention: which steps are kept. It is not needed for reading, because checkpoints record the metric by which they
        were selected.
      alone: whether this process saves its own arrays, independent of the other processes of its run.
    """

    def __init__(self, directory: epath.PathLike, retention: Retention | None = None, *, alone: bool = False) -> None:
        self._folders = CheckpointFolders(directory)
        self._retention = retention
        self._alone = alone
        self._pending: Future[None] | None = None

    @property
    def directory(self) -> epath.Path:
        """The directory, as an absolute path."""
        return self._folders.directory

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: PyTree,
        extra: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts saving; waits only for an earlier save and for the copy of `state` to the host.

        Args:
          step: number of updates so far; saving a step again replaces it once the new one is complete.
          state: any tree of arrays, typed random keys and Python numbers. It may be donated as soon as this returns.
          extra: what else is needed to resume the run, as JSON (the position in the data, for example).
          metrics: values by which retention selects.

        Raises:
          SaveError: if an earlier save failed in the background, or the local disk has too little space.
        """
        self.wait()
        leaves = trees.flatten(state)
        specs = {name: trees.leaf_spec(name, leaf) for name, leaf in leaves.items()}
        retention = self._retention or Retention()
        meta = {
            "format": FORMAT,
            "step": int(step),
            "metrics": {name: _finite_or_none(value) for name, value in (metrics or {}).items()},
            "selection": {"metric": retention.metric, "mode": retention.mode},
            "leaves": specs,
            "extra": dict(extra or {}),
        }
        arrays = {name: trees.to_stored(leaf) for name, leaf in leaves.items() if orbax_io.is_stored(specs[name])}
        num_bytes = sum(array.nbytes for array in arrays.values())
        folder = self._new_folder(step, num_bytes)
        try:
            orbax_io.start_writing(self._checkpointer, folder, arrays, meta)
        except OSError as error:
            raise self._cleared(folder, error, num_bytes) from error
        self._pending = self._finalizer.submit(self._finish, folder, num_bytes)

    def wait(self) -> None:
        """Waits for the save in progress, if any.

        Raises:
          SaveError: if it failed.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.result()

    def close(self) -> None:
        """Waits, then ends the background threads."""
        try:
            self.wait()
        finally:
            # Neither exists before its first use.
            if "_finalizer" in self.__dict__:
                self._finalizer.shutdown()
            if "_checkpointer" in self.__dict__:
                self._checkpointer.close()

    def discard_after(self, step: int) -> None:
        """Deletes every checkpoint of a later step, so that a restart begins at this step or before.

        It is for rewinding a run. All processes must call it; it returns when the files are deleted for all of them.

        Args:
          step: the newest step to keep; it need not exist.

        Raises:
          SaveError: if an earlier save failed in the background.
        """
        self.wait()
        if self._everyone.index == 0:
            for saved in self._folders.all():
                if saved.step > step:
                    delete(saved.folder)
        self._everyone.gather("discarded")

    def steps(self) -> list[int]:
        """Steps whose save has finished, ascending. Their files are verified when they are loaded.

        Folders of interrupted saves are logged once, as a warning.
        """
        self._mention_unfinished()
        return sorted({saved.step for saved in self._folders.finished()})

    def best_step(self) -> int | None:
        """The best finished step by the metric of the retention (or of the newest checkpoint's record), if any."""
        return next(iter(self.ranked_steps()), None)

    def ranked_steps(self) -> list[int]:
        """Finished steps from best to worst by that metric, without those that were not evaluated."""
        metas = self._folders.metas()
        if not metas:
            return []
        retention = self._retention or Retention(**metas[max(metas)]["selection"])
        return retention.ranked({step: meta["metrics"].get(retention.metric) for step, meta in metas.items()})

    def restore(self, template: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any]]:
        """Loads a state and its `extra`, after verifying every file.

        Without `step` the newest undamaged checkpoint is loaded; newer ones that are damaged are logged as warnings
        with the reason.

        Args:
          template: a tree of arrays or `jax.ShapeDtypeStruct`s like the saved state. Leaves get the template's
            sharding, which may differ from that of the save; without one, they are on the first device. NumPy arrays
            and Python numbers keep their types.
          step: exactly this step, or None.

        Returns:
          `(state, extra)`.

        Raises:
          UserError: if there is no undamaged checkpoint, or this version cannot read its format.
          StructureError: if it has another tree; `details` lists the differences.
        """
        self.wait()
        self._mention_unfinished()
        saved = self._newest_whole(step, together=self._everyone)
        meta = read_meta(saved.folder)
        leaves = trees.flatten(template)
        specs = {name: trees.leaf_spec(name, leaf) for name, leaf in leaves.items()}
        trees.check_same(recorded_specs(meta), specs, where=f"checkpoint {saved.folder}")
        wanted = {name: leaf for name, leaf in leaves.items() if orbax_io.is_stored(specs[name])}
        requests = {name: orbax_io.request_like(leaf) for name, leaf in wanted.items()}
        arrays = orbax_io.read(self._checkpointer, saved.folder, requests)
        restored = (
            trees.from_stored(arrays[name], leaf) if name in arrays else orbax_io.empty_like(leaf)
            for name, leaf in leaves.items()
        )
        return jax.tree.unflatten(jax.tree.structure(template), restored), meta["extra"]

    def restore_params(self, which: Which = "best", subtree: Literal["params", "ema"] = "params") -> Params:
        """Loads only the parameters, as NumPy arrays, without a template.

        Args:
          which: `best` and `last` fall back to the next undamaged one, with a warning.
          subtree: `params`, or `ema` for their EMA.

        Returns:
          Nested dictionaries of NumPy arrays.

        Raises:
          UserError: if there is no such checkpoint, or it has no such weights.
        """
        folder = self._chosen(which, lambda folder: subtree)
        specs = _specs_of(folder, subtree)
        if not specs:
            raise UserError(f"checkpoint {folder} holds no weights named {subtree!r}")
        return _read_weights(folder, subtree, specs)

    def evaluation_params(self, which: Which = "best") -> Params:
        """Loads the weights for evaluation and decoding: the EMA if the run has one, else the parameters.

        Args:
          which: `best` and `last` fall back to the next undamaged one, with a warning. A damaged EMA is never replaced
            by the parameters of the same checkpoint.

        Returns:
          Nested dictionaries of NumPy arrays.

        Raises:
          UserError: if there is no such checkpoint.
        """
        folder = self._chosen(which, _evaluated)
        for subtree in ("ema", "params"):
            if specs := _specs_of(folder, subtree):
                return _read_weights(folder, subtree, specs)
        raise UserError(f"checkpoint {folder} holds no weights")

    def step_of(self, which: str | int) -> int:
        """The finished step for a name: the best by metric (or the newest), the newest, or that step.

        Raises:
          UserError: if there is no checkpoint.
        """
        chosen = self.checked_name(which)
        if isinstance(chosen, int):
            return chosen
        best = self.best_step() if chosen == "best" else None
        steps = self.steps()
        if not steps:
            raise UserError(f"no whole checkpoint in {self.directory}")
        return steps[-1] if best is None else best

    @staticmethod
    def checked_name(which: str | int) -> Literal["best", "last"] | int:
        """`best`, `last` or a step.

        Raises:
          UserError: for anything else.
        """
        if which in ("best", "last"):
            return "best" if which == "best" else "last"
        if str(which).isdecimal():
            return int(which)
        raise UserError(f"checkpoint {which!r}: must be best, last or a step")

    @cached_property
    def _everyone(self) -> Processes:
        """The processes that save and load together."""
        return ALONE if self._alone else Processes.all()

    @cached_property
    def _checkpointer(self) -> Any:
        return orbax_io.make_checkpointer(alone=self._alone)

    @cached_property
    def _finalizer(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def _new_folder(self, step: int, num_bytes: int) -> epath.Path:
        """The folder for a step, the same for all processes, after checking the disk space.

        Raises:
          SaveError: on all processes if there is too little.
          UserError: if the processes do not see the same directory.
        """
        answer: dict[str, Any] = {}
        if self._everyone.index == 0:
            self._folders.prepare()
            revision = max((saved.revision + 1 for saved in self._folders.all() if saved.step == step), default=0)
            answer = {"revision": revision, "free": self._folders.free_bytes()}
        # Only one process decides, because another may see files that the first has already deleted.
        answer = json.loads(self._everyone.gather(json.dumps(answer))[0])
        seen = self._everyone.gather("yes" if self._folders.is_visible() else "no")
        if blind := [index for index, sees in enumerate(seen) if sees == "no"]:
            raise UserError(
                f"processes {blind} do not see {self.directory}, which process 0 has made; the run folder must be on a "
                "file system that all processes share"
            )
        free, folder = answer["free"], self._folders.named(step, answer["revision"])
        if free is not None and free < num_bytes:
            raise self._cleared(folder, "the disk is too full", num_bytes)
        return folder

    def _finish(self, folder: epath.Path, num_bytes: int) -> None:
        """In the background, after Orbax has renamed the folder: writes digests, then deletes what is not kept.

        Raises:
          SaveError: if any of it fails.
        """
        everyone = self._everyone
        try:
            self._checkpointer.wait_until_finished()
            if everyone.count > 1:
                write_part_of_digests(folder, everyone.index, everyone.count)
                barrier(f"digests of {folder}", TIMEOUT_SECONDS)
            if everyone.index == 0:
                write_digests(folder, parts=everyone.count if everyone.count > 1 else 0)
        except Exception as error:
            raise self._cleared(folder, error, num_bytes) from error
        if everyone.index == 0:
            self._delete_others(folder)
        if everyone.count > 1:
            barrier(f"end of {folder}", TIMEOUT_SECONDS)
        logger.debug("checkpoint %s saved", folder)

    def _cleared(self, folder: epath.Path, reason: object, num_bytes: int) -> SaveError:
        """The error of a failed save, after deleting its files, because a full disk needs the space."""
        if self._everyone.index == 0:
            self._folders.delete_for_good(folder)
        text = str(reason) or repr(reason)
        named = _SYSTEM_ERROR.search(text)
        text = named[1].strip() if named else text.splitlines()[0]
        free = self._folders.free_bytes()
        room = "" if free is None else f" (it takes {_readable(num_bytes)}; {_readable(free)} are free there)"
        whole = [saved.folder.name for saved in self._folders.finished()]
        left = f"the last checkpoint is {whole[-1]}" if whole else "there is no checkpoint yet"
        return SaveError(f"checkpoint {folder} could not be saved: {text}{room}; {left}")

    def _mention_unfinished(self) -> None:
        """Warns once about each folder without digests, unless a save is in progress."""
        if self._pending is None:
            self._folders.mention_unfinished()

    def _delete_others(self, just_saved: epath.Path) -> None:
        folders = {saved.step: saved.folder for saved in self._folders.finished()}
        metas = self._folders.metas()
        retention = self._retention or Retention()
        values = {step: metas[step]["metrics"].get(retention.metric) if step in metas else None for step in folders}
        kept = {folders[step] for step in retention.kept(values)} | {just_saved}
        for saved in self._folders.all():
            if saved.folder not in kept:
                delete(saved.folder)

    def _chosen(self, which: Which, subtree: Callable[[epath.Path], str]) -> epath.Path:
        """The checkpoint `which`, with its record and the weights `subtree(folder)` verified."""
        self.wait()

        def wanted(folder: epath.Path) -> Callable[[str], bool]:
            others = {orbax_io.STATE, *orbax_io.WEIGHTS} - {subtree(folder)}
            return lambda name: name.split("/")[0] not in others

        step = which if isinstance(which, int) else None
        return self._newest_whole(step, first=self.ranked_steps() if which == "best" else (), wanted=wanted).folder

    def _newest_whole(
        self,
        step: int | None,
        first: Sequence[int] = (),
        wanted: Callable[[epath.Path], Callable[[str], bool]] = lambda folder: lambda name: True,
        together: Processes = ALONE,
    ) -> Saved:
        """The first undamaged folder: of `step`, or of the steps `first` in their order, then the newest.

        Verifies the files for which `wanted(folder)` is true.
        """
        order = {step: rank for rank, step in enumerate(first)}
        folders = [saved for saved in self._folders.all() if step is None or saved.step == step]
        folders.sort(key=lambda saved: (order.get(saved.step, len(order)), -saved.step, -saved.revision))
        reasons = []
        names = (saved.folder.name for saved in folders)
        # Process 0 names the next one, so that all processes check the same, even if their views of the files differ.
        while name := together.gather(next(names, ""))[0]:
            folder = self.directory / name
            found = together.gather(find_damage(folder, wanted(folder), together.index, together.count) or "")
            damage = next(filter(None, found), None)
            if damage is None:
                saved = parse(folder)
                assert saved is not None
                return saved
            reasons.append(f"{name}: {damage}")
            self._folders.refuse(folder, damage)
        asked = "checkpoint" if step is None else f"checkpoint of step {step}"
        why = f" ({'; '.join(reasons)})" if reasons else f"; finished steps: {self.steps() or 'none'}"
        raise UserError(f"no whole {asked} in {self.directory}{why}")


def _evaluated(folder: epath.Path) -> str:
    """The kind of weights to evaluate: the EMA if the checkpoint has files of one."""
    return "ema" if any(name.startswith("ema/") for name in recorded_files(folder)) else "params"


def _specs_of(folder: epath.Path, subtree: str) -> dict[str, trees.LeafSpec]:
    specs = recorded_specs(read_meta(folder))
    return {name: spec for name, spec in specs.items() if orbax_io.item_of(name) == subtree}


def _read_weights(folder: epath.Path, subtree: str, specs: Mapping[str, trees.LeafSpec]) -> Params:
    wanted = {name: orbax_io.request_numpy() for name, spec in specs.items() if orbax_io.is_stored(spec)}
    with orbax_io.lone_reader() as reader:
        arrays = orbax_io.read(reader, folder, wanted)
    empty = {name: np.zeros(spec.shape, spec.dtype) for name, spec in specs.items() if not orbax_io.is_stored(spec)}
    return trees.nested(arrays | empty)[subtree]


def _readable(num_bytes: float) -> str:
    """Bytes with a unit, such as `56.4 GB`."""
    units = iter(("bytes", "kB", "MB", "GB"))
    unit = next(units)
    while num_bytes >= 1000 and (larger := next(units, None)):
        num_bytes, unit = num_bytes / 1000, larger
    return f"{num_bytes:.3g} {unit}"


def _finite_or_none(value: float) -> float | None:
    """None for NaN and infinity, which strict JSON does not have and which are never best."""
    return float(value) if math.isfinite(value) else None
