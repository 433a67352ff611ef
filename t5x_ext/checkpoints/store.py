"""The checkpoints of a run: written in the background, atomic, verified, and never all lost at once."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import SingleDeviceSharding

from t5x_ext.checkpoints import trees
from t5x_ext.checkpoints.files import DIGESTS, find_damage, write_digests, write_part_of_digests
from t5x_ext.checkpoints.processes import ALONE, TIMEOUT_SECONDS, Processes, barrier
from t5x_ext.checkpoints.retention import Retention
from t5x_ext.contracts import Params, PyTree, UserError

logger = logging.getLogger(__name__)

FORMAT = 1
WEIGHTS = ("params", "ema")
"""Parts of a state that are stored apart, so that reading parameters touches nothing else."""

_STATE = "state"
_TEMPORARY = ".orbax-checkpoint-tmp"
_FOLDER_NAME = re.compile(r"([0-9]+)(?:\.([0-9]+))?")
_SYSTEM_ERROR = re.compile(r": ([A-Z][^:\[\]]*) \[(?:\w+=.*)?os_error_code=", re.DOTALL)
"""How TensorStore ends a message: the words of the operating system, then notes in brackets, its number among them."""


class SaveError(UserError):
    """A checkpoint could not be saved, for example because the disk is full; earlier checkpoints are untouched."""


class _Saved(NamedTuple):
    """A folder of one saved step; saving the same step again makes a new revision beside it."""

    step: int
    revision: int
    folder: epath.Path


class CheckpointStore:
    """Checkpoints in one directory, a folder a step, through Orbax.

    A save blocks for the copy from device to host only. In the background the folder is written under a temporary name,
    renamed, and then given `digests.json` (size and SHA-256 of every file): only then it counts as whole, and only then
    older ones are deleted. A load verifies the digests first. Folders that an interrupted save left behind are
    deleted when the next save begins.

    One run at a time writes to a directory; any number may read. Where a run has several processes, all of them see the
    directory, and all of them call `save`, `wait`, `restore` and `discard_after` in the same order; every process
    writes, digests and verifies its share. The other methods each process may call by itself.

    Args:
      directory: a local path or a bucket (`gs://...`); made by the first save.
      retention: which steps stay. For reading alone it is not needed: the checkpoints know by which metric they were
        selected.
      alone: whether this process saves arrays of its own, of which the other processes of its run know nothing.
    """

    def __init__(self, directory: epath.PathLike, retention: Retention | None = None, *, alone: bool = False) -> None:
        self.directory = epath.Path(directory) if _is_remote(directory) else epath.Path(directory).absolute()
        self._retention = retention
        self._alone = alone
        self._pending: Future[None] | None = None
        self._refused: set[epath.Path] = set()
        self._mentioned: set[epath.Path] = set()

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
          step: updates done so far; saving a step again replaces it once the new one is whole.
          state: any tree of arrays, typed random keys and Python numbers. It may be donated as soon as this returns.
          extra: what else a resumed run needs, as JSON (the data position, for example).
          metrics: values that retention selects by.

        Raises:
          SaveError: if an earlier save failed in the background, or a local disk has no room for this one.
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
        arrays = {name: trees.to_stored(leaf) for name, leaf in leaves.items() if _is_stored(specs[name])}
        num_bytes = sum(array.nbytes for array in arrays.values())
        folder = self._new_folder(step, num_bytes)
        ocp = _orbax()
        items = {item: ocp.args.PyTreeSave(tree) for item, tree in _items(arrays).items()}
        try:
            self._checkpointer.save(folder, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items))
        except OSError as error:
            raise self._cleared(folder, error, num_bytes) from error
        self._pending = self._finalizer.submit(self._finish, folder, num_bytes)

    def wait(self) -> None:
        """Returns when no save is under way.

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
        """Deletes every checkpoint of a later step, so that the newest one left is where a restart begins.

        For going back behind a part of training that went wrong. All processes call it, and it returns when the files
        are gone for all of them.

        Args:
          step: the newest step that stays; it need not exist.

        Raises:
          SaveError: if an earlier save failed in the background.
        """
        self.wait()
        if self._everyone.index == 0:
            for saved in self._folders():
                if saved.step > step:
                    _delete(saved.folder)
        self._everyone.gather("discarded")

    def steps(self) -> list[int]:
        """Steps whose save has finished, ascending. Their files are verified when they are loaded.

        What an interrupted save has left behind is mentioned once, as a warning.
        """
        self._mention_unfinished()
        return sorted({saved.step for saved in self._finished()})

    def best_step(self) -> int | None:
        """The best finished step by the metric of the retention (or the one the newest checkpoint names), if any."""
        return next(iter(self.ranked_steps()), None)

    def ranked_steps(self) -> list[int]:
        """Finished steps from best to worst by that metric; those that were not measured are left out."""
        metas = self._metas()
        if not metas:
            return []
        retention = self._retention or Retention(**metas[max(metas)]["selection"])
        return retention.ranked({step: meta["metrics"].get(retention.metric) for step, meta in metas.items()})

    def restore(self, template: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any]]:
        """Loads a state and its `extra`, after verifying every file.

        Without `step` the newest whole checkpoint is taken; each newer one that had to be refused is logged as a
        warning with the reason.

        Args:
          template: a tree of arrays or `jax.ShapeDtypeStruct`s like the saved state. Leaves come back with the
            template's sharding, which may differ from that of the save; without one, on the first device. NumPy arrays
            and Python numbers come back as such.
          step: exactly this step, or None.

        Returns:
          `(state, extra)`.

        Raises:
          UserError: if there is no whole checkpoint, or it is of a format that this version cannot read.
          StructureError: if it holds another tree; `details` lists the differences.
        """
        self.wait()
        self._mention_unfinished()
        saved = self._newest_whole(step, together=self._everyone)
        meta = _read_meta(saved.folder)
        leaves = trees.flatten(template)
        specs = {name: trees.leaf_spec(name, leaf) for name, leaf in leaves.items()}
        trees.check_same(_specs(meta), specs, where=f"checkpoint {saved.folder}")
        requests = {name: _restore_args(leaf) for name, leaf in leaves.items() if _is_stored(specs[name])}
        arrays = _read(self._checkpointer, saved.folder, requests)
        restored = (
            trees.from_stored(arrays[name], leaf) if name in arrays else _empty_like(leaf)
            for name, leaf in leaves.items()
        )
        return jax.tree.unflatten(jax.tree.structure(template), restored), meta["extra"]

    def restore_params(
        self, which: Literal["best", "last"] | int = "best", subtree: Literal["params", "ema"] = "params"
    ) -> Params:
        """Loads only the parameters, as NumPy arrays, knowing nothing about the rest of the state.

        Args:
          which: `last`, a step, or `best`: the best by metric, or the newest where no metric was recorded. `best` and
            `last` fall back to the next whole one, with a warning.
          subtree: `params`, or `ema` for the averaged weights.

        Returns:
          Nested dictionaries of NumPy arrays.

        Raises:
          UserError: if there is no such checkpoint, or it has no such weights.
        """
        self.wait()
        step = which if isinstance(which, int) else None
        others = {_STATE, *WEIGHTS} - {subtree}
        saved = self._newest_whole(
            step,
            first=self.ranked_steps() if which == "best" else (),
            wanted=lambda name: name.split("/")[0] not in others,
        )
        specs = {name: spec for name, spec in _specs(_read_meta(saved.folder)).items() if _item_of(name) == subtree}
        if not specs:
            raise UserError(f"checkpoint {saved.folder} holds no weights named {subtree!r}")
        as_numpy = _orbax().RestoreArgs(restore_type=np.ndarray)
        wanted = {name: as_numpy for name, spec in specs.items() if _is_stored(spec)}
        with _lone_reader() as reader:
            arrays = _read(reader, saved.folder, wanted)
        empty = {name: np.zeros(spec.shape, spec.dtype) for name, spec in specs.items() if not _is_stored(spec)}
        return trees.nested(arrays | empty)[subtree]

    def evaluation_params(self, which: str | int = "best") -> Params:
        """The weights to decode or measure with, as NumPy arrays: their EMA where the run kept one.

        Args:
          which: `best`, `last` or a step, also as text.

        Raises:
          UserError: as `restore_params`.
        """
        chosen = self.checked_name(which)
        try:
            return self.restore_params(chosen, subtree="ema")
        except UserError:
            # Most runs keep no EMA; where it is the checkpoint that is missing, this says so.
            return self.restore_params(chosen)

    def step_of(self, which: str | int) -> int:
        """The finished step that a name means: the best by metric (or the newest), the newest, or that step.

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
        ocp = _orbax()
        options = _only_here() if self._alone else ocp.options.MultiprocessingOptions()
        # Trained weights are noise to a compressor: it would cost time and save little.
        trees_of_arrays = {
            item: ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=options)
            for item in (_STATE, *WEIGHTS)
        }
        meta = ocp.JsonCheckpointHandler(multiprocessing_options=options)
        return ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                composite_options=ocp.CompositeOptions(multiprocessing_options=options), meta=meta, **trees_of_arrays
            ),
            timeout_secs=TIMEOUT_SECONDS,
            multiprocessing_options=options,
        )

    @cached_property
    def _finalizer(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def _new_folder(self, step: int, num_bytes: int) -> epath.Path:
        """Where a step will be saved, the same for all processes, after checking that there is room.

        Raises:
          SaveError: on all processes, if there is none.
          UserError: if the processes do not see the same directory.
        """
        answer: dict[str, Any] = {}
        if self._everyone.index == 0:
            self._check_is_folder()
            self.directory.mkdir(parents=True, exist_ok=True)
            self._delete_unfinished()
            revision = max((saved.revision + 1 for saved in self._folders() if saved.step == step), default=0)
            free = _free_bytes(self.directory)
            answer = {"revision": revision, "free": free}
        # Only one process may decide: another may see files that the first has already deleted.
        answer = json.loads(self._everyone.gather(json.dumps(answer))[0])
        # A bucket has no empty folders to see.
        seen = self._everyone.gather("yes" if _is_remote(self.directory) or self.directory.exists() else "no")
        if blind := [index for index, sees in enumerate(seen) if sees == "no"]:
            raise UserError(
                f"processes {blind} do not see {self.directory}, which process 0 has made; the run folder must be on a "
                "file system that all processes share"
            )
        free, revision = answer["free"], answer["revision"]
        folder = self.directory / (f"{step:08d}.{revision}" if revision else f"{step:08d}")
        if free is not None and free < num_bytes:
            raise self._cleared(folder, "the disk is too full", num_bytes)
        self._refused.discard(folder)
        self._mentioned.discard(folder)
        return folder

    def _finish(self, folder: epath.Path, num_bytes: int) -> None:
        """In the background: after Orbax has renamed the folder, proves it whole, then deletes what need not stay.

        Raises:
          SaveError: if any of it failed.
        """
        everyone = self._everyone
        try:
            self._checkpointer.wait_until_finished()
            if everyone.count > 1:
                write_part_of_digests(folder, everyone.index, everyone.count)
                barrier(f"digests of {folder}")
            if everyone.index == 0:
                write_digests(folder, parts=everyone.count if everyone.count > 1 else 0)
        except Exception as error:
            raise self._cleared(folder, error, num_bytes) from error
        if everyone.index == 0:
            self._delete_others(folder)
        if everyone.count > 1:
            barrier(f"end of {folder}")
        logger.debug("checkpoint %s saved", folder)

    def _cleared(self, folder: epath.Path, reason: object, num_bytes: int) -> SaveError:
        """Why a save failed, after deleting what there is of it: it is of no use, and a full disk needs the room."""
        if self._everyone.index == 0:
            self._delete_for_good(folder)
        text = str(reason) or repr(reason)
        named = _SYSTEM_ERROR.search(text)
        text = named[1].strip() if named else text.splitlines()[0]
        free = _free_bytes(self.directory)
        room = "" if free is None else f" (it takes {_readable(num_bytes)}; {_readable(free)} are free there)"
        whole = [saved.folder.name for saved in self._finished()]
        left = f"the last checkpoint is {whole[-1]}" if whole else "there is no checkpoint yet"
        return SaveError(f"checkpoint {folder} could not be saved: {text}{room}; {left}")

    def _check_is_folder(self) -> None:
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"{self.directory} is a file; it must be the folder of the checkpoints")

    def _mention_unfinished(self) -> None:
        """Says once of each folder without digests that it counts for nothing; not while a save is under way."""
        if self._pending is not None or not self.directory.is_dir():
            return
        for folder in self.directory.iterdir():
            damage = find_damage(folder, wanted=lambda name: False) if _parse(folder) else None
            if _TEMPORARY in folder.name:
                damage = "its save has not finished"
            if damage and folder not in self._mentioned | self._refused:
                self._mentioned.add(folder)
                logger.warning("checkpoint %s refused: %s", folder, damage)

    def _delete_unfinished(self) -> None:
        """Deletes what interrupted saves have left; not while a save is under way."""
        if self._everyone.index == 0 and self.directory.is_dir():
            for folder in self.directory.iterdir():
                if _TEMPORARY in folder.name or (_parse(folder) and not (folder / DIGESTS).exists()):
                    _delete(folder)

    def _delete_for_good(self, folder: epath.Path) -> None:
        """Deletes what a failed save has left, and what its other writers add: Orbax reports the first that failed."""
        looks_clean = 0
        for _ in range(100):
            self._delete_unfinished()
            if folder.exists():
                _delete(folder)
            time.sleep(0.1)
            left = folder.exists() or any(_TEMPORARY in other.name for other in self.directory.iterdir())
            looks_clean = 0 if left else looks_clean + 1
            if looks_clean == 5:
                return

    def _delete_others(self, just_saved: epath.Path) -> None:
        folders = {saved.step: saved.folder for saved in self._finished()}
        metas = self._metas()
        retention = self._retention or Retention()
        values = {step: metas[step]["metrics"].get(retention.metric) if step in metas else None for step in folders}
        kept = {folders[step] for step in retention.kept(values)} | {just_saved}
        for saved in self._folders():
            if saved.folder not in kept:
                _delete(saved.folder)

    def _folders(self) -> list[_Saved]:
        """Folders of steps, finished or not, ascending by step and revision."""
        self._check_is_folder()
        if not self.directory.exists():
            return []
        return sorted(saved for folder in self.directory.iterdir() if (saved := _parse(folder)))

    def _finished(self) -> list[_Saved]:
        return [
            saved
            for saved in self._folders()
            if saved.folder not in self._refused and (saved.folder / DIGESTS).exists()
        ]

    def _metas(self) -> dict[int, dict[str, Any]]:
        """The records of finished steps, ascending, without those that cannot be read."""
        metas = {}
        for saved in self._finished():
            try:
                metas[saved.step] = _read_meta(saved.folder)
            except (OSError, ValueError, LookupError, TypeError, UserError) as error:
                # Not verified here: a load would refuse this folder, saying why.
                logger.debug("checkpoint %s has no readable record: %s", saved.folder, error)
        return metas

    def _newest_whole(
        self,
        step: int | None,
        first: Sequence[int] = (),
        wanted: Callable[[str], bool] = lambda name: True,
        together: Processes = ALONE,
    ) -> _Saved:
        """The first folder without damage: of `step`, or of the steps `first` in their order, then the newest."""
        order = {step: rank for rank, step in enumerate(first)}
        folders = [saved for saved in self._folders() if step is None or saved.step == step]
        folders.sort(key=lambda saved: (order.get(saved.step, len(order)), -saved.step, -saved.revision))
        reasons = []
        names = (saved.folder.name for saved in folders)
        # Process 0 says which one is next, so that all look at the same, whatever their file system shows them.
        while name := together.gather(next(names, ""))[0]:
            folder = self.directory / name
            found = together.gather(find_damage(folder, wanted, together.index, together.count) or "")
            damage = next(filter(None, found), None)
            if damage is None:
                saved = _parse(folder)
                assert saved is not None
                return saved
            reasons.append(f"{name}: {damage}")
            if folder not in self._refused | self._mentioned:
                logger.warning("checkpoint %s refused: %s", folder, damage)
            self._refused.add(folder)
        asked = "checkpoint" if step is None else f"checkpoint of step {step}"
        why = f" ({'; '.join(reasons)})" if reasons else f"; finished steps: {self.steps() or 'none'}"
        raise UserError(f"no whole {asked} in {self.directory}{why}")


def _orbax() -> Any:
    """Orbax on first use: importing it takes as long as importing the rest of the room."""
    import orbax.checkpoint

    return orbax.checkpoint


def _only_here() -> Any:
    """Orbax' options for what waits for no other process."""
    here = jax.process_index()
    return _orbax().options.MultiprocessingOptions(primary_host=here, active_processes={here})


