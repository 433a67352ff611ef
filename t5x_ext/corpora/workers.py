"""Processing the numbered chunks of a corpus with several processes, in order."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from t5x_ext.contracts import UserError

_MAX_PROCESSES = 16

_work: Callable[..., Any] | None = None


def choose_processes(num_pairs: int, worth: int, num_processes: int | None) -> int:
    """`num_processes` if given; otherwise one a core for more than `worth` pairs, and one below."""
    if num_processes is not None:
        return num_processes
    return min(os.cpu_count() or 1, _MAX_PROCESSES) if num_pairs > worth else 1


def work_in_order(
    make_work: Callable[..., Callable[..., Any]],
    arguments: tuple[Any, ...],
    tasks: Iterable[tuple[Any, ...]],
    processes: int,
) -> Iterator[Any]:
    """Results of `make_work(*arguments)(*task)` for every task, in order.

    Args:
      make_work: makes the function that does the work, once a process; importable by name.
      arguments: its arguments, sent to every process once.
      tasks: the arguments of each call; only a few more than there are processes are read ahead.
      processes: 1 or less: the work is done in this process.

    Raises:
      UserError: if a process dies, or if the work raises it.
    """
    if processes <= 1:
        work = make_work(*arguments)
        for task in tasks:
            yield work(*task)
        return
    # Workers are spawned, not forked: JAX may hold threads in this process.
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[Any]] = deque()
    try:
        with ProcessPoolExecutor(processes, context, _start, (make_work, arguments)) as pool:
            for task in tasks:
                waiting.append(pool.submit(_do, *task))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died: out of memory, or the calling script lacks `if __name__ == '__main__':`"
            " (num_processes=1 needs neither)"
        ) from None


def _start(make_work: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]) -> None:
    global _work
    _work = make_work(*arguments)


def _do(*task: Any) -> Any:
    assert _work is not None
    return _work(*task)
