"""Two aligned text files, or one table of tab-separated columns, as a corpus."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import IO, NamedTuple, cast

import numpy as np
from etils import epath

from t5x_ext.contracts import UserError
from t5x_ext.corpora.special_pieces import Side, check_language

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"
_NEWLINE = 10
_BLOCK_BYTES = 1 << 20
_SCAN_BYTES = 1 << 24


class LineSpan(NamedTuple):
    """A range of a corpus: number of its first line, number of pairs, and its offset in every file, in bytes."""

    line: int
    pairs: int
    starts: tuple[int, ...]


@dataclass(frozen=True)
class ParallelText:
    r"""Aligned lines of two languages: line i of one file translates line i of the other.

    Files are UTF-8, plain or gzipped (told by their first bytes, not by their names), local or remote (`gs://`).
    Lines end with "\n" only, so that U+2028 or a form feed inside a line does not shift the alignment; a carriage
    return before it and a byte order mark at the start of a file are dropped.

    Attributes:
      source_path: the file of the source language.
      target_path: the file of the target language.
      source_language: its code, as in `en`, `zh` or `pt_BR`.
      target_language: likewise.
      name: a short name for tables and logs; by default made from the file name.
      tsv_path: one table instead of two files.
      source_column: the table's column with the source text, counted from 0.
      target_column: likewise.
      synthetic: the side that a model has written. The encoder sees a marker after the language tag: `<BT>` if the
        source is synthetic, `<FT>` if the target is (tagged back-translation, arXiv 1906.06442). In the other direction
        the marker is the other of the two. None: no marker.

    Raises:
      UserError: at once for a wrong combination of arguments; while reading for a missing or empty file, unequal
        line counts, bytes that are not UTF-8 and lines with too few columns, naming file and line.
    """

    source_path: str | None = None
    target_path: str | None = None
    source_language: str = ""
    target_language: str = ""
    name: str = ""
    tsv_path: str | None = None
    source_column: int = 0
    target_column: int = 1
    synthetic: Side | None = None

    def __post_init__(self) -> None:
        if self.synthetic not in (None, "source", "target"):
            raise UserError(f"ParallelText.synthetic={self.synthetic!r}: allowed are None, 'source', 'target'")
        for role, language in (("source_language", self.source_language), ("target_language", self.target_language)):
            if not language:
                raise UserError(f"ParallelText: {role} is missing; give a code such as 'en'")
            check_language(language)
        if self.tsv_path is None and not (self.source_path and self.target_path):
            raise UserError("ParallelText: give source_path and target_path, or tsv_path")
        if self.tsv_path is not None and (self.source_path or self.target_path):
            raise UserError("ParallelText: give either tsv_path or source_path and target_path, not both")
        if self.source_column == self.target_column or min(self.source_column, self.target_column) < 0:
            raise UserError(
                f"ParallelText: source_column={self.source_column} and target_column={self.target_column}"
                " must be two different columns, counted from 0"
            )
        if not self.name:
            object.__setattr__(self, "name", self._name_from_path())

    @property
    def languages(self) -> tuple[str, str]:
        """Language codes of source and target."""
        return self.source_language, self.target_language

    def pairs(self) -> Iterator[tuple[str, str]]:
        """The aligned lines, in order, without line ends."""
        return self._table_pairs() if self.tsv_path is not None else self._file_pairs()

    def fingerprint(self) -> str:
        """SHA-256 over the languages and the files' text as stored once decompressed."""
        digest = hashlib.sha256(repr((self.languages, self._columns())).encode())
        for path in self._paths():
            for block in _blocks(path):
                digest.update(block)
            digest.update(b"\0end of file\0")
        return digest.hexdigest()

    def spans(self, pairs_per_span: int) -> list[LineSpan] | None:
        """Ranges of `pairs_per_span` pairs that can be read independently; None if a file is gzipped.

        Files are scanned for line ends only, at some GB a second; `read_span` decodes and checks the lines.

        Raises:
          UserError: for missing and empty files, and unequal line counts.
        """
        marks = [_mark_lines(path, pairs_per_span) for path in self._paths()]
        if any(mark is None for mark in marks):
            return None
        counts, starts = zip(*cast(list[tuple[int, list[int]]], marks))
        self._check_counts(*counts)
        return [
            LineSpan(number * pairs_per_span + 1, min(pairs_per_span, counts[0] - number * pairs_per_span), offsets)
            for number, offsets in enumerate(zip(*starts))
        ]

    def read_span(self, span: LineSpan) -> list[tuple[str, str]]:
        """The pairs of a range that `spans` gave.

        Raises:
          UserError: as `pairs` does, with the same line numbers.
        """
        lines = [read_lines(path, start, span.line) for path, start in zip(self._paths(), span.starts)]
        pairs = zip(*lines) if self.tsv_path is None else self._split(lines[0], span.line)
        return list(islice(pairs, span.pairs))

    def _columns(self) -> tuple[int, int] | None:
        return None if self.tsv_path is None else (self.source_column, self.target_column)

    def _paths(self) -> tuple[str, ...]:
        if self.tsv_path is not None:
            return (self.tsv_path,)
        return cast(str, self.source_path), cast(str, self.target_path)

    def _name_from_path(self) -> str:
        stem = self._paths()[0].rstrip("/").rsplit("/", 1)[-1]
        for suffix in (".gz", ".tsv", f".{self.source_language}"):
            stem = stem.removesuffix(suffix)
        return f"{stem}.{self.source_language}-{self.target_language}"

    def _file_pairs(self) -> Iterator[tuple[str, str]]:
        source_path, target_path = self._paths()
        counts = [0, 0]
        for source, target in zip_longest(read_lines(source_path), read_lines(target_path)):
            counts[0] += source is not None
            counts[1] += target is not None
            if source is not None and target is not None:
                yield source, target
        self._check_counts(*counts)

    def _check_counts(self, *counts: int) -> None:
        if len(set(counts)) > 1:
            source_path, target_path = self._paths()
            raise UserError(
                f"{source_path} has {counts[0]} lines but {target_path} has {counts[1]}: aligned files need as many"
            )

    def _table_pairs(self) -> Iterator[tuple[str, str]]:
        return self._split(read_lines(self._paths()[0]), 1)

    def _split(self, lines: Iterator[str], first: int) -> Iterator[tuple[str, str]]:
        path = self._paths()[0]
        needed = max(self.source_column, self.target_column) + 1
        for number, line in enumerate(lines, start=first):
            columns = line.split("\t")
            if len(columns) < needed:
                raise UserError(f"{path}, line {number}: {len(columns)} tab-separated column(s), {needed} are needed")
            yield columns[self.source_column], columns[self.target_column]


