#!/usr/bin/env python3
"""Measures the data loader: target tokens a second from a token cache, how full rows are, and memory of planning.

  taskset -c 0-3 scripts/bench_loader.py --json_out=loader.json

Without --cache it writes one of random tokens whose lengths are log-normal as those of WMT22's en-de test set: 2,037
segments under a joint SentencePiece model of 16,000 pieces trained on the en-de and de-en texts have 22.3 and 23.1
tokens a side, end of sentence included; their logarithms have means 2.93 and 2.96, deviations 0.62 and 0.61, and a
correlation of 0.95.

Speed counts what a training step would be given: batches of all arrays, taken one after the other from the iterator
that training uses. Target tokens are real ones, end of sentence counted, padding not. The cache is in the page cache
after a first pass, as it is on a machine with memory to spare.

Memory is measured in a process for each number of examples, which plans one whole epoch from lengths in a file. The
file is memory-mapped: its pages are counted by the system as the process's own while they are in memory, and given back
when memory is needed. So the table shows them apart from the memory that the plan takes for itself.
"""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from absl import app, flags

from t5x_ext.corpora import PairRules
from t5x_ext.data import (
    BatchConfig,
    BatchPlan,
    PackedBatches,
    Stream,
    SubwordSampling,
    TagPolicy,
    TokenCache,
    Vocabulary,
    batch_iterator,
    train_vocabulary,
)
from t5x_ext.data.cache_files import MANIFEST_FILE, CacheWriter, make_manifest
from t5x_ext.data.encoding import Chunk, Encoder

_CACHE = flags.DEFINE_string("cache", None, "folder of one token cache; by default one is made, and removed")
_PAIRS = flags.DEFINE_integer("pairs", 1_000_000, "pairs of the cache that is made", lower_bound=1000)
_LENGTHS = flags.DEFINE_multi_integer("length", [256, 512], "tokens a row, both sides")
_THREADS = flags.DEFINE_multi_integer("threads", [0, 1, 2, 3], "reading threads of grain; 0: none")
_TOKENS = flags.DEFINE_integer("tokens_per_batch", 65_536, "positions of a batch, a side", lower_bound=1024)
_SECONDS = flags.DEFINE_float("seconds", 10.0, "how long each speed is measured")
_EXAMPLES = flags.DEFINE_multi_integer("examples", [10**6, 10**7, 10**8], "examples of which memory is measured")
_JSON_OUT = flags.DEFINE_string("json_out", None, "file for the figures as JSON")

_LOG_MEANS, _LOG_DEVIATIONS, _CORRELATION = (2.93, 2.96), (0.62, 0.61), 0.95
_LONGEST = 200
_VOCABULARY_SIZE = 32_000


