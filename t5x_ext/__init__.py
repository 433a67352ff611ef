"""t5x_ext: train, compress and serve encoder-decoder Transformers for translation with JAX and Flax.

Importing the package loads nothing heavy; `load` brings in what it needs when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from t5x_ext.decode.translator import Translator

__version__ = "0.1.0"


def load(run_dir: str, checkpoint: str = "best") -> Translator:
    """Opens a run folder for translation and scoring.

    Args:
      run_dir: a folder that `t5x_ext train` wrote; a local path or any path that etils reads (`gs://`).
      checkpoint: `best`, `last`, or a step number.

    Returns:
      A `Translator`: `load(run_dir).translate(["a line"], target_language="de")`.

    Raises:
      UserError: where the folder holds no model, no such checkpoint, or the parts do not fit each other.
    """
    from t5x_ext.decode.translator import Translator

    return Translator.from_run(run_dir, checkpoint)