def monolingual_text(path: str, language: str, name: str = "") -> ParallelText:
    """A text of one language as a corpus: every line is paired with itself.

    It trains a language model (`models.DecoderConfig`), which reads the second side only. Both sides have the
    same length, so rows are packed as densely as a single side would be.

    Args:
      path: UTF-8 text, as `ParallelText` reads it.
      language: its code, as in `en`.
      name: a short name for tables and logs; by default made from the file name.

    Raises:
      UserError: as `ParallelText`.
    """
    return ParallelText(path, path, language, language, name)


def aligned_files(directory: str, stem: str, source_language: str, target_language: str) -> ParallelText:
    """Two files of a folder named by their language, as `train.en` and `train.de`, or the same with `.gz`.

    A missing file is reported when it is read: a run can be described and planned without its texts.
    """

    def find(language: str) -> str:
        plain = epath.Path(directory) / f"{stem}.{language}"
        zipped = plain.with_name(f"{plain.name}.gz")
        return str(zipped if zipped.exists() and not plain.exists() else plain)

    return ParallelText(find(source_language), find(target_language), source_language, target_language)


def read_lines(path: str, start: int = 0, first: int = 1) -> Iterator[str]:
    r"""The lines of a UTF-8 file, plain or gzipped, split at "\n" only and without line ends.

    Args:
      path: the file.
      start: where to begin, in bytes: the start of a line of a plain file.
      first: number of the line that begins there.

    Raises:
      UserError: if the file is missing, empty, truncated or not UTF-8; the last names the line.
    """
    with _open(path) as file:
        number = first - 1
        try:
            if start:
                file.seek(start)
            for number, raw in enumerate(file, start=first):
                if number == 1:
                    raw = raw.removeprefix(_BYTE_ORDER_MARK)
                yield raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start} of the line);"
                " convert the file to UTF-8"
            ) from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path}, after line {number}: the gzip file is damaged ({error})") from None
        if number == 0:
            raise UserError(f"{path}: the file is empty")


def _mark_lines(path: str, every: int) -> tuple[int, list[int]] | None:
    """Number of lines, and where line 0, `every`, 2 * `every`, ... begin in bytes; None for a gzipped file."""
    count, offset, starts, last = 0, 0, [0], b""
    with _open(path) as file:
        if isinstance(file, gzip.GzipFile):
            return None
        while block := file.read(_SCAN_BYTES):
            ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == _NEWLINE)
            # Line n begins behind line end n, counted from 1.
            starts += (offset + 1 + ends[(-count - 1) % every :: every]).tolist()
            count, offset, last = count + len(ends), offset + len(block), block[-1:]
    if not offset:
        raise UserError(f"{path}: the file is empty")
    if last != b"\n":
        return count + 1, starts
    return count, starts[: -(-count // every)]


def _blocks(path: str) -> Iterator[bytes]:
    with _open(path) as file:
        try:
            while block := file.read(_BLOCK_BYTES):
                yield block
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path}: the gzip file is damaged ({error})") from None


def _open(path: str) -> IO[bytes]:
    location = epath.Path(path)
    try:
        with location.open("rb") as file:
            is_gzip = file.read(2) == _GZIP_MAGIC
        file = location.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; a text file is needed") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    return cast(IO[bytes], gzip.GzipFile(fileobj=file) if is_gzip else file)
