"""Wait for one more scrape before a process that was told to stop ends."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Final

from consul_prom.process.signals import is_deaf

TICK: Final = 0.02


def await_scrape(
    scraped_since: Callable[[float], bool], *, goes_on: Callable[[], bool], timeout: float, told: bool
) -> None:
    """Return when there was a scrape from now on, after *timeout* seconds, or when it no longer *goes_on*.

    Where a signal *told* the process to end, SIGTERM is ignored meanwhile: Gunicorn repeats it each second, to those
    that no longer handle it too. A process that ends of itself shall hear the first one.
    """
    asked_at, ends_at = time.time(), time.monotonic() + timeout
    with is_deaf() if told else nullcontext():
        while goes_on() and time.monotonic() < ends_at and not scraped_since(asked_at):
            time.sleep(TICK)
