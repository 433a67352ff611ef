"""Signals that a run listens to while it trains."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Handler = Callable[[int, object], None]


@contextmanager
def listening(numbers: Sequence[int], handler: Handler) -> Iterator[Callable[[], None]]:
    """Gives these signals to a handler inside the block; yields a function that gives them back at once.

    Outside the main thread Python takes no signals, and nothing happens.
    """
    before: dict[int, object] = {}

    def give_back() -> None:
        for number, old in before.items():
            # None: installed by code that is not Python (JAX's coordination service), and not to be got back.
            signal.signal(number, signal.SIG_DFL if old is None else old)  # type: ignore[arg-type]
        before.clear()

    if threading.current_thread() is threading.main_thread():
        before.update({number: signal.signal(number, handler) for number in numbers})
    try:
        yield give_back
    finally:
        give_back()
