"""What makes models smaller, as pure functions on parameter trees: scores of entries, masks."""

from t5x_ext.compress.masks import (
    LargeSparse,
    MatrixReport,
    Schedule,
    Scope,
    apply_masks,
    as_density,
    at_init,
    er_densities,
    from_scores,
    kept_entries,
    large_sparse,
    report,
    report_text,
)
from t5x_ext.compress.scores import LossFn, Score, er, for_scope, grasp, magnitude, map_selected, random, snip, synflow

__all__ = [
    "LargeSparse",
    "LossFn",
    "MatrixReport",
    "Schedule",
    "Scope",
    "Score",
    "apply_masks",
    "as_density",
    "at_init",
    "er",
    "er_densities",
    "for_scope",
    "from_scores",
    "grasp",
    "kept_entries",
    "large_sparse",
    "magnitude",
    "map_selected",
    "random",
    "report",
    "report_text",
    "snip",
    "synflow",
]
