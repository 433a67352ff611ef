"""Stages in order, each from named artefacts to one of its own, restartable and recorded.

A pipeline's folder holds a folder for every stage:

    OUT/environment.json         threads and devices that the first process had, for those that go on
    OUT/manifest.json            every stage: configuration, inputs, outputs with their SHA-256, counts, versions
    OUT/cache/                   token caches, which stages share; may be deleted
    OUT/<stage>/record.json      written first: what the stage is made from
    OUT/<stage>/NAME.LANG        plain aligned text, or run folders, or scores.json and scores.txt
    OUT/<stage>/artefact.json    written last, atomically: what the stage has made; without it, it has not finished

Killed anywhere, the same call goes on and ends with the same artefacts. A stage whose configuration or inputs have
changed is refused by name with the difference, and so is nothing overwritten by accident; named in `only` (`--stages`
on the command line) it is deleted and made anew.

Where a run has several processes (`parallel.initialize_distributed`), all make the same call, on a folder that all of
them see: the first makes the stages, and the others train, decode and score with it.
"""

from __future__ import annotations

import errno
import logging
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from t5x_ext.contracts import Corpus, UserError
from t5x_ext.corpora import ParallelText
from t5x_ext.parallel import AxisRules, MeshConfig, failing_together, is_primary
from t5x_ext.pipeline.artefact import (
    ARTEFACT_FILE,
    FORMAT,
    RECORD_FILE,
    Artefact,
    Kind,
    damaged,
    describe,
    file_digest,
    missing,
    read_artefact,
    read_record,
    wrong_kind,
)
from t5x_ext.pipeline.manifest import write_manifest
from t5x_ext.pipeline.shared_work import Task, ask, asked
from t5x_ext.pipeline.stage import CheckedStage, SharedStage, Stage, TypedStage
from t5x_ext.pipeline.workspace import SCRATCH, OpenModel, Workspace, open_model
from t5x_ext.storage.files import delete_drafts, write_json
from t5x_ext.train.records import environment

logger = logging.getLogger(__name__)

ENVIRONMENT_FILE = "environment.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_RESERVED = ("cache",)

_REFUSED = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
}
"""What a disk may say, and what helps."""

_FREE = ("Run.mesh", "Run.axis_rules", "MeshConfig.", "AxisRules.", "Run.log_every", "Run.tensorboard")
"""Settings that do not decide what a stage makes: devices may be others when it goes on, and so may its log."""


@dataclass(frozen=True)
class Pipeline:
    """Stages in the order in which they run.

    Attributes:
      stages: each reads artefacts of earlier ones only.
      mesh: how the devices of each process are laid out to decode and score; training has `Run.mesh`, which spans those
        of all processes.
      axis_rules: how weights are cut over it.

    Raises:
      UserError: for two stages of one name, for one that reads what is not there before it or is of another kind, and
        for whatever a `CheckedStage` raises.
    """

    stages: tuple[Stage, ...]
    mesh: MeshConfig = field(default_factory=MeshConfig)
    axis_rules: AxisRules = field(default_factory=AxisRules)

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError("Pipeline.stages: there is no stage; give at least one")
        known: dict[str, Stage] = {}
        for stage in self.stages:
            if not _NAME.fullmatch(stage.name) or stage.name in _RESERVED:
                raise UserError(f"Pipeline.stages: the name {stage.name!r} must be lower case letters, digits, _ and -")
            if stage.name in known:
                raise UserError(f"Pipeline.stages: two stages are called {stage.name!r}")
            for needed in stage.inputs():
                if needed not in known:
                    raise UserError(
                        f"Pipeline.stages: {stage.name!r} reads {needed!r}, which is no stage before it; "
                        f"before it there are: {', '.join(known) or 'none'}"
                    )
            _check_kinds(stage, known)
            if isinstance(stage, CheckedStage):
                stage.check(known)
            known[stage.name] = stage

    def descendants(self, name: str) -> list[str]:
        """A stage and all that are made from it, in order."""
        found = [name]
        for stage in self.stages:
            if set(stage.inputs()) & set(found):
                found.append(stage.name)
        return found

    def ancestors(self, names: Collection[str]) -> set[str]:
        """All stages that these are made from."""
        found: set[str] = set()
        for stage in reversed(self.stages):
            if stage.name in names or stage.name in found:
                found |= set(stage.inputs())
        return found


def _check_kinds(stage: Stage, earlier: Mapping[str, Stage]) -> None:
    if not isinstance(stage, TypedStage):
        return
    for needed in stage.inputs():
        wanted: Kind = "models" if needed in stage.models() else "corpora"
        other = earlier[needed]
        if isinstance(other, TypedStage) and other.makes != wanted:
            raise wrong_kind(stage.name, needed, wanted, other.makes)


State = Literal["finished", "unfinished", "changed", "new"]


