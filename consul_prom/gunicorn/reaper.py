"""Removes in Gunicorn's master what dead workers left: by the lock's proof, synchronously, and within a budget.

A master that waits serves nobody: it spends half a second in each second at most, looks no name up, and lets an agent
that did not answer be for half a minute. What it leaves, the caretaker or the slot's next worker removes.
"""

import ipaddress
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from consul_prom.consul.registration import entry_id, is_of
from consul_prom.consul.sync_client import remove_sync, service_sync
from consul_prom.errors import AgentError, AgentTimeout
from consul_prom.logs import ThrottledLogger
from consul_prom.settings.settings import Settings
from consul_prom.slots import slots

log = logging.getLogger(__name__)

BUDGET: Final = 0.5
"""Seconds in each second."""
OFF: Final = 30.0
LEAST: Final = 0.05
DYING: Final = 1.0
RETRY: Final = 0.01


class MasterReaper:
    """What a master does for its dead workers. Nothing that it does raises an AgentError."""

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._sleep = sleep
        self._spent: deque[tuple[float, float]] = deque()
        self._off_until = -math.inf
        self._log = ThrottledLogger(log, clock=clock)

    def bury(self, pid: int | str) -> None:
        """Remove the entries of the one dead worker."""
        self._bury([it for it in slots.remains(self._settings.dir) if it.pid == pid])

    def bury_all(self, *, dying: Callable[[], bool] = lambda: False) -> None:
        """Remove those of all dead workers of the directory, at the master's end, when there is nobody left to serve.

        *dying*: whether some that were killed are still there.
        """
        ends_at = self._clock() + DYING
        while dying() and self._clock() < ends_at:
            self._sleep(RETRY)
        held = self._bury(slots.remains(self._settings.dir))
        while held and self._clock() < ends_at:  # a process seems gone once its main thread is: others have the lock
            self._sleep(RETRY)
            held = self._bury(held)

    def _bury(self, dead: list[slots.StaleSlot]) -> list[slots.StaleSlot]:
        """Those whose lock cannot be had."""
        held = []
        for remains in dead:
            slot = None
            with suppress(OSError):
                slot = slots.try_slot(self._settings.dir, remains.service, remains.number)
            if slot:
                try:
                    if self._deregister(remains):
                        slot.settle()
                finally:
                    slot.release()
            else:
                held.append(remains)
        return held

    def _deregister(self, remains: slots.StaleSlot) -> bool:
        """Whether nothing is left to do."""
        begun, dead = self._clock(), entry_id(remains.service, self._settings.host, remains.number)
        hosts = remains.hosts or self._literal()
        if begun < self._off_until or not hosts or self._left() < LEAST:
            return False
        try:
            entry = service_sync(self._settings, dead, timeout=self._left(), hosts=hosts)
            if entry and is_of(entry, self._settings.dir):
                left = max(self._left() - (self._clock() - begun), LEAST)
                remove_sync(self._settings, entry, timeout=left, hosts=hosts)
                log.info("removed %s: its worker is dead, since the lock of its slot is free", dead)
        except AgentError as error:
            if isinstance(error, AgentTimeout):
                self._off_until = self._clock() + OFF
            self._log.failed("%s of a dead worker is left to its siblings: %s", dead, error, reason=error.reason)
            return False
        finally:
            self._spent.append((self._clock(), self._clock() - begun))
        self._log.over("entries of dead workers are removed again")
        return True

    def _left(self) -> float:
        """Seconds that may be spent now."""
        while self._spent and self._spent[0][0] < self._clock() - 1:
            self._spent.popleft()
        return BUDGET - sum(seconds for _, seconds in self._spent)

    def _literal(self) -> tuple[str, ...]:
        """The agent's addresses where no name server is needed to tell them."""
        target = self._settings.consul_http_addr
        if target.host == "localhost":
            return ("127.0.0.1", "::1")
        with suppress(ValueError):
            return (str(ipaddress.ip_address(target.host)),)
        return (target.host,) if target.socket else ()
