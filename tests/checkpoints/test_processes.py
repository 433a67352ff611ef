"""Saving and loading by two processes of two devices each, and by other numbers of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ext.checkpoints import CheckpointStore
from t5x_ext.contracts import UserError
from t5x_ext.storage.digests import DIGESTS

PROGRAM = """
import logging, shutil, sys
from pathlib import Path
from unittest import mock

import jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

address, this, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.distributed.initialize(address, 2, this)
from t5x_ext.checkpoints import CheckpointStore, Retention, SaveError
from t5x_ext.contracts import UserError

logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(message)s")
wide = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), P("x"))
square = NamedSharding(Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y")), P("y", "x"))
whole = NamedSharding(wide.mesh, P())
kernel = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)


def state(step, sharding=wide):
    place = lambda array, where: jax.make_array_from_callback(array.shape, where, lambda index: array[index])
    return {"params": {"kernel": place(kernel + step, sharding)}, "step": place(np.int32(step), whole)}


def check(tree, step):
    for shard in tree["params"]["kernel"].addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), (kernel + step)[shard.index])


store = CheckpointStore(folder, Retention(keep_last=4))
# Saved by one process before; restored in another shape by all.
restored, extra = store.restore(state(0, square))
check(restored, 1)
assert extra == {"by": "one"}
assert restored["params"]["kernel"].sharding == square
for step in (2, 3, 4):
    store.save(step, state(step), {"step": step})
store.wait()
assert store.steps() == [1, 2, 3, 4], store.steps()
assert (folder / "00000004" / "params" / "ocdbt.process_1").is_dir()

# The processes may read the parameters each for itself.
if this == 1:
    np.testing.assert_array_equal(store.restore_params("last")["kernel"], kernel + 4)
multihost_utils.sync_global_devices("read")

# Damage anywhere is seen by all, whoever verifies that file.
names = sorted(path for path in (folder / "00000004").rglob("*") if path.is_file() and path.name != "digests.json")
if this == 0:
    for path in (names[0], [path for path in (folder / "00000003").rglob("d/*") if path.is_file()][-1]):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
multihost_utils.sync_global_devices("damaged")
restored, extra = store.restore(state(0, square))
check(restored, 2)
assert extra == {"step": 2}

# Going back, and saving the same step again.
store.discard_after(2)
assert store.steps() == [1, 2]
store.save(4, state(40), {"step": 40})
assert store.restore(state(0))[1] == {"step": 40}

# A full disk that only process 0 looks at stops all.
full = mock.Mock(return_value=mock.Mock(free=10))
with mock.patch.object(shutil, "disk_usage", full):
    try:
        store.save(5, state(5))
    except SaveError as error:
        print(error)
assert full.called
store.save(6, state(6), {"step": 6})
store.close()

# Folders that are not shared are a mistake that is named.
alone = CheckpointStore(f"{folder}.of{this}")
alone.directory.mkdir() if this == 0 else None
try:
    alone.save(1, state(1))
except UserError as error:
    print(error)
print("done")
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_save_and_load_together(tmp_path):
    folder = tmp_path / "checkpoints"
    kernel = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    with CheckpointStore(folder) as store:
        store.save(1, {"params": {"kernel": jnp.asarray(kernel + 1)}, "step": jnp.int32(1)}, {"by": "one"})
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    address = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(index), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    for process, (output, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output + errors
        assert output.splitlines()[-1] == "done"
        assert "checkpoint 00000005 could not be saved" in output.replace(f"{folder}/", "")
        assert "processes [1] do not see" in output
    refusals = [line for output, _ in outputs for line in output.splitlines() if "refused" in line]
    assert {line.split("refused")[0].rsplit("/")[-1].strip() for line in refusals} == {"00000003", "00000004"}
    # One process, one device: the same bits.
    with CheckpointStore(folder) as store:
        state, extra = store.restore(jax.eval_shape(lambda: {"params": {"kernel": kernel}, "step": jnp.int32(0)}))
        np.testing.assert_array_equal(state["params"]["kernel"], kernel + 6)
        assert extra == {"step": 6}
    assert not [path for path in folder.rglob("*") if "tmp" in path.name or path.name.startswith(f"{DIGESTS}.")]


def test_a_file_in_place_of_the_folder_is_a_users_mistake(tmp_path):
    Path(tmp_path / "checkpoints").write_text("")
    store = CheckpointStore(tmp_path / "checkpoints")
    for call in (store.steps, store.restore_params, lambda: store.save(1, {"params": jnp.ones(1)})):
        with pytest.raises(UserError, match=r"checkpoints is a file; it must be the folder of the checkpoints$"):
            call()