class Status(NamedTuple):
    """How a stage stands: `unfinished` was begun, `changed` was made from something else than it would be now."""

    stage: str
    state: State
    difference: str = ""


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
      output_dir: the pipeline's folder; made if there is none.
      configurations: resolved gin text by stage. Compared with what a stage was begun with; where it is left out,
        inputs and sources alone are.
      only: names of stages to run, and to make anew where they have changed; all that they read must have finished.
        Empty: all stages, none of which may have changed.
      opener: opens models for decoding; None: on all devices of this process, see `Pipeline.mesh`.

    Returns:
      The artefacts of the stages that ran or had finished, by name; in the first process. Nothing in the others.

    Raises:
      UserError: for a stage that has changed, an unknown name, and whatever a stage raises; where another process has
        failed.
      Interrupted: where a signal asked a stage to stop.
    """
    _check_names(pipeline, only)
    opener = opener or partial(open_model, mesh=pipeline.mesh, axis_rules=pipeline.axis_rules)
    folder, texts = Path(output_dir), configurations or {}
    with failing_together(), _room(folder):
        if not is_primary():
            _help(pipeline, folder, texts, opener)
            return {}
        artefacts = _make_all(pipeline, folder, texts, only, opener)
        ask(None)
        return artefacts


def _help(pipeline: Pipeline, output_dir: Path, texts: Mapping[str, str], opener: OpenModel) -> None:
    """Does what the first process asks for, until all stages are made."""
    stages, workspace = {stage.name: stage for stage in pipeline.stages}, None
    while (task := asked()) is not None:
        if workspace is None or workspace.stage != task.stage:
            workspace = Workspace(output_dir, task.stage, texts.get(task.stage, ""), opener)
        if task.decoding is not None:
            workspace.take_part(task.decoding)
            continue
        stage = stages[task.stage]
        assert isinstance(stage, SharedStage)
        stage.take_part(workspace)


def _make_all(
    pipeline: Pipeline, folder: Path, texts: Mapping[str, str], only: Sequence[str], opener: OpenModel
) -> dict[str, Artefact]:
    """`execute` in the first process."""
    delete_drafts(folder)
    names, artefacts = [stage.name for stage in pipeline.stages], {}
    for stage in _wanted(pipeline, only):
        status = status_of(stage, folder, texts.get(stage.name, ""))
        if status.state == "changed" and stage.name not in only:
            raise UserError(_refusal(pipeline, folder, status))
        if status.state != "finished":
            if only and stage.name not in only:
                raise UserError(f"stage {stage.name!r} has not finished; add it to --stages, or run it first")
            _run(stage, folder, texts.get(stage.name, ""), opener, status.state)
            write_manifest(folder, names)
        _tidy(folder / stage.name)
        artefact = read_artefact(folder, stage.name)
        assert artefact is not None
        artefacts[stage.name] = artefact
    # Once more: a process may have been killed between a stage's last file and the manifest.
    write_manifest(folder, names)
    return artefacts


def _tidy(folder: Path) -> None:
    """Deletes what a finished stage need not keep, and drafts that were left there and in its run folders."""
    shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    delete_drafts(folder)
    for path in folder.iterdir():
        if path.is_dir():
            delete_drafts(path)


@contextmanager
def _room(output_dir: Path) -> Iterator[None]:
    """Says in one line that a disk is full, or no longer takes what is written."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        raise UserError(
            f"{error.filename or output_dir}: {error.strerror}; {_REFUSED[error.errno]}, the same command goes on"
        ) from error


def _check_names(pipeline: Pipeline, only: Sequence[str]) -> None:
    names = [stage.name for stage in pipeline.stages]
    for name in only:
        if name not in names:
            raise UserError(f"--stages: there is no stage {name!r}; there are {', '.join(names)}")


def _wanted(pipeline: Pipeline, only: Sequence[str]) -> Iterator[Stage]:
    """The stages asked for and those they are made from."""
    names = {*only, *pipeline.ancestors(only)}
    return (stage for stage in pipeline.stages if not only or stage.name in names)


def status_of(stage: Stage, output_dir: Path, configuration: str = "") -> Status:
    """How a stage stands against what it would be made from now; reads its sources, writes nothing.

    Raises:
      UserError: where a source cannot be read, or a record is damaged.
    """
    path = output_dir / stage.name / RECORD_FILE
    before = read_record(path, "configuration", "inputs", "sources")
    if before is None:
        return Status(stage.name, "new")
    now = _made_from(stage, output_dir, configuration)
    with damaged(path):
        difference = _difference(before, now)
    artefact = read_artefact(output_dir, stage.name)
    if difference:
        # Of a stage that was refused at once nothing is lost: its mistake is mended and it is run, and that is all.
        bare = {path.name for path in (output_dir / stage.name).iterdir()} == {RECORD_FILE}
        return Status(stage.name, "new") if bare else Status(stage.name, "changed", difference)
    if artefact is None:
        return Status(stage.name, "unfinished")
    for name in missing(output_dir, artefact):
        return Status(stage.name, "changed", f"{name} is missing")
    return Status(stage.name, "finished")


