"""What happens at a fork: the parent waits for the fork lock, and the child drops the parent's sockets.

A thread does not exist in a forked child, but its descriptors and the locks that it held do.
"""

import os
import threading
from contextlib import suppress
from typing import Final, Protocol
from weakref import WeakSet

FORK_PATIENCE: Final = 5.0


class HasDescriptors(Protocol):
    """An object with descriptors that a forked child must not keep."""

    def descriptors(self) -> list[int]: ...


NOT_INHERITED: Final[WeakSet[HasDescriptors]] = WeakSet()
FORK_LOCK: Final = threading.RLock()
"""Held while the metrics thread may hold a lock of prometheus_client's: a fork waits for it."""


def _before_fork() -> None:
    FORK_LOCK.acquire(timeout=FORK_PATIENCE)  # a collector that hangs must not hold the application's fork


def _after_fork_in_parent() -> None:
    with suppress(RuntimeError):  # it was not acquired
        FORK_LOCK.release()


def _after_fork_in_child() -> None:
    """Let go of the parent's sockets. A plain close would let their numbers be used again, under our objects' feet."""
    FORK_LOCK._at_fork_reinit()  # type: ignore[attr-defined]  # noqa: SLF001  # its owner may be a thread that is gone
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for thread in list(NOT_INHERITED):
        for descriptor in thread.descriptors():
            os.dup2(null, descriptor, inheritable=False)
    os.close(null)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
