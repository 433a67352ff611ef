"""Which stage made what from what, and whether it is still so: `manifest.json`, and the audit of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5x_ext.checkpoints import RunFolder
from t5x_ext.contracts import UserError
from t5x_ext.corpora import ParallelText
from t5x_ext.pipeline.artefact import (
    ARTEFACT_FILE,
    FORMAT,
    RECORD_FILE,
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
      sources: what it read from outside, by name.
      checked: files, weights and sources whose digest was computed again.
      problems: what does not match, a line each.
    """

    stage: str
    kind: str
    inputs: tuple[str, ...]
    sources: tuple[str, ...]
    checked: int
    problems: tuple[str, ...]


def write_manifest(output_dir: Path, stages: Sequence[str]) -> None:
    """Gathers the records of all finished stages; nothing stands in the manifest that is not in them.

    Args:
      output_dir: the pipeline's folder.
      stages: names in the order in which they ran.
    """
    found = {}
    for stage in stages:
        described = read_record(output_dir / stage / ARTEFACT_FILE)
        record = read_record(output_dir / stage / RECORD_FILE)
        if described is not None and record is not None:
            found[stage] = {
                **{name: value for name, value in record.items() if name != "format"},
                "artefact": file_digest(output_dir / stage / ARTEFACT_FILE),
                "kind": described["artefact"]["kind"],
                "counts": described["artefact"]["counts"],
                "outputs": described["outputs"],
            }
    write_json(output_dir / MANIFEST_FILE, {"format": FORMAT, "stages": found})


def audit(output_dir: str | Path) -> list[StageAudit]:
    """Computes every digest of a pipeline's folder again, from its scores back to the texts it began with.

    Texts from outside are read again where the record says in which files they were.

    Args:
      output_dir: the pipeline's folder.

    Returns:
      The stages from the last to the first, so that each stands before all that it was made from.

    Raises:
      UserError: where there is no manifest, or it is damaged.
    """
    folder = Path(output_dir)
    manifest = read_record(folder / MANIFEST_FILE, "stages")
    if manifest is None:
        raise UserError(f"{folder}: has no {MANIFEST_FILE}; give the --output_dir of `t5x_ext pipeline`")
    stages = manifest["stages"]
    with damaged(folder / MANIFEST_FILE):
        return [_audit(folder, name, stages) for name in reversed(stages)]


def _audit(folder: Path, name: str, stages: Mapping[str, Any]) -> StageAudit:
    record, problems = stages[name], []
    described = folder / name / ARTEFACT_FILE
    if not described.exists():
        problems.append(f"{name}/{ARTEFACT_FILE} is missing")
    elif file_digest(described) != record["artefact"]:
        problems.append(f"{name}/{ARTEFACT_FILE} has changed")
    for file, digest in record["outputs"].items():
        problems += _compare(folder, file, digest)
    for needed, digest in record["inputs"].items():
        if needed not in stages:
            problems.append(f"it was made from {needed!r}, which is not in the manifest")
        elif stages[needed]["artefact"] != digest:
            problems.append(f"it was made from another {needed!r} than the one that is here")
    read_again = [source for source in record["sources"] if "parallel_text" in source]
    problems += [problem for source in read_again for problem in _compare_source(source)]
    sources = tuple(source["name"] for source in record["sources"])
    checked = 1 + len(record["outputs"]) + len(read_again)
    return StageAudit(name, record["kind"], tuple(record["inputs"]), sources, checked, tuple(problems))


def _compare(folder: Path, name: str, digest: str) -> list[str]:
    """What is wrong with a file, or with the weights `run_dir:step`."""
    run_dir, _, step = name.rpartition(":")
    try:
        found = weights_digest(RunFolder(folder / run_dir), int(step)) if run_dir else file_digest(folder / name)
    except FileNotFoundError:
        return [f"{name} is missing"]
    except (OSError, UserError) as error:
        return [f"{name} cannot be read: {error}"]
    return [] if found == digest else [f"{name} has changed"]


def _compare_source(source: Mapping[str, Any]) -> list[str]:
    try:
        found = ParallelText(**source["parallel_text"]).fingerprint()
    except UserError as error:
        return [str(error)]
    return [] if found == source["fingerprint"] else [f"the text {source['name']!r} it read has changed"]
