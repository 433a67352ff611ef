"""Files that models make: what is to be done, by all processes of a run together, and how fast it went."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from t5x_ext.decode import DecodeConfig, FileReport, Translator, score_file, translate_file
from t5x_ext.decode.files import CHUNK_LINES
from t5x_ext.pipeline.artefact import Model
from t5x_ext.storage.files import write_json


@dataclass(frozen=True)
class Decoding:
    """A file that a model makes of another one, line for line.

    Attributes:
      model: the model.
      input_file: what it reads; a path relative to the pipeline's folder, like the next.
      output_file: what it makes.
      direction: source and target language.
      config: options of the search.
      scores: whether it scores its input as a language model instead of translating it.
    """

    model: Model
    input_file: str
    output_file: str
    direction: tuple[str, str]
    config: DecodeConfig
    scores: bool = False

    def run(self, output_dir: Path, translator: Translator) -> FileReport:
        """Makes the file, as one of the processes that do; resumes what an interrupted run has left."""
        input_file, output_file = output_dir / self.input_file, output_dir / self.output_file
        if self.scores:
            return score_file(
                translator, input_file, output_file, self.direction[0], self.config, chunk_lines=CHUNK_LINES
            )
        return translate_file(
            translator,
            input_file,
            output_file,
            *self.direction,
            self.config,
            chunk_lines=CHUNK_LINES,
            show_progress=False,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return plain | {"model": asdict(self.model), "config": self.config.to_json()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Decoding:
        """What `to_json` described.

        Raises:
          UserError: where its search or a constraint is not of this package.
        """
        changed = {
            "model": Model.from_json(record["model"]),
            "direction": tuple(record["direction"]),
            "config": DecodeConfig.from_json(record["config"]),
        }
        return cls(**{**record, **changed})


class Journal:
    """Counts and speed of each file that models have made for a stage, kept while the stage is made."""

    def __init__(self, path: Path):
        """Nothing is read or written yet.

        Args:
          path: the file that keeps them.
        """
        self._path = path

    def add(self, file: str, decoding: Decoding, report: FileReport) -> None:
        """Records what was done for a file."""
        task = "scored" if decoding.scores else "translated"
        write_json(self._path, self._files() | {file: {"task": task, **report.to_json()}})

    def summary(self) -> dict[str, Any]:
        """All files, and sums over those translated and those scored; empty if there is no file.

        Speed counts what was not resumed: lines and tokens per second, compilation included.
        """
        files = self._files()
        tasks = sorted({report["task"] for report in files.values()})
        sums = {task: _summed([report for report in files.values() if report["task"] == task]) for task in tasks}
        return {**sums, "files": files} if files else {}

    def _files(self) -> dict[str, dict[str, Any]]:
        return json.loads(self._path.read_text()) if self._path.exists() else {}


def _summed(reports: list[dict[str, Any]]) -> dict[str, float]:
    total = {name: sum(report[name] for report in reports) for name in FileReport._fields if name != "processes"}
    return FileReport(**total, processes=max(report["processes"] for report in reports)).to_json()
