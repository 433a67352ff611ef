"""A trained model with its vocabulary: lines in, lines out."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from t5x_ext.contracts import Direction, Params, UserError
from t5x_ext.data.tags import TagPolicy
from t5x_ext.data.vocabulary import Vocabulary
from t5x_ext.decode.batching import LengthBatch, mesh_of, pad, plan_batches
from t5x_ext.decode.config import DecodeConfig
from t5x_ext.decode.ensemble import Combine, Ensemble
from t5x_ext.decode.open import Opened, fingerprint, join_members, open_run, place
from t5x_ext.decode.programs import decode_batch, random_key, without_seed
from t5x_ext.decode.scoring import Score, label_log_probs
from t5x_ext.models import Transformer
from t5x_ext.parallel import AxisRules
from t5x_ext.parallel.batches import batch_sharding

logger = logging.getLogger(__name__)

Progress = Callable[[int], object]
"""Told the number of lines that are done since the last call."""

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
"""Control characters of ASCII and Latin-1, and Unicode's separators of lines and paragraphs."""


class Hypothesis(NamedTuple):
    """One translation of a line."""

    text: str  # one line without control characters
    score: float  # log-probability over the length penalty, see `Hypotheses`
    num_tokens: int  # forced prefix and end of sentence included; 0 for an empty line


