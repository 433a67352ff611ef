"""The token cache: every pair of a corpus tokenised once, offline, and read by number.

A cache is a folder `<root>/<corpus name>-<hash>` with ArrayRecord shards of token ids, the array of all lengths, and
`manifest.json`. The hash covers what decides its content: corpus, vocabulary, cleaning, subword sampling and format.
Directions, tags, end of sentence, length limits and model sizes are not in it; they are applied when batches are
planned. A cache is written beside its place and moved there when whole, so that a half-written one is never read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import socket
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from t5x_ext.contracts import Corpus, UserError
from t5x_ext.data.cleaning import CleaningConfig, clean_line
from t5x_ext.data.shards import Shard, open_writer
from t5x_ext.data.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
LENGTHS_FILE = "lengths.npy"
_FORMAT = 1

_RECORD_OVERHEAD_BYTES = 8
_RECORDS_PER_SHARD = 1 << 20
_CHUNK_PAIRS = 8192
_PAIRS_WORTH_PROCESSES = 200_000
_MAX_PROCESSES = 16
_ESTIMATE_PAIRS = 4096


@dataclass(frozen=True)
class SubwordSampling:
    """Several random segmentations of every line instead of its best one.

    The cache holds `variants` segmentations of every pair; the pass number over the corpus, modulo `variants`, picks
    the one that is read, so that sampling costs disk space and no time during training.

    Attributes:
      variants: segmentations a pair; 0: the best one only.
      alpha: small for varied, large for likely segmentations, see `Vocabulary.sample`. On Multi30k with 8,000
        pieces 0.2, 0.3 and 0.5 make lines 30, 11 and 3 % longer.
    """

    variants: int = 0
    alpha: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.variants <= 64:
            raise UserError(f"SubwordSampling.variants={self.variants}: must be 0 (off) to 64")
        if not 0 < self.alpha <= 1:
            raise UserError(f"SubwordSampling.alpha={self.alpha}: must be above 0 and at most 1")

    @property
    def stored(self) -> int:
        """Segmentations that a cache holds of every pair."""
        return max(1, self.variants)


class Tokens(NamedTuple):
    """Token ids of several records end to end: the source of a record, its target, then the next record.

    `ids` is uint16 or int32; `source_lengths` and `target_lengths` are int32, one a record.
    """

    ids: Int[np.ndarray, " tokens"]
    source_lengths: Int[np.ndarray, " records"]
    target_lengths: Int[np.ndarray, " records"]


class TokenCache:
    """A finished cache, opened for reading.

    Records are numbered variant by variant: record `variant * num_pairs + pair`.

    Attributes:
      path: its folder.
      manifest: the content of `manifest.json`.
      lengths: int32 [records, 2], tokens of both sides.
    """

    def __init__(self, path: str):
        """Opens a cache folder and checks that it is whole.

        Raises:
          UserError: where it is not a cache of this format, or shards, lengths and manifest do not fit each other.
        """
        self.path = str(path)
        folder = Path(path)
        self.manifest = _read_manifest(folder)
        try:
            self.lengths: Int[np.ndarray, "records 2"] = np.load(folder / LENGTHS_FILE, mmap_mode="r")
        except (OSError, ValueError):
            raise UserError(
                f"{folder / LENGTHS_FILE}: missing or damaged; delete the folder to build it anew"
            ) from None
        shards = self.manifest["shards"]
        self._shards = [Shard(folder / shard["file"], shard["records"]) for shard in shards]
        self._starts = list(accumulate((shard["records"] for shard in shards), initial=0))
        if len(self.lengths) != self._starts[-1] or self._starts[-1] != self.num_pairs * self.variants:
            raise UserError(f"{path}: lengths, shards and manifest differ; delete the folder to build it anew")
        if self.manifest["tokens"] != _sum_lengths(self.lengths):
            raise UserError(f"{folder / LENGTHS_FILE}: damaged; delete the folder to build it anew")
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
        """Pairs kept after cleaning."""
        return self.manifest["pairs"]

    @property
    def variants(self) -> int:
        """Segmentations stored of every pair."""
        return self.manifest["variants"]

    def read_tokens(self, records: Int[np.ndarray, " records"]) -> Tokens:
        """The records with these numbers, in this order, in one batched read a shard.

        Raises:
          UserError: where a shard has been damaged since the cache was opened, or cannot be read (see `Shard`).
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
            places = np.flatnonzero(shards == shard)
            local = (records[places] - self._starts[shard]).tolist()
            for place, blob in zip(places.tolist(), self._shards[shard].read(local, sizes[places].tolist())):
                blobs[place] = blob
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
    cleaning: CleaningConfig | None = None,
    subword: SubwordSampling | None = None,
    num_processes: int | None = None,
) -> TokenCache:
    """Tokenises a corpus, or opens the cache that holds it already.

    Args:
      corpus: the pairs; read three times (fingerprint, count, tokens).
      vocabulary: what tokenises them.
      root: local folder of all caches; made if it is missing.
      cleaning: which pairs are left out.
      subword: how many segmentations of every pair.
      num_processes: worker processes; None: one a core for more than 200,000 pairs, otherwise none. The result is the
        same, byte for byte, for any number.

    Raises:
      UserError: for what the corpus raises, an empty corpus, too little free disk space, a remote `root`, and a
        corpus of which nothing is left after cleaning. Nothing half-written stays behind.
    """
    cleaning, subword = cleaning or CleaningConfig(), subword or SubwordSampling()
    if "://" in str(root):
        raise UserError(f"{root}: token caches are read at random and need a local folder")
    identity = {
        "format": _FORMAT,
        "corpus": corpus.fingerprint(),
        "languages": list(corpus.languages),
        "vocabulary": vocabulary.fingerprint(),
        "cleaning": asdict(cleaning),
        "subword": asdict(subword) if subword.variants else None,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = Path(root) / f"{_safe_name(corpus.name)}-{digest[:16]}"
    if not (folder / MANIFEST_FILE).exists():
        encoder = _Encoder(vocabulary.model, vocabulary.languages, cleaning, subword)
        _build(corpus, encoder, folder, identity, num_processes)
    return TokenCache(str(folder))


class _Chunk(NamedTuple):
    """A chunk of pairs, tokenised: rules that dropped pairs, and for every variant all ids and [pairs, 2] lengths."""

    counts: Counter[str]
    ids: list[bytes]
    lengths: list[np.ndarray]


class _Encoder:
    """Turns a numbered chunk of pairs into tokens: a pure function of the chunk, wherever it runs."""

    def __init__(self, model: bytes, languages: Sequence[str], cleaning: CleaningConfig, subword: SubwordSampling):
        self.arguments = (model, languages, cleaning, subword)
        self._vocabulary = Vocabulary.from_model(model, languages)
        self._cleaning = cleaning
        self._subword = subword
        self.dtype = np.dtype("<u2" if self._vocabulary.size <= 1 << 16 else "<i4")

    def encode(self, number: int, pairs: Sequence[tuple[str, str]]) -> _Chunk:
        counts: Counter[str] = Counter()
        lines: list[str] = []
        for source, target in pairs:
            cleaned = clean_line(source), clean_line(target)
            counts["changed_lines"] += (cleaned[0] != source) + (cleaned[1] != target)
            rule = self._cleaning.rule_against(*cleaned)
            if rule is None:
                lines += cleaned
            else:
                counts[rule] += 1
        variants = [self._segment(lines, number, variant) for variant in range(self._subword.stored)]
        ids = [np.concatenate([*sides, np.zeros(0, np.int32)]).astype(self.dtype).tobytes() for sides in variants]
        lengths = [np.array([len(side) for side in sides], dtype=np.int32).reshape(-1, 2) for sides in variants]
        return _Chunk(counts, ids, lengths)

    def _segment(self, lines: Sequence[str], number: int, variant: int) -> list[np.ndarray]:
        if not self._subword.variants:
            return self._vocabulary.encode(lines)
        seed = int.from_bytes(hashlib.sha256(f"{number}/{variant}".encode()).digest()[:4], "little")
        return self._vocabulary.sample(lines, self._subword.alpha, seed)


_worker_encoder: _Encoder | None = None


def _start_worker(*arguments: Any) -> None:
    global _worker_encoder
    _worker_encoder = _Encoder(*arguments)


def _encode_in_worker(number: int, pairs: list[tuple[str, str]]) -> _Chunk:
    assert _worker_encoder is not None
    return _worker_encoder.encode(number, pairs)


def _build(
    corpus: Corpus, encoder: _Encoder, folder: Path, identity: dict[str, Any], num_processes: int | None
) -> None:
    num_pairs, sample = _count(corpus)
    if not num_pairs:
        raise UserError(f"{corpus.name}: the corpus is empty")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _check_disk(corpus.name, num_pairs, encoder.encode(0, sample), len(sample), folder.parent)
    processes = _choose_processes(num_pairs, num_processes)
    with _temporary_folder(folder) as temporary:
        progress = tqdm(total=num_pairs, desc=f"cache {corpus.name}", unit=" pairs", disable=None)
        with progress, _Writer(temporary, encoder.dtype) as writer:
            for chunk in _encoded_chunks(corpus.pairs(), encoder, processes):
                writer.add(chunk)
                progress.update(len(chunk.lengths[0]) + sum(n for r, n in chunk.counts.items() if r != "changed_lines"))
        counts = dict(sorted(writer.counts.items()))
        if not writer.num_pairs:
            raise UserError(f"{corpus.name}: no pair is left after cleaning ({counts})")
        manifest = {
            **identity,
            "name": corpus.name,
            "pairs_read": num_pairs,
            "pairs": writer.num_pairs,
            "variants": len(writer.shards_of),
            "dropped": {rule: count for rule, count in counts.items() if rule != "changed_lines"},
            "changed_lines": counts.get("changed_lines", 0),
            "tokens": writer.save_lengths(),
            "dtype": encoder.dtype.str,
            "shards": [shard for shards in writer.shards_of for shard in shards],
        }
        (temporary / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
    logger.info(
        "cache %s: %d of %d pairs kept, dropped %s", folder.name, writer.num_pairs, num_pairs, manifest["dropped"] or 0
    )


def _count(corpus: Corpus) -> tuple[int, list[tuple[str, str]]]:
    """Number of pairs, and a few spread evenly over the corpus. Also finds every unreadable line before any writing."""
    sample: list[tuple[str, str]] = []
    stride, count = 1, 0
    for count, pair in enumerate(corpus.pairs(), start=1):
        if (count - 1) % stride == 0:
            sample.append(pair)
            if len(sample) == _ESTIMATE_PAIRS:
                sample, stride = sample[::2], 2 * stride
    return count, sample


def _check_disk(name: str, num_pairs: int, chunk: _Chunk, sampled: int, root: Path) -> None:
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


def _choose_processes(num_pairs: int, num_processes: int | None) -> int:
    if num_processes is not None:
        return num_processes
    return min(os.cpu_count() or 1, _MAX_PROCESSES) if num_pairs > _PAIRS_WORTH_PROCESSES else 1


def _encoded_chunks(pairs: Iterator[tuple[str, str]], encoder: _Encoder, processes: int) -> Iterator[_Chunk]:
    chunks = enumerate(iter(lambda: list(islice(pairs, _CHUNK_PAIRS)), []))
    if processes <= 1:
        for number, chunk in chunks:
            yield encoder.encode(number, chunk)
        return
    # Workers are spawned, not forked: JAX may hold threads in this process.
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[_Chunk]] = deque()
    try:
        with ProcessPoolExecutor(processes, context, _start_worker, encoder.arguments) as pool:
            for number, chunk in chunks:
                waiting.append(pool.submit(_encode_in_worker, number, chunk))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a tokenising process died: out of memory, or the calling script lacks `if __name__ == '__main__':`"
            " (num_processes=1 needs neither)"
        ) from None


