"""Translation with a model that writes all tokens at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from t5x_ext.contracts import UserError
from t5x_ext.data import Vocabulary
from t5x_ext.decode import CtcGreedy, DecodeConfig, LengthBeam, ParallelGreedy
from t5x_ext.models import ParallelConfig
from t5x_ext.tasks.translation import Translation

if TYPE_CHECKING:
    from t5x_ext.train.run import Run

_OF_LENGTHS, _OF_FRAMES = (LengthBeam, ParallelGreedy), (CtcGreedy,)


@dataclass(frozen=True)
class ParallelTranslation(Translation):
    """Translation with a decoder that is not autoregressive (`train.Task`); see `Translation`.

    The objective is `objectives.Glancing` or `objectives.ParallelCrossEntropy`; for an upsampled model
    `objectives.Ctc`, which needs `BatchConfig.packing = False`, and the search `decode.CtcGreedy`. Such models learn
    better from what an autoregressive model translated than from the original targets (sequence-level distillation,
    gin/pipelines/distil_parallel.gin).

    Attributes:
      model: sizes; the size of the vocabulary and the unknown token are taken from the data.
      decode: search used during training.
      test_decode: search used for the final test.

    The other attributes are those of `Translation`.
    """

    kind: ClassVar[str] = "parallel_translation"

    model: ParallelConfig = field(default_factory=ParallelConfig)
    decode: DecodeConfig = field(default_factory=lambda: DecodeConfig(ParallelGreedy()))
    test_decode: DecodeConfig = field(default_factory=lambda: DecodeConfig(LengthBeam()))

    def check(self, run: Run) -> None:
        """Refuses what `Translation` refuses, packed rows with an upsampled model, and searches that do not fit.

        Raises:
          UserError: for settings that do not go together.
        """
        super().check(run)
        upsampled = self.model.upsample is not None
        if upsampled and self.data.batch.packing:
            raise UserError(
                "ParallelConfig.upsample needs one example a row, because CTC aligns rows; set "
                "data.BatchConfig.packing = False"
            )
        wrong, right = (_OF_LENGTHS, "decode.CtcGreedy") if upsampled else (_OF_FRAMES, "decode.LengthBeam")
        for name in ("decode", "test_decode"):
            if isinstance(search := getattr(self, name).search, wrong):
                is_model = "is upsampled" if upsampled else "predicts lengths"
                raise UserError(
                    f"ParallelTranslation.{name} searches with {type(search).__name__}, but the model {is_model}; "
                    f"take {right}"
                )

    def sizes(self, vocabulary: Vocabulary) -> dict[str, int]:
        """Size of the vocabulary, and the unknown token."""
        return super().sizes(vocabulary) | {"unk_id": vocabulary.unk_id}

    def sized(self, sizes: Mapping[str, int]) -> ParallelConfig:
        """The model's config with what the data decide; without `unk_id` (planning) its own stays."""
        unk_id = sizes.get("unk_id", self.model.unk_id)
        return dataclasses.replace(self.model, vocab_size=sizes["vocab_size"], unk_id=unk_id)
