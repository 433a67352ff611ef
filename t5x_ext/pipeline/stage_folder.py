"""The folder of a stage on disk: what the stage is made from, what it has made, and the digests of both.

A pipeline's folder holds a folder for every stage:

    OUT/environment.json         threads and devices of the process that made the folder, for those that resume
    OUT/manifest.json            every stage: configuration, inputs, outputs with their SHA-256, counts, versions
    OUT/cache/                   token caches, which stages share; may be deleted
    OUT/<stage>/record.json      written first: what the stage is made from
    OUT/<stage>/NAME.LANG        plain aligned text, or run folders, or scores.json and scores.txt
    OUT/<stage>/artefact.json    written last, atomically: what the stage has made; without it, it has not finished
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from t5x_ext.checkpoints import RunFolder, run_params
from t5x_ext.contracts import UserError
from t5x_ext.pipeline.artefact import Artefact, Weights
from t5x_ext.storage.digests import file_digest, params_digest
from t5x_ext.storage.files import delete_drafts, write_json

ARTEFACT_FILE = "artefact.json"
RECORD_FILE = "record.json"
FORMAT = 1
"""Format of the records, the artefacts and the manifest."""

SCRATCH = "work"
"""Subfolder of a stage for files it does not keep; deleted once the stage has finished."""


class PipelineFolder:
    """A pipeline's folder, in which the folder of each stage is read at most once.

    Attributes:
      path: the folder; it need not exist yet.
    """

    def __init__(self, path: str | Path):
        """Nothing is read or written yet.

        Args:
          path: see the attribute.
        """
        self.path = Path(path)
        self._stages: dict[str, StageFolder] = {}

    def __str__(self) -> str:
        return str(self.path)

    def stage(self, name: str) -> StageFolder:
        """The folder of a stage, always the same object for the same name."""
        if name not in self._stages:
            self._stages[name] = StageFolder(self.path, name)
        return self._stages[name]


class StageFolder:
    """The folder of one stage; each of its records is read, and hashed, at most once.

    `begin`, `finish` and `discard` change the folder; what other processes change after the first look is not seen.

    Attributes:
      output_dir: the pipeline's folder.
      name: the stage's name.
      path: the stage's own folder; it need not exist.
    """

    def __init__(self, output_dir: Path, name: str):
        """Nothing is read or written yet.

        Args:
          output_dir: see the attribute, like the next.
          name: see there.
        """
        self.output_dir, self.name = output_dir, name
        self.path = output_dir / name

    @cached_property
    def record(self) -> dict[str, Any] | None:
        """What the stage was begun from (`record.json`); None if it has not begun.

        Raises:
          UserError: if the file is damaged or of another format.
        """
        return read_record(self.path / RECORD_FILE, "configuration", "inputs", "sources")

    @cached_property
    def _description(self) -> bytes | None:
        return _content(self.path / ARTEFACT_FILE)

    @cached_property
    def digest(self) -> str | None:
        """SHA-256 of `artefact.json`, which holds the digests of all that the stage has made; None before that.

        It stands for the artefact in the records of the stages that read it.
        """
        content = self._description
        return None if content is None else hashlib.sha256(content).hexdigest()

    @cached_property
    def described(self) -> dict[str, Any] | None:
        """`artefact.json`: the artefact, and the digests of its files as `outputs`; None if the stage has not finished.

        Raises:
          UserError: if the file is damaged or of another format.
        """
        content = self._description
        return None if content is None else _parsed(self.path / ARTEFACT_FILE, content, ("artefact", "outputs"))

    @cached_property
    def artefact(self) -> Artefact | None:
        """What the stage has made; None if it has not finished.

        Raises:
          UserError: if the file is damaged or of another format.
        """
        if self.described is None:
            return None
        with damaged(self.path / ARTEFACT_FILE):
            return Artefact.from_json(self.described["artefact"])

    def missing(self) -> Iterator[str]:
        """Names the files and checkpoints of the artefact that no longer exist."""
        if self.artefact is None:
            return
        for file in self.artefact.all_files():
            if not (self.output_dir / file).exists():
                yield f"its file {file}"
        for weights in self.artefact.weights:
            folder = self.output_dir / weights.run_dir
            # Stages that plug in may name models that have no folder here.
            if folder.exists() and not any((folder / "checkpoints").glob(f"{weights.step:08d}*")):
                yield f"its checkpoint {weights}"

    def begin(self, record: Mapping[str, Any]) -> None:
        """Makes the folder and writes what the stage is made from.

        Raises:
          UserError: if something is in the folder that no stage has written.
        """
        # Drafts of records begin with a dot.
        ours = lambda path: path.name.startswith(".") or path.name == RECORD_FILE
        shutil.rmtree(self._deleted, ignore_errors=True)
        if self.path.exists() and (not self.path.is_dir() or not all(map(ours, self.path.iterdir()))):
            raise UserError(f"{self.path}: exists and does not belong to a pipeline; name another --output_dir")
        self.path.mkdir(exist_ok=True)
        write_json(self.path / RECORD_FILE, record)
        self._forget()

    def describe(self, artefact: Artefact) -> dict[str, Any]:
        """The contents of `artefact.json`: the artefact, and the digests of all that the stage has written for it."""
        return {"format": FORMAT, "artefact": artefact.to_json(), "outputs": self._outputs(artefact)}

    def finish(self, record: Mapping[str, Any], described: Mapping[str, Any]) -> None:
        """Writes the final record and, last of all, what `describe` gave."""
        write_json(self.path / RECORD_FILE, record)
        write_json(self.path / ARTEFACT_FILE, described)
        self._forget()

    def discard(self) -> None:
        """Deletes the folder; a process killed meanwhile leaves all of it or nothing under its name."""
        shutil.rmtree(self._deleted, ignore_errors=True)
        self.path.rename(self._deleted)
        shutil.rmtree(self._deleted, ignore_errors=True)
        self._forget()

    def tidy(self) -> None:
        """Deletes what a finished stage does not keep: scratch files, and drafts of records, its run folders' too."""
        shutil.rmtree(self.path / SCRATCH, ignore_errors=True)
        delete_drafts(self.path)
        for path in self.path.iterdir():
            if path.is_dir():
                delete_drafts(path)

    @property
    def _deleted(self) -> Path:
        return self.path.with_name(f".{self.name}.deleted")

    def _forget(self) -> None:
        for name in ("record", "_description", "digest", "described", "artefact"):
            with suppress(KeyError):
                del self.__dict__[name]

    def _outputs(self, artefact: Artefact) -> dict[str, str]:
        """SHA-256 of everything that the artefact names in the stage's own folder, by its name.

        Files are hashed byte for byte. Of a run folder, `run_dir:step` stands for the weights that decode (names, types
        and numbers, since the same weights are not stored in the same bytes twice); the files that describe the model
        are hashed beside it.
        """
        own = f"{self.name}/"
        tables = sorted(path.relative_to(self.output_dir).as_posix() for path in self.path.glob("scores.*"))
        named = dict.fromkeys([*artefact.all_files(), *tables])
        found = {file: file_digest(self.output_dir / file) for file in named if file.startswith(own)}
        for weights in artefact.weights:
            if weights.run_dir.startswith(own):
                run = RunFolder(self.output_dir / weights.run_dir)
                for path in (run.model_json, *sorted(run.vocabulary.iterdir())):
                    found[str(path.relative_to(self.output_dir))] = file_digest(Path(path))
                found[str(weights)] = weights_digest(self.output_dir, weights)
        return dict(sorted(found.items()))


