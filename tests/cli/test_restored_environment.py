"""What a run that goes on takes over from the machine it was started on, before JAX looks at it."""

from __future__ import annotations

import json

import pytest

from t5x_ext.cli import environment
from t5x_ext.cli.flags import parse

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


@pytest.mark.parametrize(
    ("recorded", "given", "flag", "expected"),
    [
        (None, {}, False, {}),
        ({"cpu_threads": 3, "xla_flags": ""}, {}, False, {"NPROC": "3"}),
        ({"cpu_threads": 3, "xla_flags": ""}, {"NPROC": "5"}, False, {"NPROC": "5"}),
        (None, {"XLA_FLAGS": "--a=1"}, True, {"XLA_FLAGS": f"--a=1 {DETERMINISTIC}"}),
        ({"cpu_threads": 3, "xla_flags": f"-b {DETERMINISTIC}"}, {}, False, {"NPROC": "3", "XLA_FLAGS": DETERMINISTIC}),
        (None, {"XLA_FLAGS": DETERMINISTIC}, True, {"XLA_FLAGS": DETERMINISTIC}),
    ],
)  # fmt: skip
def test_threads_and_deterministic_kernels(recorded, given, flag, expected, tmp_path, monkeypatch):
    variables = dict(given)
    monkeypatch.setattr(environment.os, "environ", variables)
    if recorded is not None:
        (tmp_path / "environment.json").write_text(json.dumps(recorded))
    values = parse(environment.define_deterministic_flag, ["--deterministic"] if flag else [])
    environment.restore_environment(str(tmp_path), values.deterministic)
    assert variables == expected