def _made_from(stage: Stage, output_dir: Path, configuration: str) -> dict[str, Any]:
    """All that decides what a stage makes: settings, artefacts of earlier stages, sources."""
    artefacts = {name: output_dir / name / ARTEFACT_FILE for name in stage.inputs()}
    return {
        "format": FORMAT,
        "configuration": configuration,
        # The digest of an artefact's description stands for its files, whose digests are in it.
        "inputs": {name: file_digest(path) if path.exists() else "unfinished" for name, path in artefacts.items()},
        "sources": [_source(corpus) for corpus in stage.sources()],
    }


def _source(corpus: Corpus) -> dict[str, Any]:
    record: dict[str, Any] = {"name": corpus.name, "languages": list(corpus.languages)}
    # What an audit can read again; other corpora are known by their fingerprint only.
    files = {"parallel_text": asdict(corpus)} if isinstance(corpus, ParallelText) else {}
    return record | {"fingerprint": corpus.fingerprint()} | files


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What a stage was made from that is another thing now, in a few words; empty where nothing is."""
    parts = []
    old, new = _settings(before["configuration"]), _settings(now["configuration"])
    # A stage that was not built from gin has no text to compare.
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)] if old and new else []
    if changed:
        more = f" (and {len(changed) - 1} more settings)" if len(changed) > 1 else ""
        name = changed[0]
        parts.append(f"{name} = {old.get(name, 'unset')}, now {new.get(name, 'unset')}{more}")
    for name, digest in now["inputs"].items():
        if before["inputs"].get(name) != digest:
            parts.append(f"another {name!r}")
    for one in range(max(len(before["sources"]), len(now["sources"]))):
        was, is_now = (dict(enumerate(record["sources"])).get(one, {}) for record in (before, now))
        if was.get("fingerprint") != is_now.get("fingerprint"):
            parts.append(f"another text {(is_now or was)['name']!r}")
    return ", ".join(parts)


def _settings(text: str) -> dict[str, str]:
    lines = (line.split(" = ", 1) for line in text.splitlines() if " = " in line and not line.startswith("#"))
    return {name: value for name, value in lines if not any(part in name for part in _FREE)}


def _refusal(pipeline: Pipeline, output_dir: Path, status: Status) -> str:
    begun = [name for name in pipeline.descendants(status.stage) if (output_dir / name).exists()]
    return (
        f"stage {status.stage!r} in {output_dir} was made from something else: {status.difference}; restore it, or "
        f"make it anew, with all that was made from it, by --stages={','.join(begun)}"
    )


def _run(stage: Stage, output_dir: Path, configuration: str, opener: OpenModel, state: State) -> None:
    """Runs one stage and writes its records; what an unfinished one has left is gone on from."""
    folder, start = output_dir / stage.name, time.monotonic()
    record = _made_from(stage, output_dir, configuration)
    _begin(output_dir)
    deleted = folder.with_name(f".{stage.name}.deleted")
    if state == "changed":
        # Under its name a stage is there wholly or not at all.
        shutil.rmtree(deleted, ignore_errors=True)
        folder.rename(deleted)
    shutil.rmtree(deleted, ignore_errors=True)
    if state != "unfinished":
        _check_free(folder)
        folder.mkdir(exist_ok=True)
        write_json(folder / RECORD_FILE, record)
    logger.info("stage %s", stage.name)
    workspace = Workspace(output_dir, stage.name, configuration, opener)
    if isinstance(stage, SharedStage):
        ask(Task(stage.name))
    artefact = stage.make(workspace)
    described = describe(output_dir, stage.name, artefact)
    # Time and machine are not part of the artefact, which is the same wherever and however often it was interrupted.
    record |= {"seconds": round(time.monotonic() - start, 2), "environment": environment()}
    decoding = workspace.journal.summary()
    if decoding:
        record["decoding"] = decoding
        logger.info("stage %s: %s", stage.name, _speed(decoding))
    write_json(folder / RECORD_FILE, record)
    write_json(folder / ARTEFACT_FILE, described)


def _begin(output_dir: Path) -> None:
    """Makes the pipeline's folder, once there is something to be made in it."""
    output_dir.mkdir(parents=True, exist_ok=True)
    if not (output_dir / ENVIRONMENT_FILE).exists():
        # Whoever goes on elsewhere takes over what decides the last bits.
        write_json(output_dir / ENVIRONMENT_FILE, environment())


def _speed(decoding: Mapping[str, Any]) -> str:
    """How fast models were, in words."""
    return "; ".join(
        f"{task} {done['lines'] + done['resumed_lines']:,} lines ({done['sentences_per_second']:,.1f} sentences/s, "
        f"{done['target_tokens_per_second']:,.0f} target tokens/s)"
        for task, done in decoding.items()
        if task != "files"
    )


def _check_free(folder: Path) -> None:
    """Raises UserError where something lies that no stage has written; its record and drafts of it do not count."""
    if folder.exists() and (not folder.is_dir() or any(_is_foreign(path.name) for path in folder.iterdir())):
        raise UserError(f"{folder}: is there already and is not of a pipeline; name another --output_dir")


def _is_foreign(name: str) -> bool:
    return name[0] != "." and name != RECORD_FILE
