"""Applying the rules for single pairs to one chunk of a corpus: the same for every process and Beam runner."""

from __future__ import annotations

import functools
import io
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import UInt16, UInt64

from t5x_ext.corpora.beam import Task, read_task
from t5x_ext.corpora.filters.config import FilterConfig
from t5x_ext.corpora.filters.duplicates import KeyMaker, sort_keys
from t5x_ext.corpora.filters.held_out import HeldOut, read_held_out
from t5x_ext.corpora.filters.rules import pair_rules
from t5x_ext.corpora.filters.transforms import LineTransform
from t5x_ext.corpora.parallel_text import ParallelText
from t5x_ext.storage.files import write_bytes

CHUNK_PAIRS = 8192
"""Pairs a chunk; the result does not depend on it."""


class FilteredChunk(NamedTuple):
    """The pairs of a chunk that the rules keep; counts of pairs dropped, by rule, and lines changed, by transform."""

    kept: list[tuple[str, ...]]
    dropped: Counter[str]
    changed: Counter[str]


class ChunkFilter:
    """Normalises lines and applies the rules for single pairs: a pure function of the pairs."""

    def __init__(self, config: FilterConfig, languages: Sequence[str], held_out: HeldOut = ()):
        """For pairs of two languages, or for text of one: then the first line of every pair is the text.

        Args:
          config: the rules.
          languages: one code a side.
          held_out: from `hold_out`, for these languages; empty: nothing is held out.

        Raises:
          UserError: as `pair_rules` and `KeyMaker`.
        """
        self._transforms = [LineTransform(config, language) for language in languages]
        self._rules = pair_rules(config, languages, held_out)
        self.rule_names = tuple(rule.name for rule in self._rules)
        self.key_maker = KeyMaker(config, languages)

    def __call__(self, pairs: Iterable[Sequence[str]]) -> FilteredChunk:
        """Filters pairs."""
        kept, dropped, changed = [], Counter[str](), Counter[str]()
        for pair in pairs:
            lines = tuple(transform(line, changed) for line, transform in zip(pair, self._transforms))
            against = next((rule.name for rule in self._rules if rule.drops(lines)), None)
            if against is None:
                kept.append(lines)
            else:
                dropped[against] += 1
        return FilteredChunk(kept, dropped, changed)


def make_filter_task(
    corpus: ParallelText | None, scratch: str, config: FilterConfig, languages: tuple[str, ...]
) -> Callable[[int, object], int]:
    """`filter_task` for one corpus as a function of the two parts of a task, for worker processes."""
    return lambda number, pairs: filter_task(Task(number, pairs), corpus, scratch, config, languages)  # type: ignore[arg-type]


def filter_task(
    task: Task, corpus: ParallelText | None, scratch: str, config: FilterConfig, languages: tuple[str, ...]
) -> int:
    """Filters the chunk of a task into files of the scratch folder, unless they exist; returns its number.

    Raises:
      UserError: as `read_task`.
    """
    if not _path(scratch, task.number, "chunk").exists():
        chunk_filter = _chunk_filter(config, languages, scratch)
        chunk = chunk_filter(read_task(task, corpus, scratch))
        keys, rows = sort_keys(chunk_filter.key_maker.keys(chunk.kept))
        for kind, array in (("keys.npy", keys), ("rows.npy", rows)):
            content = io.BytesIO()
            np.save(content, array)
            write_bytes(_path(scratch, task.number, kind), content.getvalue())
        # The last file of a chunk says that the others are there.
        write_bytes(_path(scratch, task.number, "chunk"), pickle.dumps(tuple(chunk)))
    return task.number


@functools.lru_cache(maxsize=2)
def _chunk_filter(config: FilterConfig, languages: tuple[str, ...], scratch: str) -> ChunkFilter:
    return ChunkFilter(config, languages, read_held_out(scratch))


def read_chunk(scratch: str, number: int) -> FilteredChunk:
    """A chunk that `filter_task` wrote."""
    return FilteredChunk(*pickle.loads(_path(scratch, number, "chunk").read_bytes()))


def read_keys(
    scratch: str, number: int, in_place: bool = False
) -> tuple[UInt64[np.ndarray, "columns lines"], UInt16[np.ndarray, "columns lines"]]:
    """The sorted keys of a chunk's lines, and their rows; `in_place` maps local files into memory."""
    if in_place:
        keys, rows = (np.load(_path(scratch, number, kind), mmap_mode="r") for kind in ("keys.npy", "rows.npy"))
    else:
        keys, rows = (
            np.load(io.BytesIO(_path(scratch, number, kind).read_bytes())) for kind in ("keys.npy", "rows.npy")
        )
    return keys, rows


def _path(scratch: str, number: int, kind: str) -> epath.Path:
    return epath.Path(scratch) / f"{number:07d}.{kind}"
