"""Labelled texts, or pairs of texts, from a table of tab-separated columns."""

from __future__ import annotations

import difflib
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from t5x_ext.contracts import UserError
from t5x_ext.corpora.parallel_text import read_lines


class Labelled(NamedTuple):
    """One example."""

    line: int  # of the file, from 1
    texts: tuple[str, ...]  # one text, or the two of a pair
    label: str


@dataclass(frozen=True)
class LabelledText:
    r"""A table with one example a line: columns separated by tabs, without quoting.

    Files are UTF-8, plain or gzipped; lines end with "\n". A column is text, quotation marks and numbers too.

    Attributes:
      path: the file.
      text: name of the column with the text; two names for pairs of texts, such as `("sentence1", "sentence2")`.
      label: name of the column with the label.
      columns: names of the columns where the file has no header; None: its first line is one.
      examples: read so many examples only, at random but always the same for a seed; None: all.
      seed: of that choice.

    Raises:
      UserError: while reading, for a missing or empty file, a column that is not there, a line with another number of
        columns and an empty label, naming file and line.
    """

    path: str
    text: str | tuple[str, ...] = "text"
    label: str = "label"
    columns: tuple[str, ...] | None = None
    examples: int | None = None
    seed: int = field(default=0)

    def __post_init__(self) -> None:
        if self.examples is not None and self.examples < 1:
            raise UserError(f"LabelledText.examples is {self.examples}; it must be 1 or more, or None for all")
        if len(self.text_columns) not in (1, 2):
            raise UserError(f"LabelledText.text is {self.text!r}; it must name one column, or two for pairs")

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Names of the columns with text."""
        return (self.text,) if isinstance(self.text, str) else tuple(self.text)

    def read(self) -> list[Labelled]:
        """The examples, in the order of the file."""
        lines = enumerate(read_lines(self.path), start=1)
        names = self.columns
        if names is None:
            names = tuple(next(lines)[1].split("\t"))
        wanted = [self._position(name, names) for name in (*self.text_columns, self.label)]
        found = []
        for number, line in lines:
            values = line.split("\t")
            if len(values) != len(names):
                raise UserError(
                    f"{self.path}, line {number}: {len(values)} columns where there are {len(names)} "
                    f"({', '.join(names)}); columns are separated by tabs"
                )
            *texts, label = (values[position] for position in wanted)
            if not label:
                raise UserError(f"{self.path}, line {number}: the column {self.label!r} is empty")
            found.append(Labelled(number, tuple(texts), label))
        if not found:
            raise UserError(f"{self.path}: there is a header and no example")
        if self.examples is None or self.examples >= len(found):
            return found
        chosen = random.Random(self.seed).sample(range(len(found)), self.examples)
        return [found[index] for index in sorted(chosen)]

    def _position(self, name: str, names: Sequence[str]) -> int:
        if name in names:
            return names.index(name)
        where = "LabelledText.columns" if self.columns is not None else f"the first line of {self.path}"
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(repr, names))}"
        more = "" if self.columns is not None else "; name the columns in LabelledText.columns if there is no header"
        raise UserError(f"{where} names no column {name!r}; {hint}{more}")


def class_names(examples: Sequence[Labelled]) -> tuple[str, ...]:
    """The labels that occur, sorted: as numbers where all are, else as text.

    >>> class_names([Labelled(1, ("a",), "10"), Labelled(2, ("b",), "9"), Labelled(3, ("c",), "9")])
    ('9', '10')
    """
    labels = {example.label for example in examples}
    if all(label.isdecimal() for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))  # 1 and 01 in the same order everywhere
    return tuple(sorted(labels))


def label_numbers(examples: Sequence[Labelled], classes: Sequence[str], path: str) -> list[int]:
    """The number of each example's class.

    Args:
      examples: from `LabelledText.read`.
      classes: names of the classes, in order.
      path: of the file, for messages.

    Raises:
      UserError: for a label that is none of the classes, naming file and line.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    for example in examples:
        if example.label not in numbers:
            raise UserError(
                f"{path}, line {example.line}: the label {example.label!r} is none of the classes of this task: "
                f"{', '.join(map(repr, classes))}"
            )
    return [numbers[example.label] for example in examples]


def fingerprint(examples: Sequence[Labelled]) -> str:
    """SHA-256 over texts and labels."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update("\t".join((*example.texts, example.label)).encode() + b"\n")
    return digest.hexdigest()
