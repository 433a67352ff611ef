"""The token cache built on Apache Beam: byte for byte the local one, by as many workers as the runner has.

What runs here runs there: chunks of the same pairs go through the same `Encoder`; the numbers of pairs that chunks keep
give every record its number, records are grouped by shard, and each shard is written by one worker, in order.

  tasks -> chunks -> Encoder -> (shard, part of a chunk) -> group by shard -> ArrayRecord file and its lengths

What remains with the calling process, and bounds the size of a corpus: its fingerprint, the search for line ends (a
corpus of plain text files) or a copy of its text in numbered files (any other corpus, gzipped files too), the array of
lengths, and the manifest. Workers must reach the cache's folder, and text files where they lie; the records of a shard,
about a million, must fit a worker's memory. Only `DirectRunner` is tested: the others get the same pipeline.

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
from t5x_ext.storage.folders import is_remote, whole_folder

_ENCODER_FILE, _COUNTS_FILE, _MISTAKES_FILE = "encoder.pickle", "counts.json", "errors.json"


class _Part(NamedTuple):
    """What a chunk gives to one shard."""

    chunk: int
    ids: bytes
    lengths: np.ndarray  # int32 [records, 2]


def build(corpus: Corpus, encoder: Encoder, place: str, identity: Mapping[str, Any], runner: BeamRunner) -> None:
    """Builds a cache in the folder `place`, local or remote.

    A local folder appears whole or not at all; a remote one is whole once it has its manifest, which comes last, and is
    completed by the next build where this one fails.

    Args:
      corpus: the pairs.
      encoder: what cleans and tokenises them.
      place: the cache's own folder, which all workers reach.
      identity: the part of the manifest that decides the content.
      runner: where Beam runs.

    Raises:
      UserError: if Beam is not installed or the runner refuses its options, for what the corpus raises, an empty
        corpus, and one of which nothing is left after cleaning. What else fails on a worker is Beam's error.
    """
    beam = import_beam()
    pipeline = make_pipeline(beam, runner)
    if is_remote(place):
        _build(beam, pipeline, corpus, encoder, epath.Path(place), identity)
        return
    with whole_folder(Path(place), MANIFEST_FILE) as temporary:
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
            | "cut" >> beam.FlatMap(_cut, beam.pvalue.AsSingleton(first_records), RECORDS_PER_SHARD)
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
    """One a thread: an encoder remembers words while it samples segmentations."""
    return Encoder(*pickle.loads((epath.Path(scratch) / _ENCODER_FILE).read_bytes()))


def _count_kept(numbered: tuple[int, Chunk]) -> tuple[int, int]:
    number, chunk = numbered
    return number, len(chunk.lengths[0])


def _first_records(kept: Iterable[tuple[int, int]]) -> dict[int, int]:
    """The number that a chunk's first pair has in a variant of the cache."""
    firsts, first = {}, 0
    for number, count in sorted(kept):
        firsts[number] = first
        first += count
    return firsts


def _cut(
    numbered: tuple[int, Chunk], first_records: Mapping[int, int], records_per_shard: int
) -> Iterator[tuple[tuple[int, int], _Part]]:
    """The parts of a chunk that belong to different shards, by variant and number of the shard."""
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
        # Beam may do a piece of work twice, at the same time even: each writes a file of its own and then renames it.
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
