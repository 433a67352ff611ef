"""What a stage of a pipeline is: the protocols that `Pipeline` knows stages by, and what a stage computes.

`Stage` is all that a stage must be. The other protocols are optional, and recognised by their methods: a stage that
says more about itself is checked earlier, shares its work with other processes, or can be compiled without being run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from t5x_ext.contracts import Corpus
from t5x_ext.decode import DecodeConfig
from t5x_ext.pipeline.artefact import Artefact, Kind
from t5x_ext.pipeline.workspace import Workspace
from t5x_ext.train import Run


@runtime_checkable
class Stage(Protocol):
    """A step of a pipeline: any object with these members, from any package; gin names it.

    What it writes must follow from its configuration, its inputs and its sources alone.
    """

    @property
    def name(self) -> str:
        """Names its folder, and its artefact for later stages; lower case letters, digits, `_` and `-`."""
        ...

    def inputs(self) -> tuple[str, ...]:
        """The earlier stages whose artefacts it reads."""
        ...

    def sources(self) -> tuple[Corpus, ...]:
        """The corpora it reads from outside the pipeline; their fingerprints are recorded."""
        ...

    def make(self, workspace: Workspace) -> Artefact:
        """Makes the artefact, or continues an interrupted attempt; all its files are in `workspace.own("")`.

        With several processes, only the first calls this. The others help with the work of its workspace, or take part
        in a `SharedStage`.

        Raises:
          UserError: for any mistake in the input.
          Interrupted: if a signal asked it to stop; the next call resumes.
        """
        ...


@runtime_checkable
class SharedStage(Stage, Protocol):
    """A stage in which all processes do the same, such as training."""

    def take_part(self, workspace: Workspace) -> None:
        """Does in the other processes what `make` does in the first, together with all of them."""
        ...


@runtime_checkable
class TypedStage(Stage, Protocol):
    """A stage that says what it reads and makes, so that a wrong input is noticed before days of training, not after.

    Kinds are compared by name. Inputs that `reads` does not name, and those made by other stages than typed ones, are
    not checked.
    """

    @property
    def makes(self) -> Kind:
        """The kind of its artefact."""
        ...

    def reads(self) -> Mapping[str, Kind]:
        """The kind that it needs of each of its inputs, by the input's name."""
        ...


@runtime_checkable
class CheckedStage(Stage, Protocol):
    """A stage that can tell from the settings of earlier stages that it could not be made."""

    def check(self, earlier: Mapping[str, Stage]) -> None:
        """Looks at the earlier stages when the pipeline is built.

        Args:
          earlier: the stages before this one, by name.

        Raises:
          UserError: if it could not be made.
        """
        ...


class StageWork(NamedTuple):
    """What a stage computes on devices, as plain data.

    Attributes:
      run: the run it trains; of a stage that decodes, the run that its model comes from.
      decode: how it decodes; None if it trains.
      members: number of models that decode together.
    """

    run: Run
    decode: DecodeConfig | None = None
    members: int = 1


@runtime_checkable
class ComputingStage(Stage, Protocol):
    """A stage that trains or decodes, and says what that is before it is run: `t5x_ext check --stage` compiles it."""

    def program(self, earlier: Mapping[str, Stage]) -> StageWork | None:
        """Its training run, or its search: of several searches, the one with the most hypotheses.

        `Pipeline.program` lays a search out on the pipeline's mesh.

        Args:
          earlier: the stages before this one, by name.

        Returns:
          None if it depends on a stage that says nothing about its models (`ModelStage`).
        """
        ...


class ModelOrigin(NamedTuple):
    """The run that a model comes from.

    Attributes:
      run: the run, with the vocabulary that it takes over from an earlier stage.
      members: number of models that decode together.
    """

    run: Run
    members: int = 1


@runtime_checkable
class ModelStage(Stage, Protocol):
    """A stage of models that says which run they come from, so that stages which decode with them can be compiled."""

    def origin(self, earlier: Mapping[str, Stage]) -> ModelOrigin | None:
        """The run of its models, which all have one shape.

        Args:
          earlier: the stages before this one, by name.
        """
        ...


def origin_of(model: str, earlier: Mapping[str, Stage]) -> ModelOrigin | None:
    """The run that the model of an earlier stage comes from; None if the stage does not say.

    Args:
      model: the stage's name.
      earlier: the stages, by name.
    """
    stage = earlier[model]
    return stage.origin(earlier) if isinstance(stage, ModelStage) else None


def program_of(stage: Stage, earlier: Mapping[str, Stage]) -> StageWork | None:
    """What a stage computes; None if it neither trains nor decodes, or does not say.

    Args:
      stage: the stage.
      earlier: the stages before it, by name.
    """
    return stage.program(earlier) if isinstance(stage, ComputingStage) else None


def decoding_work(model: str, decode: DecodeConfig, earlier: Mapping[str, Stage]) -> StageWork | None:
    """What a stage computes that decodes with the model of an earlier one; for `ComputingStage.program`.

    Args:
      model: the stage of the model.
      decode: how it is decoded.
      earlier: the stages, by name.
    """
    origin = origin_of(model, earlier)
    return None if origin is None else StageWork(origin.run, decode, origin.members)


def models_and_corpora(models: Iterable[str], corpora: Iterable[str]) -> dict[str, Kind]:
    """What `TypedStage.reads` gives for a stage that reads first these models, then these texts.

    >>> models_and_corpora(["model"], ["news", "talks"])
    {'model': 'models', 'news': 'corpora', 'talks': 'corpora'}
    """
    named: dict[str, Kind] = dict.fromkeys(models, "models")
    return named | {name: "corpora" for name in corpora if name not in named}


class StageDefaults:
    """A base class for stages whose inputs are those that `reads` names, without sources. No stage needs to have it."""

    def reads(self) -> Mapping[str, Kind]:
        """The kind that it needs of each of its inputs, by the input's name; none by default."""
        return {}

    def inputs(self) -> tuple[str, ...]:
        """The stages that `reads` names."""
        return tuple(self.reads())

    def sources(self) -> tuple[Corpus, ...]:
        """No corpus from outside the pipeline."""
        return ()


class Interrupted(Exception):
    """A stage was asked to stop before it had finished; the same call resumes it."""
