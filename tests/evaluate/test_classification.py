"""Scores from counts equal scikit-learn's from lists, and formulas written out."""

from __future__ import annotations

import numpy as np
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.evaluate.classification import classification_scores

metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")


@pytest.mark.parametrize("classes", [2, 5])
def test_scores_are_those_of_the_lists(classes):
    rng = np.random.default_rng(classes)
    truth = rng.integers(0, classes, 200)
    predicted = np.where(rng.random(200) < 0.6, truth, rng.integers(0, classes, 200))
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (truth, predicted), 1)
    scores = classification_scores(confusion)
    average = "binary" if classes == 2 else "macro"
    assert scores["accuracy"] == pytest.approx(np.mean(truth == predicted))
    assert scores["f1"] == pytest.approx(metrics.f1_score(truth, predicted, average=average))
    assert scores["matthews"] == pytest.approx(metrics.matthews_corrcoef(truth, predicted))


def test_formulas_of_two_classes():
    tn, fp, fn, tp = 40, 10, 5, 45
    scores = classification_scores(np.array([[tn, fp], [fn, tp]]))
    assert scores["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    root = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert scores["matthews"] == pytest.approx((tp * tn - fp * fn) / root)


def test_one_class_only():
    assert classification_scores(np.array([[7, 0], [0, 0]])) == {"accuracy": 1.0, "f1": 0.0, "matthews": 0.0}
    with pytest.raises(UserError, match="no examples to score"):
        classification_scores(np.zeros((2, 2), int))
