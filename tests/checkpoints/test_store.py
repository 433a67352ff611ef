"""The checkpoint store: bit-exact, asynchronous, atomic, verified; damage of every kind falls back and is said."""

from __future__ import annotations

import json
import logging
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_ext.checkpoints import CheckpointStore, Retention, SaveError, StructureError
from t5x_ext.contracts import UserError
from t5x_ext.storage.digests import DIGESTS


class State(NamedTuple):
    step: Any
    params: Any
    optimizer_state: Any
    ema: Any = None
    mutable: Any = ()


def make_state(seed: int = 0, width: int = 4) -> State:
    kernel = jax.random.normal(jax.random.key(seed), (3, width))
    params = {"encoder": {"kernel": kernel, "bias": jnp.arange(width, dtype=jnp.bfloat16)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adam(1e-3), {"encoder": True}))
    return State(jnp.int32(seed), params, optimizer.init(params))


def assert_identical(actual: Any, expected: Any) -> None:
    """Same structure, types, dtypes and bits (NaN payloads and signs of zero included)."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(one, jax.Array) == isinstance(other, jax.Array)
        if isinstance(other, bool | int | float):
            assert type(one) is type(other)
            assert one == other
            continue
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.fixture
def store(tmp_path):
    with CheckpointStore(tmp_path / "checkpoints", Retention(keep_last=3)) as store:
        yield store


DTYPES = ("bool", "int4", "int8", "int32", "uint8", "uint32", "float8_e4m3fn", "bfloat16", "float16", "complex64")


def test_every_kind_of_leaf_comes_back_bit_for_bit(store):
    state = make_state()._replace(
        ema={"kernel": jnp.array([np.nan, -0.0, np.inf, 1e-45], jnp.float32)},
        mutable={
            "dtypes": {name: jnp.arange(5).astype(name) for name in DTYPES},
            "numpy": {"wide": np.arange(3, dtype=np.int64), "exact": np.array(0.1), "scalar": np.float32(0.1)},
            "key": jax.random.key(3),
            "keys": jax.random.split(jax.random.key(3, impl="rbg"), 4),
            "raw_key": jax.random.PRNGKey(3),
            "numbers": [7, 0.1, True],
            "no_elements": (jnp.zeros((0, 3), jnp.bfloat16), np.zeros((2, 0))),
            "nothing": [None, {}, (), optax.EmptyState(), optax.MaskedNode()],
        },
    )
    extra = {"batches": 12, "skipped": [[3, 5]], "name": "ö"}
    store.save(7, state, extra)
    restored, restored_extra = store.restore(state)
    assert_identical(restored, state)
    assert restored_extra == extra
    shapes = jax.eval_shape(lambda: make_state())
    store.save(8, make_state())
    assert_identical(store.restore(shapes)[0], make_state())


def test_a_saved_state_may_be_donated_and_overwritten_at_once(store):
    """Oracle: a copy taken before. The step donates the very buffers that the save is still writing."""
    bump = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 2 + 1, tree), donate_argnums=0)
    state = {"params": {str(i): jax.random.normal(jax.random.key(i), (256, 1024)) for i in range(8)}}
    host = {"counts": np.zeros(1 << 16)}
    expected = jax.tree.map(np.array, state)
    store.save(1, state | host)
    for _ in range(5):
        state = bump(state)
        host["counts"] += 1
    jax.block_until_ready(state)
    restored, _ = store.restore(state | host)
    assert_identical(jax.tree.map(np.asarray, restored["params"]), expected["params"])
    assert not restored["counts"].any()


def test_leaves_that_are_not_arrays_are_refused(store):
    with pytest.raises(TypeError, match="params/name is a str"):
        store.save(1, {"params": {"name": "base"}})
    assert store.steps() == []


def test_a_step_saved_again_replaces_the_earlier_one(store):
    for value in (1, 2, 3):
        store.save(5, {"params": jnp.int32(value)}, {"value": value})
    store.save(4, {"params": jnp.int32(0)})
    assert store.restore({"params": jnp.int32(0)}) == ({"params": 3}, {"value": 3})
    assert store.steps() == [4, 5]
    assert sorted(folder.name for folder in store.directory.iterdir()) == ["00000004", "00000005.2"]


def test_after_going_back_the_newest_one_left_wins(tmp_path):
    """Oracle: a store that never saw the later steps; one of them is damaged, and comes again under the same number."""
    with CheckpointStore(tmp_path, Retention(keep_last=9)) as store:
        for step in (2, 4, 6, 8):
            store.save(step, make_state(step), {"step": step})
        store.wait()
        (tmp_path / "00000006" / DIGESTS).write_text("")
        with pytest.raises(UserError, match="of step 6"):
            store.restore(make_state(), step=6)
        store.discard_after(5)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "00000004"]
        assert store.restore(make_state())[1] == {"step": 4}
        store.discard_after(4)
        store.save(6, make_state(60), {"again": True})
    for reader in (store, CheckpointStore(tmp_path)):
        restored, extra = reader.restore(make_state())
        assert extra == {"again": True}
        assert_identical(restored, make_state(60))
        assert reader.steps() == [2, 4, 6]


def largest_file(folder):
    return max((path for path in Path(folder).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def damage_flip(folder):
    file = largest_file(folder / "params")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def damage_truncate(folder):
    file = largest_file(folder / "params")
    file.write_bytes(file.read_bytes()[:-1])


def damage_remove(folder):
    (folder / "params" / "manifest.ocdbt").unlink()


def damage_meta(folder):
    text = (folder / "meta" / "metadata").read_text()
    (folder / "meta" / "metadata").write_text(text.replace('"step"', '"stop"', 1))


def damage_meta_beyond_reading(folder):
    (folder / "meta" / "metadata").write_bytes(b"\xff{")


def damage_digests(folder):
    (folder / DIGESTS).write_text((folder / DIGESTS).read_text()[:-20])


def damage_digests_to_other_json(folder):
    (folder / DIGESTS).write_text("[]")


def damage_unfinished(folder):
    (folder / DIGESTS).unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_flip, "has changed (its SHA-256 differs)"),
        (damage_truncate, "bytes instead of"),
        (damage_remove, "params/manifest.ocdbt is missing"),
        (damage_meta, "meta/metadata has changed"),
        (damage_meta_beyond_reading, "meta/metadata has 2 bytes"),
        (damage_digests, "digests.json is damaged"),
        (damage_digests_to_other_json, "digests.json is damaged"),
        (damage_unfinished, "its save has not finished"),
    ],
)
def test_damage_falls_back_to_the_newest_whole_one_and_says_so(tmp_path, caplog, damage: Callable, reason: str):
    states = {step: make_state(step) for step in (1, 2, 3)}
    with CheckpointStore(tmp_path) as store:
        for step, state in states.items():
            store.save(step, state, {"step": step}, {"bleu": float(step)})
    damage(store.directory / "00000003")
    kernel = np.asarray(states[2].params["encoder"]["kernel"])
    assert CheckpointStore(tmp_path).restore_params("best")["encoder"]["kernel"].tobytes() == kernel.tobytes()
    caplog.clear()
    with CheckpointStore(tmp_path, Retention(keep_last=2)) as store, caplog.at_level(logging.WARNING):
        restored, extra = store.restore(states[3])
        assert_identical(restored, states[2])
        assert extra == {"step": 2}
        [message] = caplog.messages
        assert message.startswith(f"checkpoint {tmp_path}/00000003 refused: ")
        assert reason in message
        with pytest.raises(UserError, match=r"no whole checkpoint of step 3 in .* \(00000003: "):
            store.restore(states[3], step=3)
        # Training goes on from 2 and comes to 3 again; what was refused is gone and takes nobody's place.
        assert store.steps() == [1, 2]
        store.save(3, states[3], {"again": True})
        assert store.restore(states[3])[1] == {"again": True}
        assert store.steps() == [2, 3]


def test_nothing_whole_is_a_user_error(tmp_path):
    with CheckpointStore(tmp_path / "none") as store:
        assert store.steps() == []
        assert store.best_step() is None
        with pytest.raises(UserError, match=r"no whole checkpoint in .*/none; finished steps: none"):
            store.restore(make_state())
        with pytest.raises(UserError, match="no whole checkpoint in"):
            store.restore_params()
        assert not (tmp_path / "none").exists()


def test_another_structure_is_refused_with_its_differences(store):
    store.save(1, make_state())
    wanted = make_state(width=8)
    wanted.params["decoder"] = jnp.zeros(2)
    del wanted.params["encoder"]["bias"]
    with pytest.raises(StructureError) as caught:
        store.restore(wanted)
    assert "\n" not in str(caught.value)
    assert "missing in the checkpoint: params/decoder float32[2] (and " in str(caught.value)
    rows = [row.split("  ") for row in caught.value.details.splitlines()]
    table = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert table[0] == ["array", "in the checkpoint", "wanted"]
    assert ["params/decoder", "-", "float32[2]"] in table
    assert ["params/encoder/bias", "bfloat16[4]", "-"] in table
    assert ["params/encoder/kernel", "float32[3, 4]", "float32[3, 8]"] in table
    assert not any(row[0] == "step" for row in table)
    narrow = make_state()
    narrow.params["encoder"]["kernel"] = narrow.params["encoder"]["kernel"].astype(jnp.bfloat16)
    with pytest.raises(StructureError, match=r"params/encoder/kernel is float32\[3, 4\].*wanted bfloat16\[3, 4\]$"):
        store.restore(narrow)


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(keep_last=2, keep_best=2, metric="bleu"), [2, 5, 8, 9]),
        (Retention(keep_last=1, keep_best=1, metric="bleu", mode="min"), [7, 9]),
        (Retention(keep_last=3, keep_best=0, metric="bleu"), [7, 8, 9]),
        (Retention(keep_last=2, keep_best=2), [8, 9]),
        (Retention(keep_last=1, keep_best=1, metric="chrf"), [9]),
        (Retention(keep_last=9, keep_best=9, metric="bleu"), [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_kept_steps(retention, kept):
    # Step 5 equals step 6; 3 was not evaluated, 4 diverged.
    values = {1: 10.0, 2: 31.0, 3: None, 4: float("nan"), 5: 30.0, 6: 29.0, 7: 1.0, 8: 12.0, 9: 11.0}
    found = values if retention.metric == "bleu" else dict.fromkeys(values)
    assert sorted(retention.kept(found)) == kept


def test_of_equal_values_the_newer_is_best():
    assert Retention(metric="bleu").ranked({1: 3.0, 2: 3.0, 3: 1.0}) == [2, 1, 3]


@pytest.mark.parametrize("arguments", [{"keep_last": 0}, {"keep_best": -1}, {"mode": "largest"}])
def test_impossible_retention_is_refused(arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        Retention(**arguments)


def test_best_and_last_stay_and_readers_find_them(tmp_path):
    retention = Retention(keep_last=1, keep_best=1, metric="loss", mode="min")
    with CheckpointStore(tmp_path, retention) as store:
        for step, loss in enumerate([3.0, 1.0, 2.0, float("nan"), 4.0], start=1):
            store.save(step, make_state(step), metrics={"loss": loss})
        store.save(6, make_state(6))
        store.wait()
        assert (store.steps(), store.best_step()) == ([2, 6], 2)
    reader = CheckpointStore(tmp_path)  # knows nothing of the metric; the checkpoints do
    kernels = {step: np.asarray(make_state(step).params["encoder"]["kernel"]) for step in (2, 6)}
    assert reader.best_step() == 2
    np.testing.assert_array_equal(reader.restore_params("best")["encoder"]["kernel"], kernels[2])
    np.testing.assert_array_equal(reader.restore_params("last")["encoder"]["kernel"], kernels[6])
    np.testing.assert_array_equal(reader.restore_params(6)["encoder"]["kernel"], kernels[6])
    with pytest.raises(UserError, match=r"of step 5 .*finished steps: \[2, 6\]"):
        reader.restore_params(5)


def test_parameters_are_read_alone(tmp_path):
    """Only their files are touched: damage elsewhere does not matter, and the types are NumPy's."""
    state = make_state()
    averaged = jax.tree.map(lambda leaf: leaf * 2, state.params)
    with CheckpointStore(tmp_path) as store:
        store.save(1, state._replace(ema=averaged))
        store.save(2, state)
    largest_file(tmp_path / "00000001" / "state").unlink()
    reader = CheckpointStore(tmp_path)
    for subtree, expected in (("params", state.params), ("ema", averaged)):
        params = reader.restore_params(1, subtree)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
        assert_identical(params, jax.tree.map(np.asarray, expected))
    with pytest.raises(UserError, match="holds no weights named 'ema'"):
        reader.restore_params(2, "ema")


