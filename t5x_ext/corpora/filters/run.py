"""Filtering of corpora: resumable, with several processes or on Apache Beam, always with the same bytes.

`filter_task` filters chunks of a corpus into files of a scratch folder, `.filter-<digest>` in the output folder. Then
duplicates are found over all chunks, and the kept lines are joined in order. The scratch folder survives a killed
process: the next one with the same corpora and configuration resumes from its chunks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

from etils import epath
from tqdm import tqdm

from t5x_ext.contracts import Corpus, UserError
from t5x_ext.corpora.beam import BeamRunner, read_tasks, sent_corpus, write_tasks
from t5x_ext.corpora.filters import chunks
from t5x_ext.corpora.filters.chunks import (
    ChunkFilter,
    make_filter_task,
    read_chunk,
    read_keys,
)
from t5x_ext.corpora.filters.config import FilterConfig
from t5x_ext.corpora.filters.duplicates import DUPLICATE_RULES, Verdicts, find_later, keys_of_partition, partition_bits
from t5x_ext.corpora.filters.held_out import hold_out, write_held_out
from t5x_ext.corpora.filters.on_beam import check_runner, filter_on_beam
from t5x_ext.corpora.filters.report import CorpusReport, FilterReport
from t5x_ext.corpora.filters.rules import library_version
from t5x_ext.corpora.filters.transforms import TRANSFORMS
from t5x_ext.corpora.parallel_text import ParallelText
from t5x_ext.corpora.workers import choose_processes, work_in_order
from t5x_ext.storage.files import write_bytes
from t5x_ext.storage.remote import is_remote

logger = logging.getLogger(__name__)

REPORT_FILE = "report.json"
_SCRATCH_PREFIX = ".filter-"
_FORMAT = 2
_PAIRS_WORTH_PROCESSES = 50_000
_LIBRARIES = ("babel", "datasketch", "py3langid", "regex")


@dataclass(frozen=True)
class _Job:
    """A corpus and the names of its output; one language if both sides are the same text."""

    corpus: Corpus
    name: str
    languages: tuple[str, ...]

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(f"{self.name}.{language}" for language in self.languages)


def filter_corpora(
    corpora: Sequence[Corpus],
    output_dir: str,
    config: FilterConfig | None = None,
    num_processes: int | None = None,
    beam: BeamRunner | None = None,
    held_out: Sequence[Corpus] = (),
) -> FilterReport:
    """Filters corpora into files `NAME.LANGUAGE` of a folder, one a side; `report.json` is written last.

    A corpus whose two languages are equal is text of one language: the first line of every pair. The order of lines is
    kept. Call it again after a kill to resume; after it has finished, it returns the report. The bytes are the same for
    any number of processes, any runner and any interruptions. Memory: about 200 MB and a chunk for every process, two
    bytes for every duplicate and kind of key, and 100 bytes for every held-out line, for any size of the corpora.

    Args:
      corpora: what is filtered; read three times. Their names must differ.
      output_dir: a folder, made if it is missing; remote (`gs://`) only with `beam`.
      config: the rules.
      num_processes: worker processes; None: one a core for more than 50,000 pairs, otherwise none.
      beam: filter on Apache Beam instead; its workers must be able to read and write `output_dir`.
      held_out: test sets, parallel or of one language. A pair is dropped if either side is one of their lines in the
        same language, see `filters.held_out`.

    Raises:
      UserError: if a corpus raises it, names clash, the folder has other content, a rule's library is not installed, or
        no pair of a corpus is kept. Then no files are left behind.
    """
    config = config or FilterConfig()
    jobs = _make_jobs(corpora)
    if is_remote(output_dir) and beam is None:
        raise UserError(f"{output_dir}: a remote folder is for filtering on a runner; give a local one")
    if beam is not None:
        check_runner(beam)
    for job in jobs:
        ChunkFilter(config, job.languages)
        _read_through(job.corpus)
    for corpus in held_out:
        _read_through(corpus)
    work = _digest(jobs, config, held_out)
    output = epath.Path(output_dir)
    report = _finished_report(output, work)
    if report is None:
        report = _filter_all(jobs, output, work, config, held_out, num_processes, beam)
    else:
        logger.info("%s: filtered already", output_dir)
    for left in [path for path in output.iterdir() if path.name.startswith(_SCRATCH_PREFIX)]:
        left.rmtree()
    return report


def _filter_all(
    jobs: Sequence[_Job],
    output: epath.Path,
    work: str,
    config: FilterConfig,
    held_out: Sequence[Corpus],
    num_processes: int | None,
    beam: BeamRunner | None,
) -> FilterReport:
    files = [file for job in jobs for file in job.files]
    with _scratch_folder(output, work, files) as scratch:
        if not (scratch / REPORT_FILE).exists():
            reports = [_filter(job, scratch, config, held_out, num_processes, beam) for job in jobs]
            write_bytes(scratch / REPORT_FILE, _to_text(FilterReport(work, asdict(config), tuple(reports))))
        report = FilterReport.from_json(json.loads((scratch / REPORT_FILE).read_text()))
        # From here on a restarted process only resumes moving.
        for name in (*files, REPORT_FILE):
            if (scratch / name).exists():
                (scratch / name).replace(output / name)
    return report


def _to_text(report: FilterReport) -> bytes:
    return (json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n").encode()


def _make_jobs(corpora: Sequence[Corpus]) -> list[_Job]:
    jobs = []
    for corpus in corpora:
        source, target = corpus.languages
        name: str = corpus.name
        languages: tuple[str, ...] = (source, target)
        if source == target:
            if isinstance(corpus, ParallelText) and corpus.source_path != corpus.target_path:
                raise UserError(f"{corpus.name}: both sides are {source}; text of one language has one file")
            name, languages = name.removesuffix(f".{source}-{source}"), (source,)
        if "/" in name or name.startswith("."):
            raise UserError(f"corpus name {name!r}: it becomes a file name; remove slashes and a leading dot")
        jobs.append(_Job(corpus, name, languages))
    files = Counter(file for job in jobs for file in job.files)
    clash = [file for file, count in files.items() if count > 1]
    if clash:
        raise UserError(f"two corpora would be written to {clash[0]}; give them different names")
    return jobs


def _read_through(corpus: Corpus) -> None:
    """Finds unreadable lines before anything is written."""
    if next(corpus.pairs(), None) is None:
        raise UserError(f"{corpus.name}: the corpus is empty")
    for _ in corpus.pairs():
        pass


def _digest(jobs: Sequence[_Job], config: FilterConfig, held_out: Sequence[Corpus]) -> str:
    """A digest of everything that the result depends on, versions of the rules' libraries included."""
    identity = {
        "format": _FORMAT,
        "config": asdict(config),
        "corpora": [(job.name, job.languages, job.corpus.fingerprint()) for job in jobs],
        "held_out": [corpus.fingerprint() for corpus in held_out],
        "unicode": unicodedata.unidata_version,
        "libraries": {name: library_version(name) for name in _LIBRARIES},
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _finished_report(output: epath.Path, work: str) -> FilterReport | None:
    path = output / REPORT_FILE
    if not path.exists():
        return None
    try:
        report = FilterReport.from_json(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} exists and is no report of a filtering; name another folder") from None
    missing = [file for corpus in report.corpora for file in corpus.files if not (output / file).exists()]
    if report.work != work or missing:
        reason = f"without {missing[0]}" if missing else "of other corpora or rules"
        raise UserError(f"{output} holds a filtering {reason}; name another folder, or remove it")
    return report


@contextmanager
def _scratch_folder(output: epath.Path, work: str, files: Sequence[str]) -> Iterator[epath.Path]:
    """The scratch folder: removed after a `UserError`, kept after any other interruption."""
    scratch = output / f"{_SCRATCH_PREFIX}{work[:16]}"
    if not scratch.exists():
        for file in files:
            if (output / file).exists():
                raise UserError(f"{output / file} exists already; name another folder, or remove it")
    is_new = not output.exists()
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        yield scratch
    except UserError:
        scratch.rmtree()
        if is_new:
            output.rmdir()
        raise


def _filter(
    job: _Job,
    scratch: epath.Path,
    config: FilterConfig,
    held_out: Sequence[Corpus],
    num_processes: int | None,
    beam: BeamRunner | None,
) -> CorpusReport:
    folder = scratch / f"{job.files[0]}.chunks"
    folder.mkdir(exist_ok=True)
    tasks_file, num_pairs = write_tasks(job.corpus, folder, chunks.CHUNK_PAIRS)
    hashes = hold_out(held_out, config, job.languages) if held_out else ()
    write_held_out(hashes, folder)
    chunk_filter = ChunkFilter(config, job.languages, hashes)
    columns, bits, corpus = chunk_filter.key_maker.columns, partition_bits(num_pairs), sent_corpus(job.corpus)
    arguments = (corpus, str(folder), config, job.languages)
    num_chunks = -(-num_pairs // chunks.CHUNK_PAIRS)
    if beam is not None:
        verdicts = filter_on_beam(tasks_file, *arguments, columns, bits, beam)
    else:
        processes = choose_processes(num_pairs, _PAIRS_WORTH_PROCESSES, num_processes)
        with tqdm(total=num_pairs, desc=f"filter {job.name}", unit=" pairs", disable=None) as progress:
            for number in work_in_order(make_filter_task, arguments, read_tasks(tasks_file), processes):
                progress.update(min(chunks.CHUNK_PAIRS, num_pairs - number * chunks.CHUNK_PAIRS))
        verdicts = _find_duplicates(str(folder), num_chunks, columns, bits)
    report = _join(job, folder, scratch, num_chunks, verdicts, chunk_filter)
    if not report.kept:
        raise UserError(f"{job.name}: filtering keeps no pair ({_describe(report.dropped)})")
    logger.info("filter %s: %d of %d kept, dropped %s", job.name, report.kept, report.read, _describe(report.dropped))
    return report


def _find_duplicates(folder: str, num_chunks: int, columns: Sequence[str], bits: int) -> Verdicts:
    verdicts = Verdicts()
    for column, rule in enumerate(columns):
        for partition in range(1 << bits):
            keys = ((number, *read_keys(folder, number, in_place=True)) for number in range(num_chunks))
            parts = (
                keys_of_partition(number, keys[column], rows[column], partition, bits) for number, keys, rows in keys
            )
            verdicts.add(rule, find_later(parts))
    return verdicts


def _join(
    job: _Job,
    folder: epath.Path,
    scratch: epath.Path,
    num_chunks: int,
    verdicts: Verdicts,
    chunk_filter: ChunkFilter,
) -> CorpusReport:
    """Writes the kept lines to the scratch folder, under their final names."""
    dropped, changed, read, kept = Counter[str](), Counter[str](), 0, 0
    with ExitStack() as stack:
        files = [stack.enter_context((scratch / name).open("wb")) for name in job.files]
        for number in range(num_chunks):
            chunk = read_chunk(str(folder), number)
            verdict = verdicts.of_chunk(number, len(chunk.kept))
            stays = verdict >= len(DUPLICATE_RULES)
            dropped.update(chunk.dropped)
            dropped.update(DUPLICATE_RULES[rule] for rule in verdict[~stays].tolist())
            changed.update(chunk.changed)
            read += len(chunk.kept) + chunk.dropped.total()
            kept += int(stays.sum())
            for side, file in enumerate(files):
                file.write("".join(f"{lines[side]}\n" for lines, stay in zip(chunk.kept, stays) if stay).encode())
    on = (*chunk_filter.rule_names, *dict.fromkeys(chunk_filter.key_maker.columns))
    return CorpusReport(
        job.name,
        job.languages,
        job.files,
        read,
        kept,
        {rule: dropped[rule] for rule in on},
        {transform: changed[transform] for transform in TRANSFORMS},
    )


def _describe(dropped: dict[str, int]) -> str:
    return ", ".join(f"{rule} {count:,}" for rule, count in dropped.items() if count) or "none"
