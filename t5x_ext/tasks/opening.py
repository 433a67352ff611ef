"""Run folders opened by what task they are of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from t5x_ext.checkpoints import RunFolder
from t5x_ext.contracts import UserError
from t5x_ext.convert import ENCODER_TASK
from t5x_ext.decode import Translator
from t5x_ext.tasks.classification import TASK, TextClassifier
from t5x_ext.tasks.graphs import TASK as NODES_TASK
from t5x_ext.tasks.graphs import NodeClassifier
from t5x_ext.tasks.sentences import SentenceEncoder

Opener = Callable[[str, str | int], Any]
"""From a run folder and a checkpoint to what the task gives its readers."""

OPENERS: dict[str, Opener] = {
    "translation": Translator.from_run,
    "language_model": Translator.from_run,
    "parallel_translation": Translator.from_run,
    TASK: TextClassifier.from_run,
    ENCODER_TASK: SentenceEncoder.from_run,
    NODES_TASK: NodeClassifier.from_run,
}
"""Built-in tasks by the name in `model.json`. A folder names no code: nothing else can be opened from it alone."""


def open_run(run_dir: str, checkpoint: str | int = "best") -> Any:
    """Opens a run folder to use its model.

    Args:
      run_dir: of a run; a local path or any path that etils reads (`gs://`).
      checkpoint: `best`, `last` or a step.

    Raises:
      UserError: if the folder holds no model, no such checkpoint, or is of a task from outside the package.
    """
    task = RunFolder(run_dir).read_record()["task"]
    if task not in OPENERS:
        known = ", ".join(OPENERS)
        raise UserError(
            f"{run_dir} is a run of the task {task!r}, which its own module must open; built in are {known}"
        )
    return OPENERS[task](run_dir, checkpoint)