def read_record(path: Path, *fields: str) -> dict[str, Any] | None:
    """A JSON record of a pipeline; None if there is no such file.

    Args:
      path: the file.
      fields: keys that must be in it.

    Raises:
      UserError: if it is damaged or of another format.
    """
    content = _content(path)
    return None if content is None else _parsed(path, content, fields)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {_remedy(path)}") from None


def _parsed(path: Path, content: bytes, fields: tuple[str, ...]) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except ValueError:
        raise UserError(f"{path}: not JSON; {_remedy(path)}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path}: not a record of format {FORMAT}")
    with damaged(path):
        return {name: record[name] for name in fields} | record


def _remedy(path: Path) -> str:
    """What to do about a damaged record. The manifest is collected from the others, so nothing is rebuilt for it."""
    what = path.parent if path.name in (RECORD_FILE, ARTEFACT_FILE) else path
    return f"was it changed by hand? Delete {what} to rebuild it"


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Turns the error of a missing or wrong field of a record into one line."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: a field is missing or wrong ({error}); {_remedy(path)}") from error


def weights_digest(output_dir: Path, weights: Weights) -> str:
    """SHA-256 of the weights of a checkpoint: names, types, shapes and numbers.

    Args:
      output_dir: the pipeline's folder.
      weights: the checkpoint.

    Raises:
      UserError: if there is no such checkpoint, or it cannot be read.
    """
    return params_digest(run_params(RunFolder(output_dir / weights.run_dir), weights.step))
