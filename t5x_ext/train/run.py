"""`Run`: everything that defines a training run, in one dataclass that gin configures from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optax

from t5x_ext.checkpoints import BASE
from t5x_ext.contracts import Accumulator, Objective, UserError
from t5x_ext.objectives import LabelSmoothedCrossEntropy
from t5x_ext.optim import mean_accumulator
from t5x_ext.parallel import AxisRules, MeshConfig
from t5x_ext.train.budget import Budget
from t5x_ext.train.init_from import InitFrom
from t5x_ext.train.intervals import Interval, check_interval
from t5x_ext.train.loop import Hook
from t5x_ext.train.step import StepFactory, make_train_step
from t5x_ext.train.task import Evaluator, Task, checked


@dataclass(frozen=True)
class EvaluationConfig:
    """When the run is measured on held-out data, and which value decides.

    Attributes:
      every: updates between evaluations, or `"2 epochs"`, `"5000 examples"`; 0 evaluates after the last update only.
        An evaluator may have an interval of its own.
      metric: the value that picks the best checkpoint and stops early, as `valid/loss`; which there are depends on the
        task's evaluators.
      higher_is_better: whether more of the metric is better.
      patience: measurements of the metric without gain after which training stops; None never stops early.
      select_from: measurements before this update pick no checkpoint and do not count for patience: in a run that is
        pruned gradually, those of models that are not yet as sparse as the last one.
    """

    every: Interval = 1000
    metric: str = "valid/loss"
    higher_is_better: bool = False
    patience: int | None = None
    select_from: int = 0

    def __post_init__(self) -> None:
        check_interval("EvaluationConfig.every", self.every)
        if self.patience is not None and self.patience < 1:
            raise UserError(f"EvaluationConfig.patience is {self.patience}; it must be at least 1, or None")


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept.

    Attributes:
      every: updates between saves, or epochs or examples as in `EvaluationConfig.every`; each measurement of the metric
        is followed by a save too.
      keep_last: newest checkpoints kept.
      keep_best: best checkpoints kept, by the evaluation's metric.
      keep: from a step to whether its checkpoint is kept for good, beside those; None keeps no others.
    """

    every: Interval = 500
    keep_last: int = 2
    keep_best: int = 1
    keep: Callable[[int], bool] | None = None

    def __post_init__(self) -> None:
        check_interval("CheckpointConfig.every", self.every)


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
      task: model, data and measurements.
      optimizer: an Optax transformation.
      steps: updates in total.
      budget: what may end the run before that; None: nothing.
      objective: from the model to what is minimised.
      accumulator: how gradients of microbatches add up.
      num_microbatches: microbatches that a batch is split into; more of them need less memory.
      step: how an update is made.
      trainable: patterns on parameter names; gradient, optimizer state, EMA and checkpoint exist for the parameters in
        whose name one is found, the others stay as the run begins with them. Empty: all are trained.
      frozen: parameters of other runs that the objective reads in `context.frozen`, by name, a teacher for example.
      init_from: weights of another run to start from; None starts from random ones.
      seed: root of every random choice.
      mesh: how devices are laid out.
      axis_rules: which axes of the weights go to which axes of the mesh.
      ema_decay: of the EMA of the weights, used for evaluation; None keeps none.
      log_every: updates between log lines.
      max_skipped_updates: so many updates in a row skipped, because loss or gradient was not finite, rewind the run to
        a checkpoint from before them and skip their data.
      max_rewinds: so many rewinds are made; then the run ends.
      tensorboard: whether TensorBoard files are written beside the JSON lines.
      evaluation: when it is measured.
      evaluators: measurements beside those of the task.
      checkpoints: what is kept.
      hooks: further hooks, called after the evaluation and before saving: what they add to `loop.evaluation` can pick
        the best checkpoint, what they put into `loop.memory.hooks` is in it.
    """

    task: Task
    optimizer: optax.GradientTransformation
    steps: int
    budget: Budget | None = None
    objective: Callable[[Any], Objective] = LabelSmoothedCrossEntropy
    accumulator: Accumulator = field(default_factory=mean_accumulator)
    num_microbatches: int = 1
    step: StepFactory = make_train_step
    trainable: tuple[str, ...] = ()
    frozen: Mapping[str, InitFrom] = field(default_factory=dict)
    init_from: InitFrom | None = None
    seed: int = 0
    mesh: MeshConfig = field(default_factory=MeshConfig)
    axis_rules: AxisRules = field(default_factory=AxisRules)
    ema_decay: float | None = None
    log_every: int = 50
    max_skipped_updates: int = 10
    max_rewinds: int = 3
    tensorboard: bool = True
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    evaluators: tuple[Evaluator, ...] = ()
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    hooks: tuple[Hook, ...] = ()

    def __post_init__(self) -> None:
        least_values = {"steps": 1, "num_microbatches": 1, "log_every": 1, "max_skipped_updates": 1, "max_rewinds": 0}
        for name, least in least_values.items():
            if getattr(self, name) < least:
                raise UserError(f"Run.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.task.rows % self.num_microbatches:
            raise UserError(
                f"Run.num_microbatches is {self.num_microbatches}, which does not divide the {self.task.rows} rows "
                "of a batch (BatchConfig.rows)"
            )
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise UserError(f"Run.ema_decay is {self.ema_decay}; it must be between 0 and 1")
        if BASE in self.frozen:
            raise UserError(f"Run.frozen: {BASE!r} is what Run.trainable leaves frozen; give another name")
        checked(self)
