"""What stages hand to each other: texts, models, scores or anything else, described in JSON beside the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from t5x_ext.contracts import Direction, UserError
from t5x_ext.decode.ensemble import Combine

Kind: TypeAlias = str
"""Kind of an artefact, by name: `corpora`, `models`, `scores`, or any other that the stages of a pipeline agree on."""


class Reading(NamedTuple):
    """One of the two ways to read a pair of files.

    Attributes:
      languages: source and target.
      files: what is translated, and its translation by people or models.
    """

    languages: tuple[str, str]
    files: tuple[str, str]

    @property
    def direction(self) -> str:
        """The languages as one name, `en-de`."""
        return Direction(*self.languages).name


@dataclass(frozen=True)
class TextFiles:
    """Plain text, UTF-8, one sentence a line: a pair of aligned files, or one file of monolingual text.

    Attributes:
      name: names the text in tables and in the files that are made from it.
      languages: of the files, two or one.
      files: one per language, as paths relative to the pipeline's folder; they may belong to an earlier stage.
      lines: number of lines of each file.
      synthetic: the side that a model has written; None if people wrote both.
      one_way: whether to train on it in the order of its languages only.
      reference: of translations: the file that people wrote in the second language.
    """

    name: str
    languages: tuple[str, ...]
    files: tuple[str, ...]
    lines: int
    synthetic: Literal["source", "target"] | None = None
    one_way: bool = False
    reference: str | None = None

    @property
    def is_pair(self) -> bool:
        """Whether it has two sides."""
        return len(self.files) == 2

    def readings(self) -> tuple[Reading, ...]:
        """A pair in its own order and in the other; empty for monolingual text."""
        if not self.is_pair:
            return ()
        (first, second), (one, other) = self.languages, self.files
        return Reading((first, second), (one, other)), Reading((second, first), (other, one))

    def file_in(self, language: str) -> str | None:
        """The file in that language; None if there is none."""
        return dict(zip(self.languages, self.files)).get(language)


class Weights(NamedTuple):
    """A checkpoint of a run folder.

    Attributes:
      run_dir: the run folder, relative to the pipeline's folder.
      step: the checkpoint's number of updates.
    """

    run_dir: str
    step: int

    def __str__(self) -> str:
        return f"{self.run_dir}:{self.step}"


@dataclass(frozen=True)
class Model:
    """A model, or several that decode as one.

    Attributes:
      directions: what it does, by name: `en-de` for a translation model, `en-en` for a language model of English; a
        model of another task names what later stages ask it for.
      members: its weights.
      combine: how the predictions of several members are averaged, see `decode.Ensemble`.
    """

    directions: tuple[str, ...]
    members: tuple[Weights, ...]
    combine: Combine = "log_prob"

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Model:
        """The model that `dataclasses.asdict` described, read back from JSON."""
        return cls(tuple(fields["directions"]), tuple(Weights(*one) for one in fields["members"]), fields["combine"])


@dataclass(frozen=True)
class Artefact:
    """What a stage has made.

    Attributes:
      kind: what later stages take it for; built-in stages read `corpora` and `models`.
      corpora: the texts, in order.
      models: the models: one for all directions, or one for each.
      scores: numbers by name, for tables.
      counts: what the stage reports about its work, such as lines dropped by reason.
      files: any other files, as paths relative to the pipeline's folder: what an artefact of your own kind consists of.
    """

    kind: Kind
    corpora: tuple[TextFiles, ...] = ()
    models: tuple[Model, ...] = ()
    scores: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    def model_for(self, direction: str) -> Model | None:
        """The first model with this direction."""
        return next((model for model in self.models if direction in model.directions), None)

    @property
    def directions(self) -> tuple[str, ...]:
        """The directions of its models, in order, without repetition."""
        return tuple(dict.fromkeys(direction for model in self.models for direction in model.directions))

    @property
    def weights(self) -> tuple[Weights, ...]:
        """The checkpoints of its models, in order, without repetition."""
        return tuple(dict.fromkeys(weights for model in self.models for weights in model.members))

    def all_files(self) -> Iterator[str]:
        """Every file that it names: those of its texts, and its other files."""
        for text in self.corpora:
            yield from text.files
        yield from self.files

    def to_json(self) -> dict[str, Any]:
        """Plain values, the same for equal artefacts."""
        fields = asdict(self)
        # The manifest keeps the SHA-256 of this description: artefacts without `files` are written as they always were.
        if not self.files:
            del fields["files"]
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Artefact:
        """The artefact that `to_json` described."""
        corpora = (
            TextFiles(**{**text, "languages": tuple(text["languages"]), "files": tuple(text["files"])})
            for text in fields["corpora"]
        )
        models = tuple(map(Model.from_json, fields["models"]))
        files = tuple(fields.get("files", ()))
        return cls(fields["kind"], tuple(corpora), models, fields["scores"], fields["counts"], files)


def wrong_kind(stage: str, needed: str, wanted: Kind, makes: Kind) -> UserError:
    """The error of a stage that is given another kind of artefact than it reads."""
    return UserError(f"stage {stage!r} reads {wanted} of {needed!r}, which makes {makes}")