class Translator:
    """Translates and scores lines of text.

    Lines are sorted by length into batches of few shapes, and come back in their order, one for one. A line without
    tokens (empty, or white space) is not given to the model: its translation is the empty line.

    Where the model has a `MeshPlacement`, rows of a batch are sharded over `BATCH_AXES` of its mesh. Devices decide the
    rounding of scores, and nothing else.
    """

    def __init__(
        self,
        model: Transformer | Ensemble,
        params: Params,
        vocabulary: Vocabulary,
        tags: TagPolicy,
        directions: Sequence[str],
    ):
        """Puts the parts together.

        Args:
          model: the module that computes, or an ensemble.
          params: its parameters; NumPy arrays go where the model's placement wants them, or else to the default
            device; JAX arrays stay where they are.
          vocabulary: whose ids the model was trained on.
          tags: where language tags stand.
          directions: what the model was trained for, such as `("en-de", "de-en")`.

        Raises:
          UserError: where vocabulary or parameters do not fit the model.
        """
        opened = place(Opened(model, params, vocabulary, tags, tuple(directions)))
        self.model, self.params, self.vocabulary, self.tags, self.directions = opened

    @classmethod
    def from_run(
        cls,
        run_dir: epath.PathLike,
        checkpoint: str | int = "best",
        mesh: Mesh | None = None,
        axis_rules: AxisRules | None = None,
    ) -> Translator:
        """Opens a run folder, see `open_run`.

        Raises:
          UserError: where the folder is not that of a run, has no such checkpoint, or its parts do not fit.
        """
        return cls(*open_run(run_dir, checkpoint, mesh, axis_rules))

    @classmethod
    def ensemble(cls, members: Sequence[Translator], combine: Combine = "log_prob") -> Translator:
        """Several models of one shape, vocabulary and tag policy as one, see `join_members`.

        Raises:
          UserError: where the members do not fit each other.
        """
        return cls(*join_members([member._opened for member in members], combine))

    @property
    def _opened(self) -> Opened:
        return Opened(self.model, self.params, self.vocabulary, self.tags, self.directions)

    def fingerprint(self) -> str:
        """SHA-256 over everything that decides a translation but the options: weights, model, vocabulary, tags."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._opened)

    def translate(
        self,
        lines: Sequence[str],
        source_language: str | None = None,
        target_language: str | None = None,
        config: DecodeConfig | None = None,
        progress: Progress | None = None,
    ) -> list[str]:
        """The best translation of each line, in order.

        Args:
          lines: text without line ends.
          source_language: None: the one that follows from the other language and the model's directions.
          target_language: likewise.
          config: how to decode; None: `DecodeConfig()`, beam search.
          progress: told how many more lines are done.

        Raises:
          UserError: for a direction that the model was not trained for.
        """
        results = self.translate_n_best(lines, source_language, target_language, config, progress)
        return [hypotheses[0].text for hypotheses in results]

    def translate_n_best(
        self,
        lines: Sequence[str],
        source_language: str | None = None,
        target_language: str | None = None,
        config: DecodeConfig | None = None,
        progress: Progress | None = None,
        first_line: int = 0,
    ) -> list[list[Hypothesis]]:
        """The translations of each line that the search returns, best first; texts of several may agree.

        An empty line has one empty hypothesis of score 0; a line for which nothing is found has one of score -inf.

        Args:
          lines: as in `translate`, like all but the last.
          source_language: see there.
          target_language: see there.
          config: see there.
          progress: see there.
          first_line: number of the first line; sampling depends on line numbers, so that the parts of a text are
            sampled like the whole.
        """
        config = config or DecodeConfig()
        direction = self.resolve(source_language, target_language)
        sources = self._sources(lines, direction, config.max_source_length)
        results = [[Hypothesis("", 0.0, 0)] for _ in lines]
        filled = [index for index, source in enumerate(sources) if source]
        if progress and len(filled) < len(lines):
            progress(len(lines) - len(filled))
        for batch in plan_batches([len(sources[index]) for index in filled], config.batch_tokens, self._mesh):
            indices = [filled[member] for member in batch.indices]
            batch_sources = [sources[index] for index in indices]
            line_ids = [first_line + index for index in indices]
            for index, hypotheses in zip(indices, self._decode(batch_sources, line_ids, batch, direction, config)):
                results[index] = hypotheses
            if progress:
                progress(len(indices))
        return results

    def score(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        source_language: str | None = None,
        target_language: str | None = None,
        config: DecodeConfig | None = None,
        progress: Progress | None = None,
    ) -> list[Score]:
        """How probable the model finds given translations: forced log-probabilities of all tokens.

        The forced prefix and the end of sentence count, as in training. Sources are truncated as in `translate`,
        targets never; empty lines are scored like any other.

        Args:
          sources: lines to translate.
          targets: a translation of each.
          source_language: as in `translate`, like all that follows.
          target_language: see there.
          config: gives `max_source_length` and `batch_tokens`; the rest does not matter.
          progress: see there.

        Raises:
          UserError: for unequal numbers of lines or an unknown direction.
        """
        _check_lines(targets)
        if len(sources) != len(targets):
            raise UserError(f"score: {len(sources)} source lines but {len(targets)} target lines; give one for each")
        config = config or DecodeConfig()
        direction = self.resolve(source_language, target_language)
        eos = self.vocabulary.eos_id
        prefix = self.tags.target_prefix(self.vocabulary, direction.target_language)
        inputs = [
            source or self._source((), direction)
            for source in self._sources(sources, direction, config.max_source_length)
        ]
        labels = [[*prefix, *tokens.tolist(), eos] for tokens in self.vocabulary.encode(targets)]
        return self.score_tokens(inputs, labels, config.batch_tokens, progress)

    def score_tokens(
        self,
        inputs: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]],
        batch_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> list[Score]:
        """`score` on token ids: whole encoder inputs and whole decoder labels, tags and ends included."""
        results: list[Score] = [Score(())] * len(inputs)
        longest = [max(len(source), len(target)) for source, target in zip(inputs, labels)]
        for batch in plan_batches(longest, batch_tokens, self._mesh):
            source, source_lengths = pad([inputs[i] for i in batch.indices], batch.rows, batch.length)
            target, target_lengths = pad([labels[i] for i in batch.indices], batch.rows, batch.length)
            log_probs = _fetch(
                label_log_probs(
                    self.model,
                    self.params,
                    *self._sharded(source, source_lengths, target, target_lengths),
                    self.vocabulary.eos_id,
                )
            )
            for row, index in enumerate(batch.indices):
                results[index] = Score(tuple(log_probs[row, : target_lengths[row]].tolist()))
            if progress:
                progress(len(batch.indices))
        return results

    def _decode(
        self,
        sources: Sequence[Sequence[int]],
        line_ids: Sequence[int],
        batch: LengthBatch,
        direction: Direction,
        config: DecodeConfig,
    ) -> list[list[Hypothesis]]:
        """Hypotheses of one batch, padded to its shape."""
        prefix = self.tags.target_prefix(self.vocabulary, direction.target_language)
        source_prefix = len(self._source((), direction)) - 1
        limits = [len(prefix) + config.max_target_length(len(source) - source_prefix) for source in sources]
        tokens, lengths = pad(sources, batch.rows, batch.length)
        # Rows of padding end at once: they have room for the prefix and the end of sentence only.
        max_lengths = np.full(batch.rows, len(prefix) + 1, np.int32)
        max_lengths[: len(limits)] = limits
        row_ids = np.zeros(batch.rows, np.int32)
        row_ids[: len(line_ids)] = line_ids
        search = config.search
        found = decode_batch(
            self.model,
            self.params,
            *self._sharded(
                tokens, lengths, np.tile(np.asarray(prefix, np.int32), (batch.rows, 1)), max_lengths, row_ids
            ),
            random_key(search),
            eos_id=self.vocabulary.eos_id,
            max_length=len(prefix) + config.max_target_length(batch.length),
            search=without_seed(search),
            constraints=config.constraints,
        )
        token_ids, ends, scores = (_fetch(leaf)[: len(sources)] for leaf in found)
        return [self._hypotheses(token_ids[row], ends[row], scores[row], len(prefix)) for row in range(len(sources))]

    def _sharded(self, *arrays: np.ndarray) -> Sequence[Any]:
        """Arrays of a batch, rows first, with their rows sharded over the mesh, if there is one."""
        if self._mesh is None:
            return arrays
        sharding = batch_sharding(self._mesh)
        return [jax.make_array_from_callback(array.shape, sharding, array.__getitem__) for array in arrays]

    @property
    def _mesh(self) -> Mesh | None:
        return mesh_of(self.model)

    def _hypotheses(self, tokens: np.ndarray, lengths: np.ndarray, scores: np.ndarray, prefix: int) -> list[Hypothesis]:
        found = [rank for rank in range(len(lengths)) if lengths[rank] > 0]
        texts = self.vocabulary.decode([tokens[rank, prefix : lengths[rank]] for rank in found])
        return [
            Hypothesis(_one_line(text), float(scores[rank]), int(lengths[rank])) for rank, text in zip(found, texts)
        ] or [Hypothesis("", -math.inf, 0)]

    def _sources(self, lines: Sequence[str], direction: Direction, max_length: int) -> list[list[int]]:
        """Encoder inputs, truncated to `max_length`; none for a line without tokens."""
        _check_lines(lines)
        room = max_length - len(self._source((), direction))
        encoded = self.vocabulary.encode(lines)
        longer = sum(len(tokens) > room for tokens in encoded)
        if longer:
            logger.warning(
                "%d of %d lines are longer than %d tokens and were truncated", longer, len(lines), max_length
            )
        return [self._source(tokens[:room].tolist(), direction) if len(tokens) else [] for tokens in encoded]

    def _source(self, tokens: Iterable[int], direction: Direction) -> list[int]:
        return [*self.tags.source_prefix(self.vocabulary, *direction), *tokens, self.vocabulary.eos_id]

    def resolve(self, source_language: str | None, target_language: str | None) -> Direction:
        """The one direction of the model that fits the languages given.

        Raises:
          UserError: where none fits, or several.
        """
        known = [self._split(name) for name in self.directions]
        fitting = [
            direction
            for direction in known
            if source_language in (None, direction.source_language)
            and target_language in (None, direction.target_language)
        ]
        if len(fitting) == 1:
            return fitting[0]
        asked = f"{source_language or '?'}-{target_language or '?'}"
        problem = "fits several directions" if fitting else "is not a direction of this model"
        raise UserError(f"{asked} {problem}; it translates {', '.join(self.directions)}")

    def _split(self, name: str) -> Direction:
        """Languages of a direction's name; where codes hold hyphens themselves, the vocabulary's languages decide."""
        parts = name.split("-")
        splits = [Direction("-".join(parts[:i]), "-".join(parts[i:])) for i in range(1, len(parts))]
        known = [split for split in splits if set(split) <= set(self.vocabulary.languages)]
        if len(splits) != 1 and len(known) != 1:
            raise UserError(f"direction {name!r}: cannot tell its two languages apart; write codes with '_', not '-'")
        return splits[0] if len(splits) == 1 else known[0]


def _fetch(array: jax.Array) -> np.ndarray:
    """An array on this host, also where other hosts hold parts of it; all of them call it."""
    if not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _one_line(text: str) -> str:
    """The text with a space for control characters, which byte pieces can spell: one line in is one line out."""
    if not _CONTROL.search(text):
        return text
    return " ".join(filter(None, (part.strip(" ") for part in _CONTROL.split(text))))


def _check_lines(lines: Sequence[str]) -> None:
    if isinstance(lines, str):
        raise UserError("lines: give a list of strings, not one string")
