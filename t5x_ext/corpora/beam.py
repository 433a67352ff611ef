"""What pipelines on Apache Beam share: the runner, its options, and a corpus split into tasks for workers.

apache_beam is imported when a pipeline is made, not before.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from types import ModuleType
from typing import Any, NamedTuple

from etils import epath

from t5x_ext.contracts import Corpus, UserError
from t5x_ext.corpora.parallel_text import LineSpan, ParallelText

_TASKS_FILE = "tasks.pickle"


@dataclass(frozen=True)
class BeamRunner:
    """Where Apache Beam runs.

    Attributes:
      name: `DirectRunner` (this machine), `FlinkRunner`, `SparkRunner` or `DataflowRunner`.
      options: Beam's pipeline options as on its command line, as in `--direct_num_workers=4`. Workers need this
        package: name a container image that has it (`--sdk_container_image=...`), or install it (`--setup_file=...`).
    """

    name: str = "DirectRunner"
    options: tuple[str, ...] = ()


class Task(NamedTuple):
    """A numbered chunk of a corpus: a range of its files, or the name of the scratch file with its pairs."""

    number: int
    pairs: LineSpan | str


def import_beam() -> ModuleType:
    """Apache Beam.

    Raises:
      UserError: if it is not installed.
    """
    try:
        import apache_beam
    except ImportError as error:
        raise UserError(f"a runner needs Apache Beam: pip install 't5x_ext[beam]' ({error})") from error
    return apache_beam


def make_pipeline(beam: ModuleType, runner: BeamRunner) -> Any:
    """An empty pipeline. The runner checks its options here.

    Raises:
      UserError: if the runner refuses its options, or Beam does not know one of them.
    """
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            options = beam.pipeline.PipelineOptions([f"--runner={runner.name}", *runner.options])
            known = options.get_all_options()
            unknown = options.get_all_options(retain_unknown_options=True).keys() - known.keys()
    except (SystemExit, argparse.ArgumentError, ValueError) as error:
        reason = (messages.getvalue().strip().splitlines() or [str(error)])[-1]
        raise UserError(f"{runner.name}: Beam refuses its options: {reason}") from None
    if unknown:
        raise UserError(
            f"{runner.name}: Beam has no pipeline option {', '.join(f'--{name}' for name in sorted(unknown))}"
        )
    try:
        return beam.Pipeline(options=options)
    except (ImportError, ValueError) as error:
        raise UserError(f"{runner.name}: {' '.join(str(error).split())}") from None


def write_tasks(corpus: Corpus, scratch: epath.Path, pairs_per_task: int) -> tuple[str, int]:
    """Splits a corpus into tasks. Text that workers cannot read themselves is written to numbered files.

    Args:
      corpus: the pairs.
      scratch: a folder that all workers can read.
      pairs_per_task: pairs in every task but the last.

    Returns:
      The path of the tasks, for `read_tasks`, and the number of pairs.

    Raises:
      UserError: if the corpus raises it or is empty.
    """
    spans = corpus.spans(pairs_per_task) if isinstance(corpus, ParallelText) else None
    if spans is not None:
        tasks, num_pairs = [Task(*task) for task in enumerate(spans)], sum(span.pairs for span in spans)
    else:
        tasks, num_pairs, pairs = [], 0, corpus.pairs()
        for number, chunk in enumerate(iter(lambda: list(islice(pairs, pairs_per_task)), [])):
            name = f"pairs-{number:07d}.json"
            (scratch / name).write_text(json.dumps(chunk))
            tasks.append(Task(number, name))
            num_pairs += len(chunk)
    if not num_pairs:
        raise UserError(f"{corpus.name}: the corpus is empty")
    (scratch / _TASKS_FILE).write_bytes(pickle.dumps(tasks))
    return f"{scratch}/{_TASKS_FILE}", num_pairs


def read_tasks(path: str) -> list[Task]:
    """What `write_tasks` wrote."""
    return pickle.loads(epath.Path(path).read_bytes())


def sent_corpus(corpus: Corpus) -> ParallelText | None:
    """The corpus if workers read it themselves; others are not sent, because they may not be picklable."""
    return corpus if isinstance(corpus, ParallelText) else None


def read_task(task: Task, corpus: ParallelText | None, scratch: str) -> Sequence[tuple[str, str]]:
    """The pairs of a task.

    Raises:
      UserError: as `ParallelText.read_span`.
    """
    if isinstance(task.pairs, str):
        return json.loads((epath.Path(scratch) / task.pairs).read_text())
    assert corpus is not None
    return corpus.read_span(LineSpan(*task.pairs))
