"""Which stage made what from what, and whether that is still true: `manifest.json`, and its audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5x_ext.contracts import UserError
from t5x_ext.corpora import ParallelText
from t5x_ext.pipeline.artefact import Weights
from t5x_ext.pipeline.stage_folder import (
    ARTEFACT_FILE,
    FORMAT,
    PipelineFolder,
    damaged,
    read_record,
    weights_digest,
)
from t5x_ext.storage.digests import file_digest
from t5x_ext.storage.files import write_json

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class StageAudit:
    """What an audit found of one stage.

    Attributes:
      stage: its name.
      kind: of its artefact.
      inputs: the stages it was made from.
      sources: what it read from outside the pipeline, by name.
      checked: number of files, weights and sources whose digest was computed again.
      problems: what does not match, a line each.
    """

    stage: str
    kind: str
    inputs: tuple[str, ...]
    sources: tuple[str, ...]
    checked: int
    problems: tuple[str, ...]


def write_manifest(folder: PipelineFolder, stages: Sequence[str]) -> None:
    """Collects the records of all finished stages; the manifest holds nothing that is not in them.

    Args:
      folder: the pipeline's folder.
      stages: names in the order in which they run.

    Raises:
      UserError: if a record is damaged.
    """
    found = {}
    for stage in map(folder.stage, stages):
        if stage.described is None or stage.record is None:
            continue
        with damaged(stage.path / ARTEFACT_FILE):
            found[stage.name] = {
                **{name: value for name, value in stage.record.items() if name != "format"},
                "artefact": stage.digest,
                "kind": stage.described["artefact"]["kind"],
                "counts": stage.described["artefact"]["counts"],
                "outputs": stage.described["outputs"],
            }
    write_json(folder.path / MANIFEST_FILE, {"format": FORMAT, "stages": found})


def audit(output_dir: str | Path) -> list[StageAudit]:
    """Computes every digest of a pipeline's folder again, from its scores back to the texts it began with.

    Texts from outside are read again if the record says in which files they were.

    Args:
      output_dir: the pipeline's folder.

    Returns:
      The stages from the last to the first, so that each comes before all that it was made from.

    Raises:
      UserError: if there is no manifest, or it is damaged.
    """
    folder = PipelineFolder(output_dir)
    manifest = read_record(folder.path / MANIFEST_FILE, "stages")
    if manifest is None:
        raise UserError(f"{folder}: has no {MANIFEST_FILE}; give the --output_dir of `t5x_ext pipeline`")
    stages = manifest["stages"]
    with damaged(folder.path / MANIFEST_FILE):
        return [_audit(folder, name, stages) for name in reversed(stages)]


def _audit(folder: PipelineFolder, name: str, stages: Mapping[str, Any]) -> StageAudit:
    record, problems = stages[name], []
    digest = folder.stage(name).digest
    if digest is None:
        problems.append(f"{name}/{ARTEFACT_FILE} is missing")
    elif digest != record["artefact"]:
        problems.append(f"{name}/{ARTEFACT_FILE} has changed")
    for file, expected in record["outputs"].items():
        problems += _compare(folder.path, file, expected)
    for needed, expected in record["inputs"].items():
        if needed not in stages:
            problems.append(f"it was made from {needed!r}, which is not in the manifest")
        elif stages[needed]["artefact"] != expected:
            problems.append(f"it was made from another {needed!r} than the one that is here")
    read_again = [source for source in record["sources"] if "parallel_text" in source]
    problems += [problem for source in read_again for problem in _compare_source(source)]
    sources = tuple(source["name"] for source in record["sources"])
    checked = 1 + len(record["outputs"]) + len(read_again)
    return StageAudit(name, record["kind"], tuple(record["inputs"]), sources, checked, tuple(problems))


def _compare(output_dir: Path, name: str, expected: str) -> list[str]:
    """What is wrong with a file, or with the weights `run_dir:step`."""
    run_dir, _, step = name.rpartition(":")
    try:
        found = weights_digest(output_dir, Weights(run_dir, int(step))) if run_dir else file_digest(output_dir / name)
    except FileNotFoundError:
        return [f"{name} is missing"]
    except (OSError, UserError) as error:
        return [f"{name} cannot be read: {error}"]
    return [] if found == expected else [f"{name} has changed"]


def _compare_source(source: Mapping[str, Any]) -> list[str]:
    try:
        found = ParallelText(**source["parallel_text"]).fingerprint()
    except UserError as error:
        return [str(error)]
    return [] if found == source["fingerprint"] else [f"the text {source['name']!r} that it read has changed"]
