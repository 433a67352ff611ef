"""`Clean`: raw text becomes training text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from t5x_ext.contracts import Corpus, UserError
from t5x_ext.corpora import monolingual_text
from t5x_ext.corpora.filters import FilterConfig, filter_corpora
from t5x_ext.pipeline.artefact import Artefact, Kind, TextFiles
from t5x_ext.pipeline.stage import StageDefaults
from t5x_ext.pipeline.texts import corpus_of
from t5x_ext.pipeline.workspace import Workspace


@dataclass(frozen=True)
class Clean(StageDefaults):
    """Filters parallel and monolingual corpora, see `corpora.filters.filter_corpora`; it counts what each rule drops.

    Attributes:
      name: of the stage.
      corpora: raw corpora from outside the pipeline; monolingual ones are `corpora.monolingual_text`.
      texts: stages whose texts are filtered in the same way.
      held_out: stages of texts whose lines, in either language, are dropped: what models are tested on, chosen by and
        tuned with. Several pairs may share one English side, so all held-out texts are dropped from each of them.
      config: the rules.

    Raises:
      UserError: if there is nothing to filter.
    """

    makes: ClassVar[Kind] = "corpora"

    name: str
    corpora: tuple[Corpus, ...] = ()
    texts: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    config: FilterConfig = field(default_factory=FilterConfig)

    def __post_init__(self) -> None:
        if not self.corpora and not self.texts:
            raise UserError("Clean.corpora and Clean.texts are both empty: give what is to be filtered")

    def reads(self) -> Mapping[str, Kind]:
        """The texts, and those that are held out."""
        return dict.fromkeys((*self.texts, *self.held_out), "corpora")

    def sources(self) -> tuple[Corpus, ...]:
        """The raw corpora."""
        return self.corpora

    def make(self, workspace: Workspace) -> Artefact:
        """Filters, or resumes filtering."""
        corpora = [*self.corpora, *(_corpus(text, workspace) for text in workspace.corpora(self.texts))]
        held_out = [_corpus(text, workspace) for text in workspace.corpora(self.held_out)]
        report = filter_corpora(corpora, workspace.path(self.name), self.config, held_out=held_out)
        texts, counts = [], {}
        for corpus in report.corpora:
            files = tuple(workspace.own(file) for file in corpus.files)
            texts.append(TextFiles(corpus.name, corpus.languages, files, corpus.kept))
            # English and German text of one corpus may have the same name.
            name = corpus.name if len(files) == 2 else corpus.files[0]
            counts[name] = {"read": corpus.read, "kept": corpus.kept, **corpus.dropped}
        return Artefact("corpora", tuple(texts), counts=counts)


def _corpus(text: TextFiles, workspace: Workspace) -> Corpus:
    if text.is_pair:
        return corpus_of(text, workspace)
    return monolingual_text(workspace.path(text.files[0]), text.languages[0], text.name)
