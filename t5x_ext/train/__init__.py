"""Floor 4: the loop. It knows no task: models, data and scores come from the `Task` of a run.

A `Run` says what to train, `execute` does it, `train` is the loop itself, `hooks` what happens between updates.
"""

from t5x_ext.train.budget import Budget
from t5x_ext.train.execute import execute
from t5x_ext.train.goodput import Clock
from t5x_ext.train.init_from import InitFrom
from t5x_ext.train.loop import Hook, Loop, Session, train
from t5x_ext.train.memory import Memory
from t5x_ext.train.program import Program, make_program
from t5x_ext.train.prune_at_init import PruneAtInit
from t5x_ext.train.run import CheckpointConfig, EvaluationConfig, Run
from t5x_ext.train.state import TrainState, create_state
from t5x_ext.train.step import StepMetrics, make_evaluation_step, make_train_step
from t5x_ext.train.task import ArraySpec, Definition, Evaluator, Prepared, Task

__all__ = [
    "ArraySpec",
    "Budget",
    "CheckpointConfig",
    "Clock",
    "Definition",
    "EvaluationConfig",
    "Evaluator",
    "Hook",
    "InitFrom",
    "Loop",
    "Memory",
    "Prepared",
    "Program",
    "PruneAtInit",
    "Run",
    "Session",
    "StepMetrics",
    "Task",
    "TrainState",
    "create_state",
    "execute",
    "make_evaluation_step",
    "make_program",
    "make_train_step",
    "train",
]
