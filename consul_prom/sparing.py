"""A log of failures that may last, and come and go: it says what an operator needs, and no more."""

import logging
import math
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


class SparingLog:
    """What one part of a worker has to say, through *log*.

    A failure is said at once if its reason is new, and each ten minutes while it lasts; that it is over is said once.
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
        """An INFO where a failure had been said."""
        if self._said:
            self._said.clear()
            if self._room(MOST_LINES):
                self._log.info(message, *args, stacklevel=2)

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
