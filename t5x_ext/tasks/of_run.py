"""Runs on text: their data and their model, read and replaced."""

from __future__ import annotations

import dataclasses
from typing import Any

from t5x_ext.contracts import UserError
from t5x_ext.data import DataConfig
from t5x_ext.tasks.language_model import LanguageModeling
from t5x_ext.tasks.translation import Translation
from t5x_ext.train.run import Run

TEXT_TASKS = (Translation, LanguageModeling)
"""Tasks whose `data` is a `DataConfig` and whose `model` is a config with a `vocab_size`."""


def text_task(run: Run) -> Translation | LanguageModeling:
    """The task of a run on text.

    Raises:
      UserError: if it is another kind of task.
    """
    if not isinstance(run.task, TEXT_TASKS):
        known = ", ".join(task.__name__ for task in TEXT_TASKS)
        raise UserError(f"this is for the tasks {known}; the run's task is {type(run.task).__name__}")
    return run.task


def with_data(run: Run, data: DataConfig) -> Run:
    """The run on other data."""
    return dataclasses.replace(run, task=dataclasses.replace(text_task(run), data=data))


def with_model(run: Run, **changes: Any) -> Run:
    """The run with other fields of its model's config."""
    task = text_task(run)
    model: Any = dataclasses.replace(task.model, **changes)
    return dataclasses.replace(run, task=dataclasses.replace(task, model=model))
