"""Every file of a checkpoint damaged in every way: the last whole one is found, and what was wrong is said."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t5x_ext.checkpoints import CheckpointStore, Retention
from t5x_ext.contracts import UserError
from t5x_ext.storage.digests import DIGESTS, find_damage

sys.path.append(str(Path(__file__).parent))
import golden

FILES = sorted(path.relative_to(golden.GOLDEN / "00000007") for path in golden.GOLDEN.rglob("*") if path.is_file())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("x")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flip": flip,
    "truncate": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "delete": Path.unlink,
    "folder": to_folder,
}


@pytest.fixture(scope="module")
def newest(tmp_path_factory):
    """Step 8, which has step 7 beside it."""
    folder = tmp_path_factory.mktemp("pair")
    for step in ("00000007", "00000008"):
        shutil.copytree(golden.GOLDEN / "00000007", folder / step)
    return folder / "00000008"


def repair(path: Path, name: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    shutil.copyfile(golden.GOLDEN / "00000007" / name, path)


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_file_damaged_is_refused(newest, caplog, kind):
    for name in FILES:
        DAMAGES[kind](newest / name)
        caplog.clear()
        with CheckpointStore(newest.parent) as store, caplog.at_level(logging.WARNING):
            found = store._newest_whole(None)
        assert found.step == 7, name
        [said] = caplog.messages
        assert said.startswith(f"checkpoint {newest} refused: "), said
        # A bit of the digests may name another file.
        assert name.name in said or name.name == DIGESTS
        if name != FILES[-1]:
            repair(newest / name, name)
    # Once with the arrays, too.
    with CheckpointStore(newest.parent) as store:
        assert store.restore(jax.eval_shape(golden.state))[1] == golden.EXTRA
    repair(newest / name, name)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(newest, place, bit):
    """Of the files that hold the checkpoint, every bit counts; of `digests.json`, every one that could hide damage."""
    sizes = [(newest / name).stat().st_size for name in FILES]
    place %= sum(sizes)
    index = int(np.searchsorted(np.cumsum(sizes), place, side="right"))
    path, offset = newest / FILES[index], place - sum(sizes[:index])
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(bytes(data))
    damage = find_damage(CheckpointStore(newest.parent).directory / newest.name)
    repair(path, FILES[index])
    if path.name != DIGESTS:
        assert damage is not None
        assert damage.startswith(FILES[index].as_posix())
    elif damage is None:
        # What it says of the files has not changed: it was a blank, or the number of its format.
        assert json.loads(data)["files"] == json.loads((golden.GOLDEN / "00000007" / DIGESTS).read_text())["files"]


def test_things_that_are_no_checkpoints(tmp_path, caplog):
    """What else may lie in the folder is passed over, or refused with a reason, and the next save clears up."""
    shutil.copytree(golden.GOLDEN / "00000007", tmp_path / "00000007")
    (tmp_path / "00000011").mkdir()
    (tmp_path / "00000012").write_text("a file")
    shutil.copytree(golden.GOLDEN / "00000007", tmp_path / "00000013.orbax-checkpoint-tmp")
    (tmp_path / "00000013.orbax-checkpoint-tmp" / DIGESTS).unlink()
    shutil.copytree(golden.GOLDEN / "00000007" / "state", tmp_path / "00000014" / "state")
    others = ("notes.txt", "best", "-1", "00000015.x", "00000016.1.2", "０００００１７", "00000018 (copy)")
    for name in others:
        shutil.copytree(golden.GOLDEN / "00000007", tmp_path / name)
    with CheckpointStore(tmp_path, Retention(keep_last=2)) as store:
        with caplog.at_level(logging.WARNING):
            assert store.steps() == [7]
            assert store.steps() == [7]
            state, extra = store.restore(jax.eval_shape(golden.state))
        assert extra == golden.EXTRA
        # Each of them is mentioned once.
        assert sorted(re.sub(r"^checkpoint .*/", "", message) for message in caplog.messages) == [
            "00000011 refused: it has no digests.json, so its save has not finished",
            "00000012 refused: it is not a folder",
            "00000013.orbax-checkpoint-tmp refused: its save has not finished",
            "00000014 refused: it has no digests.json, so its save has not finished",
        ]
        with pytest.raises(UserError, match=r"no whole checkpoint of step 12 .*\(00000012: it is not a folder\)$"):
            store.restore(jax.eval_shape(golden.state), step=12)
        store.save(8, state, golden.EXTRA)
        store.wait()
        assert store.steps() == [7, 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["00000007", "00000008", *others])


def test_all_damaged_is_refused_and_nothing_deleted(tmp_path):
    for step in (7, 8):
        shutil.copytree(golden.GOLDEN / "00000007", tmp_path / f"{step:08d}")
        flip(tmp_path / f"{step:08d}" / "meta" / "metadata")
    before = sorted(tmp_path.rglob("*"))
    with CheckpointStore(tmp_path) as store, pytest.raises(UserError) as caught:
        store.restore(jax.eval_shape(golden.state))
    reason = "meta/metadata has changed (its SHA-256 differs)"
    assert str(caught.value) == f"no whole checkpoint in {tmp_path} (00000008: {reason}; 00000007: {reason})"
    assert sorted(tmp_path.rglob("*")) == before
