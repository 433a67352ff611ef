"""Turns this process into a command that does not outlive the one that started it; run by its path, alone.

arguments: PARENT NICENESS CORES COMMAND..., CORES being numbers with commas between them, or nothing.

It imports the standard library alone. What the program that it becomes inherits: its priority, its cores, a lock on its
log, and a signal when its parent dies.
"""

import os
import signal
import sys

PARENT_DIED = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def main(parent: str, niceness: str, cores: str, *command: str) -> None:
    """Takes the lock, sets what the arguments say, and becomes the command."""
    os.nice(int(niceness))
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(map(int, cores.split(","))))
    if sys.platform == "linux":
        import ctypes

        # A study that is killed tells nobody. Its runs are to save and end, as at a signal from a person.
        ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGTERM)
        if os.getppid() != int(parent):
            sys.exit(130)
    if os.name == "posix":
        import fcntl

        # Standard output is the log of the run. Two processes never work on one run: where the run of a study that was
        # killed is still saving, the next one waits here. The lock ends with the process.
        fcntl.flock(sys.stdout.fileno(), fcntl.LOCK_EX)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
