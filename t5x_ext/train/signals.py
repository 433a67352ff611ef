"""Signals that a run listens to while it trains."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Handler = Callable[[int, object], None]


@contextmanager
def listening(numbers: Sequence[int], handler: Handler) -> Iterator[None]:
    """Gives these signals to a handler inside the block.

    Outside the main thread Python takes no signals, and nothing happens.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            # None: installed by code that is not Python, and not to be got back.
            signal.signal(number, signal.SIG_DFL if old is None else old)
