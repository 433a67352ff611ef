"""The same filtering on Apache Beam: chunks are distributed over workers, keys are grouped by partition.

  tasks -> filter_task -> (column, partition), part of a chunk's keys -> group -> find_later -> one file a partition

Workers must be able to read the scratch folder and the corpus' files. A partition of keys, about 100 MB, must fit into
a worker's memory. Only `DirectRunner` is tested; the others get the same pipeline.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Sequence

from etils import epath

from t5x_ext.corpora.beam import BeamRunner, Task, import_beam, make_pipeline, read_tasks
from t5x_ext.corpora.filters.chunks import filter_task, read_keys
from t5x_ext.corpora.filters.config import FilterConfig
from t5x_ext.corpora.filters.duplicates import Part, Verdicts, find_later, keys_of_partition
from t5x_ext.corpora.parallel_text import ParallelText
from t5x_ext.storage.files import write_bytes


def check_runner(runner: BeamRunner) -> None:
    """Checks a runner by making a pipeline.

    Raises:
      UserError: if Beam is not installed or the runner refuses its options.
    """
    make_pipeline(import_beam(), runner)


def filter_on_beam(
    tasks_file: str,
    corpus: ParallelText | None,
    scratch: str,
    config: FilterConfig,
    languages: tuple[str, ...],
    columns: Sequence[str],
    bits: int,
    runner: BeamRunner,
) -> Verdicts:
    """Filters all tasks into the scratch folder and finds the duplicates.

    Args:
      tasks_file: of `write_tasks`.
      corpus: what workers read; None if tasks name scratch files.
      scratch: a folder that all workers can read and write.
      config: the rules.
      languages: one code a side.
      columns: the rule of every column of keys.
      bits: how many leading bits of a key number its partition.
      runner: where Beam runs.

    Raises:
      UserError: as `check_runner`. Errors on a worker are raised as Beam's.
    """
    beam = import_beam()
    with make_pipeline(beam, runner) as pipeline:
        (
            pipeline
            | beam.Create([tasks_file])
            | "read tasks" >> beam.FlatMap(read_tasks)
            | "spread chunks" >> beam.Reshuffle()
            | "filter" >> beam.Map(_filter, corpus, scratch, config, languages)
            | "split keys" >> beam.FlatMap(_split_keys, scratch, bits)
            | "group by partition" >> beam.GroupByKey()
            | "find later ones" >> beam.Map(_write_later, scratch)
        )
    verdicts = Verdicts()
    for column, rule in enumerate(columns):
        for partition in range(1 << bits):
            path = _later_path(scratch, column, partition)
            if path.exists():
                verdicts.add(rule, pickle.loads(path.read_bytes()))
    return verdicts


def _filter(
    task: Task, corpus: ParallelText | None, scratch: str, config: FilterConfig, languages: tuple[str, ...]
) -> int:
    return filter_task(Task(*task), corpus, scratch, config, languages)


def _split_keys(chunk: int, scratch: str, bits: int) -> Iterator[tuple[tuple[int, int], Part]]:
    keys, rows = read_keys(scratch, chunk)
    for column in range(len(keys)):
        for partition in range(1 << bits):
            yield (column, partition), keys_of_partition(chunk, keys[column], rows[column], partition, bits)


def _write_later(group: tuple[tuple[int, int], Iterable[Part]], scratch: str) -> None:
    (column, partition), parts = group
    write_bytes(_later_path(scratch, column, partition), pickle.dumps(find_later(parts)))


def _later_path(scratch: str, column: int, partition: int) -> epath.Path:
    return epath.Path(scratch) / f"later-{column:02d}-{partition:06d}.pickle"
