"""Whether a stage has finished, and if not, what it would be made from now that is not as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from t5x_ext.contracts import Corpus
from t5x_ext.corpora import ParallelText
from t5x_ext.pipeline.pipeline import Pipeline
from t5x_ext.pipeline.stage import Stage
from t5x_ext.pipeline.stage_folder import FORMAT, RECORD_FILE, PipelineFolder, damaged
from t5x_ext.train.run_records import settings

_MAY_CHANGE = ("Run.mesh", "Run.axis_rules", "MeshConfig.", "AxisRules.", "Run.log_every", "Run.tensorboard")
"""Settings that do not decide what a stage makes: it may be resumed on other devices, and with another log."""

State = Literal["finished", "unfinished", "changed", "new"]


class Status(NamedTuple):
    """The state of a stage.

    Attributes:
      stage: its name.
      state: `unfinished` was begun; `changed` was made from something else than it would be made from now.
      difference: of a changed stage, what is different, in a few words.
    """

    stage: str
    state: State
    difference: str = ""


def statuses(
    pipeline: Pipeline, output_dir: str | Path, configurations: Mapping[str, str] | None = None
) -> list[Status]:
    """The states of all stages, in order; reads their sources, writes nothing.

    Args:
      pipeline: the stages.
      output_dir: the pipeline's folder; it need not exist.
      configurations: resolved gin text by stage, see `execute`.

    Raises:
      UserError: if a source cannot be read, or a record is damaged.
    """
    folder, texts = PipelineFolder(output_dir), configurations or {}
    return [Comparison(stage, folder, texts.get(stage.name, "")).status for stage in pipeline.stages]


def status_of(stage: Stage, output_dir: str | Path, configuration: str = "") -> Status:
    """The state of one stage; reads its sources, writes nothing.

    Args:
      stage: the stage.
      output_dir: the pipeline's folder; it need not exist.
      configuration: the stage's resolved gin text.

    Raises:
      UserError: if a source cannot be read, or a record is damaged.
    """
    return Comparison(stage, PipelineFolder(output_dir), configuration).status


class Comparison:
    """A stage against its folder; sources are hashed at most once, and not at all for a stage that was not begun."""

    def __init__(self, stage: Stage, folder: PipelineFolder, configuration: str):
        """Nothing is read yet.

        Args:
          stage: the stage.
          folder: the pipeline's.
          configuration: the stage's resolved gin text; empty if it was not built from gin.
        """
        self._stage, self._folder, self._configuration = stage, folder, configuration
        self._own = folder.stage(stage.name)

    @cached_property
    def made_from(self) -> dict[str, Any]:
        """All that decides what the stage makes now: settings, artefacts of earlier stages, sources.

        Raises:
          UserError: if a source cannot be read.
        """
        return {
            "format": FORMAT,
            "configuration": self._configuration,
            "inputs": {name: self._folder.stage(name).digest or "unfinished" for name in self._stage.inputs()},
            "sources": [_source(corpus) for corpus in self._stage.sources()],
        }

    @cached_property
    def status(self) -> Status:
        """The state of the stage, as it was at the first look.

        Raises:
          UserError: if a source cannot be read, or a record is damaged.
        """
        name, before = self._stage.name, self._own.record
        if before is None:
            return Status(name, "new")
        with damaged(self._own.path / RECORD_FILE):
            difference = _difference(before, self.made_from)
        finished = self._own.artefact is not None
        if difference:
            # A stage that refused its input at once has made nothing that could be lost: fix the mistake and rerun.
            only_record = {path.name for path in self._own.path.iterdir()} == {RECORD_FILE}
            return Status(name, "new") if only_record else Status(name, "changed", difference)
        if not finished:
            return Status(name, "unfinished")
        for missing in self._own.missing():
            return Status(name, "changed", f"{missing} is missing")
        return Status(name, "finished")


def _source(corpus: Corpus) -> dict[str, Any]:
    record: dict[str, Any] = {"name": corpus.name, "languages": list(corpus.languages)}
    # What an audit can read again; other corpora are known by their fingerprint only.
    files = {"parallel_text": asdict(corpus)} if isinstance(corpus, ParallelText) else {}
    return record | {"fingerprint": corpus.fingerprint()} | files


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What a stage was made from that has changed, in a few words; empty if nothing has."""
    parts = []
    old, new = (settings(record["configuration"], _MAY_CHANGE) for record in (before, now))
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
