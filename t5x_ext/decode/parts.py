"""Finished chunks of an output, each in a file of its own, until all are there and are joined."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from t5x_ext.contracts import UserError
from t5x_ext.parallel import barrier, is_primary, primary_first
from t5x_ext.storage.files import to_disk, write_json, write_text


class Parts:
    """The folder `<output>.parts` of one output, which the processes of a run fill together.

    A chunk is there whole or not at all, so that processes may be killed at any moment, and any number of them resumes
    with what is missing. All processes call `missing` and `finish`, in this order.
    """

    def __init__(self, output: Path, work: Mapping[str, Any], count: int):
        """Describes the folder; nothing is read or written.

        Args:
          output: the file to be made.
          work: what it is made from and how, as JSON can hold it; chunks of other work are not taken over.
          count: how many chunks there are.
        """
        self._output, self._work, self._count = output, dict(work), count
        self._folder = output.with_name(output.name + ".parts")

    def missing(self) -> list[int]:
        """The chunks that no earlier process has finished, the same list in every process.

        Raises:
          UserError: where a process sees another folder, or is about other work, than process 0.
        """
        with primary_first("parts"):
            if is_primary():
                self._prepare()
            else:
                self._check()
            missing = [index for index in range(self._count) if not self._chunk(index).exists()]
        barrier("parts")  # nothing is finished before every process has seen what is missing
        return missing

    def write(self, index: int, text: str) -> None:
        """Keeps a finished chunk, down to the disk: it is there even after a power cut."""
        write_text(self._chunk(index), text)

    def finish(self, counts: Mapping[str, float]) -> list[dict[str, float]]:
        """Waits for all processes; process 0 makes the output, whole, by one rename, and removes the folder.

        Args:
          counts: numbers that this process tells the others.

        Returns:
          Those of all processes.
        """
        write_json(self._counts(jax.process_index()), dict(counts))
        barrier("translated")
        with primary_first("joining"):
            if is_primary():
                self._join()
            told = [json.loads(self._counts(number).read_text()) for number in range(jax.process_count())]
        barrier("joined")
        if is_primary():
            shutil.rmtree(self._folder)
        return told

    def _prepare(self) -> None:
        if self._recorded() != self._work:
            if self._folder.exists():
                shutil.rmtree(self._folder)
            self._folder.mkdir()
            write_json(self._folder / "work.json", self._work)

    def _check(self) -> None:
        recorded, number = self._recorded(), jax.process_index()
        if recorded is None:
            raise UserError(
                f"process {number} does not see {self._folder}, which process 0 made: give an output in a folder that "
                "all processes share"
            )
        differing = [name for name in self._work if recorded.get(name) != self._work[name]]
        if differing:
            raise UserError(f"process {number} has other work than process 0: {', '.join(differing)} must agree")

    def _recorded(self) -> dict[str, Any] | None:
        """What the chunks in the folder were made from; None where nothing says so."""
        try:
            return json.loads((self._folder / "work.json").read_text())
        except (OSError, ValueError):
            return None

    def _join(self) -> None:
        draft = self._folder / "joined"
        with draft.open("wb") as sink:
            for index in range(self._count):
                with self._chunk(index).open("rb") as chunk:
                    shutil.copyfileobj(chunk, sink)
            to_disk(sink)
        os.replace(draft, self._output)

    def _chunk(self, index: int) -> Path:
        return self._folder / f"{index:08d}"

    def _counts(self, process: int) -> Path:
        return self._folder / f"process-{process}.json"
