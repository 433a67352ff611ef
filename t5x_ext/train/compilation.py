"""How a program came to be: compiled now, or taken from JAX's persistent cache."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from jax import monitoring

from t5x_ext.train.goodput import Clock

logger = logging.getLogger(__name__)

_EVENTS = {"/jax/compilation_cache/cache_hits": "hits", "/jax/compilation_cache/cache_misses": "misses"}


@contextmanager
def compiling(clock: Clock, what: str) -> Iterator[None]:
    """Counts the block as `compile`, and logs how long it took and what the persistent cache had."""
    counts: Counter[str] = Counter()

    def count(event: str, **_: str | int) -> None:
        if event in _EVENTS:
            counts[_EVENTS[event]] += 1

    start = clock.now()
    monitoring.register_event_listener(count)
    try:
        with clock.section("compile"):
            yield
    finally:
        monitoring.unregister_event_listener(count)
    cache = f"hits {counts['hits']}, misses {counts['misses']}" if counts else "off"
    logger.info("%s compiled in %.1f s (cache: %s)", what, clock.now() - start, cache)
