"""The slots that no worker lives in, and whose last pages the caretaker serves until they have been scraped enough.

After a scale-down or a reload some slots have no worker for now. What these counted after their last scrape is in
their ledgers; and were they to vanish at once, a plain sum over all workers would fall.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from prometheus_client import CollectorRegistry

from consul_prom.errors import ConsulPromError
from consul_prom.ledger.file import NEVER, State, ledger_path, peek, read, vacate
from consul_prom.ledger.registry import last_page
from consul_prom.logs import ThrottledLogger
from consul_prom.slots import slots
from consul_prom.slots.slots import Slot

log = logging.getLogger(__name__)

BOOTING: Final = 10.0
"""Seconds in which a replacement may be on its way to a slot; twice as long as a start takes, where that is more."""
GLANCE: Final = 0.02
GAPS: Final = 3
LONGEST: Final = 600.0


class TargetLike(Protocol):
    """A slot's last page, as a target; one of these ends it."""

    async def give_up(self) -> None: ...
    async def retire(self, timeout: float) -> bool: ...


Serve = Callable[[Slot, CollectorRegistry, int], Awaitable[TargetLike]]


@dataclass(slots=True)
class _Adopted:
    """A slot that we serve, until *over*; *size* is that of its note when we last read it."""

    slot: Slot
    guest: TargetLike
    path: Path
    state: State
    ends_at: float
    size: int = -1
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def is_asked_for(self) -> bool:
        before, self.size = self.size, self.slot.note_size
        return self.size != before and self.slot.wanted


class Adoption:
    """What the caretaker does for such slots, in `turn`, each second or so, until `end`.

    *serve* starts a guest for a slot, a page and, if it can be had, a port. *complete*, given the number of workers
    that have slots, tells whether no other worker is on its way.
    """

    def __init__(
        self,
        directory: Path,
        service: str,
        *,
        host: str,
        retain: float,
        patience: float,
        serve: Serve,
        complete: Callable[[int], bool],
        slowest_start: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """*patience*: seconds that a guest may take to leave. *slowest_start*: that a worker has taken to come up."""
        self._directory = directory
        self._service = service
        self._host = host
        self._retain = retain
        self._patience = patience
        self._serve = serve
        self._complete = complete
        self._booting = max(BOOTING, 2 * slowest_start)
        self._clock = clock
        self._vacant: dict[int, float] = {}
        self._adopted: dict[int, _Adopted] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._log = ThrottledLogger(log)
        self._over = False

    async def turn(self) -> None:
        """Adopt the slots whose workers are gone and not about to be replaced."""
        found, now = slots.survey(self._directory, self._service), self._clock()
        self._vacant = {it: self._vacant.get(it, now) for it in found.vacant if it not in self._adopted}
        complete = self._complete(found.inhabited)
        for number, since in self._vacant.items():
            state = peek(ledger_path(self._directory, self._service, number))
            if state and state.vacant != NEVER and (complete or state.vacant or now - since >= self._booting):
                await self._try_adopt(number)

    async def end(self) -> None:
        """All guests leave. None is cancelled: it may be leaving already."""
        self._over = True
        for adopted in self._adopted.values():
            adopted.over.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _try_adopt(self, number: int) -> None:
        try:
            if slot := slots.try_slot(self._directory, self._service, number):
                try:
                    await self._adopt(slot)
                finally:
                    if number not in self._adopted:
                        slot.release()
        except (ConsulPromError, OSError, ValueError, LookupError, TypeError) as error:
            self._log.failed("what slot %d counted at last is not served (CONSUL_PROM_RETAIN): %s", number, error)

    async def _adopt(self, slot: Slot) -> None:
        path = ledger_path(self._directory, self._service, slot.number)
        state, contents = peek(path), read(path)
        ours = {"boot": slot.boot, "instance": f"{self._host}:{slot.number}"}
        if state is None or contents is None or state.head != ours:
            return
        now = self._clock()
        since = state.vacant or now
        ends_at = since + self._patience_of_scrapers(state)
        if not since <= now < ends_at or not contents.series:
            vacate(path, state, NEVER)
            return
        vacate(path, state, since)
        page, before = last_page(contents), slot.note
        slot.adopt()  # before there may be an entry
        try:
            guest = await self._serve(slot, page, state.port)
        except BaseException:
            if before:  # somebody's who is dead, and our note would hide it
                slot.abandon()
            else:
                slot.settle()
            raise
        self._log.over("what slots counted at last is served again")
        log.info("%s:%d has no worker: its last page is served for %.0f s", self._host, slot.number, ends_at - now)
        self._keep(_Adopted(slot, guest, path, state, ends_at))

    def _patience_of_scrapers(self, state: State) -> float:
        return max(self._retain, min(GAPS * state.gap, LONGEST))

    def _keep(self, adopted: _Adopted) -> None:
        self._adopted[adopted.slot.number] = adopted
        task = asyncio.create_task(self._end_of(adopted))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        """While slots are adopted, see which of them are over. With 199 of them a glance takes half a millisecond."""
        change = 0
        while self._adopted:
            before, change, now = change, slots.last_change(self._directory), self._clock()
            for adopted in self._adopted.values():
                lost = change != before and not adopted.slot.intact
                if lost or now >= adopted.ends_at or adopted.is_asked_for():
                    adopted.over.set()
            await asyncio.sleep(GLANCE)

    async def _end_of(self, adopted: _Adopted) -> None:
        """Wait until a worker wants the slot, it is no longer ours, its time is over or we end; then give it up."""
        slot, guest = adopted.slot, adopted.guest
        try:
            await adopted.over.wait()
            if slot.wanted:
                await guest.give_up()
                return
            if slot.intact and not self._over:  # else it is another's ledger by now, or the next caretaker's
                vacate(adopted.path, adopted.state, NEVER)
            if await guest.retire(self._patience):
                slot.settle()
            else:
                slot.abandon()
        finally:
            slot.release()
            del self._adopted[slot.number]
