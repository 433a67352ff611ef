"""`Pipeline`: stages in order, each from named artefacts to one of its own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from t5x_ext.contracts import UserError
from t5x_ext.parallel import AxisRules, MeshConfig
from t5x_ext.pipeline.artefact import wrong_kind
from t5x_ext.pipeline.stage import CheckedStage, Stage, StageWork, TypedStage, program_of

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_RESERVED = ("cache",)


@dataclass(frozen=True)
class Pipeline:
    """Stages in the order in which they run.

    Attributes:
      stages: each reads artefacts of earlier ones only.
      mesh: layout of the devices of each process for decoding and scoring; training has `Run.mesh`, which spans the
        devices of all processes.
      axis_rules: how weights are sharded over `mesh`.

    Raises:
      UserError: for two stages of one name, for a stage that reads a stage which is not before it, or one of another
        kind, and for any mistake that a `CheckedStage` finds.
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
                        f"Pipeline.stages: {stage.name!r} reads {needed!r}, which is not a stage before it; "
                        f"stages before it: {', '.join(known) or 'none'}"
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

    def program(self, name: str) -> StageWork | None:
        """What a stage computes on devices; a search is laid out on the pipeline's mesh.

        Args:
          name: of the stage.

        Returns:
          None if the stage neither trains nor decodes, or does not say what it computes (`ComputingStage`).
        """
        stages = {stage.name: stage for stage in self.stages}
        earlier = {other: stages[other] for other in list(stages)[: list(stages).index(name)]}
        work = program_of(stages[name], earlier)
        if work is None or work.decode is None:
            return work
        run = dataclasses.replace(work.run, mesh=self.mesh, axis_rules=self.axis_rules, num_microbatches=1)
        return work._replace(run=run)


def _check_kinds(stage: Stage, earlier: Mapping[str, Stage]) -> None:
    """Raises UserError if a stage reads another kind than an earlier one makes, as far as both say so."""
    if not isinstance(stage, TypedStage):
        return
    for needed, wanted in stage.reads().items():
        other = earlier.get(needed)
        if isinstance(other, TypedStage) and other.makes != wanted:
            raise wrong_kind(stage.name, needed, wanted, other.makes)