@contextmanager
def _lone_reader() -> Iterator[Any]:
    """A reader that waits for no other process."""
    ocp, options = _orbax(), _only_here()
    handlers = {item: ocp.PyTreeCheckpointHandler(multiprocessing_options=options) for item in (_STATE, *WEIGHTS)}
    composite = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=options), **handlers
    )
    with ocp.Checkpointer(composite, multiprocessing_options=options) as reader:
        yield reader


def _read(reader: Any, folder: epath.Path, requests: Mapping[str, Any]) -> dict[str, Any]:
    """The requested arrays by name."""
    ocp = _orbax()
    items = {item: ocp.args.PyTreeRestore(item=tree, restore_args=tree) for item, tree in _items(requests).items()}
    restored = reader.restore(folder, args=ocp.args.Composite(**items))
    return {name: leaf for item in items for name, leaf in trees.flatten(restored[item]).items()}


def _is_remote(path: epath.PathLike) -> bool:
    return "://" in str(path)


def _free_bytes(directory: epath.Path) -> int | None:
    """Free bytes of a local disk; None for a bucket, which has no end."""
    return None if _is_remote(directory) else shutil.disk_usage(directory).free


def _readable(num_bytes: float) -> str:
    """Bytes with a unit, such as `56.4 GB`."""
    units = iter(("bytes", "kB", "MB", "GB"))
    unit = next(units)
    while num_bytes >= 1000 and (larger := next(units, None)):
        num_bytes, unit = num_bytes / 1000, larger
    return f"{num_bytes:.3g} {unit}"


