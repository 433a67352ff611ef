"""Optimizers in Optax's form: Adam, Adafactor, SAM, FSAM, Flora, Ginger, gradual pruning, schedules, rules by path."""

from t5x_ext.optim.accumulation import mean_accumulator
from t5x_ext.optim.adafactor import adafactor
from t5x_ext.optim.adam import adam
from t5x_ext.optim.flora import flora, flora_accumulator, scale_by_flora
from t5x_ext.optim.fsam import fsam, sam
from t5x_ext.optim.ginger import ginger, ginger_curvature_grads, ginger_reference, scale_by_ginger
from t5x_ext.optim.learning_rate import learning_rate_of, with_learning_rate
from t5x_ext.optim.matrices import as_matrices, from_matrices
from t5x_ext.optim.projections import gaussian, orthogonal
from t5x_ext.optim.rules import freeze, scale_by_path
from t5x_ext.optim.schedules import inverse_sqrt, linear_decay
from t5x_ext.optim.sparsify import PruningGroup, Regrowth, gradual_pruning, pruning_masks
from t5x_ext.optim.static_mask import StaticMaskState, static_mask, with_masks
from t5x_ext.optim.top_k import top_k_mask

__all__ = [
    "PruningGroup",
    "Regrowth",
    "StaticMaskState",
    "adafactor",
    "adam",
    "as_matrices",
    "flora",
    "flora_accumulator",
    "freeze",
    "from_matrices",
    "fsam",
    "gaussian",
    "ginger",
    "ginger_curvature_grads",
    "ginger_reference",
    "gradual_pruning",
    "inverse_sqrt",
    "learning_rate_of",
    "linear_decay",
    "mean_accumulator",
    "orthogonal",
    "pruning_masks",
    "sam",
    "scale_by_flora",
    "scale_by_ginger",
    "scale_by_path",
    "static_mask",
    "top_k_mask",
    "with_learning_rate",
    "with_masks",
]
