"""Building the token cache on Apache Beam: byte for byte the local one, with any number of workers.

The same chunks of pairs go through the same `Encoder` as locally. The number of pairs that each chunk keeps gives every
record its number; records are grouped by shard, and one worker writes each shard, in order.

  tasks -> chunks -> Encoder -> (shard, part of a chunk) -> group by shard -> ArrayRecord file and its lengths

The calling process computes the corpus' fingerprint, finds line ends (plain text files) or copies the text to numbered
files (any other corpus, gzipped files too), and writes the array of lengths and the manifest; this bounds the size of a
corpus. Workers must be able to read and write the cache's folder and to read the corpus' files. The records of a shard,
about a million, must fit into a worker's memory. Only `DirectRunner` is tested; the others get the same pipeline.

apache_beam is imported when a cache is built, not before.
"""

from __future__ import annotations

import functools
import json
import pickle
import tempfile
import threading
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from t5x_ext.contracts import Corpus, UserError
from t5x_ext.corpora.beam import (
    BeamRunner,
    Task,
    import_beam,
    make_pipeline,
    read_task,
    read_tasks,
    sent_corpus,
    write_tasks,
)
from t5x_ext.corpora.parallel_text import ParallelText
from t5x_ext.data.cache_files import (
    LENGTHS_FILE,
    MANIFEST_FILE,
    RECORDS_PER_SHARD,
    check_kept,
    make_manifest,
    shard_file,
    write_lengths,
)
from t5x_ext.data.encoding import CHUNK_PAIRS, Chunk, Encoder
from t5x_ext.data.shards import open_writer
from t5x_ext.storage.folders import whole_folder
from t5x_ext.storage.remote import is_remote

_ENCODER_FILE, _COUNTS_FILE, _MISTAKES_FILE = "encoder.pickle", "counts.json", "errors.json"


class _Part(NamedTuple):
    """The records of a chunk that belong to one shard."""

    chunk: int
    ids: bytes
    lengths: np.ndarray  # int32 [records, 2]


def build(corpus: Corpus, encoder: Encoder, folder: str, identity: Mapping[str, Any], runner: BeamRunner) -> None:
    """Builds a cache in a folder, local or remote.

    A local folder appears when it is complete. A remote one is complete once it has its manifest, which is written
    last; if this build fails, the next one completes it.

    Args:
      corpus: the pairs.
      encoder: cleans and tokenises them.
      folder: the cache's own folder, which all workers can read and write.
      identity: the part of the manifest that the content depends on.
      runner: where Beam runs.

    Raises:
      UserError: if Beam is not installed, the runner refuses its options, the corpus raises it or is empty, or cleaning
        keeps no pair. Other errors on a worker are raised as Beam's.
    """
    beam = import_beam()
    pipeline = make_pipeline(beam, runner)
    if is_remote(folder):
        _build(beam, pipeline, corpus, encoder, epath.Path(folder), identity)
        return
    with whole_folder(Path(folder), MANIFEST_FILE) as temporary:
        _build(beam, pipeline, corpus, encoder, epath.Path(temporary), identity)


def _build(
    beam: ModuleType, pipeline: Any, corpus: Corpus, encoder: Encoder, folder: epath.Path, identity: Mapping[str, Any]
) -> None:
    scratch = folder / f"scratch-{uuid.uuid4().hex}"
    scratch.mkdir(parents=True)
    try:
        tasks, num_pairs = write_tasks(corpus, scratch, CHUNK_PAIRS)
        (scratch / _ENCODER_FILE).write_bytes(pickle.dumps(encoder.arguments))
        _run(beam, pipeline, tasks, sent_corpus(corpus), encoder, str(folder), str(scratch))
        mistakes = json.loads((scratch / _MISTAKES_FILE).read_text())
        if mistakes:
            raise UserError(min(mistakes)[1])
        counts = Counter(json.loads((scratch / _COUNTS_FILE).read_text()))
        shards, tokens = _join_lengths(folder, scratch)
        check_kept(corpus.name, len(shards), counts)
        manifest = make_manifest(dict(identity), corpus.name, num_pairs, encoder, counts, tokens, shards)
    finally:
        scratch.rmtree()
    (folder / MANIFEST_FILE).write_text(manifest)


def _run(
    beam: ModuleType,
    pipeline: Any,
    tasks: str,
    corpus: ParallelText | None,
    encoder: Encoder,
    folder: str,
    scratch: str,
) -> None:
    with pipeline:
        encoded = (
            pipeline
            | beam.Create([tasks])
            | "read tasks" >> beam.FlatMap(read_tasks)
            | "spread chunks" >> beam.Reshuffle()
            | "encode" >> beam.FlatMap(_encode, corpus, scratch).with_outputs("mistakes", main="chunks")
        )
        first_records = (
            encoded.chunks
            | "count kept" >> beam.Map(_count_kept)
            | "all counts" >> beam.combiners.ToList()
            | "number records" >> beam.Map(_first_records)
        )
        (
            encoded.chunks
            | "split by shard"
            >> beam.FlatMap(_split_by_shard, beam.pvalue.AsSingleton(first_records), RECORDS_PER_SHARD)
            | "group by shard" >> beam.GroupByKey()
            | "write shard" >> beam.Map(_write_shard, folder, scratch, encoder.dtype.itemsize)
        )
        (
            encoded.chunks
            | "counts" >> beam.Map(_counts)
            | "add counts" >> beam.CombineGlobally(_add)
            | "write counts" >> beam.Map(_write_json, f"{scratch}/{_COUNTS_FILE}")
        )
        (
            encoded.mistakes
            | "all mistakes" >> beam.combiners.ToList()
            | "write mistakes" >> beam.Map(_write_json, f"{scratch}/{_MISTAKES_FILE}")
        )


