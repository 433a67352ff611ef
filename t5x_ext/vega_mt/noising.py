"""Vega-MT's noisy development text: copies with typing errors, to tune a model on more than clean text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from t5x_ext.contracts import UserError
from t5x_ext.corpora.noise import TypingNoise
from t5x_ext.pipeline.artefact import Artefact, Kind, TextFiles
from t5x_ext.pipeline.stage import StageDefaults
from t5x_ext.pipeline.workspace import Workspace


@dataclass(frozen=True)
class NoisyDev(StageDefaults):
    """Pairs with typing noise on the source and a clean target, in each direction.

    Attributes:
      name: of the stage.
      texts: stages of pairs.
      noise: the noise.
      directions: those that get a noisy copy; empty: both directions of every pair.

    References:
      Zan et al., arXiv 2209.09444, of whose generalisation tuning it is a part here; the noise is ours.
    """

    makes: ClassVar[Kind] = "corpora"

    name: str
    texts: tuple[str, ...]
    noise: TypingNoise = field(default_factory=TypingNoise)
    directions: tuple[str, ...] = ()

    def reads(self) -> Mapping[str, Kind]:
        """The texts."""
        return dict.fromkeys(self.texts, "corpora")

    def make(self, workspace: Workspace) -> Artefact:
        """Writes the noisy sources."""
        found = []
        changed = 0
        for text in workspace.corpora(self.texts):
            for reading in text.readings():
                if self.directions and reading.direction not in self.directions:
                    continue
                clean, kept = reading.files
                name = f"{text.name}.noisy.{reading.direction}"
                noisy = workspace.own(f"{name}.{reading.languages[0]}")
                lines = [(line, self.noise(line, number)) for number, line in enumerate(workspace.lines(clean))]
                workspace.write_lines(noisy, (typed for _, typed in lines))
                changed += sum(line != typed for line, typed in lines)
                found.append(TextFiles(name, reading.languages, (noisy, kept), text.lines, one_way=True))
        if not found:
            raise UserError(
                f"stage {self.name!r}: there is no pair for {', '.join(self.directions) or 'any direction'}"
            )
        return Artefact(
            "corpora", tuple(found), counts={"lines": sum(text.lines for text in found), "changed": changed}
        )
