"""Averages of checkpoints against float64 arithmetic and bits."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from t5x_ext.checkpoints import average_params
from t5x_ext.contracts import UserError


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 11])
def test_equal_checkpoints_average_to_their_own_bits(dtype, count):
    rng = np.random.default_rng(count)
    values = (rng.normal(size=2000) * 10.0 ** rng.integers(-30, 30, size=2000)).astype(np.float32)
    special = np.float32([0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, np.finfo(np.float32).max])
    with np.errstate(over="ignore"):
        params = {"a": {"kernel": np.concatenate([values, special]).astype(dtype)}}
    average = average_params([params] * count)
    assert average["a"]["kernel"].dtype == dtype
    assert average["a"]["kernel"].tobytes() == params["a"]["kernel"].tobytes()


def test_the_average_is_the_rounded_float64_mean_and_inputs_stay_untouched():
    rng = np.random.default_rng(0)
    checkpoints = [{"w": rng.normal(size=(5, 3)).astype(np.float32)} for _ in range(5)]
    copies = [params["w"].copy() for params in checkpoints]
    average = average_params(params for params in checkpoints)
    np.testing.assert_array_equal(average["w"], np.mean(np.float64(copies), axis=0).astype(np.float32))
    for params, copy in zip(checkpoints, copies, strict=True):
        np.testing.assert_array_equal(params["w"], copy)


def test_trees_that_differ_are_refused():
    with pytest.raises(UserError, match="none was given"):
        average_params([])
    one = {"w": np.zeros(2, np.float32)}
    with pytest.raises(UserError, match=r"checkpoint 2 .*: w is float32\[3\] there, float32\[2\] in the first"):
        average_params([one, {"w": np.zeros(3, np.float32)}])
    with pytest.raises(UserError, match=r"checkpoint 3 .*: v is float32\[2\] there, None in the first"):
        average_params([one, one, {"w": np.zeros(2, np.float32), "v": np.zeros(2, np.float32)}])
