"""Counts of what a filtering kept and dropped."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate


@dataclass(frozen=True)
class CorpusReport:
    """Counts of one corpus: `read` is `kept` plus the sum of `dropped`.

    Attributes:
      name: of the corpus.
      languages: one code a side; one for text of one language.
      files: names of the files in the output folder, one a side.
      read: pairs, or lines of text of one language.
      kept: pairs, or lines of text of one language.
      dropped: pairs by rule, for every rule that was on, in the order in which rules are tried.
      changed: lines of all sides, dropped ones included, by the transform that changed them.
    """

    name: str
    languages: tuple[str, ...]
    files: tuple[str, ...]
    read: int
    kept: int
    dropped: dict[str, int]
    changed: dict[str, int]


@dataclass(frozen=True)
class FilterReport:
    """The result of `filter_corpora`, as in `report.json`.

    Attributes:
      work: a digest of corpora, configuration and versions of libraries.
      config: the configuration as a dictionary.
      corpora: one report each.
    """

    work: str
    config: dict[str, Any]
    corpora: tuple[CorpusReport, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain lists, dictionaries, text and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> FilterReport:
        """The inverse of `to_json`."""
        corpora = [
            CorpusReport(**{**corpus, "languages": tuple(corpus["languages"]), "files": tuple(corpus["files"])})
            for corpus in record["corpora"]
        ]
        return cls(record["work"], record["config"], tuple(corpora))

    def table(self) -> str:
        """Counts as a text table: a row for every rule, a column for every corpus."""
        rules = list(dict.fromkeys(rule for corpus in self.corpora for rule in corpus.dropped))
        rows = [["", *(corpus.name for corpus in self.corpora)]]
        rows.append(["read", *(f"{corpus.read:,}" for corpus in self.corpora)])
        for rule in rules:
            rows.append(
                [rule, *(f"{corpus.dropped[rule]:,}" if rule in corpus.dropped else "-" for corpus in self.corpora)]
            )
        rows.append(["kept", *(f"{corpus.kept:,}" for corpus in self.corpora)])
        rows.append(["kept %", *(f"{100 * corpus.kept / corpus.read:.2f}" for corpus in self.corpora)])
        columns = ("left", *["right"] * len(self.corpora))
        return tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=columns)
