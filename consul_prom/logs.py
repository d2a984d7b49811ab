"""Logging: a lasting failure is logged once, repeated every ten minutes, and so is its recovery.

If the application has configured no logging, our records go to Gunicorn's error log, or else to standard error.
"""

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, Final

REPEAT: Final = 600.0
HOUR: Final = 3600.0
MOST_LINES: Final = 10
"""In an hour, whatever comes and goes."""
MOST_FAILURES: Final = 8
"""Of these lines, so that there is one left to say that it is over."""


_SERVER: Final = "gunicorn.error"
_FACTS: Final[set[str]] = set()


class _Fallback(logging.Handler):
    """Write the records for which the application has no handler.

    Python would write the message alone, without time, level and process.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if _has_handlers(logging.getLogger(record.name), besides=self):
            return
        server = logging.getLogger(_SERVER)
        if server.handlers:
            if server.isEnabledFor(record.levelno):
                server.callHandlers(record)  # without its filters, by which we count Gunicorn's own lines
            return
        try:
            sys.stderr.write(f"{self.format(record)}\n")
        except Exception:  # noqa: BLE001  # as every handler of the library's
            self.handleError(record)


def _has_handlers(log: logging.Logger | None, *, besides: logging.Handler) -> bool:
    while log:
        if any(handler is not besides for handler in log.handlers):
            return True
        log = log.parent if log.propagate else None
    return False


_fallback = _Fallback()
_fallback.setFormatter(logging.Formatter("[%(asctime)s] [%(process)d] [%(levelname)s] %(name)s: %(message)s"))
logging.getLogger(__name__.partition(".")[0]).addHandler(_fallback)


def first_time(fact: str) -> bool:
    """Return whether neither this process nor the one that forked it has asked about *fact* before.

    So Gunicorn's master logs a wrong setting, and its workers do not repeat it.
    """
    is_new = fact not in _FACTS
    _FACTS.add(fact)
    return is_new


class ThrottledLogger:
    """What one part of a worker has to say, through *log*.

    A failure is said at once if its reason is new, and each ten minutes while it lasts; that it is over is said once,
    and as loud: else the last line of many a log would be the failure.
    """

    def __init__(self, log: logging.Logger, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._said: dict[Hashable, float] = {}
        self._lines: deque[float] = deque()

    def failed(self, message: str, *args: object, reason: Hashable = "", exc_info: Any = None) -> None:
        """A WARNING where it is time for one. Equal reasons are one failure, whatever the words."""
        now = self._clock()
        if now - self._said.get(reason, -math.inf) >= REPEAT and self._room(MOST_FAILURES):
            self._said[reason] = now
            self._log.warning(message, *args, exc_info=exc_info, stacklevel=2)

    def over(self, message: str, *args: object) -> None:
        """A WARNING where a failure had been said."""
        if self._said:
            self._said.clear()
            if self._room(MOST_LINES):
                self._log.warning(message, *args, stacklevel=2)

    def tell(self, message: str, *args: object) -> None:
        """What is no failure: an INFO while there is room for it."""
        self._log.log(logging.INFO if self._room(MOST_LINES) else logging.DEBUG, message, *args, stacklevel=2)

    def _room(self, most: int) -> bool:
        """Whether there is room for a line, which is then taken."""
        now = self._clock()
        while self._lines and now - self._lines[0] >= HOUR:
            self._lines.popleft()
        if len(self._lines) >= most:
            return False
        self._lines.append(now)
        return True