def test_older_checkpoints_stay_until_the_new_one_is_whole(tmp_path, monkeypatch):
    """With one kept, at the moment when digests are written the old one must still be there."""
    present = []
    from t5x_ext.checkpoints import store as module

    write_digests = module.write_digests

    def watching(folder, parts):
        present.append(sorted(path.name for path in tmp_path.iterdir()))
        write_digests(folder, parts)

    monkeypatch.setattr(module, "write_digests", watching)
    with CheckpointStore(tmp_path, Retention(keep_last=1)) as store:
        store.save(1, make_state(1))
        store.save(2, make_state(2))
    assert present == [["00000001"], ["00000001", "00000002"]]
    assert [path.name for path in tmp_path.iterdir()] == ["00000002"]


@contextmanager
def files_of_at_most(limit: int):
    """As on a full disk, writing beyond the limit fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_finds_no_room_is_reported_and_loses_nothing(tmp_path):
    state = {"params": jnp.ones((512, 1024))}
    with CheckpointStore(tmp_path, Retention(keep_last=1)) as store:
        store.save(1, state)
        store.wait()
        # As a process leaves it that is killed before the digests are written.
        (tmp_path / "00000002" / "params").mkdir(parents=True)
        with files_of_at_most(1_000_000):
            store.save(2, state)
            with pytest.raises(SaveError, match="could not be saved: File too large") as caught:
                store.wait()
        assert re.search(r"\(it takes 2.1 MB; .* free there\); the last checkpoint is 00000001$", str(caught.value))
        assert "\n" not in str(caught.value)
        assert store.steps() == [1]
        assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
        store.save(3, state)
        store.wait()
        assert [path.name for path in tmp_path.iterdir()] == ["00000003"]


SAVER = """
import sys, jax.numpy as jnp
from t5x_ext.checkpoints import CheckpointStore, Retention