class _Writer(ExitStack):
    """Writes chunks into shards, the same number of records a shard whatever the chunks."""

    def __init__(self, folder: Path, dtype: np.dtype):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.num_pairs = 0
        self.shards_of: list[list[dict[str, Any]]] = []
        self._folder = folder
        self._itemsize = dtype.itemsize
        self._lengths: list[list[np.ndarray]] = []
        self._writers: list[Any] = []

    def add(self, chunk: _Chunk) -> None:
        """Appends a chunk's records."""
        self.counts.update(chunk.counts)
        if not self._writers:
            self.shards_of = [[] for _ in chunk.ids]
            self._lengths = [[] for _ in chunk.ids]
            self._writers = [None for _ in chunk.ids]
        for variant, (ids, lengths) in enumerate(zip(chunk.ids, chunk.lengths)):
            self._lengths[variant].append(lengths)
            ends = (np.cumsum(lengths.sum(axis=1)) * self._itemsize).tolist()
            for start, end in zip([0, *ends], ends):
                self._write(variant, ids[start:end])
        self.num_pairs += len(chunk.lengths[0])

    def _write(self, variant: int, record: bytes) -> None:
        shards = self.shards_of[variant]
        if not shards or shards[-1]["records"] == _RECORDS_PER_SHARD:
            self._close_shard(variant)
            name = f"tokens-{variant:02d}-{len(shards):05d}.array_record"
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
        """Writes the array of lengths; returns the tokens of both sides, all variants together."""
        lengths = np.concatenate([part for parts in self._lengths for part in parts])
        np.save(self._folder / LENGTHS_FILE, lengths)
        return lengths.sum(axis=0, dtype=np.int64).tolist()


@contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place at the end, and is removed if anything fails."""
    prefix = f".{folder.name}-{socket.gethostname()}-"
    _remove_abandoned(folder.parent.glob(f"{prefix}*"), prefix)
    temporary = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            # Another process finished the same content first; a folder without a manifest is not one of ours.
            if not (folder / MANIFEST_FILE).exists():
                raise UserError(f"{folder}: is in the way of a token cache; remove it") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_abandoned(folders: Iterable[Path], prefix: str) -> None:
    """Removes what builds of this machine left behind when they were killed."""
    for folder in folders:
        process = folder.name.removeprefix(prefix).split("-")[0]
        if process.isdigit() and not _is_alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _safe_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip(".") or "corpus"


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: not a token cache ({MANIFEST_FILE} is missing)") from None
    except ValueError:
        raise UserError(f"{path}: not JSON; delete the folder to build it anew") from None
    if manifest.get("format") != _FORMAT:
        raise UserError(f"{path}: not a token cache of format {_FORMAT}; delete the folder to build it anew")
    return manifest


def _sum_lengths(lengths: Int[np.ndarray, "records 2"]) -> list[int]:
    """Tokens of both sides; a sum over a whole memory-mapped file at once would need it twice in memory."""
    parts = (lengths[start : start + _RECORDS_PER_SHARD] for start in range(0, len(lengths), _RECORDS_PER_SHARD))
    return sum((part.sum(axis=0, dtype=np.int64) for part in parts), np.zeros(2, dtype=np.int64)).tolist()
