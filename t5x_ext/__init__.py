"""t5x_ext: train, adapt and decode encoder-decoder Transformers with JAX and Flax.

Importing the package loads nothing heavy; `load` brings in what it needs when it is called.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def load(run_dir: str, checkpoint: str = "best") -> Any:
    """Opens a run folder to use its model.

    Args:
      run_dir: a folder that `t5x_ext train` wrote; a local path or any path that etils reads (`gs://`).
      checkpoint: `best`, `last`, or a step number.

    Returns:
      What the run's task gives its readers. For translation it is a `decode.Translator`:
      `load(run_dir).translate(["a line"], target_language="de")`.

    Raises:
      UserError: where the folder holds no model, no such checkpoint, or the parts do not fit each other.
    """
    from t5x_ext.tasks import open_run

    return open_run(run_dir, checkpoint)
