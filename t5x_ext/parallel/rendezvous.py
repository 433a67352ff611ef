"""Waiting for all processes of a run, and naming those that do not arrive.

`jax.distributed.initialize` kills the process if another one is missing, without saying which. So the processes meet
before: each connects to process 0 at the coordinator's address and waits. When all have arrived, or after the timeout,
process 0 answers all of them. Then the port is free for JAX.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Iterable
from typing import Any

from t5x_ext.contracts import UserError

_LONGEST_MESSAGE = 4096
_ANSWER_LATE = 15.0  # seconds that the others wait longer than process 0, for its answer


def meet(coordinator: str, num_processes: int, process_id: int, timeout_seconds: float) -> None:
    """Waits until all processes have called it, at most `timeout_seconds` after process 0.

    Args:
      coordinator: `host:port` at which process 0 can be reached.
      num_processes: number of processes.
      process_id: number of this process, from 0.
      timeout_seconds: how long process 0 waits for the others, and each of the others for process 0.

    Raises:
      UserError: if processes did not arrive, naming them, in every process that did.
    """
    host, port = split_address(coordinator)
    if process_id == 0:
        _Reception(coordinator, port, num_processes).run(timeout_seconds)
    else:
        _call((host, port), {"process": process_id, "of": num_processes}, timeout_seconds)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`; an IPv6 host is in brackets.

    >>> split_address("10.0.0.1:1234"), split_address("[::1]:80")
    (('10.0.0.1', 1234), ('::1', 80))
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"coordinator address {address!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


class _Reception:
    """Process 0's side: which processes have connected, and their connections."""

    def __init__(self, coordinator: str, port: int, num_processes: int):
        self._coordinator = coordinator
        self._port = port
        self._num_processes = num_processes
        self._here: dict[int, socket.socket] = {}

    def run(self, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        with _listen(self._port) as server, selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            while len(self._here) < self._num_processes - 1 and (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    connection: Any = key.fileobj
                    if connection is server:
                        caller, _ = server.accept()
                        caller.setblocking(False)
                        selector.register(caller, selectors.EVENT_READ)
                    else:
                        self._hear(connection, selector)
        missing = sorted(set(range(1, self._num_processes)) - self._here.keys())
        error = self._missing(missing, timeout_seconds) if missing else None
        for connection in self._here.values():
            _send(connection, {"error": error})
            connection.close()
        if error is not None:
            raise UserError(error)

    def _hear(self, connection: socket.socket, selector: selectors.BaseSelector) -> None:
        """Registers a process, or forgets one that has closed its connection and may connect again."""
        message = _receive(connection)
        refusal = None if message is None else self._refusal(message)
        if message is None or refusal is not None:
            if refusal is not None:
                _send(connection, {"error": refusal})
            self._here = {process: other for process, other in self._here.items() if other is not connection}
            selector.unregister(connection)
            connection.close()
        else:
            self._here[message["process"]] = connection

    def _refusal(self, message: dict[str, Any]) -> str | None:
        process, of = message.get("process"), message.get("of")
        if of != self._num_processes:
            return f"process 0 was told of {self._num_processes} processes, process {process} of {of}"
        if not isinstance(process, int) or not 0 < process < self._num_processes:
            return f"there is no process {process} of {self._num_processes}"
        if process in self._here:
            return f"two processes say they are process {process} of {self._num_processes}; each needs its own id"
        return None

    def _missing(self, missing: list[int], timeout_seconds: float) -> str:
        word = "process" if len(missing) == 1 else "processes"
        here = _names(set(range(self._num_processes)) - set(missing))
        return (
            f"{word} {_names(missing)} of {self._num_processes} did not arrive within {timeout_seconds:g} s "
            f"(coordinator {self._coordinator}); arrived: {here}"
        )


def _names(processes: Iterable[int]) -> str:
    """Numbers, with runs of more than three shortened.

    >>> _names([0, 1, 2, 3, 7, 9, 10])
    '0-3, 7, 9, 10'
    """
    runs: list[list[int]] = []
    for process in sorted(processes):
        if runs and process == runs[-1][-1] + 1:
            runs[-1].append(process)
        else:
            runs.append([process])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 3 else ", ".join(map(str, run)) for run in runs)


def _call(address: tuple[str, int], message: dict[str, Any], timeout_seconds: float) -> None:
    """Calls process 0 until it answers; calls again if it hung up, because it may have been restarted."""
    deadline = time.monotonic() + timeout_seconds
    what = "did not answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=min(left, 10.0)) as connection:
                what = "hung up on"
                # From here on process 0's timeout counts, which may have started later.
                connection.settimeout(timeout_seconds + _ANSWER_LATE)
                _send(connection, message)
                answer = _receive(connection)
        except OSError:
            answer = None
        if answer is None:
            time.sleep(min(0.3, left))
        elif answer.get("error") is not None:
            raise UserError(answer["error"])
        else:
            return
    me = f"process {message['process']} of {message['of']}"
    where = f"process 0 at {address[0]}:{address[1]} (the coordinator)"
    raise UserError(f"{where} {what} {me} within {timeout_seconds:g} s; is it running there?")


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    except OSError as error:
        raise UserError(f"process 0 cannot listen on port {port}: {error.strerror}; choose another one") from error


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    # A closed connection is noticed when its answer is read.
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any] | None:
    """One message; None if the connection was closed or the sender is not one of this package."""
    try:
        data = connection.recv(_LONGEST_MESSAGE)
        message = json.loads(data)
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None
