"""Which process of which machine this is, and whether another one still runs."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def host_name() -> str:
    """The name of this machine."""
    return socket.gethostname()


def process_space() -> str:
    """Tells apart machines, boots and containers, in which equal process ids mean other processes; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def started(process: int) -> str:
    """When a process of this machine started, in clock ticks since boot, since ids are used again; empty if unknown."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]


def is_alive(process: int) -> bool:
    """Whether a process of this machine runs; one that has ended and is still to be waited for does not count."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return True
    return text.rpartition(")")[2].split()[0] not in ("Z", "X")
