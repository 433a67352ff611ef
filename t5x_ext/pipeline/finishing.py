"""How models translate what people will read: normalised before, postprocessed after."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from t5x_ext.corpora.filters import normalize_punctuation, unescape_entities
from t5x_ext.decode import DecodeConfig
from t5x_ext.pipeline.artefact import Model
from t5x_ext.pipeline.postprocess import Postprocessor, postprocessor
from t5x_ext.pipeline.workspace import Workspace


@dataclass(frozen=True)
class Finished:
    """How translations are made as readers get them; models are chosen by the same translations.

    Attributes:
      decode: options of the search.
      normalize: whether the punctuation of the input is normalised as `Clean` normalises training text
        (`corpora.filters.normalize_punctuation`).
      postprocess: what is done to each translated line: a name in `postprocess.POSTPROCESSORS`, or a function from the
        line and its language to the finished line.

    Raises:
      UserError: for an unknown name.
    """

    decode: DecodeConfig
    normalize: bool
    postprocess: str | Postprocessor

    def __post_init__(self) -> None:
        postprocessor(self.postprocess)

    def translate(
        self, model: Model, input_file: str, output_file: str, direction: tuple[str, str], workspace: Workspace
    ) -> None:
        """Translates a file line for line; the output appears whole, and an interrupted translation is resumed.

        Args:
          model: the model.
          input_file: what is translated; a path relative to the pipeline's folder, like the next.
          output_file: what is made; if it exists, nothing happens.
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
        finish = postprocessor(self.postprocess)
        workspace.write_lines(output_file, (finish(line, target) for line in workspace.lines(raw)))
