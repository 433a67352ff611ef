"""What stages hand to each other: texts, models and scores, described in JSON beside the files themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from t5x_ext.checkpoints import RunFolder
from t5x_ext.contracts import UserError, path_name
from t5x_ext.decode.ensemble import Combine
from t5x_ext.decode.open import restore_weights

ARTEFACT_FILE = "artefact.json"
RECORD_FILE = "record.json"
FORMAT = 1

Kind = Literal["corpora", "models", "scores"]
_WANTED = {"corpora": "reads texts", "models": "needs a model"}


class Reading(NamedTuple):
    """One of the two ways in which a pair of files can be read."""

    languages: tuple[str, str]
    """Source and target."""
    files: tuple[str, str]
    """What is translated, and what people or models have made of it."""

    @property
    def direction(self) -> str:
        """The languages as one name, `en-de`."""
        return "-".join(self.languages)


@dataclass(frozen=True)
class TextFiles:
    """Plain text, UTF-8, one sentence a line: a pair of aligned files, or one of monolingual text.

    Attributes:
      name: what it is called in tables and in the names of files made from it.
      languages: of the files, two or one.
      files: one a language, by paths below the pipeline's folder; a stage may point at files of an earlier one.
      lines: of every file.
      synthetic: which side a model has written; None where people wrote both.
      one_way: whether it is to be learned from in the order of its languages only.
      reference: of translations: the file with what people wrote in the second language.
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
        """A pair in its own order and in the other; of monolingual text nothing."""
        if not self.is_pair:
            return ()
        (first, second), (one, other) = self.languages, self.files
        return Reading((first, second), (one, other)), Reading((second, first), (other, one))

    def file_in(self, language: str) -> str | None:
        """The file in that language; None where there is none."""
        return dict(zip(self.languages, self.files)).get(language)


class Weights(NamedTuple):
    """A checkpoint of a run folder below the pipeline's folder."""

    run_dir: str
    step: int

    def __str__(self) -> str:
        return f"{self.run_dir}:{self.step}"


@dataclass(frozen=True)
class Model:
    """A model, or several that decode as one.

    Attributes:
      directions: what it translates, as `en-de`; `en-en` alone of a language model.
      members: its weights.
      combine: how the predictions of several are averaged, see `decode.Ensemble`.
    """

    directions: tuple[str, ...]
    members: tuple[Weights, ...]
    combine: Combine = "log_prob"

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Model:
        """The model that `dataclasses.asdict` described, by way of JSON."""
        return cls(tuple(fields["directions"]), tuple(Weights(*one) for one in fields["members"]), fields["combine"])


