"""How models translate what people will read: punctuation before and after."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from t5x_ext.corpora.filters import normalize_punctuation, unescape_entities
from t5x_ext.decode import DecodeConfig
from t5x_ext.pipeline.artefact import Model
from t5x_ext.pipeline.postprocess import POSTPROCESSORS
from t5x_ext.pipeline.workspace import Workspace

Postprocess: TypeAlias = Literal["widths", "released", "none"]
"""A name in `postprocess.POSTPROCESSORS`."""


@dataclass(frozen=True)
class Finished:
    """Translations as readers get them, and as models are therefore to be chosen.

    Attributes:
      decode: how a model decodes.
      normalize: whether the punctuation of what is translated gets the form that `Clean` gives to what is learned from
        (`corpora.filters.normalize_punctuation`).
      postprocess: how the punctuation of Chinese and Japanese is written.
    """

    decode: DecodeConfig
    normalize: bool
    postprocess: Postprocess

    def translate(
        self, model: Model, input_file: str, output_file: str, direction: tuple[str, str], workspace: Workspace
    ) -> None:
        """Makes a file line for line, whole or not at all, and goes on where it was killed.

        Args:
          model: translates.
          input_file: what is translated; a path below the pipeline's folder, like the next.
          output_file: what is made; where it is there already, nothing happens.
          direction: source and target language.
          workspace: of the stage.
        """
        if os.path.exists(workspace.path(output_file)):
            return
        name, (source, target) = Path(output_file).name, direction
        plain, raw = input_file, workspace.scratch(f"{name}.raw")
        if self.normalize:
            plain = workspace.scratch(f"{name}.{source}")
            lines = (unescape_entities(line) for line in workspace.lines(input_file))
            workspace.write_lines(plain, (normalize_punctuation(line, source) for line in lines))
        workspace.translate_with(model, plain, raw, direction, self.decode)
        finish = POSTPROCESSORS[self.postprocess]
        workspace.write_lines(output_file, (finish(line, target) for line in workspace.lines(raw)))
