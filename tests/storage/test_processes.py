"""What processes agree on: who is first, what process 0 says, and that all of them fail when one does."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time

import pytest

from t5x_ext.storage.processes import (
    ALONE,
    Processes,
    barrier,
    failing_together,
    from_primary,
    is_primary,
    primary_first,
)


@pytest.fixture
def address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_one_process_is_first_and_waits_for_nobody():
    assert is_primary()
    barrier("alone")
    with primary_first("alone"):
        pass
    assert from_primary("alone", "said") == "said"
    with pytest.raises(ValueError, match="as it is"), failing_together():
        raise ValueError("as it is")


PROGRAM = """
import json, sys, time
from t5x_ext.contracts import UserError
from t5x_ext.parallel import DistributedConfig, initialize_distributed
from t5x_ext.storage.processes import barrier, primary_first
address, process = sys.argv[1], int(sys.argv[2])
initialize_distributed(DistributedConfig("explicit", address, 2, process, 60))
seen = []
barrier("again")
barrier("again")
with primary_first("a file"):
    if process == 0:
        time.sleep(0.3)
    seen.append(time.time())
try:
    with primary_first("a file"):
        if process == 0:
            raise UserError("no such text")
        seen.append("unreachable")
except UserError as error:
    seen.append(str(error))
print(json.dumps(seen))
"""


def test_process_0_goes_first_and_its_failure_is_everyones(address):
    command = [sys.executable, "-c", PROGRAM, address]
    start = lambda process: subprocess.Popen([*command, str(process)], stdout=subprocess.PIPE, text=True)
    lines = [process.communicate()[0].splitlines()[-1] for process in [start(0), start(1)]]
    (first, failure), (second, told) = map(json.loads, lines)
    assert first < second
    assert (failure, told) == ("no such text", "process 0, a file: no such text")


FAILING = """
import sys
from t5x_ext.contracts import UserError
from t5x_ext.parallel import DistributedConfig, initialize_distributed
from t5x_ext.storage import processes
from t5x_ext.storage.processes import barrier, failing_together, from_primary
address, process, failing, where = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
initialize_distributed(DistributedConfig("explicit", address, 2, process, 60))
processes._LOOK_MILLISECONDS = 100
assert from_primary("greeting", "good morning" if process == 0 else "") == "good morning"
try:
    with failing_together():
        if process == failing:
            raise UserError("no such text")
        barrier("where") if where == "barrier" else from_primary("where")
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize(("failing", "where"), [(0, "word"), (1, "barrier")])
def test_who_waits_for_one_that_fails_fails_with_it(address, failing, where):
    """Both end on their own at once; JAX would abort them half a minute later."""
    command, start = [sys.executable, "-c", FAILING, address], time.monotonic()
    begin = lambda process: subprocess.Popen(
        [*command, str(process), str(failing), where], stdout=subprocess.PIPE, text=True
    )
    processes = [begin(0), begin(1)]
    lines = [process.communicate(timeout=60)[0].splitlines()[-1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert lines[failing] == "no such text"
    assert lines[1 - failing] == f"process {failing}: no such text"
    assert time.monotonic() - start < 25


GATHERING = """
import sys, time
import jax
from t5x_ext.contracts import UserError
from t5x_ext.parallel import DistributedConfig, initialize_distributed
from t5x_ext.storage import processes
address, process = sys.argv[1], int(sys.argv[2])
initialize_distributed(DistributedConfig("explicit", address, 3, process, 60))
everyone = processes.Processes.all()
for turn in range(4):
    time.sleep(0.05 * ((process + turn) % 3))
    assert everyone.gather(f"{turn} {process}") == [f"{turn} {index}" for index in range(3)]
assert processes.ALONE.gather("mine") == ["mine"]
client = processes.coordination_client()
processes.barrier("counted")
# Only what was gathered last is still there.
assert sorted(name for name, _ in client.key_value_dir_get("t5x_ext/gather")) == [
    f"t5x_ext/gather/3/{index}" for index in range(3)
]
processes._LOOK_MILLISECONDS = 50
try:
    processes.barrier("late", 0.3) if process != 1 else time.sleep(1.0)
except jax.errors.JaxRuntimeError as error:
    print(str(error).split(":")[0])
processes.barrier("end")
"""


def test_all_texts_in_order_and_a_barrier_that_does_not_wait_forever(address):
    command = [sys.executable, "-c", GATHERING, address]
    started = [
        subprocess.Popen([*command, str(process)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for process in range(3)
    ]
    results = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], results
    assert [output.split() for output, _ in results] == [["DEADLINE_EXCEEDED"], [], ["DEADLINE_EXCEEDED"]]


def test_one_process_gathers_its_own_text():
    assert Processes.all() == ALONE
    assert ALONE.gather("only") == ["only"]
