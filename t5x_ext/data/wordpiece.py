"""WordPiece, the vocabulary of BERT: texts or pairs of texts to token ids, by the library `tokenizers`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int

from t5x_ext.contracts import UserError

FILE = "tokenizer.json"
"""The name of a tokenizer's file in a run folder, and what Hugging Face calls it."""


class TokenizedText(NamedTuple):
    """The tokens of one example."""

    ids: Int[np.ndarray, " length"]  # int32, with [CLS] and [SEP]
    types: Int[np.ndarray, " length"]  # int32: 0 for the first text, 1 for the second


class WordPiece:
    """A tokenizer that begins a text with [CLS] and ends it, and the second of a pair, with [SEP].

    Attributes:
      definition: the text of its `tokenizer.json`.
    """

    def __init__(self, definition: str, where: str = FILE):
        """Builds the tokenizer.

        Args:
          definition: the text of a `tokenizer.json`.
          where: the file that it came from, for messages.

        Raises:
          UserError: if it is not one, or `tokenizers` is not installed.
        """
        tokenizers = _library()
        self.definition = definition
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises nothing more precise
            raise UserError(f"{where} is not a tokenizer of the library tokenizers: {error}") from error
        # Those of sentence encoders truncate and pad by themselves.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    @classmethod
    def from_vocabulary(cls, lines: Sequence[str], lowercase: bool = True) -> WordPiece:
        """The tokenizer of a `vocab.txt`, one piece a line, in order of their ids.

        Args:
          lines: the pieces; [PAD], [UNK], [CLS] and [SEP] must be among them.
          lowercase: fold case and strip accents, as `uncased` models do.

        Raises:
          UserError: if a special piece is missing, or `tokenizers` is not installed.
        """
        tokenizers = _library()
        pieces = {piece: number for number, piece in enumerate(lines)}
        for special in ("[PAD]", "[UNK]", "[CLS]", "[SEP]"):
            if special not in pieces:
                raise UserError(f"vocab.txt has no piece {special}; it is not the vocabulary of a BERT")
        model = tokenizers.models.WordPiece(pieces, unk_token="[UNK]", max_input_chars_per_word=100)
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        tokenizer.post_processor = tokenizers.processors.BertProcessing(
            ("[SEP]", pieces["[SEP]"]), ("[CLS]", pieces["[CLS]"])
        )
        tokenizer.decoder = tokenizers.decoders.WordPiece()
        return cls(tokenizer.to_str(), "vocab.txt")

    @classmethod
    def from_folder(cls, folder: epath.PathLike) -> WordPiece:
        """The tokenizer of a folder with `tokenizer.json` or `vocab.txt`.

        Raises:
          UserError: if there is neither.
        """
        path = epath.Path(folder)
        if (path / FILE).exists():
            return cls((path / FILE).read_text(), str(path / FILE))
        if (path / "vocab.txt").exists():
            settings = path / "tokenizer_config.json"
            lowercase = json.loads(settings.read_text()).get("do_lower_case", True) if settings.exists() else True
            return cls.from_vocabulary((path / "vocab.txt").read_text().splitlines(), lowercase)
        raise UserError(f"{path} has no tokenizer: neither {FILE} nor vocab.txt")

    @property
    def size(self) -> int:
        """Number of pieces."""
        return int(self._tokenizer.get_vocab_size())

    def fingerprint(self) -> str:
        """SHA-256 of the definition."""
        return hashlib.sha256(self.definition.encode()).hexdigest()

    def save(self, folder: epath.PathLike) -> None:
        """Writes `tokenizer.json` into a folder, making it if there is none."""
        path = epath.Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / FILE).write_text(self.definition)

    def encode(self, texts: Sequence[tuple[str, ...]], max_length: int) -> list[TokenizedText]:
        """Token ids of texts, or of pairs.

        Args:
          texts: each one text, or two.
          max_length: tokens to keep of an example; of a pair the longer text is truncated first.
        """
        self._tokenizer.enable_truncation(max_length, strategy="longest_first")
        inputs = [one[0] if len(one) == 1 else one for one in texts]
        encoded = self._tokenizer.encode_batch(inputs)
        self._tokenizer.no_truncation()
        as_array = lambda numbers: np.array(numbers, np.int32)
        return [TokenizedText(as_array(one.ids), as_array(one.type_ids)) for one in encoded]


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.normalizers
        import tokenizers.pre_tokenizers
        import tokenizers.processors
    except ImportError as error:
        raise UserError(f"WordPiece needs tokenizers: pip install 't5x_ext[pretrained]' ({error})") from error
    return tokenizers
