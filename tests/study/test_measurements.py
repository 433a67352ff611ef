"""Values that runs recorded, and their course over what was spent."""

from __future__ import annotations

import json

import numpy as np
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.study import MeasuredRun, Recorded
from t5x_ext.study.measurements import AXES, curve

LINES = [
    {"step": 2, "loss": 4.0, "target_tokens": 10.0, "model_flops_per_second": 5.0, "seconds": 4.0, "time/step": 0.5},
    {"step": 3, "valid/loss": 2.0},
    {"step": 4, "loss": 3.0, "target_tokens": 30.0, "model_flops_per_second": 5.0, "seconds": 4.0, "time/step": 0.25,
     "time/data": 0.25},
    {"step": 4, "valid/loss": 1.0},
    {"step": 6, "valid/loss": None},
]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    results = {"steps": 6, "directions": {"en-de": {"bleu": 12.5, "signature": "x"}}, "goodput": {"ok": True}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    return MeasuredRun(tmp_path, None, 0, None, "")


def test_recorded_values_are_found_in_metrics_or_results(run):
    assert Recorded("loss")(run) == {"loss": 3.0}
    assert Recorded("loss", "most")(run) == {"most loss": 4.0}
    assert Recorded("valid/loss", "least")(run) == {"least valid/loss": 1.0}
    assert np.isnan(Recorded("valid/loss")(run)["valid/loss"])
    assert Recorded("directions/en-de/bleu")(run) == {"directions/en-de/bleu": 12.5}
    assert Recorded("steps")(run) == {"steps": 6.0}


@pytest.mark.parametrize(
    "name", ["valid/bleu", "directions/en-de", "goodput/ok", "goodput/ok/x", "directions/en-de/signature"]
)
def test_what_was_not_recorded_is_refused_with_what_was(run, name):
    with pytest.raises(
        UserError, match=r"was not recorded; recorded are directions/en-de/bleu, loss, model_flops_per_second, "
    ):
        Recorded(name)(run)


@pytest.mark.parametrize(
    ("axis", "loss", "valid"),
    [
        ("steps", [2, 4], [3, 4, 6]),
        ("target_tokens", [10, 40], [25, 40, 40]),
        ("model_flops", [10, 20], [15, 20, 20]),
        ("seconds", [2, 4], [3, 4, 4]),
    ],
)
def test_curves_are_over_what_was_spent(run, axis, loss, valid):
    assert axis in AXES
    assert curve(run.folder, "loss", axis).x.tolist() == loss
    assert curve(run.folder, "loss", axis).y.tolist() == [4, 3]
    found = curve(run.folder, "valid/loss", axis)
    assert found.x.tolist() == valid
    assert np.isnan(found.y[-1])
    assert curve(run.folder, "valid/bleu", axis) is None
