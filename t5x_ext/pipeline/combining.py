"""Several checkpoints as one model: averaged weights, and greedily chosen ensembles."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

from t5x_ext.checkpoints import CheckpointStore, RunFolder, average_run
from t5x_ext.contracts import UserError
from t5x_ext.decode import DecodeConfig
from t5x_ext.decode.ensemble import Combine
from t5x_ext.evaluate import bleu, tokenizer_for
from t5x_ext.pipeline.artefact import Artefact, Kind, Model, Reading, Weights
from t5x_ext.pipeline.finishing import Finished
from t5x_ext.pipeline.postprocess import Postprocessor
from t5x_ext.pipeline.stage import (
    ModelOrigin,
    Stage,
    StageDefaults,
    StageWork,
    models_and_corpora,
    origin_of,
    program_of,
)
from t5x_ext.pipeline.stage_folder import FORMAT, read_record
from t5x_ext.pipeline.workspace import Workspace
from t5x_ext.storage.files import write_json

logger = logging.getLogger(__name__)

_Member = TypeVar("_Member", bound=Hashable)


@dataclass(frozen=True)
class Average(StageDefaults):
    """The mean of the weights of several checkpoints of a run, for each model of an earlier stage.

    Attributes:
      name: of the stage.
      model: the stage of the runs; they must have kept the checkpoints (`CheckpointConfig.keep_last`, `keep_best`).
      last: number of newest checkpoints; if training ended with fewer, all of them.
      best: number of best checkpoints, instead.

    Raises:
      UserError: unless exactly one of the two is given; in a pipeline, if the runs keep fewer.
    """

    makes: ClassVar[Kind] = "models"

    name: str
    model: str
    last: int | None = None
    best: int | None = None

    def __post_init__(self) -> None:
        given = [count for count in (self.last, self.best) if count is not None]
        if len(given) != 1 or given[0] < 1:
            raise UserError(f"Average.last={self.last}, Average.best={self.best}: give one of them, at least 1")

    def reads(self) -> Mapping[str, Kind]:
        """The stage of the runs."""
        return {self.model: "models"}

    def check(self, earlier: Mapping[str, Stage]) -> None:
        """Raises UserError if the runs delete checkpoints that are to be averaged."""
        work = program_of(earlier[self.model], earlier)
        if work is None or work.decode is not None:
            return
        setting = "last" if self.last else "best"
        wanted, kept = getattr(self, setting), getattr(work.run.checkpoints, f"keep_{setting}")
        if wanted > kept:
            raise UserError(
                f"stage {self.name!r}: Average.{setting}={wanted}, but the runs of {self.model!r} keep {kept}; "
                f"set CheckpointConfig.keep_{setting} of {self.model!r} to {wanted} or more"
            )

    def origin(self, earlier: Mapping[str, Stage]) -> ModelOrigin | None:
        """That of the models it averages."""
        return origin_of(self.model, earlier)

    def make(self, workspace: Workspace) -> Artefact:
        """Averages run by run."""
        models, counts = [], {}
        for model in workspace.models(self.model).models:
            if len(model.members) > 1:
                raise UserError(f"stage {self.name!r}: {self.model!r} is an ensemble; average the runs of its members")
            weights, steps = self._average(model.members[0], workspace)
            models.append(replace(model, members=(weights,)))
            counts[weights.run_dir.removeprefix(f"{self.name}/")] = {"averaged": steps}
        return Artefact("models", models=tuple(models), counts=counts)

    def _average(self, weights: Weights, workspace: Workspace) -> tuple[Weights, list[int]]:
        source = RunFolder(workspace.path(weights.run_dir))
        run_dir = workspace.own(Path(weights.run_dir).name)
        with CheckpointStore(source.checkpoints) as store:
            ranked = store.steps()[::-1] if self.last else store.ranked_steps()
        if not ranked:
            raise UserError(
                f"stage {self.name!r}: {weights.run_dir} has no {'finished' if self.last else 'measured'} checkpoint"
            )
        wanted = self.last or self.best or 0
        steps = sorted(ranked[:wanted])
        if len(steps) < wanted:
            # The run stopped early. To fail here would cost all stages before this one.
            logger.warning("%s: averaging %d checkpoints, there are not %d", weights.run_dir, len(steps), wanted)
        output = Path(workspace.path(run_dir))
        if not output.exists():
            average_run(source, steps, output)
        return Weights(run_dir, steps[-1]), steps


class Choice(NamedTuple):
    """The members of an ensemble.

    Attributes:
      members: in the order in which they were chosen.
      scores: the score of the ensemble after each choice.
    """

    members: tuple[Hashable, ...]
    scores: tuple[float, ...]


def choose_greedily(
    candidates: Sequence[_Member],
    score: Callable[[tuple[_Member, ...]], float],
    delta: float = 0.0,
    max_members: int | None = None,
) -> Choice:
    """Forward selection: starts with the best candidate, then adds the one that helps most while it gains over `delta`.

    Scores never decrease from member to member. Of equal candidates the first is chosen.

    Args:
      candidates: at least one.
      score: of several members together; higher is better.
      delta: the gain below or at which no further member is added.
      max_members: the most members; None: all candidates.

    >>> choose_greedily([1, 5, 3], lambda members: sum(members) - 4 * (len(members) - 1))
    Choice(members=(5,), scores=(5,))
    """
    members: tuple[_Member, ...] = ()
    scores: tuple[float, ...] = ()
    while len(members) < min(len(candidates), max_members or len(candidates)):
        tried = {one: score((*members, one)) for one in candidates if one not in members}
        best = max(tried, key=tried.__getitem__)
        if scores and tried[best] <= scores[-1] + delta:
            break
        members, scores = (*members, best), (*scores, tried[best])
    return Choice(members, scores)


@dataclass(frozen=True)
class GreedyEnsemble(StageDefaults):
    """The models that translate best together, chosen one by one by BLEU on development text (`choose_greedily`).

    Directions whose candidates are the same weights get one ensemble, scored by its mean BLEU; models for single
    directions get one each.

    Attributes:
      name: of the stage.
      candidates: stages of models of one shape and vocabulary.
      dev: stages of pairs to score on, read in every direction that the candidates translate.
      decode: options of the search.
      normalize: see `finishing.Finished`; give what `Translate` will be given.
      postprocess: see there.
      delta: BLEU that a further member must gain.
      max_members: the most members; None: as many as there are candidates.
      combine: how predictions are averaged, see `decode.Ensemble`.

    Raises:
      UserError: for an empty list of stages, and for values outside their range.
    """

    makes: ClassVar[Kind] = "models"

    name: str
    candidates: tuple[str, ...]
    dev: tuple[str, ...]
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    normalize: bool = True
    postprocess: str | Postprocessor = "widths"
    delta: float = 0.0
    max_members: int | None = None
    combine: Combine = "log_prob"

    def __post_init__(self) -> None:
        for name in ("candidates", "dev"):
            if not getattr(self, name):
                raise UserError(f"GreedyEnsemble.{name}: there is no stage; give at least one")
        self._finished()
        if self.delta < 0 or (self.max_members is not None and self.max_members < 1):
            raise UserError(
                f"GreedyEnsemble.delta={self.delta}, max_members={self.max_members}: delta must be 0 or more, "
                "max_members at least 1"
            )

    def reads(self) -> Mapping[str, Kind]:
        """The candidates and the development text."""
        return models_and_corpora(self.candidates, self.dev)

    def origin(self, earlier: Mapping[str, Stage]) -> ModelOrigin | None:
        """That of its first candidate, with as many members as it may get."""
        found = origin_of(self.candidates[0], earlier)
        members = len(self.candidates)
        return found and ModelOrigin(found.run, min(members, self.max_members or members))

    def program(self, earlier: Mapping[str, Stage]) -> StageWork | None:
        """The search of an ensemble with as many members as it may get."""
        origin = self.origin(earlier)
        return origin and StageWork(origin.run, self.decode, origin.members)

    def make(self, workspace: Workspace) -> Artefact:
        """Tries ensembles; scores are kept, so that a killed attempt resumes."""
        models, counts = [], {}
        for pool, directions in self._pools(workspace).items():
            trials = _Trials(self, directions, workspace)
            choice = choose_greedily(pool, trials.score, self.delta, self.max_members)
            members = tuple(one for one in choice.members if isinstance(one, Weights))
            models.append(Model(directions, members, self.combine))
            counts[", ".join(directions)] = {
                "members": [str(member) for member in choice.members],
                "bleu": list(choice.scores),
                "tried": trials.count,
            }
        return Artefact("models", models=tuple(models), counts=counts)

    def _finished(self) -> Finished:
        return Finished(self.decode, self.normalize, self.postprocess)

    def _pools(self, workspace: Workspace) -> Mapping[tuple[Weights, ...], tuple[str, ...]]:
        """The directions of every set of candidates."""
        artefacts = [workspace.models(name) for name in self.candidates]
        shared = [
            direction
            for direction in artefacts[0].directions
            if all(direction in artefact.directions for artefact in artefacts)
        ]
        if not shared:
            raise UserError(f"stage {self.name!r}: the candidates have no direction in common")
        pools: dict[tuple[Weights, ...], tuple[str, ...]] = {}
        for direction in shared:
            found = [artefact.model_for(direction) for artefact in artefacts]
            pool = dict.fromkeys(member for model in found if model is not None for member in model.members)
            pools[tuple(pool)] = (*pools.get(tuple(pool), ()), direction)
        return pools


class _Trials:
    """Mean BLEU of ensembles in some directions, each computed once."""

    def __init__(self, stage: GreedyEnsemble, directions: tuple[str, ...], workspace: Workspace):
        self._stage, self._workspace = stage, workspace
        self._readings = [
            reading
            for text in workspace.corpora(stage.dev)
            for reading in text.readings()
            if reading.direction in directions
        ]
        if not self._readings:
            raise UserError(f"stage {stage.name!r}: there is no development text for {', '.join(directions)}")
        self._directions = directions
        self._path = Path(workspace.path(workspace.scratch(f"{directions[0]}.json")))
        record = read_record(self._path, "scores") or {"scores": {}}
        self._scores: dict[str, float] = record["scores"]

    @property
    def count(self) -> int:
        """Number of ensembles that were tried."""
        return len(self._scores)

    def score(self, members: tuple[Weights, ...]) -> float:
        """The mean over texts and directions."""
        key = " ".join(map(str, members))
        if key not in self._scores:
            model = Model(self._directions, members, self._stage.combine)
            values = [self._bleu(model, number, reading) for number, reading in enumerate(self._readings)]
            self._scores[key] = sum(values) / len(values)
            write_json(self._path, {"format": FORMAT, "scores": self._scores})
        return self._scores[key]

    def _bleu(self, model: Model, number: int, reading: Reading) -> float:
        space, (languages, (input_file, reference)) = self._workspace, reading
        target = languages[1]
        # A resumed search tries ensembles in the same order, so that their numbers name the same files.
        output = space.scratch(f"{self._directions[0]}.{self.count}.{number}.{target}")
        self._stage._finished().translate(model, input_file, output, languages, space)
        return bleu(list(space.lines(output)), list(space.lines(reference)), tokenizer_for(target)).value
