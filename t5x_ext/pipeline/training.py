"""`Train`: a whole training run as a stage, on the texts of earlier stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

from t5x_ext.checkpoints import CheckpointStore, RunFolder
from t5x_ext.contracts import Corpus, UserError
from t5x_ext.data import DataConfig, TextDirection, VocabularyConfig, text_directions
from t5x_ext.pipeline.artefact import Artefact, Kind, Model, TextFiles, Weights
from t5x_ext.pipeline.stage import Interrupted, ModelOrigin, Stage, StageDefaults, StageWork, origin_of
from t5x_ext.pipeline.texts import corpus_of, reversed_corpus, sides_of
from t5x_ext.pipeline.workspace import Workspace
from t5x_ext.tasks import LanguageModeling, text_task, with_data
from t5x_ext.train import InitFrom, Run, execute


class _Way(NamedTuple):
    """A corpus, and whether to train on it in its own direction only."""

    corpus: Corpus
    one_way: bool = False

    def both(self) -> tuple[_Way, ...]:
        return (self,) if self.one_way else (self, _Way(reversed_corpus(self.corpus)))


@dataclass(frozen=True)
class Train(StageDefaults):
    """A training run: pretraining, language models, retraining on synthetic text, fine-tuning.

    It resumes as runs do, update by update; its run folder is `OUT/<stage>/run`, or one for each direction.

    Attributes:
      name: of the stage.
      run: a complete run; the fields below replace parts of it.
      corpora: stages whose texts replace the run's training corpora; empty: the run's own are used. A language model
        (`tasks.LanguageModeling`) is trained on each side by itself.
      valid: stages whose texts replace the run's validation corpora. The metrics decoded on them are means over corpora
        and directions: with a corpus for each domain, `valid/bleu` is the macro-average over domains.
      init_from: the stage whose weights and vocabulary it starts from.
      keep_optimizer: whether to keep the optimizer state of `init_from` as well.
      vocabulary: the stage whose vocabulary it uses without starting from its weights; None: that of `run`.
      per_direction: train a model for each direction of the corpora, both directions of a pair if the run's data are
        `bidirectional`.
      directions: those that `per_direction` trains; empty: all.
      languages: of a language model: the languages it learns; empty: all languages of the texts.
      upsample: how many times the texts of a stage are repeated, by its name; once by default.
      provenance: whether the encoder's input marks synthetic text, see `corpora.ParallelText.synthetic`.
      checkpoint: the checkpoint that later stages get: the best by the run's metric, or the last.

    Raises:
      UserError: for settings that do not go together.
    """

    makes: ClassVar[Kind] = "models"

    name: str
    run: Run
    corpora: tuple[str, ...] = ()
    valid: tuple[str, ...] = ()
    init_from: str | None = None
    keep_optimizer: bool = False
    vocabulary: str | None = None
    per_direction: bool = False
    directions: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    upsample: Mapping[str, int] = field(default_factory=dict)
    provenance: bool = False
    checkpoint: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        for stage, times in self.upsample.items():
            if stage not in self.corpora or times < 1:
                raise UserError(
                    f"Train.upsample={dict(self.upsample)}: give stages of corpora and whole numbers from 1"
                )
        if self.init_from is not None and self.vocabulary is not None:
            raise UserError("Train.vocabulary: init_from brings its own vocabulary; give one of them only")
        if self.keep_optimizer and self.init_from is None:
            raise UserError("Train.keep_optimizer goes with init_from")
        if self.directions and not self.per_direction:
            raise UserError("Train.directions goes with per_direction")
        if self.languages and not self._is_language_model:
            raise UserError("Train.languages is for language models (tasks.LanguageModeling)")

    @property
    def _is_language_model(self) -> bool:
        return isinstance(self.run.task, LanguageModeling)

    def reads(self) -> Mapping[str, Kind]:
        """Texts, and the stages of weights and vocabulary."""
        models = [name for name in (self.init_from, self.vocabulary) if name is not None]
        return dict.fromkeys((*self.corpora, *self.valid), "corpora") | dict.fromkeys(models, "models")

    def sources(self) -> tuple[Corpus, ...]:
        """The run's own corpora, unless stages replace them."""
        data = text_task(self.run).data
        return (*(() if self.corpora else data.train), *(() if self.valid else data.valid), *data.test)

    def program(self, earlier: Mapping[str, Stage]) -> StageWork:
        """Its run, with the vocabulary of the run that it starts from."""
        return StageWork(self._with_vocabulary(earlier))

    def origin(self, earlier: Mapping[str, Stage]) -> ModelOrigin:
        """Its run."""
        return ModelOrigin(self._with_vocabulary(earlier))

    def _with_vocabulary(self, earlier: Mapping[str, Stage]) -> Run:
        """The run with the vocabulary that it takes over from another."""
        source = self.init_from or self.vocabulary
        origin = origin_of(source, earlier) if source else None
        if origin is None:
            return self.run
        return with_data(self.run, replace(text_task(self.run).data, vocabulary=text_task(origin.run).data.vocabulary))

    def make(self, workspace: Workspace) -> Artefact:
        """Trains, or resumes training."""
        data = self._texts(workspace)
        if not self.per_direction:
            model, counts = self._trained(data, "run", self._init_from(None, workspace), workspace)
            return Artefact("models", models=(model,), counts=counts)
        data_of = self._by_direction(data)
        # All of them before the first is trained, so that a missing one is noticed now and not after days.
        init_from = {direction: self._init_from(direction, workspace) for direction in data_of}
        trained = {
            direction: self._trained(one, direction, init_from[direction], workspace)
            for direction, one in data_of.items()
        }
        counts = {direction: counts for direction, (_, counts) in trained.items()}
        return Artefact("models", models=tuple(model for model, _ in trained.values()), counts=counts)

    def take_part(self, workspace: Workspace) -> None:
        """Trains in the other processes of a run, each with its share of every batch."""
        self.make(workspace)

    def _trained(
        self, data: DataConfig, folder: str, init_from: InitFrom | None, workspace: Workspace
    ) -> tuple[Model, dict[str, Any]]:
        run_dir = workspace.own(folder)
        results = execute(
            with_data(self.run, data),
            workspace.path(run_dir),
            config_text=workspace.configuration,
            cache_dir=workspace.cache_dir,
            init_from=init_from,
        )
        if not results:
            raise Interrupted(f"stage {self.name!r}")
        run = RunFolder(workspace.path(run_dir))
        with CheckpointStore(run.checkpoints) as store:
            best = store.best_step() if self.checkpoint == "best" else None
            step = store.steps()[-1] if best is None else best
        counts = {"steps": results["steps"], "checkpoint": step, "parameters": results["parameters"]}
        return Model(run.read_model().directions, (Weights(run_dir, step),)), counts

    def _init_from(self, direction: str | None, workspace: Workspace) -> InitFrom | None:
        if self.init_from is None:
            return None
        artefact = workspace.models(self.init_from)
        model = artefact.models[0] if direction is None else artefact.model_for(direction)
        if model is None or len(model.members) > 1 or (direction is None and len(artefact.models) > 1):
            raise UserError(
                f"Train.init_from: {self.init_from!r} has no single model for {direction or 'all directions'}"
            )
        weights = model.members[0]
        return InitFrom(workspace.path(weights.run_dir), weights.step, self.keep_optimizer)

    def _texts(self, workspace: Workspace) -> DataConfig:
        """The run's data with the texts and the vocabulary of other stages."""
        data = text_task(self.run).data
        if self.vocabulary is not None:
            weights = workspace.models(self.vocabulary).models[0].members[0]
            data = replace(data, vocabulary=VocabularyConfig(path=f"{workspace.path(weights.run_dir)}/vocabulary"))
        if self._is_language_model:
            return replace(data, train=self._sides(workspace) if self.corpora else data.train, bidirectional=False)
        train = [_Way(corpus) for corpus in data.train]
        if self.corpora:
            texts = [text for name in self.corpora for text in self._pairs([name], workspace) * self._times(name)]
            train = [_Way(corpus_of(text, workspace, mark=self.provenance), text.one_way) for text in texts]
        valid = [_Way(corpus) for corpus in data.valid]
        if self.valid:
            texts = self._pairs(self.valid, workspace)
            valid = [_Way(corpus_of(text, workspace), text.one_way) for text in texts]
        return self._in_ways(data, train, valid)

    def _sides(self, workspace: Workspace) -> tuple[Corpus, ...]:
        """The monolingual texts that a language model is trained on."""
        texts = [text for name in self.corpora for text in workspace.corpora([name]) * self._times(name)]
        sides = tuple(side for text in texts for side in sides_of(text, workspace, self.languages))
        if not sides:
            known = ", ".join(dict.fromkeys(language for text in texts for language in text.languages))
            raise UserError(
                f"stage {self.name!r}: no text is in {', '.join(self.languages)} (Train.languages); there is {known}"
            )
        return sides

    def _times(self, stage: str) -> int:
        return self.upsample.get(stage, 1)

    def _pairs(self, stages: Iterable[str], workspace: Workspace) -> list[TextFiles]:
        texts = workspace.corpora(stages)
        for text in texts:
            if not text.is_pair:
                raise UserError(
                    f"stage {self.name!r}: {text.name!r} is monolingual, and a translation model needs pairs"
                )
        return texts

    def _in_ways(self, data: DataConfig, train: list[_Way], valid: list[_Way]) -> DataConfig:
        if not data.bidirectional or not any(way.one_way for way in (*train, *valid)):
            return replace(data, train=_corpora(train), valid=_corpora(valid))
        # Some texts are for one direction only: each direction of the others becomes a corpus of its own.
        if data.bidirectional_steps is not None:
            names = dict.fromkeys(way.corpus.name for way in (*train, *valid) if way.one_way)
            raise UserError(
                f"stage {self.name!r}: bidirectional_steps changes the direction of every corpus, but some are for one "
                f"direction only: {', '.join(names)}"
            )
        test = [_Way(corpus) for corpus in data.test]
        both = [[other for way in ways for other in way.both()] for ways in (train, valid, test)]
        return replace(
            data, train=_corpora(both[0]), valid=_corpora(both[1]), test=_corpora(both[2]), bidirectional=False
        )

    def _by_direction(self, data: DataConfig) -> dict[str, DataConfig]:
        """The data of each direction, read in that direction."""
        found = text_directions(data.train, data.bidirectional)
        names = dict.fromkeys(direction.name for direction in found)
        for name in self.directions:
            if name not in names:
                raise UserError(f"Train.directions: the corpora have no direction {name}; they have {', '.join(names)}")
        return {
            name: replace(
                data,
                train=_in_direction(found, name),
                valid=_in_direction(text_directions(data.valid, data.bidirectional), name),
                test=_in_direction(text_directions(data.test, data.bidirectional), name),
                bidirectional=False,
                bidirectional_steps=None,
            )
            for name in self.directions or names
        }


def _corpora(ways: Iterable[_Way]) -> tuple[Corpus, ...]:
    return tuple(way.corpus for way in ways)


def _in_direction(directions: Iterable[TextDirection], name: str) -> tuple[Corpus, ...]:
    return tuple(
        reversed_corpus(direction.corpus) if direction.reverse else direction.corpus
        for direction in directions
        if direction.name == name
    )
