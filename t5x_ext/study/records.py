"""What a study keeps beside the folder of each run: its state, and what was measured of it."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from t5x_ext.contracts import UserError
from t5x_ext.storage.files import write_json

FORMAT = 1


class Record(NamedTuple):
    """The state of a run."""

    state: str  # finished, failed or unfinished
    error: str  # one line; empty where it has finished
    seconds: float  # wall time of all its processes
    command: str  # that was run last
    configuration: str  # resolved, of that command


class Measured(NamedTuple):
    """What was computed of a run for one arm."""

    values: Mapping[str, float]  # by name
    lines: Mapping[str, Float[np.ndarray, "lines sums"]]  # by name of a value, see `measurements.LineMeasurement`


class Kept(NamedTuple):
    """What was computed of a run."""

    by_arm: Mapping[str, Measured]
    error: str  # why it could not be; empty where it could


def read_record(folder: Path, path: str) -> Record | None:
    """The state of a run; None if it was never started.

    Raises:
      UserError: if the record is damaged.
    """
    fields = _read(folder / f"{path}.json")
    return None if fields is None else _built(folder / f"{path}.json", lambda: Record(**fields["run"]))


def write_record(folder: Path, path: str, record: Record) -> None:
    """Keeps the state of a run, atomically."""
    write_json(folder / f"{path}.json", {"format": FORMAT, "run": record._asdict()})


def read_measured(folder: Path, path: str, key: str) -> Kept | None:
    """What was computed of a run; None if nothing was, or other measurements were.

    Args:
      folder: of the study.
      path: of the run.
      key: says which measurements they are.

    Raises:
      UserError: if the record is damaged.
    """
    file = folder / f"{path}.measured.json"
    fields = _read(file)
    if fields is None or fields.get("measurements") != key:
        return None
    lines = _read_lines(folder / f"{path}.lines.npz")
    finite = lambda value: math.nan if value is None else float(value)
    by_arm = _built(
        file,
        lambda: {
            arm: Measured({name: finite(value) for name, value in own.items()}, lines.get(arm, {}))
            for arm, own in fields["values"].items()
        },
    )
    return Kept(by_arm, str(fields.get("error", "")))


def write_measured(folder: Path, path: str, key: str, found: Mapping[str, Measured], error: str = "") -> None:
    """Keeps what was computed of a run, by arm, or why it could not be; the record of it comes last."""
    arrays = {f"{arm} {name}": sums for arm, own in found.items() for name, sums in own.lines.items()}
    file = folder / f"{path}.lines.npz"
    if arrays:
        draft = file.with_name(f".{file.name}.tmp")
        with draft.open("wb") as draft_file:
            np.savez_compressed(draft_file, allow_pickle=False, **arrays)
        draft.replace(file)
    else:
        file.unlink(missing_ok=True)  # of an earlier measurement
    values = {arm: {name: _finite_or_none(value) for name, value in own.values.items()} for arm, own in found.items()}
    write_json(
        folder / f"{path}.measured.json", {"format": FORMAT, "measurements": key, "values": values, "error": error}
    )


def _read_lines(file: Path) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    if file.exists():
        try:
            with np.load(file, allow_pickle=False) as arrays:
                for key in arrays.files:
                    arm, _, name = key.partition(" ")
                    found.setdefault(arm, {})[name] = arrays[key]
        except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile) as error:
            raise _damaged(file) from error
    return found


def _read(file: Path) -> dict[str, Any] | None:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        fields = None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise _damaged(file)
    return fields


def _built(file: Path, build: Any) -> Any:
    try:
        return build()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(file) from error


def _damaged(file: Path) -> UserError:
    return UserError(f"{file}: not a record of ours; was it changed by hand? Delete it to have it made again")


def _finite_or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