def main(argv: Sequence[str]) -> None:
    """Measures and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    logging.getLogger("t5x_ext").setLevel(logging.WARNING)
    figures: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "speed": [], "memory": []}
    print(f"{figures['cores']} cores")
    with tempfile.TemporaryDirectory() as folder:
        cache = TokenCache(_CACHE.value or _make_cache(Path(folder) / "cache", _PAIRS.value))
        print(f"\n{cache.num_pairs:,} pairs, {cache.lengths[:, 1].mean() + 1:.1f} target tokens a pair on average")
        print(f"{'length':>6} {'threads':>7} {'target tokens/s':>16} {'batches/s':>9} {'density':>8}")
        for length, threads in itertools.product(_LENGTHS.value, _THREADS.value):
            speed = _measure_speed(cache, length, threads)
            figures["speed"].append(speed)
            rates = f"{speed['target_tokens_per_second']:>16,.0f} {speed['batches_per_second']:>9.1f}"
            print(f"{length:>6} {threads:>7} {rates} {speed['density']:>8.2%}", flush=True)
        print(f"\n{'examples':>11} {'own MiB':>8} {'mapped MiB':>10} {'lengths MiB':>11} {'s to plan an epoch':>18}")
        for examples in _EXAMPLES.value:
            memory = _measure_memory(Path(folder) / "lengths.npy", examples)
            figures["memory"].append(memory)
            sizes = f"{memory['own_mib']:>8.0f} {memory['mapped_mib']:>10.0f} {memory['file_mib']:>11.0f}"
            print(f"{examples:>11,} {sizes} {memory['plan_seconds']:>18.1f}", flush=True)
    if _JSON_OUT.value:
        Path(_JSON_OUT.value).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _draw_lengths(random: np.random.Generator, count: int) -> np.ndarray:
    """Tokens without end of sentence, int32 [count, 2]."""
    first, second = random.normal(size=(2, count))
    second = _CORRELATION * first + np.sqrt(1 - _CORRELATION**2) * second
    sides = [
        np.exp(mean + deviation * draw) for mean, deviation, draw in zip(_LOG_MEANS, _LOG_DEVIATIONS, (first, second))
    ]
    return (np.clip(np.rint(np.stack(sides, axis=1)), 2, _LONGEST) - 1).astype(np.int32)


def _vocabulary() -> Vocabulary:
    return train_vocabulary(["a few letters"], 300, ("en", "de"))


def _make_cache(folder: Path, pairs: int) -> str:
    folder.mkdir()
    random, vocabulary = np.random.default_rng(0), _vocabulary()
    encoder = Encoder(vocabulary.model, vocabulary.languages, SubwordSampling(), PairRules(), ("en", "de"))
    with CacheWriter(folder, encoder.dtype) as writer:
        for start in range(0, pairs, 8192):
            lengths = _draw_lengths(random, min(8192, pairs - start))
            ids = random.integers(0, _VOCABULARY_SIZE, lengths.sum(), dtype=encoder.dtype)
            writer.add(Chunk(Counter(), [ids.tobytes()], [lengths]))
        tokens, shards = writer.save_lengths(), writer.shards_of[0]
    identity = {"format": 1, "corpus": "synthetic", "languages": ["en", "de"]}
    manifest = make_manifest(identity, "synthetic", pairs, encoder, writer.counts, tokens, shards)
    (folder / MANIFEST_FILE).write_text(manifest)
    return str(folder)


def _plan(cache: Any, length: int, rows: int, vocabulary: Vocabulary) -> BatchPlan:
    config = BatchConfig(rows=rows, source_length=length, target_length=length)
    return BatchPlan([Stream(cache)], vocabulary, TagPolicy(), config, seed=0)


def _measure_speed(cache: TokenCache, length: int, threads: int) -> dict[str, Any]:
    vocabulary = _vocabulary()
    batches = PackedBatches(_plan(cache, length, _TOKENS.value // length, vocabulary), vocabulary)
    iterator = batch_iterator(batches, num_threads=threads)
    for _ in range(20):
        next(iterator)
    tokens = count = 0
    start = time.perf_counter()
    while (seconds := time.perf_counter() - start) < _SECONDS.value:
        tokens += np.count_nonzero(next(iterator)["target_segment_ids"])
        count += 1
    return {
        "length": length,
        "threads": threads,
        "target_tokens_per_second": tokens / seconds,
        "batches_per_second": count / seconds,
        "density": tokens / (count * _TOKENS.value),
    }


def _measure_memory(path: Path, examples: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    lengths = np.lib.format.open_memmap(path, "w+", np.int32, (examples, 2))
    for start in range(0, examples, 1 << 20):
        lengths[start : start + (1 << 20)] = _draw_lengths(random, min(1 << 20, examples - start))
    lengths.flush()
    del lengths
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_plan_epoch, str(path)).result()


def _plan_epoch(path: str) -> dict[str, Any]:
    """Plans an epoch, and what it took above what Python and its libraries take."""
    lengths, vocabulary = np.load(path, mmap_mode="r"), _vocabulary()
    cache = SimpleNamespace(
        path=path, name="synthetic", languages=("en", "de"), lengths=lengths, variants=1, num_pairs=len(lengths)
    )
    before = _resident()
    peak = Counter(before)
    stop = threading.Event()
    watch = threading.Thread(target=_watch, args=(peak, stop))
    watch.start()
    start = time.perf_counter()
    plan = _plan(cache, 256, 256, vocabulary)
    batches = plan.batches_per_epoch(0)
    seconds = time.perf_counter() - start
    stop.set()
    watch.join()
    return {
        "examples": len(lengths),
        "batches": batches,
        "own_mib": (peak["RssAnon"] - before["RssAnon"]) / 2**10,
        "mapped_mib": (peak["RssFile"] - before["RssFile"]) / 2**10,
        "file_mib": lengths.nbytes / 2**20,
        "plan_seconds": seconds,
    }


def _watch(peak: Counter[str], stop: threading.Event) -> None:
    while not stop.wait(0.005):
        for name, kib in _resident().items():
            peak[name] = max(peak[name], kib)


def _resident() -> dict[str, int]:
    """Resident memory in KiB by kind, as Linux counts it."""
    return {name: int(kib) for name, kib in _status_lines() if name.startswith("Rss")}


def _status_lines() -> Iterator[tuple[str, str]]:
    yield from re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)


if __name__ == "__main__":
    app.run(main)
