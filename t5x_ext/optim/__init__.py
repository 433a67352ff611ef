"""How weights move: schedules, Adam, SAM and FSAM, gradient accumulation and per-parameter rules, all plain Optax."""

from t5x_ext.optim.accumulation import mean_accumulator
from t5x_ext.optim.adam import adam
from t5x_ext.optim.fsam import fsam, sam
from t5x_ext.optim.rules import freeze, scale_by_path
from t5x_ext.optim.schedules import inverse_sqrt, linear_decay
from t5x_ext.optim.top_k import top_k_mask

__all__ = [
    "adam",
    "freeze",
    "fsam",
    "inverse_sqrt",
    "linear_decay",
    "mean_accumulator",
    "sam",
    "scale_by_path",
    "top_k_mask",
]
