"""From corpora to training batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from t5x_ext.contracts import Corpus, UserError
from t5x_ext.corpora.beam import BeamRunner
from t5x_ext.corpora.filters import PairRules
from t5x_ext.corpora.parallel_text import ParallelText
from t5x_ext.corpora.special_pieces import MARKERS, Side
from t5x_ext.data.batches import PackedBatches
from t5x_ext.data.cache import TokenCache, build_cache
from t5x_ext.data.encoding import SubwordSampling
from t5x_ext.data.plan import BatchConfig, BatchPlan
from t5x_ext.data.streams import Stream, TextDirection, text_directions
from t5x_ext.data.switching import SwitchingPlan
from t5x_ext.data.tags import TagPolicy
from t5x_ext.data.vocabulary import (
    DESCRIPTION_FILE,
    Vocabulary,
    VocabularyConfig,
    read_description,
    train_vocabulary,
    training_record,
)

logger = logging.getLogger(__name__)

VOCABULARY_FOLDER = "vocabulary"


@dataclass(frozen=True)
class DataConfig:
    """The data of a run.

    Attributes:
      train: training corpora, at least one.
      valid: corpora for validation; one loss over all of them, and raw text for decoding.
      test: corpora for the final test, raw text only.
      bidirectional: use every corpus in both directions.
      bidirectional_steps: batches in both directions, after which only the corpora's own direction is trained
        (bidirectional training, arXiv 2109.07780); None: both to the end. Both directions are evaluated throughout.
      tags: where language tags are inserted.
      vocabulary: the joint vocabulary, trained or given.
      cleaning: which pairs are dropped from training; those with an empty side always are.
      subword: random segmentations of the training text.
      batch: shape and mixture of batches.
    """

    train: tuple[Corpus, ...]
    valid: tuple[Corpus, ...] = ()
    test: tuple[Corpus, ...] = ()
    bidirectional: bool = False
    bidirectional_steps: int | None = None
    tags: TagPolicy = field(default_factory=TagPolicy)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    cleaning: PairRules = field(default_factory=PairRules)
    subword: SubwordSampling = field(default_factory=SubwordSampling)
    batch: BatchConfig = field(default_factory=BatchConfig)

    def __post_init__(self) -> None:
        for role in ("train", "valid", "test"):
            corpora = getattr(self, role)
            if isinstance(corpora, Corpus):
                corpora = (corpora,)
            object.__setattr__(self, role, tuple(corpora))
        if not self.train:
            raise UserError("DataConfig.train: there is no training corpus; give at least one")
        if type(self.cleaning) is not PairRules:
            raise UserError(
                f"DataConfig.cleaning: {type(self.cleaning).__name__} is for t5x_ext clean; a cache takes PairRules"
                " only"
            )
        if self.bidirectional_steps is not None and self.bidirectional_steps < 0:
            raise UserError(f"DataConfig.bidirectional_steps={self.bidirectional_steps}: must be 0 or more, or None")
        if self.bidirectional_steps is not None and not self.bidirectional:
            raise UserError("DataConfig.bidirectional_steps is set but bidirectional is False; set it to True")


@dataclass(frozen=True)
class PreparedData:
    """The data of a training run, prepared.

    Attributes:
      vocabulary: the joint vocabulary, also saved in the run folder.
      directions: names of the trained directions, as in `en-de`, each once.
      batches: the infinite training batches; `batches.plan` is their plan.
      valid_packed: validation batches, unshuffled; the first epoch is one pass. None without validation corpora.
      valid: validation text by corpus and direction.
      test: test text by corpus and direction.
      description: what the batches depend on, as JSON; it must be the same when a run is resumed.
    """

    vocabulary: Vocabulary
    directions: tuple[str, ...]
    batches: PackedBatches
    valid_packed: PackedBatches | None
    valid: tuple[TextDirection, ...]
    test: tuple[TextDirection, ...]
    description: dict[str, Any]

    @property
    def plan(self) -> BatchPlan | SwitchingPlan:
        """The plan of the training batches."""
        return self.batches.plan

    def valid_batches(self, row_start: int = 0, row_stop: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """These rows of every validation batch, one pass; nothing without validation corpora."""
        batches = self.valid_packed
        if batches is not None:
            stop = batches.rows if row_stop is None else row_stop
            for index in range(batches.plan.batches_per_epoch(0)):
                yield batches.read(index, row_start, stop)


def prepare(
    config: DataConfig,
    run_dir: str,
    cache_root: str | None = None,
    seed: int = 0,
    num_processes: int | None = None,
    beam: BeamRunner | None = None,
) -> PreparedData:
    """Vocabulary, caches and plan of a run; existing ones are reused.

    Args:
      config: the data.
      run_dir: run folder; the vocabulary is stored in its folder `vocabulary`.
      cache_root: folder of token caches, shared by runs, local or remote; None: `cache` in the run folder.
      seed: of the order of the data.
      num_processes: see `build_cache`.
      beam: where the training corpora are tokenised, see `build_cache`; None: on this machine.

    Raises:
      UserError: for invalid input, and if the run folder's vocabulary is not the one that the configuration asks for.
    """
    directions = text_directions(config.train, config.bidirectional)
    _check_directions(directions, config.tags)
    vocabulary = prepare_vocabulary(config.vocabulary, config.train, str(epath.Path(run_dir) / VOCABULARY_FOLDER))
    root = str(epath.Path(run_dir) / "cache") if cache_root is None else cache_root
    caches = [
        build_cache(corpus, vocabulary, root, config.cleaning, config.subword, num_processes, beam)
        for corpus in config.train
    ]
    plan = _training_plan(config, caches, vocabulary, seed)
    for name, rate in plan.rates().items():
        logger.info("%s: %.2f %% of the examples of an epoch", name, 100 * rate)
    return PreparedData(
        vocabulary=vocabulary,
        directions=tuple(dict.fromkeys(direction.name for direction in directions)),
        batches=PackedBatches(plan, vocabulary),
        valid_packed=_valid_batches(config, vocabulary, root),
        valid=text_directions(config.valid, config.bidirectional),
        test=text_directions(config.test, config.bidirectional),
        description=_describe(config, vocabulary, caches, seed),
    )


def prepare_vocabulary(config: VocabularyConfig, corpora: Sequence[Corpus], directory: str) -> Vocabulary:
    """The vocabulary in a folder, which is made from the configuration if it does not exist.

    Args:
      config: a given model, or how to train one.
      corpora: their languages get tags; a model is trained on them if none is given.
      directory: the folder.

    Raises:
      UserError: if the folder has another vocabulary than the configuration asks for.
    """
    languages = _languages(corpora)
    markers = config.markers
    exists = (epath.Path(directory) / DESCRIPTION_FILE).exists()
    if config.path is not None:
        vocabulary = _open_vocabulary(config.path, languages, markers)
        if exists and Vocabulary.load(directory).fingerprint() != vocabulary.fingerprint():
            raise UserError(f"{directory}: is not the vocabulary {config.path}; use that one or another run folder")
        if not exists:
            vocabulary.save(directory)
        return vocabulary
    needed = MARKERS.values() if any(map(_synthetic, corpora)) else ()
    markers = tuple(dict.fromkeys([*markers, *needed]))
    record = training_record(config, languages, [corpus.fingerprint() for corpus in corpora])
    if exists:
        _check_training(directory, record)
        _check_markers(directory, markers)
        return Vocabulary.load(directory)
    vocabulary = train_vocabulary(
        _all_lines(corpora),
        config.size - len(markers),
        languages,
        seed=config.seed,
        model_type=config.model_type,
        character_coverage=config.character_coverage,
        split_digits=config.split_digits,
        max_lines=config.max_lines,
    )
    vocabulary = Vocabulary.from_model(vocabulary.model, languages, markers)
    vocabulary.save(directory, record)
    logger.info("vocabulary: %d subwords, saved in %s", vocabulary.size, directory)
    return vocabulary


def _languages(corpora: Sequence[Corpus]) -> tuple[str, ...]:
    """Languages in the order of their first mention."""
    return tuple(dict.fromkeys(language for corpus in corpora for language in corpus.languages))


def _open_vocabulary(path: str, languages: Sequence[str], markers: Sequence[str]) -> Vocabulary:
    if not epath.Path(path).is_dir():
        return Vocabulary(path, languages, markers)
    saved = Vocabulary.load(path)
    return Vocabulary.from_model(saved.model, [*saved.languages, *languages], [*saved.markers, *markers])


def _synthetic(corpus: Corpus) -> Side | None:
    return corpus.synthetic if isinstance(corpus, ParallelText) else None


def _all_lines(corpora: Sequence[Corpus]) -> Iterator[str]:
    for corpus in corpora:
        for pair in corpus.pairs():
            yield from pair


def _check_training(directory: str, record: dict[str, Any]) -> None:
    saved = read_description(directory)["training"]
    if saved is None:
        raise UserError(f"{directory}: holds a vocabulary that was given, not trained; set VocabularyConfig.path to it")
    changed = [key for key in record if saved.get(key) != record[key]]
    if changed:
        raise UserError(
            f"{directory}: was trained with other {', '.join(changed)}; restore them, or use another run folder"
        )


def _check_markers(directory: str, markers: Sequence[str]) -> None:
    saved = Vocabulary.load(directory).markers
    if set(saved) != set(markers):
        raise UserError(
            f"{directory}: was trained with the markers {list(saved)}, not {list(markers)}; restore them, or use "
            "another run folder"
        )


def _check_directions(directions: Sequence[TextDirection], tags: TagPolicy) -> None:
    """One source language into several target languages needs a tag that says which."""
    targets: dict[str, str] = {}
    for direction in directions:
        source, target = direction.source_language, direction.target_language
        known = targets.setdefault(source, target)
        if known != target and not tags.names_target:
            raise UserError(
                f"{source} is translated into {known} and {target}, and no tag says which: set TagPolicy.encoder or"
                " TagPolicy.decoder to 'target'"
            )


def _streams(caches: Sequence[TokenCache], corpora: Sequence[Corpus], bidirectional: bool) -> list[Stream]:
    ways = (False, True) if bidirectional else (False,)
    sides = map(_synthetic, corpora)
    return [Stream(cache, reverse, side) for cache, side in zip(caches, sides) for reverse in ways]


def _training_plan(
    config: DataConfig, caches: Sequence[TokenCache], vocabulary: Vocabulary, seed: int
) -> BatchPlan | SwitchingPlan:
    def plan(bidirectional: bool) -> BatchPlan:
        return BatchPlan(_streams(caches, config.train, bidirectional), vocabulary, config.tags, config.batch, seed)

    if config.bidirectional_steps is None:
        return plan(config.bidirectional)
    return SwitchingPlan(plan(True), plan(False), config.bidirectional_steps)


def _valid_batches(config: DataConfig, vocabulary: Vocabulary, root: str) -> PackedBatches | None:
    if not config.valid:
        return None
    caches = [build_cache(corpus, vocabulary, root) for corpus in config.valid]
    batch = replace(config.batch, temperature=1.0, overlong="truncate")
    streams = _streams(caches, config.valid, config.bidirectional)
    plan = BatchPlan(streams, vocabulary, config.tags, batch, seed=0, shuffle=False)
    return PackedBatches(plan, vocabulary)


def _describe(config: DataConfig, vocabulary: Vocabulary, caches: Sequence[TokenCache], seed: int) -> dict[str, Any]:
    # Left out if unused, as in descriptions from before there were switches and markers.
    switch = {} if config.bidirectional_steps is None else {"bidirectional_steps": config.bidirectional_steps}
    sides = list(map(_synthetic, config.train))
    markers = {"synthetic": sides} if any(sides) else {}
    return {
        "vocabulary": vocabulary.fingerprint(),
        "caches": [Path(cache.path).name for cache in caches],
        "bidirectional": config.bidirectional,
        **switch,
        **markers,
        "tags": asdict(config.tags),
        "batch": asdict(config.batch),
        "seed": seed,
    }
