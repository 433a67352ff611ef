"""The names of files in a run folder, and the record that describes its model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from t5x_ext.contracts import UserError
from t5x_ext.storage.files import write_json

MODEL_FORMAT = 1


TRANSLATION = "translation"
"""The task of folders without one, from before there were tasks."""

TEXT_TASKS = (TRANSLATION, "language_model", "parallel_translation")
"""Tasks whose runs have a vocabulary, tags and directions."""


class ModelRecord(NamedTuple):
    """What is needed to build and use the model of a run on text, as JSON."""

    model: dict[str, Any]  # the fields of its config
    tags: dict[str, Any]  # the fields of a TagPolicy
    directions: tuple[str, ...]  # trained directions, such as "en-de"
    vocabulary: str  # fingerprint of the vocabulary that the weights belong to
    task: str = TRANSLATION  # its kind, one of `TEXT_TASKS`


class RunFolder:
    """Paths inside the folder of one run, which may be in a bucket.

    Args:
      path: the folder; it need not exist yet.
    """

    def __init__(self, path: epath.PathLike) -> None:
        self.path = epath.Path(path)
        self.config_gin = self.path / "config.gin"
        self.environment_json = self.path / "environment.json"
        self.model_json = self.path / "model.json"
        self.metrics_jsonl = self.path / "metrics.jsonl"
        self.skipped_examples_jsonl = self.path / "skipped_examples.jsonl"
        self.results_json = self.path / "results.json"
        self.learning_curve_png = self.path / "learning_curve.png"
        self.frozen_json = self.path / "frozen.json"
        self.base = self.path / "base"
        self.vocabulary = self.path / "vocabulary"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.cache = self.path / "cache"

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Writes `model.json` atomically, making the folder if it does not exist.

        Args:
          record: JSON with `"task"`, the kind of task, and what its readers need.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.model_json, {"format": MODEL_FORMAT, **record})

    def read_record(self) -> dict[str, Any]:
        """Reads `model.json` of any task; the result always has `"task"`.

        Raises:
          UserError: if the folder is not that of a run, or its record is damaged or has another format.
        """
        if not self.model_json.exists():
            missing = "does not exist" if not self.path.exists() else "is not the folder of a run: it has no model.json"
            raise UserError(f"{self.path} {missing}; give the --run_dir of a finished `t5x_ext train`")
        try:
            record = json.loads(self.model_json.read_text())
            version = record["format"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.model_json} is not a model record: {error!r}; was it changed by hand?") from error
        if version != MODEL_FORMAT:
            raise UserError(f"{self.model_json} has format {version}; this version reads format {MODEL_FORMAT}")
        return {"task": TRANSLATION} | {name: value for name, value in record.items() if name != "format"}

    def write_model(
        self,
        model: Mapping[str, Any],
        tags: Mapping[str, Any],
        directions: Sequence[str],
        vocabulary: str,
        task: str = TRANSLATION,
    ) -> None:
        """Writes the record of a run on text; for the arguments see `ModelRecord`."""
        record = ModelRecord(dict(model), dict(tags), tuple(directions), vocabulary, task)
        self.write_record(record._asdict() | {"directions": list(directions)})

    def read_model(self) -> ModelRecord:
        """Reads the record of a run on text.

        Raises:
          UserError: as `read_record`, and if the run is of another task.
        """
        record = self.read_record()
        if record["task"] not in TEXT_TASKS:
            raise UserError(f"{self.path} is a run of the task {record['task']!r}, which does not translate")
        try:
            directions, vocabulary = tuple(record["directions"]), str(record["vocabulary"])
            return ModelRecord(dict(record["model"]), dict(record["tags"]), directions, vocabulary, record["task"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.model_json} is incomplete: {error!r}; was it changed by hand?") from error
