"""Words shared by every error a command prints: one line, with the nearest right name. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """A mistake on the command line itself: `contracts.UserError` for the time before JAX is loaded."""


def did_you_mean(name: str, choices: Iterable[str], most: int = 12) -> str:
    """The end of an error message: the choice nearest to `name`, or all choices where they are few and none is near.

    >>> did_you_mean("stesp", ["steps", "seed"])
    '; did you mean steps?'
    >>> did_you_mean("x", ["steps", "seed"])
    '; known: seed, steps'
    """
    known = sorted(set(choices))
    near = difflib.get_close_matches(name, known, n=1)
    if not near:
        near = difflib.get_close_matches(name.lower(), [choice.lower() for choice in known], n=1)
        near = [choice for choice in known if near and choice.lower() == near[0]]
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= most else ""


def one_line(message: object) -> str:
    """The message with its line ends turned into spaces, so that an error is one line whoever wrote it."""
    return " ".join(line.strip() for line in str(message).splitlines() if line.strip())
