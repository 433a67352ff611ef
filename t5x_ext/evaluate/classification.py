"""Scores of a classification: accuracy, F1 and Matthews' correlation, through scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int

from t5x_ext.contracts import UserError


def classification_scores(confusion: Int[np.ndarray, "classes classes"]) -> dict[str, float]:
    """Scores from counts of (class, predicted class), all between 0 and 1 but `matthews`, from -1 to 1.

    Args:
      confusion: `confusion[i, j]` examples of class i were taken for class j.

    Returns:
      `accuracy`; `f1`, of two classes that of the second, of more the mean over classes that occur or were predicted;
      `matthews`, Matthews' correlation coefficient, 0 where it is not defined.

    Raises:
      UserError: if there are no examples, or scikit-learn is not installed.

    Example:
      >>> classification_scores(np.array([[8, 2], [1, 9]]))["accuracy"]
      0.85
    """
    metrics = _library()
    counts = np.asarray(confusion)
    if counts.sum() == 0:
        raise UserError("there are no examples to score")
    truth, predicted = np.nonzero(counts)
    weights = counts[truth, predicted]
    average: dict[str, Any] = {"average": "binary", "pos_label": 1} if len(counts) == 2 else {"average": "macro"}
    occurring = np.count_nonzero(counts.sum(0) + counts.sum(1))
    matthews = metrics.matthews_corrcoef(truth, predicted, sample_weight=weights) if occurring > 1 else 0.0
    return {
        "accuracy": float(metrics.accuracy_score(truth, predicted, sample_weight=weights)),
        "f1": float(metrics.f1_score(truth, predicted, sample_weight=weights, zero_division=0.0, **average)),
        "matthews": float(matthews),
    }


def _library() -> Any:
    try:
        from sklearn import metrics
    except ImportError as error:
        raise UserError(f"scores of classes need scikit-learn: pip install 't5x_ext[tasks]' ({error})") from error
    return metrics
