"""`Select`: the lines of a text that are most like given domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float

from t5x_ext.contracts import UserError
from t5x_ext.decode import DecodeConfig
from t5x_ext.pipeline.artefact import Artefact, Kind, TextFiles
from t5x_ext.pipeline.stage import StageDefaults, models_and_corpora
from t5x_ext.pipeline.workspace import Workspace


def moore_lewis(
    in_domain: Sequence[float] | Float[np.ndarray, " lines"], general: Sequence[float] | Float[np.ndarray, " lines"]
) -> Float[np.ndarray, " lines"]:
    """Cross-entropy difference H_in(s) - H_general(s) of lines, in nats per token: lower is more like the domain.

    Args:
      in_domain: length-normalised log-probability of every line under a language model of the domain.
      general: the same under a language model of all text.

    References:
      Moore and Lewis, Intelligent Selection of Language Model Training Data, ACL 2010.

    >>> moore_lewis([-1.0, -3.0], [-2.0, -2.0]).tolist()
    [-1.0, 1.0]
    """
    return np.asarray(general, np.float64) - np.asarray(in_domain, np.float64)


def lowest(scores: Float[np.ndarray, " lines"], share: float) -> Bool[np.ndarray, " lines"]:
    """Marks the given share of lines with the lowest scores, at least one; of equal scores the first.

    >>> lowest(np.array([3.0, 1.0, 1.0, 2.0]), 0.5).tolist()
    [False, True, True, False]
    """
    chosen = np.zeros(len(scores), bool)
    chosen[np.argsort(scores, kind="stable")[: max(1, int(share * len(scores)))]] = True
    return chosen


@dataclass(frozen=True)
class Select(StageDefaults):
    """Keeps of every text, in order, the lines that are most like one of several domains by `moore_lewis`.

    Attributes:
      name: of the stage.
      texts: stages of the texts, pairs or monolingual.
      in_domain: stages of language models, one per domain; lines chosen for any of them are kept.
      general: the stage of the language model of all text; the others must have its vocabulary, since scores of
        different tokens cannot be compared: train them from it.
      language: of the language models; the side of pairs that is scored.
      share: fraction of the lines of every text that is chosen for each domain.
      decode: gives the size of batches.

    Raises:
      UserError: for a share outside its range, or no domain.
    """

    makes: ClassVar[Kind] = "corpora"

    name: str
    texts: tuple[str, ...]
    in_domain: tuple[str, ...]
    general: str
    language: str
    share: float = 0.2
    decode: DecodeConfig = field(default_factory=DecodeConfig)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"Select.share={self.share}: must be above 0 and at most 1")
        if not self.in_domain:
            raise UserError("Select.in_domain: there is no language model; give one for each domain")

    def reads(self) -> Mapping[str, Kind]:
        """The language models and the texts."""
        return models_and_corpora((*self.in_domain, self.general), self.texts)

    def make(self, workspace: Workspace) -> Artefact:
        """Scores with one model after the other, then selects."""
        texts = workspace.corpora(self.texts)
        for text in texts:
            if text.file_in(self.language) is None:
                raise UserError(f"stage {self.name!r}: {text.name!r} has no side in {self.language}")
        scores = {
            (model, text.name): self._scores(model, text, workspace)
            for model in (self.general, *self.in_domain)
            for text in texts
        }
        found, counts = [], {"read": 0, "kept": 0}
        for text in texts:
            general = scores[self.general, text.name]
            chosen = np.zeros(text.lines, bool)
            for model in self.in_domain:
                chosen |= lowest(moore_lewis(scores[model, text.name], general), self.share)
            files = tuple(workspace.own(f"{text.name}.{language}") for language in text.languages)
            rows = zip(*map(workspace.lines, text.files))
            kept = workspace.write_aligned(files, (row for row, is_in in zip(rows, chosen) if is_in))
            found.append(TextFiles(text.name, text.languages, files, kept, text.synthetic, text.one_way))
            counts = {"read": counts["read"] + text.lines, "kept": counts["kept"] + kept}
        return Artefact("corpora", tuple(found), counts=counts)

    def _scores(self, model: str, text: TextFiles, workspace: Workspace) -> list[float]:
        file = text.file_in(self.language)
        assert file is not None
        return workspace.score(model, file, self.language, self.decode, workspace.scratch(f"{text.name}.{model}"))
