"""How weights move: schedules, Adam, gradient accumulation and per-parameter rules, all plain Optax."""

from t5x_ext.optim.accumulation import mean_accumulator
from t5x_ext.optim.adam import adam
from t5x_ext.optim.rules import freeze, scale_by_path
from t5x_ext.optim.schedules import inverse_sqrt, linear_decay

__all__ = ["adam", "freeze", "inverse_sqrt", "linear_decay", "mean_accumulator", "scale_by_path"]
