"""Signals that end the process: record that one came, and leave it to the installed handler."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

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


@contextmanager
def is_deaf() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: it was set by no code of Python's
