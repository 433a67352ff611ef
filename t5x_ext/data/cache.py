"""The token cache: every pair of a corpus tokenised once, offline, and read by number.

A cache is a folder `<root>/<corpus name>-<hash>` with ArrayRecord shards of token ids, the array of all lengths, and
`manifest.json`. The hash covers what the content depends on: corpus, vocabulary, cleaning, subword sampling and format.
Directions, tags, end of sentence, length limits and model sizes are not in it; they are applied when batches are
planned. A cache is written to a temporary folder and renamed when it is complete, so that a half-written one is never
read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int
from tqdm import tqdm

from t5x_ext.contracts import Corpus, UserError
from t5x_ext.corpora.beam import BeamRunner
from t5x_ext.corpora.filters import PairRules, rules_identity
from t5x_ext.corpora.workers import choose_processes, work_in_order
from t5x_ext.data.beam_cache import build as build_on_beam
from t5x_ext.data.cache_files import (
    LENGTHS_FILE,
    MANIFEST_FILE,
    RECORDS_PER_SHARD,
    CacheWriter,
    check_kept,
    make_manifest,
)
from t5x_ext.data.encoding import CHUNK_PAIRS, Chunk, Encoder, SubwordSampling
from t5x_ext.data.shards import Shard
from t5x_ext.data.vocabulary import Vocabulary
from t5x_ext.storage.folders import fetch_folder, local_copies, upload_folder, whole_folder
from t5x_ext.storage.remote import is_remote

logger = logging.getLogger(__name__)

_FORMAT = 1

_RECORD_OVERHEAD_BYTES = 8
_PAIRS_WORTH_PROCESSES = 200_000
_ESTIMATE_PAIRS = 4096


class Tokens(NamedTuple):
    """Token ids of several records, concatenated: the source of a record, its target, then the next record."""

    ids: Int[np.ndarray, " tokens"]  # uint16 or int32
    source_lengths: Int[np.ndarray, " records"]  # int32
    target_lengths: Int[np.ndarray, " records"]  # int32


class TokenCache:
    """A finished cache, opened for reading.

    Records are numbered variant by variant: record `variant * num_pairs + pair`.

    Attributes:
      path: its folder.
      manifest: the content of `manifest.json`.
      lengths: int32 [records, 2], tokens of both sides.
    """

    def __init__(self, path: str):
        """Opens a cache folder and checks that it is complete.

        Raises:
          UserError: if it is not a cache of this format, or shards, lengths and manifest do not match.
        """
        self.path = str(path)
        folder = Path(path)
        self.manifest = _read_manifest(folder)
        try:
            self.lengths: Int[np.ndarray, "records 2"] = np.load(folder / LENGTHS_FILE, mmap_mode="r")
        except (OSError, ValueError):
            raise UserError(f"{folder / LENGTHS_FILE}: missing or damaged; delete the folder to rebuild it") from None
        shards = self.manifest["shards"]
        self._shards = [Shard(folder / shard["file"], shard["records"]) for shard in shards]
        self._starts = list(accumulate((shard["records"] for shard in shards), initial=0))
        if len(self.lengths) != self._starts[-1] or self._starts[-1] != self.num_pairs * self.variants:
            raise UserError(f"{path}: lengths, shards and manifest differ; delete the folder to rebuild it")
        if self.manifest["tokens"] != _sum_lengths(self.lengths):
            raise UserError(f"{folder / LENGTHS_FILE}: damaged; delete the folder to rebuild it")
        self._dtype = np.dtype(self.manifest["dtype"])

    @property
    def name(self) -> str:
        """The corpus' name."""
        return self.manifest["name"]

    @property
    def languages(self) -> tuple[str, str]:
        """Languages of a record's first and second side."""
        first, second = self.manifest["languages"]
        return first, second

    @property
    def num_pairs(self) -> int:
        """Pairs that cleaning kept."""
        return self.manifest["pairs"]

    @property
    def variants(self) -> int:
        """Segmentations stored for every pair."""
        return self.manifest["variants"]

    def read_tokens(self, records: Int[np.ndarray, " records"]) -> Tokens:
        """The records with these numbers, in this order, in one batched read a shard.

        Raises:
          UserError: if a shard has been damaged since the cache was opened, or cannot be read (see `Shard`).
        """
        records = np.asarray(records, dtype=np.int64)
        lengths = np.asarray(self.lengths[records])
        sizes = lengths.sum(axis=1) * self._dtype.itemsize
        if len(self._shards) == 1:
            blobs = self._shards[0].read(records.tolist(), sizes.tolist())
        else:
            blobs = self._read_shards(records, sizes)
        ids = np.frombuffer(b"".join(blobs), dtype=self._dtype)
        return Tokens(ids, lengths[:, 0], lengths[:, 1])

    def _read_shards(self, records: np.ndarray, sizes: np.ndarray) -> list[bytes]:
        blobs: list[bytes] = [b""] * len(records)
        shards = np.searchsorted(self._starts, records, side="right") - 1
        for shard in np.unique(shards):
            indices = np.flatnonzero(shards == shard)
            local = (records[indices] - self._starts[shard]).tolist()
            for index, blob in zip(indices.tolist(), self._shards[shard].read(local, sizes[indices].tolist())):
                blobs[index] = blob
        return blobs

    def read(self, records: Sequence[int] | np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Token ids of both sides of these records, int32."""
        tokens = self.read_tokens(np.asarray(records, dtype=np.int64))
        both = np.stack([tokens.source_lengths, tokens.target_lengths], axis=1).reshape(-1)
        sides = np.split(tokens.ids.astype(np.int32), np.cumsum(both)[:-1]) if len(both) else []
        return sides[0::2], sides[1::2]


def build_cache(
    corpus: Corpus,
    vocabulary: Vocabulary,
    root: str,
    cleaning: PairRules | None = None,
    subword: SubwordSampling | None = None,
    num_processes: int | None = None,
    beam: BeamRunner | None = None,
) -> TokenCache:
    """Tokenises a corpus, or opens the cache that holds it already.

    Args:
      corpus: the pairs; read three times (fingerprint, count, tokens).
      vocabulary: tokenises them.
      root: folder of all caches; made if it is missing. Caches are read at random, so a remote one (`gs://`) is copied
        to a local folder (see `local_copies`) and read there.
      cleaning: which pairs are dropped, beside those with an empty side.
      subword: how many segmentations of every pair.
      num_processes: worker processes; None: one a core for more than 200,000 pairs, otherwise none. The result is the
        same, byte for byte, for any number.
      beam: tokenise on Apache Beam instead, with the same result; its workers must be able to read and write `root`.

    Raises:
      UserError: for what the corpus raises, an empty corpus, too little free disk space, a corpus of which cleaning
        keeps no pair, and a rule whose library is not installed or does not know a language. Nothing half-written
        stays behind if `root` is local.
    """
    cleaning, subword = cleaning or PairRules(), subword or SubwordSampling()
    identity = {
        "format": _FORMAT,
        "corpus": corpus.fingerprint(),
        "languages": list(corpus.languages),
        "vocabulary": vocabulary.fingerprint(),
        "cleaning": _cleaning_identity(cleaning),
        "subword": asdict(subword) if subword.variants else None,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    name = f"{_safe_name(corpus.name)}-{digest[:16]}"
    local = (local_copies() if is_remote(root) else Path(root)) / name

    def build(path: str) -> None:
        encoder = Encoder(vocabulary.model, vocabulary.languages, subword, cleaning, corpus.languages)
        if beam is None:
            _build(corpus, encoder, Path(path), identity, num_processes)
        else:
            build_on_beam(corpus, encoder, path, identity, beam)

    if not (local / MANIFEST_FILE).exists():
        if is_remote(root):
            _build_remote(f"{str(root).rstrip('/')}/{name}", local, build, on_workers=beam is not None)
        else:
            build(str(local))
    return TokenCache(str(local))


def _cleaning_identity(cleaning: PairRules) -> dict[str, Any]:
    # Without rules the value is that of before rules had these names, so that existing caches are found.
    return {"drop_copies": False, "max_length_ratio": None} if cleaning == PairRules() else rules_identity(cleaning)


def _build_remote(remote: str, local: Path, build: Callable[[str], None], on_workers: bool) -> None:
    """Makes the local copy of a remote cache, and builds the remote one first if it does not exist."""
    manifest = epath.Path(remote) / MANIFEST_FILE
    if not manifest.exists():
        build(remote if on_workers else str(local))
    if manifest.exists():
        logger.info("copying %s to %s", remote, local)
        fetch_folder(remote, local, _files_of(json.loads(manifest.read_text())))
    else:
        logger.info("copying %s to %s", local, remote)
        upload_folder(local, remote, _files_of(_read_manifest(local)))


def _files_of(manifest: Mapping[str, Any]) -> list[str]:
    """Files of a cache; the last one, the manifest, marks it as complete."""
    return [*(shard["file"] for shard in manifest["shards"]), LENGTHS_FILE, MANIFEST_FILE]


def _build(corpus: Corpus, encoder: Encoder, folder: Path, identity: dict[str, Any], num_processes: int | None) -> None:
    num_pairs, sample = _count(corpus)
    if not num_pairs:
        raise UserError(f"{corpus.name}: the corpus is empty")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _check_disk(corpus.name, num_pairs, encoder.encode(0, sample), len(sample), folder.parent)
    processes = choose_processes(num_pairs, _PAIRS_WORTH_PROCESSES, num_processes)
    pairs = corpus.pairs()
    chunks = enumerate(iter(lambda: list(islice(pairs, CHUNK_PAIRS)), []))
    with whole_folder(folder, MANIFEST_FILE) as temporary:
        progress = tqdm(total=num_pairs, desc=f"cache {corpus.name}", unit=" pairs", disable=None)
        with progress, CacheWriter(temporary, encoder.dtype) as writer:
            for chunk in work_in_order(_make_encode, encoder.arguments, chunks, processes):
                writer.add(chunk)
                progress.update(len(chunk.lengths[0]) + sum(n for r, n in chunk.counts.items() if r != "changed_lines"))
            check_kept(corpus.name, writer.num_pairs, writer.counts)
            tokens = writer.save_lengths()
        shards = [shard for shards in writer.shards_of for shard in shards]
        manifest = make_manifest(identity, corpus.name, num_pairs, encoder, writer.counts, tokens, shards)
        (temporary / MANIFEST_FILE).write_text(manifest)


def _count(corpus: Corpus) -> tuple[int, list[tuple[str, str]]]:
    """Number of pairs, and an evenly spaced sample. Also finds unreadable lines before anything is written."""
    sample: list[tuple[str, str]] = []
    stride, count = 1, 0
    for count, pair in enumerate(corpus.pairs(), start=1):
        if (count - 1) % stride == 0:
            sample.append(pair)
            if len(sample) == _ESTIMATE_PAIRS:
                sample, stride = sample[::2], 2 * stride
    return count, sample


def _check_disk(name: str, num_pairs: int, chunk: Chunk, sampled: int, root: Path) -> None:
    records = sum(len(lengths) for lengths in chunk.lengths)
    size = sum(map(len, chunk.ids)) + records * (_RECORD_OVERHEAD_BYTES + chunk.lengths[0].itemsize * 2)
    needed = int(size / sampled * num_pairs)
    free = shutil.disk_usage(root).free
    logger.info("cache %s: about %.1f MiB for %d pairs, %.1f MiB free", name, needed / 2**20, num_pairs, free / 2**20)
    if needed > free:
        raise UserError(
            f"{root}: the cache of {name} needs about {needed / 2**20:.0f} MiB but {free / 2**20:.0f} MiB are free;"
            " free space or choose another cache folder"
        )


def _make_encode(*arguments: Any) -> Callable[[int, list[tuple[str, str]]], Chunk]:
    return Encoder(*arguments).encode


def _safe_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip(".") or "corpus"


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: not a token cache ({MANIFEST_FILE} is missing)") from None
    except ValueError:
        raise UserError(f"{path}: not JSON; delete the folder to rebuild it") from None
    if manifest.get("format") != _FORMAT:
        raise UserError(f"{path}: not a token cache of format {_FORMAT}; delete the folder to rebuild it")
    return manifest


def _sum_lengths(lengths: Int[np.ndarray, "records 2"]) -> list[int]:
    """Tokens of both sides, in parts: a sum over the whole memory-mapped file would copy it into memory."""
    parts = (lengths[start : start + RECORDS_PER_SHARD] for start in range(0, len(lengths), RECORDS_PER_SHARD))
    return sum((part.sum(axis=0, dtype=np.int64) for part in parts), np.zeros(2, dtype=np.int64)).tolist()