def _encode(task: Task, corpus: ParallelText | None, scratch: str) -> Iterator[Any]:
    from apache_beam.pvalue import TaggedOutput

    try:
        chunk = _encoder(scratch, threading.get_ident()).encode(task.number, read_task(task, corpus, scratch))
        yield task.number, chunk
    except UserError as error:
        yield TaggedOutput("mistakes", (task.number, str(error)))


@functools.lru_cache(maxsize=256)
def _encoder(scratch: str, thread: int) -> Encoder:
    """One for each thread, because an encoder stores segmentations of words while it samples."""
    return Encoder(*pickle.loads((epath.Path(scratch) / _ENCODER_FILE).read_bytes()))


def _count_kept(numbered: tuple[int, Chunk]) -> tuple[int, int]:
    number, chunk = numbered
    return number, len(chunk.lengths[0])


def _first_records(kept: Iterable[tuple[int, int]]) -> dict[int, int]:
    """For every chunk the number of its first pair within a variant of the cache."""
    firsts, first = {}, 0
    for number, count in sorted(kept):
        firsts[number] = first
        first += count
    return firsts


def _split_by_shard(
    numbered: tuple[int, Chunk], first_records: Mapping[int, int], records_per_shard: int
) -> Iterator[tuple[tuple[int, int], _Part]]:
    """The parts of a chunk by (variant, number of the shard)."""
    number, chunk = numbered
    first = first_records[number]
    for variant, (ids, lengths) in enumerate(zip(chunk.ids, chunk.lengths)):
        ends = np.concatenate([[0], np.cumsum(lengths.sum(axis=1, dtype=np.int64))])
        itemsize = len(ids) // int(ends[-1]) if ends[-1] else 0
        for shard in range(first // records_per_shard, -(-(first + len(lengths)) // records_per_shard)):
            start = max(shard * records_per_shard - first, 0)
            stop = min((shard + 1) * records_per_shard - first, len(lengths))
            part = ids[ends[start] * itemsize : ends[stop] * itemsize]
            yield (variant, shard), _Part(number, part, lengths[start:stop])


def _write_shard(group: tuple[tuple[int, int], Iterable[_Part]], folder: str, scratch: str, itemsize: int) -> None:
    (variant, shard), parts = group
    ordered = sorted((_Part(*part) for part in parts), key=lambda part: part.chunk)
    lengths = np.concatenate([part.lengths for part in ordered])
    name = shard_file(variant, shard)
    with tempfile.TemporaryDirectory() as local:
        # array_record writes local files only.
        writer = open_writer(Path(local) / name)
        for part in ordered:
            ends = (np.cumsum(part.lengths.sum(axis=1, dtype=np.int64)) * itemsize).tolist()
            for start, end in zip([0, *ends], ends):
                writer.write(part.ids[start:end])
        writer.close()
        np.save(Path(local) / f"{name}.npy", lengths)
        # Beam may run a task twice, even at the same time: each writes a file of its own and then renames it.
        for file, target in ((name, folder), (f"{name}.npy", scratch)):
            partial = epath.Path(scratch) / f"{uuid.uuid4().hex}.partial"
            epath.Path(local, file).copy(partial)
            partial.replace(epath.Path(target) / file)


def _counts(numbered: tuple[int, Chunk]) -> Counter[str]:
    return numbered[1].counts


def _add(counters: Iterable[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return total


def _write_json(value: Any, path: str) -> None:
    epath.Path(path).write_text(json.dumps(value))


def _join_lengths(folder: epath.Path, scratch: epath.Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Writes the array of all lengths; returns the manifest's list of shards and the tokens of both sides."""
    names = sorted(path.name for path in scratch.glob("*.array_record.npy"))
    shards, tokens = [], np.zeros(2, dtype=np.int64)
    with tempfile.TemporaryFile() as joined:
        for name in names:
            with (scratch / name).open("rb") as file:
                lengths = np.load(file)
            joined.write(lengths.tobytes())
            tokens += lengths.sum(axis=0, dtype=np.int64)
            shards.append({"file": name.removesuffix(".npy"), "records": len(lengths)})
        records = sum(shard["records"] for shard in shards)
        write_lengths(folder / LENGTHS_FILE, [joined], records)
    return shards, tokens.tolist()
