"""Corpora from outside become plain text of the pipeline, and its texts become corpora to train on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import ClassVar, Literal

from t5x_ext.contracts import Corpus, UserError
from t5x_ext.corpora import ParallelText, monolingual_text
from t5x_ext.pipeline.artefact import Artefact, Kind, TextFiles
from t5x_ext.pipeline.stage import StageDefaults
from t5x_ext.pipeline.workspace import Workspace


@dataclass(frozen=True)
class Texts(StageDefaults):
    """Copies corpora, or a range of each, into the pipeline: as pairs, or one side of them as monolingual text.

    Attributes:
      name: of the stage.
      corpora: what is read; files are named by corpus and languages.
      start: the first pair of each corpus to take, counted from 0.
      stop: the first pair not to take; None: to the end.
      side: `both`, or the side to keep.

    Raises:
      UserError: for an empty range, and for pairs whose two sides have the same language.
    """

    makes: ClassVar[Kind] = "corpora"

    name: str
    corpora: tuple[Corpus, ...]
    start: int = 0
    stop: int | None = None
    side: Literal["both", "source", "target"] = "both"

    def __post_init__(self) -> None:
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise UserError(f"Texts.start={self.start}, Texts.stop={self.stop}: the range is empty")
        for corpus in self.corpora if self.side == "both" else ():
            if corpus.languages[0] == corpus.languages[1]:
                raise UserError(
                    f"stage {self.name!r}: {corpus.name} is {corpus.languages[0]} on both sides; for monolingual text "
                    "set Texts.side = 'source' or 'target'"
                )

    def sources(self) -> tuple[Corpus, ...]:
        """The corpora."""
        return self.corpora

    def make(self, workspace: Workspace) -> Artefact:
        """Writes them."""
        texts = [self._written(corpus, workspace) for corpus in self.corpora]
        check_distinct(text.name for text in texts)
        return Artefact("corpora", tuple(texts), counts={"lines": sum(text.lines for text in texts)})

    def _written(self, corpus: Corpus, workspace: Workspace) -> TextFiles:
        sides = {"both": (0, 1), "source": (0,), "target": (1,)}[self.side]
        languages = tuple(corpus.languages[side] for side in sides)
        name = pair_name(corpus)
        files = tuple(workspace.own(f"{name}.{language}") for language in languages)
        rows = ([pair[side] for side in sides] for pair in islice(corpus.pairs(), self.start, self.stop))
        first = next(rows, None)
        if first is None:
            raise UserError(f"stage {self.name!r}: {corpus.name} has no pair {self.start}; lower Texts.start")
        return TextFiles(name, languages, files, workspace.write_aligned(files, chain([first], rows)))


@dataclass(frozen=True)
class ReversedCorpus:
    """A corpus read from its second language to its first; satisfies `contracts.Corpus`.

    Attributes:
      corpus: the corpus.
    """

    corpus: Corpus

    @property
    def languages(self) -> tuple[str, str]:
        """Those of the corpus, swapped."""
        first, second = self.corpus.languages
        return second, first

    @property
    def name(self) -> str:
        """That of the corpus."""
        return self.corpus.name

    def pairs(self) -> Iterator[tuple[str, str]]:
        """The pairs, swapped."""
        return ((second, first) for first, second in self.corpus.pairs())

    def fingerprint(self) -> str:
        """That of the corpus, marked."""
        return f"{self.corpus.fingerprint()}-reversed"


def pair_name(corpus: Corpus) -> str:
    """The corpus' name followed by its languages, unless it ends with them already.

    >>> pair_name(ParallelText("news.en", "news.de", "en", "de"))
    'news.en-de'
    """
    ending = f".{'-'.join(corpus.languages)}"
    return f"{corpus.name.removesuffix(ending)}{ending}"


def check_distinct(names: Iterable[str]) -> None:
    """Raises UserError for two texts of one name, of which one would overwrite the other."""
    known = set()
    for name in names:
        if name in known:
            raise UserError(f"two texts are called {name!r}; give the corpora different names")
        known.add(name)


def languages_of(direction: str) -> tuple[str, str]:
    """The two languages in the name of a direction.

    Raises:
      UserError: if there are not two.

    >>> languages_of("en-pt_BR")
    ('en', 'pt_BR')
    """
    source, _, target = direction.partition("-")
    if not source or not target or "-" in target:
        raise UserError(f"direction {direction!r}: give two languages, as en-de or en-pt_BR")
    return source, target


def corpus_of(text: TextFiles, workspace: Workspace, *, mark: bool = False) -> ParallelText:
    """A pair of files as a corpus to train on.

    Args:
      text: the files.
      workspace: resolves their paths.
      mark: whether the encoder's input marks pairs of which a model has written one side, see `ParallelText.synthetic`.
    """
    source, target = map(workspace.path, text.files)
    first, second = text.languages
    return ParallelText(source, target, first, second, text.name, synthetic=text.synthetic if mark else None)


def reversed_corpus(corpus: Corpus) -> Corpus:
    """The same corpus read from its second language to its first."""
    if not isinstance(corpus, ParallelText):
        return ReversedCorpus(corpus)
    return replace(
        corpus,
        source_path=corpus.target_path,
        target_path=corpus.source_path,
        source_language=corpus.target_language,
        target_language=corpus.source_language,
        source_column=corpus.target_column,
        target_column=corpus.source_column,
        synthetic={None: None, "source": "target", "target": "source"}[corpus.synthetic],
    )


def sides_of(text: TextFiles, workspace: Workspace, languages: tuple[str, ...]) -> list[ParallelText]:
    """Each file of the text in one of these languages (if there are none: in any) as monolingual text to train on."""
    return [
        monolingual_text(workspace.path(file), language, f"{text.name}.{language}")
        for language, file in zip(text.languages, text.files)
        if not languages or language in languages
    ]
