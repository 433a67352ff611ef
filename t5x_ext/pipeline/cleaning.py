"""`Clean`: raw text becomes text to learn from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from t5x_ext.contracts import Corpus, UserError
from t5x_ext.corpora import monolingual_text
from t5x_ext.corpora.filters import FilterConfig, filter_corpora
from t5x_ext.pipeline.artefact import Artefact, Kind, TextFiles
from t5x_ext.pipeline.texts import corpus_of
from t5x_ext.pipeline.workspace import Workspace


@dataclass(frozen=True)
class Clean:
    """Filters parallel and monolingual corpora, see `corpora.filters.filter_corpora`; it counts what each rule drops.

    Attributes:
      name: of the stage.
      corpora: raw corpora from outside; those of one language are `corpora.monolingual_text`.
      texts: stages whose texts are filtered like them.
      held_out: stages of texts whose lines, in either language, must not stay: what models are tested on, chosen by and
        tuned with. One English side is often that of several pairs, so all of them are held out of each.
      config: the rules.
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

    def inputs(self) -> tuple[str, ...]:
        """The stages of the texts, and of those that are held out."""
        return (*self.texts, *self.held_out)

    def models(self) -> tuple[str, ...]:
        """None."""
        return ()

    def sources(self) -> tuple[Corpus, ...]:
        """The raw corpora."""
        return self.corpora

    def make(self, workspace: Workspace) -> Artefact:
        """Filters, or goes on filtering."""
        corpora = [*self.corpora, *(_corpus(text, workspace) for text in workspace.corpora(self.texts))]
        held_out = [_corpus(text, workspace) for text in workspace.corpora(self.held_out)]
        report = filter_corpora(corpora, workspace.path(self.name), self.config, held_out=held_out)
        texts, counts = [], {}
        for corpus in report.corpora:
            files = tuple(workspace.own(file) for file in corpus.files)
            texts.append(TextFiles(corpus.name, corpus.languages, files, corpus.kept))
            # English and German text of one corpus may be called the same.
            name = corpus.name if len(files) == 2 else corpus.files[0]
            counts[name] = {"read": corpus.read, "kept": corpus.kept, **corpus.dropped}
        return Artefact("corpora", tuple(texts), counts=counts)


def _corpus(text: TextFiles, workspace: Workspace) -> Corpus:
    if text.is_pair:
        return corpus_of(text, workspace)
    return monolingual_text(workspace.path(text.files[0]), text.languages[0], text.name)
