"""Runs of a study in processes of their own, side by side, each stopped gracefully where the study is told to stop."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from t5x_ext.train.preemption import SIGNALS
from t5x_ext.train.signals import listening

logger = logging.getLogger(__name__)

INTERRUPTED = 130
"""Exit code of a command that a signal has stopped, with what it did saved."""

NICENESS = 10
"""Of the runs: whoever works on the machine meanwhile comes first."""

_POLL_SECONDS = 0.05
_CHILD = Path(__file__).with_name("child.py")
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Process(NamedTuple):
    """A command to run."""

    name: str  # as people call it
    command: tuple[str, ...]
    log: Path  # takes what it prints, after what is there


class Outcome(NamedTuple):
    """How a process has ended."""

    code: int  # exit code; negative: the signal that killed it
    error: str  # one line; empty when the code is 0
    seconds: float  # wall time

    @property
    def interrupted(self) -> bool:
        """Whether it was stopped with its work saved."""
        return self.code == INTERRUPTED


class _Running(NamedTuple):
    popen: subprocess.Popen[bytes]
    since: float
    slot: int
    log_size: int  # before it was started


def run_all(
    processes: Sequence[Process], at_once: int, ended: Callable[[Process, Outcome], None], niceness: int = NICENESS
) -> bool:
    """Runs commands, some at a time, in their order.

    SIGTERM, SIGINT and SIGUSR1 are passed to those that run as one SIGTERM, and no further one is started; a second
    signal kills them. If this process itself is killed, the kernel sends them SIGTERM (Linux).

    Args:
      processes: what to run.
      at_once: how many at a time; of several each gets a share of the cores that this process may use.
      ended: told each outcome.
      niceness: of all of them.

    Returns:
      Whether a signal has stopped it.
    """
    waiting, running, signals = list(processes), dict[Process, _Running](), list[int]()

    def stop(number: int, frame: object) -> None:
        signals.append(number)
        for one in running.values():
            one.popen.send_signal(signal.SIGTERM if len(signals) == 1 else signal.SIGKILL)

    with listening(SIGNALS, stop):
        while running or (waiting and not signals):
            free = sorted(set(range(at_once)) - {one.slot for one in running.values()})
            while waiting and free and not signals:
                process = waiting.pop(0)
                running[process] = _start(process, free.pop(0), at_once, niceness)
                logger.info("%s: started", process.name)
                if signals:  # it came while the process was being started
                    running[process].popen.send_signal(signal.SIGTERM)
            for process, one in list(running.items()):
                code = one.popen.poll()
                if code is not None:
                    del running[process]
                    # One that had not begun to listen dies of the signal, and has nothing to save.
                    code = INTERRUPTED if signals and code < 0 else code
                    ended(process, _outcome(process, one, code))
            time.sleep(_POLL_SECONDS)
    return bool(signals)


def _start(process: Process, slot: int, at_once: int, niceness: int) -> _Running:
    cores = _cores(slot, at_once)
    environment = dict(os.environ)
    if cores:
        environment = {name: str(len(cores)) for name in _THREADS} | environment
    process.log.parent.mkdir(parents=True, exist_ok=True)
    child = (str(os.getpid()), str(niceness), ",".join(map(str, cores)), *process.command)
    with process.log.open("ab") as log:
        popen = subprocess.Popen(
            # -I -S: the standard library alone, which no module beside the script can hide.
            [sys.executable, "-I", "-S", str(_CHILD), *child],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C in a terminal goes to this process, which hands it on once
        )
        return _Running(popen, time.monotonic(), slot, log.tell())


def _cores(slot: int, at_once: int) -> list[int]:
    """The cores of one of several processes; empty: all of them."""
    if at_once == 1 or not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    return cores[slot::at_once] or [cores[slot % len(cores)]]


def _outcome(process: Process, one: _Running, code: int) -> Outcome:
    seconds = time.monotonic() - one.since
    if code == 0:
        return Outcome(code, "", seconds)
    if code == INTERRUPTED:
        return Outcome(code, "stopped by a signal; rerun the same command to resume", seconds)
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return Outcome(code, f"killed by {name}{hint}", seconds)
    with process.log.open("rb") as log:
        log.seek(one.log_size)
        return Outcome(code, last_error(log) or f"ended with exit code {code}", seconds)


def last_error(log: IO[bytes]) -> str:
    """The line in which a command says what was wrong: its last one that is not indented, without its own name."""
    lines = [line.decode(errors="replace").rstrip() for line in log]
    said = [line for line in lines if line and not line[0].isspace()]
    named = [line for line in said if line.startswith("t5x_ext ") and ": " in line]
    return named[-1].split(": ", 1)[1] if named else said[-1] if said else ""
