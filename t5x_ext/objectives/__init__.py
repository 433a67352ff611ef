"""What is optimised: losses in the `contracts.Objective` form, sums over labels with their weights."""

from __future__ import annotations

from t5x_ext.objectives.cross_entropy import LabelSmoothedCrossEntropy
from t5x_ext.objectives.ctc import Ctc
from t5x_ext.objectives.glancing import Glancing, ParallelCrossEntropy
from t5x_ext.objectives.nodes import NodeCrossEntropy

__all__ = ["Ctc", "Glancing", "LabelSmoothedCrossEntropy", "NodeCrossEntropy", "ParallelCrossEntropy"]