store = CheckpointStore(sys.argv[1], Retention(keep_last=2))
for step in range(1, 10_000):
    store.save(step, {"params": {str(i): jnp.full((64, 1024), step, jnp.float32) for i in range(8)}}, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("seed", range(3))
def test_killed_while_saving_the_last_whole_one_is_restored(tmp_path, seed):
    """SIGKILL at a random moment; oracle: all arrays hold the number of their step."""
    process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    started = 0
    while started < 3:
        started = int(process.stdout.readline())
    time.sleep(np.random.default_rng(seed).uniform(0.0, 0.1))
    process.send_signal(signal.SIGKILL)
    started = int(([str(started), *process.communicate()[0].split()])[-1])
    template = {"params": {str(i): jnp.zeros((64, 1024)) for i in range(8)}}
    with CheckpointStore(tmp_path, Retention(keep_last=2)) as store:
        state, extra = store.restore(template)
        # The print of a step follows the end of the save before it.
        assert extra["step"] >= started - 1
        assert all(np.all(leaf == extra["step"]) for leaf in jax.tree.leaves(state))
        store.save(20_000, state)
        store.wait()
        # Nothing half-written is left behind.
        folders = list(tmp_path.iterdir())
        assert all((folder / DIGESTS).exists() for folder in folders)
        assert len(folders) == 2


def test_the_record_is_strict_json(store):
    store.save(1, make_state(), metrics={"loss": float("nan"), "bleu": np.float32(3.5)})
    store.wait()
    text = (store.directory / "00000001" / "meta" / "metadata").read_text()
    meta = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert meta["metrics"] == {"loss": None, "bleu": 3.5}
    assert meta["leaves"]["params/encoder/bias"] == [[4], "bfloat16"]


@pytest.mark.devices(8)
def test_restored_on_other_shardings(tmp_path):
    """Saved on 4x2, restored on 8, on 2x4 and on one device: the same bits, the sharding asked for."""
    devices = np.array(jax.devices())
    kernel = jax.random.normal(jax.random.key(0), (16, 8))
    saved = Mesh(devices.reshape(4, 2), ("a", "b"))
    key = jax.device_put(jax.random.key(5), NamedSharding(saved, P()))
    state = {"params": jax.device_put(kernel, NamedSharding(saved, P("a", "b"))), "key": key, "step": jnp.int32(3)}
    with CheckpointStore(tmp_path) as store:
        store.save(1, state)
        for mesh, spec in (
            (Mesh(devices, ("a",)), P("a")),
            (Mesh(devices.reshape(2, 4), ("a", "b")), P("b", "a")),
            (Mesh(devices[3:4], ("a",)), P()),
        ):
            split, whole = NamedSharding(mesh, spec), NamedSharding(mesh, P())
            shardings = {"params": split, "key": whole, "step": whole}
            template = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, shardings
            )
            restored, _ = store.restore(template)
            assert restored["params"].sharding == split
            assert restored["key"].sharding.is_equivalent_to(whole, 0)
            assert_identical(jax.device_get(restored["params"]), jax.device_get(state["params"]))
            assert jnp.array_equal(jax.random.key_data(restored["key"]), jax.random.key_data(jax.random.key(5)))
        alone = jax.eval_shape(lambda: {"params": kernel, "key": jax.random.key(0), "step": jnp.int32(0)})
        assert len(store.restore(alone)[0]["params"].sharding.device_set) == 1


