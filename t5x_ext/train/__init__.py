"""Floor 4: the loop.

A `Run` says what to train, `execute` does it, `train` is the loop itself, `hooks` what happens between updates.
"""

from t5x_ext.train.beginning import InitFrom
from t5x_ext.train.budget import Budget
from t5x_ext.train.execute import execute
from t5x_ext.train.goodput import Clock
from t5x_ext.train.loop import Hook, Loop, train
from t5x_ext.train.run import CheckpointConfig, EvaluationConfig, Run
from t5x_ext.train.state import TrainState, create_state
from t5x_ext.train.step import make_evaluation_step, make_train_step

__all__ = [
    "Budget",
    "CheckpointConfig",
    "Clock",
    "EvaluationConfig",
    "Hook",
    "InitFrom",
    "Loop",
    "Run",
    "TrainState",
    "create_state",
    "execute",
    "make_evaluation_step",
    "make_train_step",
    "train",
]
