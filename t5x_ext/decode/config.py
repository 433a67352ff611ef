"""How to decode: one frozen dataclass of options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from t5x_ext.contracts import UserError
from t5x_ext.decode.sampling import check_sampling
from t5x_ext.decode.search import LENGTH_PENALTIES, LengthPenalty

STRATEGIES = ("beam", "greedy", "sample")


@dataclass(frozen=True)
class DecodeConfig:
    """Options of decoding; the defaults are fairseq's beam search with beam 5.

    Raises:
      UserError: when a value is not allowed, at construction.
    """

    strategy: Literal["beam", "greedy", "sample"] = "beam"
    beam_size: int = 5
    n_best: int = 1
    """Results for each line; at most `beam_size` for beam, 1 for greedy, any number of draws for sample."""
    length_penalty: Literal["fairseq", "gnmt"] = "fairseq"
    alpha: float = 1.0
    """Exponent of the length penalty."""
    max_length_ratio: float = 3.0
    """A translation has at most `ceil(ratio * source tokens) + extra` tokens (tags not counted, ends counted)."""
    max_length_extra: int = 20
    max_source_length: int = 512
    """Tokens of encoder input, tag and end included; longer lines are cut at their end, counted in the log."""
    batch_tokens: int | None = None
    """Padded source tokens of a batch: rows times the bucket's length. None: 512 on a CPU, where a large batch only
    waits for its longest sentence, and 8192 on an accelerator, which needs many rows to be busy. Every copy of the
    model has so many, so that a batch of a mesh has them times its axes `slices` and `data`."""
    temperature: float = 1.0
    top_k: int = 0
    """Sampling keeps the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Sampling keeps the fewest tokens that reach this probability; 1 keeps all."""
    seed: int = 0
    """Of sampling."""

    def __post_init__(self) -> None:
        _one_of("strategy", self.strategy, STRATEGIES)
        _one_of("length_penalty", self.length_penalty, tuple(LENGTH_PENALTIES))
        for name in ("beam_size", "n_best"):
            _at_least(name, getattr(self, name), 1)
        if self.batch_tokens is not None:
            _at_least("batch_tokens", self.batch_tokens, 1)
        for name in ("alpha", "max_length_ratio", "max_length_extra"):
            _at_least(name, getattr(self, name), 0)
        _at_least("max_source_length", self.max_source_length, 4)
        check_sampling(self.temperature, self.top_k, self.top_p)
        most = {"beam": self.beam_size, "greedy": 1, "sample": self.n_best}[self.strategy]
        if self.n_best > most:
            raise UserError(f"n_best = {self.n_best}: {self.strategy} gives at most {most}")

    def penalty(self) -> LengthPenalty:
        """The length penalty that `length_penalty` and `alpha` name."""
        return LENGTH_PENALTIES[self.length_penalty](self.alpha)

    def max_target_length(self, source_length: int) -> int:
        """Most tokens of a translation, end of sentence included, forced prefix not.

        >>> DecodeConfig(max_length_ratio=1.5, max_length_extra=3).max_target_length(5)
        11
        """
        return max(1, math.ceil(self.max_length_ratio * source_length) + self.max_length_extra)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} = {value!r}: must be one of {', '.join(allowed)}")


def _at_least(name: str, value: float, least: int) -> None:
    if not value >= least:
        raise UserError(f"{name} = {value}: must be {least} or more")
