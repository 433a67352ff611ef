"""The folder of a run's checkpoints: one folder a step, and which of them are complete.

If step `00000012` is saved again, the new folder is `00000012.1`. A folder is complete when it has `digests.json`.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from t5x_ext.checkpoints.trees import LeafSpec
from t5x_ext.contracts import UserError
from t5x_ext.storage.digests import DIGESTS, find_damage
from t5x_ext.storage.remote import is_remote

logger = logging.getLogger(__name__)

FORMAT = 1

_TEMPORARY = ".orbax-checkpoint-tmp"
_FOLDER_NAME = re.compile(r"([0-9]+)(?:\.([0-9]+))?")


class Saved(NamedTuple):
    """A folder of one saved step; saving the same step again makes a new revision."""

    step: int
    revision: int
    folder: epath.Path


class CheckpointFolders:
    """The step folders in one directory, as this process sees them.

    Args:
      directory: a local path or a bucket (`gs://...`); it need not exist.

    Attributes:
      directory: the directory, as an absolute path.
    """

    def __init__(self, directory: epath.PathLike) -> None:
        self.directory = epath.Path(directory) if is_remote(directory) else epath.Path(directory).absolute()
        self._refused: set[epath.Path] = set()
        self._mentioned: set[epath.Path] = set()

    def prepare(self) -> None:
        """Makes the directory, and deletes the files of interrupted saves.

        Raises:
          UserError: if it is a file.
        """
        self._check_is_folder()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.delete_unfinished()

    def is_visible(self) -> bool:
        """Whether this process sees the directory; True for a bucket, which has no empty folders."""
        return is_remote(self.directory) or self.directory.exists()

    def free_bytes(self) -> int | None:
        """Free bytes of the local disk; None for a bucket."""
        return None if is_remote(self.directory) else shutil.disk_usage(self.directory).free

    def named(self, step: int, revision: int) -> epath.Path:
        """The folder of a step; forgets refusals of an earlier folder of that name."""
        folder = self.directory / (f"{step:08d}.{revision}" if revision else f"{step:08d}")
        self._refused.discard(folder)
        self._mentioned.discard(folder)
        return folder

    def all(self) -> list[Saved]:
        """Folders of steps, finished or not, ascending by step and revision.

        Raises:
          UserError: if the directory is a file.
        """
        self._check_is_folder()
        if not self.directory.exists():
            return []
        return sorted(saved for folder in self.directory.iterdir() if (saved := parse(folder)))

    def finished(self) -> list[Saved]:
        """Folders whose save has finished and that were not refused, ascending."""
        return [
            saved for saved in self.all() if saved.folder not in self._refused and (saved.folder / DIGESTS).exists()
        ]

    def metas(self) -> dict[int, dict[str, Any]]:
        """The records of finished steps, ascending, without those that cannot be read."""
        metas = {}
        for saved in self.finished():
            try:
                metas[saved.step] = read_meta(saved.folder)
            except (OSError, ValueError, LookupError, TypeError, UserError) as error:
                # Not verified here: loading it would refuse the folder with the reason.
                logger.debug("checkpoint %s has no readable record: %s", saved.folder, error)
        return metas

    def refuse(self, folder: epath.Path, damage: str) -> None:
        """Ignores a folder from here on; warns once."""
        if folder not in self._refused | self._mentioned:
            logger.warning("checkpoint %s refused: %s", folder, damage)
        self._refused.add(folder)

    def mention_unfinished(self) -> None:
        """Warns once about each folder without digests, which is ignored."""
        if not self.directory.is_dir():
            return
        for folder in self.directory.iterdir():
            damage = find_damage(folder, wanted=lambda name: False) if parse(folder) else None
            if _TEMPORARY in folder.name:
                damage = "its save has not finished"
            if damage and folder not in self._mentioned | self._refused:
                self._mentioned.add(folder)
                logger.warning("checkpoint %s refused: %s", folder, damage)

    def delete_unfinished(self) -> None:
        """Deletes the files of interrupted saves; must not be called during a save."""
        if self.directory.is_dir():
            for folder in self.directory.iterdir():
                if _TEMPORARY in folder.name or (parse(folder) and not (folder / DIGESTS).exists()):
                    delete(folder)

    def delete_for_good(self, folder: epath.Path) -> None:
        """Deletes a failed save's files, also those that other writers add after Orbax has reported an error."""
        looks_clean = 0
        for _ in range(100):
            self.delete_unfinished()
            if folder.exists():
                delete(folder)
            time.sleep(0.1)
            left = folder.exists() or any(_TEMPORARY in other.name for other in self.directory.iterdir())
            looks_clean = 0 if left else looks_clean + 1
            if looks_clean == 5:
                return

    def _check_is_folder(self) -> None:
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"{self.directory} is a file; it must be the folder of the checkpoints")


def parse(folder: epath.Path) -> Saved | None:
    """Step and revision of a folder by its name; None if it is not named as a step."""
    match = _FOLDER_NAME.fullmatch(folder.name)
    return Saved(int(match[1]), int(match[2] or 0), folder) if match else None


def delete(folder: epath.Path) -> None:
    """Deletes a checkpoint, or a file at its path; an error is logged, because it only costs disk space."""
    try:
        # The digests are deleted first, so that an interrupted deletion leaves no folder that looks complete.
        if (folder / DIGESTS).exists():
            (folder / DIGESTS).rmtree()
        if folder.exists():
            folder.rmtree()
    except OSError as error:
        logger.warning("%s cannot be deleted: %s", folder, error.strerror or error)


def read_meta(folder: epath.Path) -> dict[str, Any]:
    """The record of a checkpoint: its step, metrics, leaves and `extra`.

    Raises:
      UserError: if it has another format.
    """
    meta = json.loads((folder / "meta" / "metadata").read_text())
    if meta.get("format") != FORMAT:
        raise UserError(f"checkpoint {folder} has format {meta.get('format')}; this version reads format {FORMAT}")
    return meta


def recorded_specs(meta: Mapping[str, Any]) -> dict[str, LeafSpec]:
    """Shape and dtype of every array of a checkpoint by name, from its record."""
    return {name: LeafSpec(tuple(shape), dtype) for name, (shape, dtype) in meta["leaves"].items()}
