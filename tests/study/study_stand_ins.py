"""Studies of a trainer that stands in for `t5x_ext`, and what they leave."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5x_ext.contracts import UserError
from t5x_ext.study import Arm, Budget, Configured, MeasuredRun, Options, Study

KNOWN = {"level", "pause", "fail", "crash", "saving"}


class Share:
    """A measurement of lines that have been kept: the share of them that are right."""

    def __call__(self, run: MeasuredRun) -> dict[str, float]:
        raise AssertionError("nothing is measured again")

    def lines(self, run: MeasuredRun) -> dict[str, np.ndarray]:
        raise AssertionError("nothing is measured again")

    def score(self, sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] / sums[..., 1]


def configure(arguments: Sequence[str]) -> Configured:
    """Refuses unknown settings, as gin does."""
    settings = {argument[6:].split("=")[0] for argument in arguments if argument.startswith("--gin.")}
    for name in sorted(settings - KNOWN):
        raise UserError(f"--gin.{name}: nothing uses it")
    return Configured("\n".join(one for one in arguments if "_dir=" not in one), dict.fromkeys(settings))


def options(**changes: Any) -> Options:
    """With the trainer in the place of the command."""
    return Options(**{"program": (sys.executable, str(Path(__file__).with_name("trainer.py"))), **changes})


def study_of(arms: Mapping[str, Mapping[str, Any]], **fields: Any) -> Study:
    """Arms from their bindings by name."""
    built = tuple(Arm(name, bindings=bindings) for name, bindings in arms.items())
    return Study(**{"name": "Stand-ins", "arms": built, "seeds": (0, 1), "budget": Budget(steps=3), **fields})


def starts(folder: Path, path: str) -> list[list[int]]:
    """Process, niceness and number of cores of each start of a run."""
    file = folder / path / "starts"
    return [[int(word) for word in line.split()] for line in file.read_text().splitlines()] if file.exists() else []


def table(folder: Path) -> dict[str, Any]:
    """What a study has found, read as strictly as any other language reads JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads((folder / "table.json").read_text(), parse_constant=refuse)
