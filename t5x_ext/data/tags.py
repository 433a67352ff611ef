"""Language tags: where an example names its languages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from t5x_ext.contracts import UserError
from t5x_ext.data.vocabulary import Vocabulary


@dataclass(frozen=True)
class TagPolicy:
    """Where language tags are inserted, as with fairseq's `--encoder-langtok` and `--decoder-langtok`.

    Encoder input is `prefix + tokens + [eos]`; decoder labels are `prefix + tokens + [eos]` and decoder input is
    `[eos] + prefix + tokens`. Decoding forces the decoder's prefix and drops it from the text.

    Attributes:
      encoder: the language whose tag starts the encoder input: `none`, the `source` or the `target` language.
      decoder: `target`: the decoder's first label is the target language's tag; `none`: no tag.
    """

    encoder: Literal["none", "source", "target"] = "none"
    decoder: Literal["none", "target"] = "none"

    def __post_init__(self) -> None:
        if self.encoder not in ("none", "source", "target"):
            raise UserError(f"TagPolicy.encoder={self.encoder!r}: allowed are 'none', 'source', 'target'")
        if self.decoder not in ("none", "target"):
            raise UserError(f"TagPolicy.decoder={self.decoder!r}: allowed are 'none', 'target'")

    @property
    def names_target(self) -> bool:
        """Whether the tags name the target language."""
        return self.encoder == "target" or self.decoder == "target"

    def source_prefix(
        self, vocabulary: Vocabulary, source_language: str, target_language: str, marker: str | None = None
    ) -> tuple[int, ...]:
        """Ids at the start of the encoder input: the tag, then the marker of synthetic text, if any.

        Raises:
          UserError: if the vocabulary has no tag for the language, or no such marker.
        """
        prefix = () if marker is None else (vocabulary.marker_id(marker),)
        if self.encoder == "none":
            return prefix
        return (vocabulary.tag_id(source_language if self.encoder == "source" else target_language), *prefix)

    def target_prefix(self, vocabulary: Vocabulary, target_language: str) -> tuple[int, ...]:
        """Ids at the start of the decoder labels, forced when decoding.

        Raises:
          UserError: if the vocabulary has no tag for the language.
        """
        return (vocabulary.tag_id(target_language),) if self.decoder == "target" else ()
