"""What is due before this process ends: when Python exits, or by SIGTERM where nobody else handles that.

Supervisors end a process by SIGTERM, and one that does not handle it, as most scripts, the processes of a
multiprocessing pool and Hypercorn's workers, would die without a word. It dies of the signal all the same, a little
later; as with any handler of Python's, not before the main thread is back from what it does in C.
"""

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

Stop = Callable[[], None]

_due: Final[list[Stop]] = []
_under_way: Final[list[Stop]] = []
_signalled: Final[list[int]] = []
_dying: Final[list[int]] = []
_exit_signals: Final[list[int]] = []


def expect(stop: Stop) -> None:
    """*stop* is due from now on, until `said`. It must be bounded in time, and do nothing where it is called again."""
    _due.append(stop)
    if util := sys.modules.get("multiprocessing.util"):
        util.Finalize(None, _say_all, exitpriority=0)  # a forked child of multiprocessing's ends without atexit
    hear()


def hear() -> None:
    """Handle SIGTERM if no one else does. Only the main thread can: another thread may `expect` after it has."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        _handle(_end)


@contextmanager
def said(stop: Stop) -> Iterator[None]:
    """While this lasts *stop* is done, which SIGTERM does not break off; it is not due any more."""
    _under_way.append(stop)
    hear()
    try:
        yield
    finally:
        if stop in _due:
            _due.remove(stop)
        if not _due and signal.getsignal(signal.SIGTERM) is _end:
            _handle(signal.SIG_DFL)
        _under_way.remove(stop)
        if _signalled and not _under_way:
            os.kill(os.getpid(), _signalled.pop())


def die_at_exit(number: int) -> None:
    """When Python exits, and all is said, the process dies of the signal *number*, as it would have without us.

    Freeing every object takes Python longer than all else that a worker does at its end.
    """
    _exit_signals.append(number)


def dying() -> bool:
    """Whether the process dies as soon as all is said.

    Then nothing need be as before, and no lock of the application's may be waited for: the signal's handler runs in the
    midst of whatever held it.
    """
    return bool(_dying)


def _end(number: int, _frame: object) -> None:
    if _under_way:
        _signalled.append(number)
        return
    _dying.append(number)
    try:
        _say_all()
    finally:
        _handle(signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _say_all() -> None:
    for stop in tuple(_due):  # each leaves it
        stop()


def _handle(handler: "Callable[[int, object], None] | signal.Handlers") -> None:
    with suppress(ValueError):  # only the main thread may
        signal.signal(signal.SIGTERM, handler)


def _forget() -> None:
    """A forked child is not the worker: it ends as if we were not there."""
    for due in (_due, _under_way, _signalled, _exit_signals):
        due.clear()
    if signal.getsignal(signal.SIGTERM) is _end:
        _handle(signal.SIG_DFL)


def _at_exit() -> None:
    _say_all()
    for number in _exit_signals:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_forget)
