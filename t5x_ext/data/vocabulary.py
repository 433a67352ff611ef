"""SentencePiece vocabularies with language tags.

SentencePiece does not normalise text (its default, NFKC, turns full-width Chinese punctuation into ASCII), and unseen
characters are encoded as bytes, so that decoding restores any line.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import sentencepiece
from etils import epath
from google.protobuf.message import DecodeError
from jaxtyping import Int
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from t5x_ext.contracts import UserError
from t5x_ext.corpora.cleaning import clean_line
from t5x_ext.corpora.special_pieces import check_marker, tag_language, tag_piece
from t5x_ext.storage.files import write_bytes, write_text

logger = logging.getLogger(__name__)

MODEL_FILE = "sentencepiece.model"
DESCRIPTION_FILE = "vocabulary.json"
_FORMAT = 1

# The result depends on how the sums of the EM algorithm are split over threads, so it is the same on every machine.
_TRAINER_THREADS = 8
_MAX_LINE_BYTES = 16384
# If there are more distinct characters than this share of the vocabulary, rare ones are left to byte fallback.
_CHARACTER_SHARE = 0.25
_REDUCED_COVERAGE = 0.9995
_ERRORS_ONLY = 2
# Segmentations of a word that are sampled from, and words whose segmentations are kept in memory.
_N_BEST = 32
_MAX_CANDIDATES = 30_000


@dataclass(frozen=True)
class VocabularyConfig:
    """One joint vocabulary: an existing SentencePiece model, or how to train one.

    Attributes:
      path: a SentencePiece model file, or a folder written by `Vocabulary.save`; None: train on the training corpora.
      size: number of ids, tags and bytes included. A corpus too small for it gives a smaller vocabulary and a log line.
      model_type: `unigram` or `bpe`.
      character_coverage: share of the text's characters that get ids, the others being encoded as bytes; None: all of
        them if they take at most a quarter of the ids, else 0.9995.
      split_digits: encode every digit by itself.
      max_lines: train on at most this many lines, a fixed random sample of all.
      seed: of that sample.
      markers: markers for the origin of a text, as `BT` for `<BT>`. A trained vocabulary also gets those that the
        training corpora need.
    """

    path: str | None = None
    size: int = 32768
    model_type: Literal["unigram", "bpe"] = "unigram"
    character_coverage: float | None = None
    split_digits: bool = False
    max_lines: int = 4_000_000
    seed: int = 0
    markers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for marker in self.markers:
            check_marker(marker)
        if self.model_type not in ("unigram", "bpe"):
            raise UserError(f"VocabularyConfig.model_type={self.model_type!r}: allowed are 'unigram', 'bpe'")
        if self.size < 1:
            raise UserError(f"VocabularyConfig.size={self.size}: must be a positive number of pieces")
        if self.max_lines < 1:
            raise UserError(f"VocabularyConfig.max_lines={self.max_lines}: must be positive")
        if self.character_coverage is not None and not 0.98 <= self.character_coverage <= 1:
            raise UserError(f"VocabularyConfig.character_coverage={self.character_coverage}: must be 0.98 to 1")


class _Candidates(NamedTuple):
    """The best segmentations of a word."""

    segmentations: list[list[int]]
    cumulative: list[float]  # cumulative probabilities

    def pick(self, draw: float) -> list[int]:
        return self.segmentations[min(bisect.bisect_right(self.cumulative, draw), len(self.cumulative) - 1)]


class Vocabulary:
    """A SentencePiece model with one tag id a language.

    Ids are the model's own. Tags that the model lacks get the ids after its last one, in the order of `languages`;
    markers follow. Text never encodes to a tag, even if it contains the letters `__de__`, and decoding drops tags.
    """

    def __init__(self, path: str, languages: Sequence[str] = (), markers: Sequence[str] = ()):
        """Opens a SentencePiece model file.

        Args:
          path: the model file, local or remote.
          languages: languages that need tags; those that the model has as pieces `__xx__` need not be given.
          markers: further ids that stand for no text, as `BT` for `<BT>`.

        Raises:
          UserError: if the file is missing, is no SentencePiece model, or has no end-of-sentence piece.
        """
        try:
            model = epath.Path(path).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise UserError(f"{path}: no such SentencePiece model file") from None
        self._open(model, languages, markers, origin=path)

    @classmethod
    def from_model(cls, model: bytes, languages: Sequence[str] = (), markers: Sequence[str] = ()) -> Vocabulary:
        """A vocabulary from a serialised SentencePiece model."""
        vocabulary = cls.__new__(cls)
        vocabulary._open(model, languages, markers, origin="the SentencePiece model")
        return vocabulary

    def _open(self, model: bytes, languages: Sequence[str], markers: Sequence[str], origin: str) -> None:
        self.model = model
        proto = _parse(model, origin)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self._scores = [piece.score for piece in proto.pieces]
        self._is_unigram = proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM
        self._splits_words = (
            proto.trainer_spec.split_by_whitespace
            and proto.normalizer_spec.add_dummy_prefix
            and not proto.trainer_spec.treat_whitespace_as_suffix
        )
        if self._processor.eos_id() < 0:
            raise UserError(
                f"{origin}: has no end-of-sentence piece; train it with eos_id set (SentencePiece's default)"
            )
        self._tags = _tag_ids(self._processor, languages)
        first = max(self._processor.get_piece_size(), 1 + max(self._tags.values(), default=-1))
        self._markers = {marker: first + index for index, marker in enumerate(dict.fromkeys(markers))}
        self._dropped = frozenset([*self._tags.values(), *self._markers.values()])
        self._candidates: dict[tuple[float, str], _Candidates] = {}

    @property
    def size(self) -> int:
        """Number of ids, tags and markers included."""
        return max(self._processor.get_piece_size(), 1 + max(self._dropped, default=-1))

    @property
    def eos_id(self) -> int:
        """The end-of-sentence id."""
        return self._processor.eos_id()

    @property
    def unk_id(self) -> int:
        """The id of unknown text; with byte fallback text never encodes to it."""
        return self._processor.unk_id()

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages that have tags, in the order of their ids."""
        return tuple(self._tags)

    def tag_id(self, language: str) -> int:
        """The id of a language's tag.

        Raises:
          UserError: if the vocabulary does not have it.
        """
        if language not in self._tags:
            known = ", ".join(self._tags) or "none"
            raise UserError(f"language {language!r} has no tag in the vocabulary; known languages: {known}")
        return self._tags[language]

    @property
    def markers(self) -> tuple[str, ...]:
        """Markers, in the order of their ids."""
        return tuple(self._markers)

    def marker_id(self, marker: str) -> int:
        """The id of a marker.

        Raises:
          UserError: if the vocabulary does not have it.
        """
        if marker not in self._markers:
            raise UserError(
                f"the vocabulary has no marker <{marker}>; make it with VocabularyConfig.markers = ('{marker}',)"
            )
        return self._markers[marker]

    def encode(self, lines: Sequence[str]) -> list[Int[np.ndarray, " length"]]:
        """Token ids of every line, int32, without end of sentence and without tags; lines are cleaned first."""
        return self._processor.encode_as_numpy([clean_line(line) for line in lines], num_threads=1)

    def sample(self, lines: Sequence[str], alpha: float, seed: int) -> list[Int[np.ndarray, " length"]]:
        """Token ids of one random segmentation of every line, the same for the same lines, alpha and seed.

        Samples from the 32 best segmentations (Kudo, arXiv 1804.10959, section 3.2) of every word, which gives far more
        segmentations of a line than its own 32 best. If the model's subwords may cross words, lines are sampled as one
        unit. SentencePiece's own sampling is not used, because it cannot be seeded across processes.

        Args:
          lines: text, cleaned first.
          alpha: a segmentation's weight is its probability to this power: 0 is uniform, 1 is the model's distribution.
          seed: of the sampling.

        Raises:
          UserError: if the model is not a unigram model; only those give probabilities.
        """
        if not self._is_unigram:
            raise UserError("subword sampling needs a unigram vocabulary; use model_type='unigram' or variants=0")
        units = [clean_line(line).split(" ") if self._splits_words else [clean_line(line)] for line in lines]
        candidates = self._candidates_of({unit for line in units for unit in line}, alpha)
        draws = iter(np.random.default_rng(seed).random(sum(map(len, units))).tolist())
        return [np.array([*chain(*(candidates[unit].pick(next(draws)) for unit in line))], np.int32) for line in units]

    def _candidates_of(self, units: set[str], alpha: float) -> dict[str, _Candidates]:
        if len(self._candidates) > _MAX_CANDIDATES:
            self._candidates.clear()
        missing = [unit for unit in units if (alpha, unit) not in self._candidates]
        for unit, segmentations in zip(missing, self._processor.nbest_encode_as_ids(missing, nbest_size=_N_BEST)):
            scores = np.array([sum(map(self._scores.__getitem__, ids)) for ids in segmentations])
            weights = np.exp(alpha * (scores - scores.max()))
            self._candidates[alpha, unit] = _Candidates(segmentations, (weights.cumsum() / weights.sum()).tolist())
        return {unit: self._candidates[alpha, unit] for unit in units}

    def decode(self, ids: Sequence[Sequence[int] | Int[np.ndarray, " length"]]) -> list[str]:
        """The text of every sequence of ids up to its first end of sentence, tags dropped."""
        # SentencePiece takes an empty list for an empty sequence.
        return self._processor.decode([self._text_ids(sequence) for sequence in ids], num_threads=1) if len(ids) else []

    def _text_ids(self, sequence: Sequence[int] | np.ndarray) -> list[int]:
        ids = np.asarray(sequence, dtype=np.int64).tolist()
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return [token for token in ids if token not in self._dropped]

    @cached_property
    def _fingerprint(self) -> str:
        # Markers are hashed only if there are any, so that fingerprints without them do not change.
        special = [list(self._tags.items()), *([list(self._markers.items())] if self._markers else [])]
        return hashlib.sha256(self.model + b"".join(json.dumps(part).encode() for part in special)).hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 over the model, the tags and the markers: equal fingerprints mean equal ids for every text."""
        return self._fingerprint

    def save(self, directory: str, training: dict[str, Any] | None = None) -> None:
        """Writes the two files of a vocabulary folder; the description, written last, marks it as complete.

        Args:
          directory: made if it is missing; local or remote.
          training: how the vocabulary was trained, as JSON, stored in the description.
        """
        folder = epath.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / MODEL_FILE, self.model)
        description = {
            "format": _FORMAT,
            "size": self.size,
            "languages": list(self.languages),
            **({"markers": list(self.markers)} if self._markers else {}),
            "fingerprint": self.fingerprint(),
            "training": training,
        }
        write_text(folder / DESCRIPTION_FILE, json.dumps(description, indent=2) + "\n")

    @classmethod
    def load(cls, directory: str) -> Vocabulary:
        """Opens a folder written by `save`.

        Raises:
          UserError: if it is not such a folder, or its two files do not match.
        """
        description = read_description(directory)
        path = str(epath.Path(directory) / MODEL_FILE)
        vocabulary = cls(path, description["languages"], description.get("markers", ()))
        if vocabulary.fingerprint() != description["fingerprint"]:
            raise UserError(f"{directory}: {MODEL_FILE} is not the model that {DESCRIPTION_FILE} describes")
        return vocabulary


def read_description(directory: str) -> dict[str, Any]:
    """The description in a vocabulary folder.

    Raises:
      UserError: if the folder is not a complete vocabulary, or has an unknown format.
    """
    path = epath.Path(directory) / DESCRIPTION_FILE
    try:
        description = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory}: not a vocabulary folder ({DESCRIPTION_FILE} is missing)") from None
    except ValueError:
        raise UserError(f"{path}: not JSON") from None
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise UserError(f"{path}: not a vocabulary description of format {_FORMAT}")
    return description


def _parse(model: bytes, origin: str) -> Any:
    """The model with its tags as control pieces: text encodes to user-defined pieces, but never to these."""
    proto = model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(model)
    except DecodeError:
        raise UserError(f"{origin}: not a SentencePiece model") from None
    if not proto.pieces:
        raise UserError(f"{origin}: not a SentencePiece model")
    for piece in proto.pieces:
        if piece.type == piece.USER_DEFINED and tag_language(piece.piece) is not None:
            piece.type = piece.CONTROL
    return proto


def _tag_ids(processor: sentencepiece.SentencePieceProcessor, languages: Sequence[str]) -> dict[str, int]:
    control = (index for index in range(processor.get_piece_size()) if processor.is_control(index))
    found = ((tag_language(processor.id_to_piece(index)), index) for index in control)
    tags = {language: index for language, index in found if language is not None}
    for language in languages:
        tag_piece(language)
        if language not in tags:
            tags[language] = max(processor.get_piece_size(), 1 + max(tags.values(), default=-1))
    return tags


def train_vocabulary(
    lines: Iterable[str],
    size: int,
    languages: Sequence[str],
    seed: int = 0,
    model_type: Literal["unigram", "bpe"] = "unigram",
    character_coverage: float | None = None,
    split_digits: bool = False,
    max_lines: int = VocabularyConfig.max_lines,
) -> Vocabulary:
    """Trains a SentencePiece model with byte fallback and one tag a language; deterministic for given lines and seed.

    Ids: 0 padding, 1 end of sentence, 2 unknown, then the tags in the order of `languages`, then bytes and subwords.

    Args:
      lines: text of all languages, cleaned first; lines above 16 KiB are skipped.
      size: number of ids; a text too small for it gives fewer, which is logged.
      languages: languages that get tags.
      seed: of the sample taken when there are more than `max_lines` lines.
      model_type: as in `VocabularyConfig`, like the other arguments.
      character_coverage: see there.
      split_digits: see there.
      max_lines: see there.

    Raises:
      UserError: if there is no text, or `size` is too small for tags, bytes and characters.
    """
    # Repeated lines are counted, because SentencePiece takes quadratic time over repeated text.
    counts = Counter(_sample_lines(lines, max_lines, seed))
    if not any(counts):
        raise UserError("vocabulary: there is no text to train on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=(f"{line}\t{count}" for line, count in counts.items()),
            input_format="tsv",
            model_writer=model,
            vocab_size=size,
            model_type=model_type,
            user_defined_symbols=[tag_piece(language) for language in dict.fromkeys(languages)],
            character_coverage=character_coverage or _automatic_coverage(counts, size),
            split_digits=split_digits,
            normalization_rule_name="identity",
            byte_fallback=True,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            hard_vocab_limit=False,
            shuffle_input_sentence=False,
            max_sentence_length=_MAX_LINE_BYTES,
            train_extremely_large_corpus=len(counts) > 1_000_000,
            num_threads=_TRAINER_THREADS,
            minloglevel=_ERRORS_ONLY,
        )
    except RuntimeError as error:
        raise UserError(f"vocabulary: {_trainer_message(error, size)}") from None
    vocabulary = Vocabulary.from_model(model.getvalue(), languages)
    if vocabulary.size < size:
        logger.info("vocabulary: %d subwords instead of %d, the text is too small for more", vocabulary.size, size)
    return vocabulary


def _sample_lines(lines: Iterable[str], max_lines: int, seed: int) -> list[str]:
    """A uniform sample of the cleaned lines (Vitter's algorithm R), all of them if there are few."""
    sample: list[str] = []
    random = np.random.default_rng(seed)
    for index, line in enumerate(lines):
        if index < max_lines:
            sample.append(clean_line(line))
        elif (slot := int(random.integers(index + 1))) < max_lines:
            sample[slot] = clean_line(line)
    return sample


def _automatic_coverage(lines: Iterable[str], size: int) -> float:
    characters: set[str] = set()
    for line in lines:
        characters.update(line)
    return 1.0 if len(characters) <= _CHARACTER_SHARE * size else _REDUCED_COVERAGE


def _trainer_message(error: RuntimeError, size: int) -> str:
    needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
    if needed:
        return f"size {size} is too small: tags, bytes and the text's characters alone take {needed.group(1)} pieces"
    return f"SentencePiece refused the text or the settings: {' '.join(str(error).split())}"


def training_record(config: VocabularyConfig, languages: Sequence[str], fingerprints: Sequence[str]) -> dict[str, Any]:
    """What a trained vocabulary depends on, as JSON: stored in its description, compared when a run is resumed."""
    record = asdict(config)
    del record["path"], record["markers"]
    return {**record, "languages": list(languages), "corpora": list(fingerprints)}