@dataclass(frozen=True)
class Artefact:
    """What a stage has made; it holds texts, models or scores.

    Attributes:
      kind: which of them.
      corpora: the texts, in order.
      models: the models: one for all directions, or one for each.
      scores: numbers by name, for tables.
      counts: what the stage has to say of its work, as lines dropped and their reasons.
    """

    kind: Kind
    corpora: tuple[TextFiles, ...] = ()
    models: tuple[Model, ...] = ()
    scores: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, Any] = field(default_factory=dict)

    def model_for(self, direction: str) -> Model | None:
        """The first model that translates in this direction."""
        return next((model for model in self.models if direction in model.directions), None)

    @property
    def directions(self) -> tuple[str, ...]:
        """What its models translate, in their order, without repetition."""
        return tuple(dict.fromkeys(direction for model in self.models for direction in model.directions))

    def to_json(self) -> dict[str, Any]:
        """Plain values, the same for equal artefacts."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Artefact:
        """The artefact that `to_json` described."""
        corpora = (
            TextFiles(**{**text, "languages": tuple(text["languages"]), "files": tuple(text["files"])})
            for text in fields["corpora"]
        )
        models = tuple(map(Model.from_json, fields["models"]))
        return cls(fields["kind"], tuple(corpora), models, fields["scores"], fields["counts"])


def wrong_kind(stage: str, needed: str, wanted: Kind, makes: Kind) -> UserError:
    """What to say where a stage is given another kind of artefact than it reads."""
    return UserError(f"stage {stage!r} {_WANTED[wanted]}, but {needed!r} makes {makes}")


def describe(output_dir: Path, stage: str, artefact: Artefact) -> dict[str, Any]:
    """What `artefact.json` of a stage says: the artefact, and a digest of all that the stage has written for it."""
    return {"format": FORMAT, "artefact": artefact.to_json(), "outputs": digests(output_dir, stage, artefact)}


def read_artefact(output_dir: Path, stage: str) -> Artefact | None:
    """What a stage has made; None where it has not finished.

    Raises:
      UserError: where the file is damaged or of another format.
    """
    path = output_dir / stage / ARTEFACT_FILE
    record = read_record(path, "artefact", "outputs")
    if record is None:
        return None
    with damaged(path):
        return Artefact.from_json(record["artefact"])


def read_record(path: Path, *fields: str) -> dict[str, Any] | None:
    """A JSON record of ours; None where there is none.

    Args:
      path: the file.
      fields: what must be in it.

    Raises:
      UserError: where it is damaged or of another format.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise UserError(f"{path}: {reason}; {_hint(path)}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path}: not a record of format {FORMAT}")
    with damaged(path):
        return {name: record[name] for name in fields} | record


def _hint(path: Path) -> str:
    """What to do about a damaged record; the manifest is only gathered from others, and nothing is made anew for it."""
    what = path.parent if path.name in (RECORD_FILE, ARTEFACT_FILE) else path
    return f"was it changed by hand? Delete {what} to make it anew"


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Says in one line that a record has not the fields that are read from it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: a field is missing or wrong ({error}); {_hint(path)}") from error


def digests(output_dir: Path, stage: str, artefact: Artefact) -> dict[str, str]:
    """SHA-256 of everything that the artefact names below the stage's own folder, by its name.

    Texts are hashed as they lie there. Of a run folder `run_dir:step` stands for the weights that decode (names, types
    and numbers, since how they are stored is not the same twice), beside the files that say what model they are of.
    """
    own = f"{stage}/"
    named = [*(file for text in artefact.corpora for file in text.files), *_tables(output_dir, stage)]
    found = {file: file_digest(output_dir / file) for file in named if file.startswith(own)}
    for weights in (weights for model in artefact.models for weights in model.members):
        if weights.run_dir.startswith(own):
            run = RunFolder(output_dir / weights.run_dir)
            for path in (run.model_json, *sorted(run.vocabulary.iterdir())):
                found[str(path.relative_to(output_dir))] = file_digest(Path(path))
            found[str(weights)] = weights_digest(run, weights.step)
    return dict(sorted(found.items()))


def missing(output_dir: Path, artefact: Artefact) -> Iterator[str]:
    """The files and the weights of an artefact that are not there."""
    for file in (file for text in artefact.corpora for file in text.files):
        if not (output_dir / file).exists():
            yield f"its file {file}"
    for weights in (weights for model in artefact.models for weights in model.members):
        folder = output_dir / weights.run_dir
        # Stages that plug in may name models that have no folder here.
        if folder.exists() and not any((folder / "checkpoints").glob(f"{weights.step:08d}*")):
            yield f"its checkpoint {weights}"


def _tables(output_dir: Path, stage: str) -> list[str]:
    return [path.relative_to(output_dir).as_posix() for path in sorted((output_dir / stage).glob("scores.*"))]


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(run: RunFolder, step: int) -> str:
    """SHA-256 of the weights of a checkpoint: names, types, shapes and numbers."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(restore_weights(run, step))
    named = [(f"/{path_name(path)}", np.asarray(leaf)) for path, leaf in leaves]
    for name, leaf in sorted(named, key=lambda named: named[0]):
        digest.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()