def test_what_other_writers_of_a_failed_save_add_is_deleted_too(tmp_path, monkeypatch):
    """Orbax reports the first array that failed while others are still being written."""
    late = tmp_path / "00000002.orbax-checkpoint-tmp" / "params"
    writer = threading.Timer(0.15, lambda: late.mkdir(parents=True))
    with CheckpointStore(tmp_path) as store:
        store.save(1, make_state(1))
        store.wait()

        def fail():
            writer.start()
            raise OSError("No space left on device")

        monkeypatch.setattr(store._checkpointer, "wait_until_finished", fail)
        with pytest.raises(SaveError, match="No space left on device"):
            store.save(2, make_state(2))
        monkeypatch.undo()
    writer.join()
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]


def test_evaluation_params_are_the_ema_where_there_is_one(tmp_path, caplog):
    with CheckpointStore(tmp_path, Retention(keep_last=9, metric="bleu")) as store:
        for step, tree in ((1, {"params": 1.0, "ema": 10.0}), (2, {"params": 2.0}), (3, {"params": 3.0, "ema": 30.0})):
            arrays = {name: {"w": jnp.full(2, value)} for name, value in tree.items()}
            store.save(step, {**arrays, "step": step}, metrics={"bleu": -step})
    reader = CheckpointStore(tmp_path)
    found = {which: reader.evaluation_params(which)["w"].tolist() for which in (1, 2, 3, "best", "last")}
    assert found == {1: [10.0] * 2, 2: [2.0] * 2, 3: [30.0] * 2, "best": [10.0] * 2, "last": [30.0] * 2}
    with pytest.raises(UserError, match=r"no whole checkpoint of step 4 in .*; finished steps: \[1, 2, 3\]$"):
        reader.evaluation_params(4)
    # A damaged EMA is not replaced by the parameters beside it; damage elsewhere in the folder is of no concern.
    for part in ("params", "ema"):
        for path in (tmp_path / "00000003" / part).rglob("d/*"):
            path.write_bytes(b"damaged")
        with caplog.at_level(logging.WARNING):
            last = CheckpointStore(tmp_path).evaluation_params("last")["w"].tolist()
        assert last == ([30.0] * 2 if part == "params" else [2.0] * 2)
    assert len(caplog.messages) == 1
    assert "00000003 refused: ema/" in caplog.text
