"""The counts of a Gunicorn master, in a file of its own, and each worker's log lines.

A master has no thread, no socket and no lock of consul-prom, because workers are forked from it. It writes a new file
and renames it, so that a reader always sees a whole one. Several masters of a service, as during an upgrade, have a
number each.
"""

import json
import logging
import os
import threading
from collections import Counter as Counts
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter

from consul_prom.errors import SlotError
from consul_prom.ledger.parent_counts import counted
from consul_prom.process.identity import process_identity
from consul_prom.slots import slots
from consul_prom.slots.directory import prepare
from consul_prom.worker.master_page import LOG_LINES, read_tally

LEVELS: Final = ("debug", "info", "warning", "error", "critical")
LOG: Final = "gunicorn.error"
BOOT_FAILURES: Final = {3, 4}
"""Exit codes: the worker, or its application, could not be loaded. Gunicorn then halts, and tells no hook."""
_EXITS: Final = (
    *((reason, "") for reason in ("stop", "max_requests", "timeout", "error", "boot")),
    ("signal", "SIGKILL"),
)


class MasterStats(logging.Filter):
    """One master's counts. As a filter of Gunicorn's log it sees all records there, and lets them pass."""

    def __init__(
        self,
        directory: Path,
        service: str,
        *,
        writing: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """*writing* is the context to write in: a master may be root, and its workers somebody else.

        Raises SlotError where the directory of the slots cannot be used.
        """
        super().__init__()
        self._pid = os.getpid()
        self._writing = writing
        self._endings: dict[int, str] = {}
        # From 0 on: the first of something rare shall be an increase.
        self._exits = Counts(dict.fromkeys(_EXITS, 0))
        self._lines = Counts(dict.fromkeys(LEVELS, 0))
        self._counted: list[Any] = []
        self._wanted = self._alive = 0
        try:
            with writing():
                prepare(directory)
                with slots.alone(directory, service):
                    self._path = _free_number(directory, service)
                    self._write()
        except OSError as error:
            raise SlotError(f"CONSUL_PROM_DIR={str(directory)!r} cannot be used: {error.strerror}") from error

    def workers(self, *, wanted: int, alive: int) -> None:
        self._wanted, self._alive = wanted, alive
        self._counted = [
            [it.name, it.documentation, it.type, it.unit, [one[:3] for one in it.samples]] for it in counted(REGISTRY)
        ]
        self._write()

    def filter(self, record: logging.LogRecord) -> bool:
        self._lines[_level(record)] += 1
        self._note_ending(record)
        if threading.current_thread() is threading.main_thread():  # others' lines wait for its next
            self._write()
        return True

    def exited(self, pid: int | str, *, timeout: bool, left: bool) -> None:
        """A worker is gone; *left*: of itself, for nobody told it to, as after max_requests."""
        signal = self._endings.pop(int(pid), "")
        reason = "timeout" if timeout else "signal" if signal.startswith("SIG") else signal
        self._exits[reason or ("max_requests" if left else "stop"), signal if signal.startswith("SIG") else ""] += 1
        self._write()

    def close(self) -> None:
        """There is no such master any more."""
        if os.getpid() != self._pid:
            return
        with suppress(OSError), self._writing():
            self._path.unlink(missing_ok=True)

    def _note_ending(self, record: logging.LogRecord) -> None:
        """No hook is told how a worker ended; Gunicorn's log is, right before ``child_exit``."""
        match str(record.msg).partition("%s) ")[2].split(" "), record.args:
            case ["was", "sent", *_], (int(), "SIGTERM"):
                pass  # Gunicorn repeats it each second, until it hits who has taken its handlers down already
            case ["was", "sent", *_], (int(pid), str(signal)):
                self._endings[pid] = signal
            case ["exited", "with", "code", *_], (int(), int(code)) if code in BOOT_FAILURES:
                self._exits["boot", ""] += 1
            case ["exited", "with", "code", *_], (int(pid), int()):
                self._endings[pid] = "error"

    def _write(self) -> None:
        """A full disk keeps nobody from serving: then the page is an old one. Does nothing in a forked child."""
        if os.getpid() != self._pid:
            return
        tally = {
            "pid": self._pid,
            "proc": process_identity(self._pid),
            "wanted": self._wanted,
            "alive": self._alive,
            "exits": [[*key, number] for key, number in self._exits.items()],
            "lines": self._lines,
            "counted": self._counted,
        }
        aside = self._path.with_name(f"{self._path.name}.new")
        with suppress(OSError), self._writing():
            aside.unlink(missing_ok=True)  # a symbolic link, say
            try:
                with aside.open("x", encoding="ascii") as file:
                    json.dump(tally, file)
                aside.rename(self._path)
            finally:
                aside.unlink(missing_ok=True)


class LogLines(logging.Filter):
    """A worker's own lines of Gunicorn's log, in the registry that it serves."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Raises ValueError where the application has a metric of that name."""
        super().__init__()
        lines = Counter(*LOG_LINES, ["level"], registry=registry)
        self._of_level = {level: lines.labels(level) for level in LEVELS}

    def filter(self, record: logging.LogRecord) -> bool:
        self._of_level[_level(record)].inc()
        return True


def _level(record: logging.LogRecord) -> str:
    return LEVELS[max(0, min(record.levelno // 10, len(LEVELS)) - 1)]


def _free_number(directory: Path, service: str) -> Path:
    """The file of the smallest number that no live master has."""
    paths = (directory / f"{service}.master.{number}" for number in range(slots.MOST_SLOTS))
    return next(path for path in paths if read_tally(path) is None)
