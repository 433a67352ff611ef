"""`Clean`: raw text becomes text to learn from."""

from __future__ import annotations

from dataclasses import dataclass, field

from t5x_ext.contracts import Corpus
from t5x_ext.data import monolingual_text
from t5x_ext.data.filters import FilterConfig, filter_corpora
from t5x_ext.vega_mt.artefact import Artefact, TextFiles
from t5x_ext.vega_mt.texts import corpus_of
from t5x_ext.vega_mt.workspace import Workspace


@dataclass(frozen=True)
class Clean:
    """Filters parallel and monolingual corpora, see `data.filters.filter_corpora`; it counts what each rule drops.

    Attributes:
      name: of the stage.
      corpora: raw corpora from outside; those of one language are `data.monolingual_text`.
      texts: stages whose texts are filtered like them.
      config: the rules.
    """

    name: str
    corpora: tuple[Corpus, ...] = ()
    texts: tuple[str, ...] = ()
    config: FilterConfig = field(default_factory=FilterConfig)

    def inputs(self) -> tuple[str, ...]:
        """The stages of the texts."""
        return self.texts

    def sources(self) -> tuple[Corpus, ...]:
        """The raw corpora."""
        return self.corpora

    def make(self, workspace: Workspace) -> Artefact:
        """Filters, or goes on filtering."""
        corpora = [*self.corpora, *(_corpus(text, workspace) for text in workspace.corpora(self.texts))]
        report = filter_corpora(corpora, workspace.path(self.name), self.config)
        texts, counts = [], {}
        for corpus in report.corpora:
            files = tuple(workspace.own(file) for file in corpus.files)
            texts.append(TextFiles(corpus.name, corpus.languages, files, corpus.kept))
            counts[corpus.name] = {"read": corpus.read, "kept": corpus.kept, **corpus.dropped}
        return Artefact("corpora", tuple(texts), counts=counts)


def _corpus(text: TextFiles, workspace: Workspace) -> Corpus:
    if text.is_pair:
        return corpus_of(text, workspace)
    return monolingual_text(workspace.path(text.files[0]), text.languages[0], text.name)
