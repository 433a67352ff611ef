"""What a stage of a pipeline is: the protocols that `Pipeline` knows stages by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from t5x_ext.contracts import Corpus
from t5x_ext.pipeline.artefact import Artefact, Kind
from t5x_ext.pipeline.workspace import Workspace


@runtime_checkable
class Stage(Protocol):
    """A step of a pipeline: any object with these is one, wherever it comes from; gin names it.

    What it writes must follow from its configuration, its inputs and its sources alone.
    """

    @property
    def name(self) -> str:
        """Names its folder and what later stages call its artefact; lower case, digits, `_` and `-`."""
        ...

    def inputs(self) -> tuple[str, ...]:
        """The earlier stages whose artefacts it reads."""
        ...

    def sources(self) -> tuple[Corpus, ...]:
        """What it reads from outside the pipeline; their fingerprints are recorded."""
        ...

    def make(self, workspace: Workspace) -> Artefact:
        """Makes the artefact, or goes on making it; all its files are below `workspace.own("")`.

        Of several processes the first alone is asked for this; the others help with the work of its workspace, or take
        part in a `SharedStage`.

        Raises:
          UserError: for whatever is wrong with the input.
          Interrupted: where a signal asked it to stop; the next call goes on.
        """
        ...


@runtime_checkable
class SharedStage(Stage, Protocol):
    """A stage in which all processes do the same, as in training."""

    def take_part(self, workspace: Workspace) -> None:
        """Does in the other processes what `make` does in the first with all of them."""
        ...


@runtime_checkable
class TypedStage(Stage, Protocol):
    """A stage that says what it reads and makes, so that a wrong one is noticed before days of training, not after."""

    @property
    def makes(self) -> Kind:
        """The kind of its artefact."""
        ...

    def models(self) -> tuple[str, ...]:
        """Those of its inputs that must be models; all others must be texts."""
        ...


@runtime_checkable
class CheckedStage(Stage, Protocol):
    """A stage that can tell from the settings of those before it that it could not be made."""

    def check(self, earlier: Mapping[str, Stage]) -> None:
        """Looks at them when the pipeline is built.

        Args:
          earlier: the stages before it, by name.

        Raises:
          UserError: where it could not be made.
        """
        ...


class Interrupted(Exception):
    """A stage was asked to stop before it had finished; the same call goes on."""
