"""Digests against independent oracles: hashlib over bytes written out, and files damaged by hand."""

from __future__ import annotations

import hashlib
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath

from t5x_ext.storage.digests import (
    DIGESTS,
    file_digest,
    find_damage,
    params_digest,
    recorded_files,
    write_digests,
    write_part_of_digests,
)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 7])
def test_a_file(tmp_path, size):
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file") == file_digest(str(tmp_path / "file")) == hashlib.sha256(content).hexdigest()
    with pytest.raises(FileNotFoundError):
        file_digest(tmp_path / "none")


def test_parameters_are_hashed_by_name_dtype_shape_and_bytes():
    """The scheme of the manifests that exist, written out."""
    bias, kernel = np.float32([1.0, -2.0]), np.arange(6, dtype=np.int8).reshape(2, 3)
    text = hashlib.sha256()
    text.update(b"/b/bias float32 (2,)" + bias.tobytes())
    text.update(b"/b/scale float32 ()" + np.float32(3).tobytes())
    text.update(b"/kernel int8 (2, 3)" + kernel.tobytes())
    text.update(b"/none float32 (0, 4)")
    tree = {
        "kernel": kernel, "none": np.zeros((0, 4), np.float32), "b": {"scale": np.float32(3), "bias": bias}
    }  # fmt: skip
    assert params_digest(tree) == text.hexdigest()


def test_parameters_have_one_digest_wherever_they_are():
    kernel = np.random.default_rng(0).normal(size=(4, 6)).astype(ml_dtypes.bfloat16)
    digest = params_digest({"kernel": kernel})
    assert params_digest({"kernel": jnp.asarray(kernel)}) == digest
    assert params_digest({"kernel": np.asfortranarray(kernel)}) == digest
    for other in (kernel.T, kernel.view(np.int16), kernel.reshape(6, 4), -kernel):
        assert params_digest({"kernel": other}) != digest
    assert params_digest({"other": kernel}) != digest


@pytest.mark.devices(8)
def test_sharded_parameters_have_the_digest_of_their_numbers():
    kernel = np.arange(64, dtype=np.float32).reshape(8, 8)
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("y", "x"))
    assert params_digest({"kernel": jax.device_put(kernel, sharding)}) == params_digest({"kernel": kernel})


def test_damage_is_told_apart(tmp_path):
    folder = epath.Path(tmp_path)
    assert find_damage(folder) == "it has no digests.json, so its save has not finished"
    assert recorded_files(folder) == frozenset()
    (folder / "a").write_text("one")
    (folder / "deep").mkdir()
    (folder / "deep" / "b").write_text("two")
    write_digests(folder)
    assert recorded_files(folder) == {"a", "deep/b"}
    assert find_damage(folder) is None
    (folder / "deep" / "b").write_text("too")
    assert find_damage(folder) == "deep/b has changed (its SHA-256 differs)"
    assert find_damage(folder, wanted=lambda name: name == "a") is None
    (folder / "a").unlink()
    assert find_damage(folder) == "a is missing"
    (folder / DIGESTS).write_text('{"files": {"a": 3}}')
    assert find_damage(folder) == "digests.json is damaged"
    assert recorded_files(folder) == frozenset()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shared_digests_are_those_of_one(tmp_path, count):
    """Any number of processes record the same file, and verify every file once."""
    folder = epath.Path(tmp_path)
    for index in range(5):
        (folder / f"file{index}").write_bytes(bytes([index]) * index)
    write_digests(folder)
    alone = (folder / DIGESTS).read_text()
    # What another process is just writing is gone when it would be read.
    draft = folder / f".{DIGESTS}.1.4711.tmp"
    draft.write_text("{")
    for index in range(count):
        write_part_of_digests(folder, index, count)
    draft.unlink()
    # A file that no process saw in its listing is recorded all the same.
    part = folder / f"{DIGESTS}.0"
    part.write_text(json.dumps(dict(list(json.loads(part.read_text()).items())[1:])))
    write_digests(folder, parts=count)
    assert (folder / DIGESTS).read_text() == alone
    assert sorted(path.name for path in folder.iterdir()) == [DIGESTS, *(f"file{i}" for i in range(5))]
    (folder / "file3").write_bytes(b"\x03\x03\x04")
    damage = [find_damage(folder, index=index, count=count) for index in range(count)]
    assert [text for text in damage if text] == ["file3 has changed (its SHA-256 differs)"]
