"""Says when a worker is registered and nobody scrapes it: all looks well then, and there are no metrics."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

log = logging.getLogger(__name__)

ROUND: Final = 5.0
MISSED: Final = 3
"""Scrapes in a row; while fewer than two were seen nobody knows the interval, and `UNKNOWN` seconds are waited."""
UNKNOWN: Final = 300.0
LEAST: Final = 15.0
GAPS: Final = 4


class ScrapeWatchdog:
    """One worker's. *who* is it, in words; *last_scrape* gives seconds since 1970; *cause* is the probable one."""

    def __init__(
        self,
        *,
        who: Callable[[], str],
        registered: Callable[[], bool],
        last_scrape: Callable[[], float | None],
        cause: Callable[[], str],
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._who = who
        self._registered = registered
        self._last_scrape = last_scrape
        self._cause = cause
        self._clock = clock
        self._sleep = sleep
        self._seen: float | None = None
        self._gaps: deque[float] = deque(maxlen=GAPS)  # of a pair of servers, the gaps alternate
        self._since: float | None = None
        self._said = False

    async def run(self) -> None:
        while True:
            await self._sleep(ROUND)
            self.look()

    def look(self) -> None:
        """One WARNING when it is time for it, one when it is over; nothing in between."""
        now, scrape = self._clock(), self._last_scrape()
        if scrape != self._seen:
            self._scraped(scrape)
        if not self._registered():
            self._since = None
            return
        if self._since is None:
            self._since = now
        silence = now - max(self._since, self._seen or 0)
        if not self._said and silence > self._patience():
            self._said = True
            log.warning(
                "%s is registered, and nobody has scraped it for %.0f s: %s", self._who(), silence, self._cause()
            )

    def _scraped(self, scrape: float | None) -> None:
        if scrape and self._seen:
            self._gaps.append(scrape - self._seen)
        if self._said:
            log.warning("%s is scraped again", self._who())
        self._seen, self._said = scrape, False

    def _patience(self) -> float:
        return max(MISSED * max(self._gaps), LEAST) if self._gaps else UNKNOWN
