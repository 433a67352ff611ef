"""The picture of a learning curve: whatever stands in the metrics file, there is one."""

from __future__ import annotations

import json
import warnings

import pytest

from t5x_ext.train.report import draw_learning_curve


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"step": 1, "loss": 2.0, "nll": 1.5}, {"step": 2, "valid/nll": 1.25, "valid/bleu": 10.0, "valid/chrf": 40.0}],
        [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None, "valid/exact_match": None}, {"step": 3, "loss": 1.0}],
    ],
    ids=["empty", "losses and scores", "no likelihood, gaps"],
)
def test_a_picture_is_drawn(lines, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_learning_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png", "run")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_no_file_no_mistake(tmp_path):
    draw_learning_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png", "run")
    assert (tmp_path / "curve.png").exists()
