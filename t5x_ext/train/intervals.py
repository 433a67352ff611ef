"""Intervals in updates, epochs or examples, all through one helper."""

from __future__ import annotations

import math
import re

from t5x_ext.contracts import BatchSource, UserError

Interval = int | str
"""Updates, or a text: `"500 steps"`, `"2 epochs"`, `"0.5 epochs"`, `"5000 examples"`."""

_INTERVAL = re.compile(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(step|epoch|example)s?\s*")


def check_interval(name: str, every: Interval) -> None:
    """Refuses what is no interval.

    Args:
      name: of the setting, for the message.
      every: its value.

    Raises:
      UserError: naming what would be right.
    """
    if isinstance(every, int):
        if every < 0:
            raise UserError(f"{name} is {every}; it must be 0 (after the last update only) or more")
        return
    match = _INTERVAL.fullmatch(every)
    if match is None or not _number(match[1]) > 0:
        raise UserError(f"{name} is {every!r}; give updates, or a text like '500 steps', '2 epochs' or '5000 examples'")


def in_steps(every: Interval, batches: BatchSource) -> int:
    """An interval as a number of updates, at least 1; 0 stays 0.

    Epochs and examples are those of the first epoch. Planning it may take a second a million examples.

    Args:
      every: the interval.
      batches: the training batches.

    Raises:
      UserError: for epochs or examples of batches that have no epochs.
    """
    if isinstance(every, int):
        return every
    match = _INTERVAL.fullmatch(every)
    assert match is not None, "check_interval was called when the run was built"
    amount, unit = _number(match[1]), match[2]
    if unit == "step":
        return max(1, round(amount))
    epoch = batches.epoch()
    if epoch is None:
        raise UserError(f"the interval {every!r} needs batches with epochs; this data has none: give it in steps")
    steps = amount * epoch.batches if unit == "epoch" else amount * epoch.batches / epoch.examples
    return max(1, round(steps))


def is_due(step: int, every: int) -> bool:
    """True at each multiple of `every` updates; 0 means never."""
    return every > 0 and step % every == 0


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
