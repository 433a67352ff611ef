"""Runs a pipeline: each stage once, restartable and recorded.

Killed at any moment, the same call resumes and ends with the same artefacts. A stage whose configuration or inputs have
changed is refused by name with the difference, so that nothing is overwritten by accident; named in `only` (`--stages`
on the command line) it is deleted and made again.

With several processes (`parallel.initialize_distributed`), all make the same call, on a folder that all of them see:
the first makes the stages, and the others train, decode and score with it.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from t5x_ext.contracts import UserError
from t5x_ext.parallel import failing_together, is_primary
from t5x_ext.pipeline.artefact import Artefact
from t5x_ext.pipeline.manifest import write_manifest
from t5x_ext.pipeline.pipeline import Pipeline
from t5x_ext.pipeline.shared_work import SharedWork, ask, asked
from t5x_ext.pipeline.stage import SharedStage, Stage
from t5x_ext.pipeline.stage_folder import PipelineFolder
from t5x_ext.pipeline.status import Comparison, Status
from t5x_ext.pipeline.workspace import OpenModel, Workspace, open_model
from t5x_ext.storage.files import delete_drafts, write_json
from t5x_ext.train.run_records import environment

logger = logging.getLogger(__name__)

ENVIRONMENT_FILE = "environment.json"

_REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
}
"""What to do about an error of the disk, by its number."""


def execute(
    pipeline: Pipeline,
    output_dir: str | Path,
    *,
    configurations: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
    opener: OpenModel | None = None,
) -> dict[str, Artefact]:
    """Runs the stages that have not finished, in order.

    Args:
      pipeline: the stages.
      output_dir: the pipeline's folder; created if it does not exist.
      configurations: resolved gin text by stage, compared with the text that the stage was begun with. Of a stage
        without text only inputs and sources are compared.
      only: names of stages to run, and to make again if they have changed; all that they read must have finished.
        Empty: all stages, none of which may have changed.
      opener: opens models for decoding; None: on all devices of this process, see `Pipeline.mesh`.

    Returns:
      The artefacts of the stages that ran or had finished, by name, in the first process; nothing in the others.

    Raises:
      UserError: for a stage that has changed, for an unknown name, for any mistake that a stage finds, and if another
        process has failed.
      Interrupted: if a signal asked a stage to stop.
    """
    _check_names(pipeline, only)
    opener = opener or partial(open_model, mesh=pipeline.mesh, axis_rules=pipeline.axis_rules)
    path, texts = Path(output_dir), configurations or {}
    with failing_together(), _disk_errors(path):
        if not is_primary():
            _help(pipeline, path, texts, opener)
            return {}
        artefacts = _Execution(pipeline, PipelineFolder(path), texts, only, opener).run()
        ask(None)
        return artefacts


def _help(pipeline: Pipeline, output_dir: Path, texts: Mapping[str, str], opener: OpenModel) -> None:
    """Does what the first process asks for, until all stages are made."""
    stages, workspace = {stage.name: stage for stage in pipeline.stages}, None
    while (work := asked()) is not None:
        if workspace is None or workspace.stage != work.stage:
            # The first process has written since the last stage: nothing that was read before may be used again.
            workspace = Workspace(PipelineFolder(output_dir), work.stage, texts.get(work.stage, ""), opener)
        if work.decoding is not None:
            workspace.take_part(work.decoding)
            continue
        stage = stages[work.stage]
        assert isinstance(stage, SharedStage)
        stage.take_part(workspace)


class _Execution:
    """`execute` in the first process; arguments as there."""

    def __init__(
        self,
        pipeline: Pipeline,
        folder: PipelineFolder,
        texts: Mapping[str, str],
        only: Sequence[str],
        opener: OpenModel,
    ):
        self._pipeline, self._folder, self._texts = pipeline, folder, texts
        self._only, self._opener = only, opener

    def run(self) -> dict[str, Artefact]:
        """Makes what has not finished; the artefacts by name."""
        delete_drafts(self._folder.path)
        names, artefacts = [stage.name for stage in self._pipeline.stages], {}
        for stage in self._wanted():
            if self._make_unless_finished(stage):
                write_manifest(self._folder, names)
            own = self._folder.stage(stage.name)
            own.tidy()
            assert own.artefact is not None
            artefacts[stage.name] = own.artefact
        # Once more: a process may have been killed between a stage's last file and the manifest.
        write_manifest(self._folder, names)
        return artefacts

    def _wanted(self) -> Iterator[Stage]:
        """The stages asked for and those they are made from."""
        names = {*self._only, *self._pipeline.ancestors(self._only)}
        return (stage for stage in self._pipeline.stages if not self._only or stage.name in names)

    def _make_unless_finished(self, stage: Stage) -> bool:
        """Whether the stage had to be made."""
        comparison = Comparison(stage, self._folder, self._texts.get(stage.name, ""))
        status = comparison.status
        if status.state == "changed" and stage.name not in self._only:
            raise UserError(self._refusal(status))
        if status.state == "finished":
            return False
        if self._only and stage.name not in self._only:
            raise UserError(f"stage {stage.name!r} has not finished; add it to --stages, or run it first")
        self._make(stage, comparison)
        return True

    def _refusal(self, status: Status) -> str:
        descendants = self._pipeline.descendants(status.stage)
        begun = [name for name in descendants if self._folder.stage(name).path.exists()]
        return (
            f"stage {status.stage!r} in {self._folder} was made from something else: {status.difference}; restore it, "
            f"or rebuild it and everything made from it by --stages={','.join(begun)}"
        )

    def _make(self, stage: Stage, comparison: Comparison) -> None:
        """Runs one stage, or resumes an unfinished one, and writes its records."""
        own, start, record = self._folder.stage(stage.name), time.monotonic(), comparison.made_from
        _begin(self._folder.path)
        if comparison.status.state == "changed":
            own.discard()
        if comparison.status.state != "unfinished":
            own.begin(record)
        logger.info("stage %s", stage.name)
        workspace = Workspace(self._folder, stage.name, record["configuration"], self._opener)
        if isinstance(stage, SharedStage):
            ask(SharedWork(stage.name))
        described = own.describe(stage.make(workspace))
        # Time and machine are not part of the artefact, which is the same on any machine, interrupted or not.
        measured: dict[str, Any] = {"seconds": round(time.monotonic() - start, 2), "environment": environment()}
        decoding = workspace.journal.summary()
        if decoding:
            measured["decoding"] = decoding
            logger.info("stage %s: %s", stage.name, _speed(decoding))
        own.finish(record | measured, described)


@contextmanager
def _disk_errors(output_dir: Path) -> Iterator[None]:
    """Says in one line that a disk is full or refuses to be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        remedy = _REMEDIES[error.errno]
        raise UserError(
            f"{error.filename or output_dir}: {error.strerror}; {remedy}, then rerun the same command to resume"
        ) from error


def _check_names(pipeline: Pipeline, only: Sequence[str]) -> None:
    names = [stage.name for stage in pipeline.stages]
    for name in only:
        if name not in names:
            raise UserError(f"--stages: there is no stage {name!r}; there are {', '.join(names)}")


def _begin(output_dir: Path) -> None:
    """Creates the pipeline's folder, as soon as something is made in it."""
    output_dir.mkdir(parents=True, exist_ok=True)
    if not (output_dir / ENVIRONMENT_FILE).exists():
        # Threads and devices decide the last bits; who resumes on another machine restores what can be restored.
        write_json(output_dir / ENVIRONMENT_FILE, environment())


def _speed(decoding: Mapping[str, Any]) -> str:
    """How fast the models of a stage were, in words."""
    return "; ".join(
        f"{task} {done['lines'] + done['resumed_lines']:,} lines ({done['sentences_per_second']:,.1f} sentences/s, "
        f"{done['target_tokens_per_second']:,.0f} target tokens/s)"
        for task, done in decoding.items()
        if task != "files"
    )
