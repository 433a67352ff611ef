"""A plan that changes its directions during a run: bidirectional training that ends in one direction."""

from __future__ import annotations

import numpy as np

from t5x_ext.data.plan import BatchPlan, RowExamples, SkippingPlan


class SwitchingPlan(SkippingPlan):
    """The batches of one plan up to a batch number, and then those of another, from its first.

    A position stays one integer. With the switch at 0 this is the second plan, batch for batch.

    Attributes:
      first: the plan up to the switch.
      second: the plan from there on; its streams are among those of `first`.
      switch: number of the first batch of `second`, counted without skipping.
      streams: those of `first`, like all that follow.
      config: shape and mixture.
      source_prefixes: tags at the start of the encoder input, one tuple a stream.
      target_prefixes: tags at the start of the decoder labels, one tuple a stream.
      skipped: see `SkippingPlan`.

    References:
      Ding et al., Improving Neural Machine Translation by Bidirectional Training (arXiv 2109.07780).
    """

    def __init__(self, first: BatchPlan, second: BatchPlan, switch: int):
        """Joins two plans that skip nothing.

        Args:
          first: see the attribute, like the others.
          second: see there.
          switch: see there.
        """
        super().__init__()
        self.first, self.second, self.switch = first, second, switch
        self.streams = first.streams
        self.config = first.config
        self.source_prefixes, self.target_prefixes = first.source_prefixes, first.target_prefixes
        self._numbers = np.array([self.streams.index(stream) for stream in second.streams])

    @property
    def density(self) -> float:
        """See `BatchPlan.density`, before the switch."""
        return self.first.density

    def rates(self) -> dict[str, float]:
        """The share of examples of every direction before the switch."""
        return self.first.rates()

    @property
    def examples_per_epoch(self) -> int:
        """Examples that an epoch before the switch samples."""
        return self.first.examples_per_epoch

    def batches_per_epoch(self, epoch: int = 0) -> int:
        """Batches of an epoch before the switch."""
        return self.first.batches_per_epoch(epoch)

    def known_rows(self) -> list[list[int]]:
        """The number of epochs that the first plan has counted, then the counts of both, see `BatchPlan.known_rows`."""
        known = self.first.known_rows()
        return [[len(known)], *known, *self.second.known_rows()]

    def remember(self, known_rows: list[list[int]]) -> None:
        """Restores what `known_rows` gave in an earlier process."""
        if known_rows:
            ((epochs,), *known) = known_rows
            self.first.remember(known[:epochs])
            self.second.remember(known[epochs:])

    def examples(self, index: int, start: int = 0, stop: int | None = None) -> RowExamples:
        """Examples in rows `start` to `stop` (None: the last) of batch `index`, see `BatchPlan.examples`."""
        number = self.unskipped(index)
        if number < self.switch:
            return self.first.examples(number, start, stop)
        examples = self.second.examples(number - self.switch, start, stop)
        return examples._replace(streams=self._numbers[examples.streams])
