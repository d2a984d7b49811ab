"""An end that waits for a scrape: whether a signal asked for it, and the wait."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any, Final

TICK: Final = 0.02
ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


class Signals:
    """Notes that a signal told the process to end, and leaves it to whoever handles the signal to do so.

    Without a handler of Python's a process ends at once, and nobody can linger. A server sets its handlers before its
    application starts.
    """

    def __init__(self) -> None:
        self.came = False
        self._ours: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._theirs: dict[int, Any] = {}

    def watch(self) -> None:
        """Does nothing outside of the main thread, which alone may."""
        if threading.current_thread() is threading.main_thread():
            for number in ENDING:
                theirs = signal.getsignal(number)
                if callable(theirs):
                    ours = self._ours[number] = self._noting(theirs)
                    self._theirs[number] = theirs
                    signal.signal(number, ours)

    def close(self) -> None:
        """The handlers are as before, where they are still ours."""
        if threading.current_thread() is threading.main_thread():
            for number, ours in self._ours.items():
                if signal.getsignal(number) is ours:
                    signal.signal(number, self._theirs[number])

    def _noting(self, theirs: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], Any]:
        def note(number: int, frame: FrameType | None) -> None:
            self.came = True
            theirs(number, frame)

        return note


def await_scrape(
    scraped_since: Callable[[float], bool], *, goes_on: Callable[[], bool], timeout: float, told: bool
) -> None:
    """Return when there was a scrape from now on, after *timeout* seconds, or when it no longer *goes_on*.

    Where a signal *told* the process to end, SIGTERM is ignored meanwhile: Gunicorn repeats it each second, to those
    that no longer handle it too. A process that ends of itself shall hear the first one.
    """
    asked_at, ends_at = time.time(), time.monotonic() + timeout
    with _deaf() if told else nullcontext():
        while goes_on() and time.monotonic() < ends_at and not scraped_since(asked_at):
            time.sleep(TICK)


@contextmanager
def _deaf() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: it was set by no code of Python's
