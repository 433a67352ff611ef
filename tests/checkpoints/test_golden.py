"""A checkpoint of an earlier version still loads; one of a version that is not known is refused in one line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ext.checkpoints import CheckpointStore
from t5x_ext.contracts import UserError
from t5x_ext.storage.digests import write_digests

sys.path.append(str(Path(__file__).parent))
import golden


def test_the_golden_checkpoint_loads_bit_for_bit(tmp_path):
    """Oracle: the formulas that it was made from."""
    shutil.copytree(golden.GOLDEN, tmp_path / "checkpoints")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with CheckpointStore(tmp_path / "checkpoints") as store:
        assert store.steps() == [7]
        assert store.best_step() == 7
        state, extra = store.restore(jax.eval_shape(golden.state))
        params, averaged = store.restore_params("best"), store.restore_params("last", "ema")
    assert extra == golden.EXTRA
    expected = golden.state()
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for actual, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected)):
        assert actual.dtype == wanted.dtype
        if jnp.issubdtype(wanted.dtype, jax.dtypes.prng_key):
            actual, wanted = jax.random.key_data(actual), jax.random.key_data(wanted)
        assert np.asarray(actual).tobytes() == np.asarray(wanted).tobytes()
    for actual, wanted in ((params, expected["params"]), (averaged, expected["ema"])):
        assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), actual, wanted))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("version", [0, 2, 99, "one", None])
def test_an_unknown_format_is_refused_in_one_line(tmp_path, version):
    """It is no damage: falling back to an earlier checkpoint would throw away what a newer version has trained."""
    for step in (7, 8):
        shutil.copytree(golden.GOLDEN / "00000007", tmp_path / f"{step:08d}")
    path = tmp_path / "00000008/meta/metadata"
    meta = json.loads(path.read_text()) | {"format": version, "leaves": "of another kind"}
    if version is None:
        del meta["format"]
    path.write_text(json.dumps(meta))
    with CheckpointStore(tmp_path) as store:
        write_digests(store.directory / "00000008")
        for load in (lambda: store.restore(jax.eval_shape(golden.state)), lambda: store.restore_params("last")):
            with pytest.raises(UserError) as caught:
                load()
            assert (
                str(caught.value) == f"checkpoint {tmp_path}/00000008 has format {version}; this version reads format 1"
            )
        assert store.restore(jax.eval_shape(golden.state), step=7)[1] == golden.EXTRA
