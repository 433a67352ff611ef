"""COMET (Rei et al. 2020), a learned metric, from a model file, computed by a Python that has `unbabel-comet`.

`unbabel-comet` 2.2 needs NumPy 1 and protobuf 4, which conflict with JAX and Apache Beam. So it runs in another
environment and process (`comet_worker.py`), and nothing of it is imported here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from t5x_ext.contracts import UserError

_WORKER = Path(__file__).with_name("comet_worker.py")
_NOT_INSTALLED = 3


class CometTexts(NamedTuple):
    """The texts of one system; line i is the same segment in each."""

    sources: Sequence[str]
    hypotheses: Sequence[str]
    references: Sequence[str]


def comet_scores(
    model: str | Path,
    systems: Sequence[CometTexts],
    *,
    python: str | None = None,
    gpus: int = 0,
    batch_size: int = 16,
) -> list[float]:
    """The score of each system: the mean over its segments, on the scale of the model.

    The worker's progress and messages go to standard error.

    Args:
      model: checkpoint file of a downloaded model, `checkpoints/model.ckpt`; `hparams.yaml` is in the folder above.
      systems: the texts of each system; a model that needs no references ignores them.
      python: Python interpreter with `unbabel-comet`; this one by default.
      gpus: GPUs to compute on; 0 for the CPU.
      batch_size: segments a batch.

    Raises:
      UserError: if there is no such model or interpreter, it has no `unbabel-comet`, line counts differ, there are no
        lines, or COMET failed.
    """
    if not Path(model).is_file():
        raise UserError(f"{model}: there is no such COMET model; give the file checkpoints/model.ckpt of a download")
    for number, system in enumerate(systems, start=1):
        counts = [len(lines) for lines in system]
        if len(set(counts)) > 1 or not counts[0]:
            raise UserError(
                f"system output {number}: {counts[0]} sources, {counts[1]} hypotheses and {counts[2]} references; "
                "COMET needs as many of each, at least one"
            )
    python = python or sys.executable
    if "/" in python:
        # Absolute, because the worker runs in another folder. Links are kept: an environment's interpreter is one.
        python = str(Path(python).absolute())
    with tempfile.TemporaryDirectory() as folder:
        texts, scores = Path(folder, "texts.jsonl"), Path(folder, "scores.json")
        with texts.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(system) + "\n" for system in systems)
        command = [python, str(_WORKER), str(Path(model).absolute()), str(texts), str(scores), str(gpus)]
        try:
            done = subprocess.run([*command, str(batch_size)], check=False, stdout=sys.stderr, cwd=folder)
        except OSError as error:
            raise UserError(f"{python}: cannot be run ({error.strerror}); name a Python interpreter") from None
        if done.returncode == _NOT_INSTALLED:
            raise UserError(
                f"COMET needs unbabel-comet, which {python} does not have; install it in another environment: "
                "python -m venv comet && comet/bin/pip install unbabel-comet, then name comet/bin/python"
            )
        if done.returncode != 0:
            raise UserError(f"COMET failed with exit code {done.returncode}; see its output above")
        result: list[float] = json.loads(scores.read_text(encoding="utf-8"))
    return result
