"""`Run`: everything that defines a training run, in one dataclass that gin configures from outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import optax

from t5x_ext.contracts import Accumulator, Objective, UserError
from t5x_ext.data import DataConfig
from t5x_ext.decode import DecodeConfig
from t5x_ext.models import TransformerConfig
from t5x_ext.objectives import LabelSmoothedCrossEntropy
from t5x_ext.optim import mean_accumulator
from t5x_ext.parallel import AxisRules, MeshConfig
from t5x_ext.train.budget import Budget
from t5x_ext.train.loop import Hook

_DECODED_METRICS = ("valid/bleu", "valid/chrf", "valid/exact_match")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on held-out text, and how it is decoded.

    Attributes:
      every: updates between evaluations during training; 0 evaluates after the last update only.
      max_lines: so many lines of each direction are decoded during training; 0 measures the loss only.
      decode: search used during training.
      test_decode: search used for the final test.
      metric: the value that picks the best checkpoint and stops early: `valid/loss`, `valid/bleu`, `valid/chrf`,
        `valid/exact_match`, or one direction's, as `valid/bleu/en-de`.
      higher_is_better: whether more of the metric is better.
      patience: evaluations without gain after which training stops; None never stops early.
    """

    every: int = 1000
    max_lines: int = 200
    decode: DecodeConfig = field(default_factory=lambda: DecodeConfig(strategy="greedy"))
    test_decode: DecodeConfig = field(default_factory=DecodeConfig)
    metric: str = "valid/loss"
    higher_is_better: bool = False
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.patience is not None and self.patience < 1:
            raise UserError(f"EvaluationConfig.patience is {self.patience}; it must be at least 1, or None")
        if self.max_lines == 0 and self.metric.startswith(_DECODED_METRICS):
            raise UserError(
                f"EvaluationConfig.metric is {self.metric!r} but max_lines is 0, so that nothing is decoded; "
                "decode some lines, or take 'valid/loss'"
            )


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept.

    Attributes:
      every: updates between saves; each evaluation is followed by a save too.
      keep_last: newest checkpoints kept.
      keep_best: best checkpoints kept, by the evaluation's metric.
    """

    every: int = 500
    keep_last: int = 2
    keep_best: int = 1


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
      data: corpora, vocabulary, tags and batch shape.
      model: sizes; the vocabulary size is taken from the data.
      optimizer: an Optax transformation.
      steps: updates in total.
      budget: what may end the run before that; None: nothing.
      objective: from the model to what is minimised.
      accumulator: how gradients of microbatches add up.
      num_microbatches: pieces a batch is cut into; more pieces need less memory.
      seed: root of every random choice.
      mesh: how devices are laid out.
      axis_rules: which axes of the weights go to which axes of the mesh.
      ema_decay: moving average of the weights, used for evaluation; None keeps none.
      log_every: updates between log lines.
      max_skipped_updates: so many updates in a row left out, because loss or gradient was not finite, take the run back
        to a checkpoint from before them, and on with other data.
      max_rewinds: so often may it go back; then it ends.
      tensorboard: whether TensorBoard files are written beside the JSON lines.
      evaluation: held-out measurements.
      checkpoints: what is kept.
      hooks: further hooks, called after the evaluation and before saving: what they add to `loop.evaluation` can pick
        the best checkpoint, what they put into `loop.memory` is in it.
    """

    data: DataConfig
    model: TransformerConfig
    optimizer: optax.GradientTransformation
    steps: int
    budget: Budget | None = None
    objective: Callable[[Any], Objective] = LabelSmoothedCrossEntropy
    accumulator: Accumulator = field(default_factory=mean_accumulator)
    num_microbatches: int = 1
    seed: int = 0
    mesh: MeshConfig = field(default_factory=MeshConfig)
    axis_rules: AxisRules = field(default_factory=AxisRules)
    ema_decay: float | None = None
    log_every: int = 50
    max_skipped_updates: int = 10
    max_rewinds: int = 3
    tensorboard: bool = True
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    hooks: tuple[Hook, ...] = ()

    def __post_init__(self) -> None:
        least_values = {"steps": 1, "num_microbatches": 1, "log_every": 1, "max_skipped_updates": 1, "max_rewinds": 0}
        for name, least in least_values.items():
            if getattr(self, name) < least:
                raise UserError(f"Run.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.data.batch.rows % self.num_microbatches:
            raise UserError(
                f"Run.num_microbatches is {self.num_microbatches}, which does not divide the {self.data.batch.rows} "
                "rows of a batch (BatchConfig.rows)"
            )
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise UserError(f"Run.ema_decay is {self.ema_decay}; it must lie between 0 and 1")
