"""The files of a token cache's folder: their names, their writer, and the manifest."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from etils import epath

from t5x_ext.contracts import UserError
from t5x_ext.data.encoding import Chunk, Encoder
from t5x_ext.data.shards import open_writer

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
LENGTHS_FILE = "lengths.npy"
RECORDS_PER_SHARD = 1 << 20
_COPY_BYTES = 1 << 24


def check_kept(name: str, kept: int, counts: Counter[str]) -> None:
    """Refuses a corpus of which no pair is kept.

    Raises:
      UserError: with the number of pairs that each rule dropped.
    """
    if not kept:
        raise UserError(f"{name}: cleaning keeps no pair ({dict(sorted(counts.items()))})")


def make_manifest(
    identity: dict[str, Any],
    name: str,
    pairs_read: int,
    encoder: Encoder,
    counts: Counter[str],
    tokens: Sequence[int],
    shards: Sequence[dict[str, Any]],
) -> str:
    """The text of `manifest.json`. Also logs how many pairs were kept.

    Args:
      identity: what the content depends on.
      name: the corpus' name.
      pairs_read: pairs before cleaning.
      encoder: tokenised them.
      counts: pairs dropped by each rule, and changed lines.
      tokens: tokens of both sides, summed over all variants.
      shards: `file` and number of `records` of every shard, variant by variant.
    """
    pairs = sum(shard["records"] for shard in shards) // encoder.variants
    dropped = {rule: count for rule, count in sorted(counts.items()) if rule != "changed_lines"}
    logger.info("cache %s: %d of %d pairs kept, dropped %s", name, pairs, pairs_read, dropped or 0)
    manifest = {
        **identity,
        "name": name,
        "pairs_read": pairs_read,
        "pairs": pairs,
        "variants": encoder.variants,
        "dropped": dropped,
        "changed_lines": counts["changed_lines"],
        "tokens": list(tokens),
        "dtype": encoder.dtype.str,
        "shards": list(shards),
    }
    return json.dumps(manifest, indent=2) + "\n"


def shard_file(variant: int, number: int) -> str:
    """The name of a variant's file whose first record is `number * RECORDS_PER_SHARD`."""
    return f"tokens-{variant:02d}-{number:05d}.array_record"


class CacheWriter(ExitStack):
    """Writes chunks into shards with `RECORDS_PER_SHARD` records each, for any size of the chunks."""

    def __init__(self, folder: Path, dtype: np.dtype):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.num_pairs = 0
        self.shards_of: list[list[dict[str, Any]]] = []
        self._folder = folder
        self._itemsize = dtype.itemsize
        self._lengths: list[IO[bytes]] = []
        self._tokens = np.zeros(2, dtype=np.int64)
        self._writers: list[Any] = []

    def add(self, chunk: Chunk) -> None:
        """Appends a chunk's records."""
        self.counts.update(chunk.counts)
        if not self._writers:
            self.shards_of = [[] for _ in chunk.ids]
            # In temporary files until all are known: in memory they would grow with the corpus.
            files = [tempfile.TemporaryFile(dir=self._folder) for _ in chunk.ids]  # noqa: SIM115, the stack closes them
            self._lengths = [self.enter_context(file) for file in files]
            self._writers = [None for _ in chunk.ids]
        for variant, (ids, lengths) in enumerate(zip(chunk.ids, chunk.lengths)):
            self._lengths[variant].write(lengths.tobytes())
            self._tokens += lengths.sum(axis=0, dtype=np.int64)
            ends = (np.cumsum(lengths.sum(axis=1)) * self._itemsize).tolist()
            for start, end in zip([0, *ends], ends):
                self._write(variant, ids[start:end])
        self.num_pairs += len(chunk.lengths[0])

    def _write(self, variant: int, record: bytes) -> None:
        shards = self.shards_of[variant]
        if not shards or shards[-1]["records"] == RECORDS_PER_SHARD:
            self._close_shard(variant)
            name = shard_file(variant, len(shards))
            self._writers[variant] = open_writer(self._folder / name)
            self.callback(self._close_shard, variant)
            shards.append({"file": name, "records": 0})
        self._writers[variant].write(record)
        shards[-1]["records"] += 1

    def _close_shard(self, variant: int) -> None:
        writer, self._writers[variant] = self._writers[variant], None
        if writer is not None:
            writer.close()

    def save_lengths(self) -> list[int]:
        """Writes the array of lengths, after all chunks were added; returns the tokens of both sides, all variants."""
        write_lengths(epath.Path(self._folder) / LENGTHS_FILE, self._lengths, self.num_pairs * len(self._lengths))
        return self._tokens.tolist()


def write_lengths(path: epath.Path, parts: Iterable[IO[bytes]], records: int) -> None:
    """Writes an int32 array [records, 2] in numpy's format, from files with the bytes of its parts."""
    with path.open("wb") as file:
        header = {"descr": "<i4", "fortran_order": False, "shape": (records, 2)}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            part.seek(0)
            shutil.copyfileobj(part, file, _COPY_BYTES)