def _parse(folder: epath.Path) -> _Saved | None:
    match = _FOLDER_NAME.fullmatch(folder.name)
    return _Saved(int(match[1]), int(match[2] or 0), folder) if match else None


def _delete(folder: epath.Path) -> None:
    """Deletes a checkpoint, or what stands in its place; what cannot be deleted is only a loss of room."""
    try:
        # The digests go first, so that a deletion that is cut short leaves no folder that looks whole.
        if (folder / DIGESTS).exists():
            (folder / DIGESTS).rmtree()
        if folder.exists():
            folder.rmtree()
    except OSError as error:
        logger.warning("%s cannot be deleted: %s", folder, error.strerror or error)


def _item_of(name: str) -> str:
    head = name.split("/")[0]
    return head if head in WEIGHTS else _STATE


def _items(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Nested dictionaries a part of the folder, full names kept inside."""
    parts: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        parts.setdefault(_item_of(name), {})[name] = leaf
    return {item: trees.nested(part) for item, part in parts.items()}


def _is_stored(spec: trees.LeafSpec) -> bool:
    """Orbax refuses arrays without elements; their shape and dtype say all about them."""
    return 0 not in spec.shape


def _empty_like(leaf: Any) -> Any:
    return np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, np.ndarray) else jnp.zeros(leaf.shape, leaf.dtype)


def _restore_args(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return _orbax().RestoreArgs(restore_type=np.ndarray)
    plain = jax.eval_shape(jax.random.key_data, leaf) if trees.is_key(leaf) else leaf
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    return _orbax().ArrayRestoreArgs(sharding=sharding, global_shape=plain.shape, dtype=plain.dtype)


def _read_meta(folder: epath.Path) -> dict[str, Any]:
    meta = json.loads((folder / "meta" / "metadata").read_text())
    if meta.get("format") != FORMAT:
        raise UserError(f"checkpoint {folder} has format {meta.get('format')}; this version reads format {FORMAT}")
    return meta


def _specs(meta: Mapping[str, Any]) -> dict[str, trees.LeafSpec]:
    return {name: trees.LeafSpec(tuple(shape), dtype) for name, (shape, dtype) in meta["leaves"].items()}


def _finite_or_none(value: float) -> float | None:
    """Strict JSON knows no NaN, and a NaN is never best."""
    return float(value) if math.isfinite(value) else None
