"""The leader: it reaps dead workers, adopts vacant slots and serves the page of Gunicorn's master."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from prometheus_client import CollectorRegistry

from consul_prom.consul.client import AgentClient
from consul_prom.consul.registration import entry_id, is_of
from consul_prom.consul.stale import AgentAPI, remove
from consul_prom.errors import AgentError, ConsulPromError
from consul_prom.logs import ThrottledLogger
from consul_prom.settings.settings import Settings
from consul_prom.slots import slots
from consul_prom.slots.slots import Slot
from consul_prom.worker.adoption import Adoption
from consul_prom.worker.master_page import MasterPage
from consul_prom.worker.target import ServedTarget
from consul_prom.worker.target_factory import TargetFactory

log = logging.getLogger(__name__)

ROUND: Final = 1.0
GLANCES: Final = 8


class MasterTargetLike(Protocol):
    """The target that shows the page of Gunicorn's master."""

    async def retire(self, timeout: float) -> bool: ...


class AdoptionLike(Protocol):
    """What the caretaker does for slots without a worker."""

    async def turn(self) -> None: ...
    async def end(self) -> None: ...


class Leader:
    """Removes the entries that dead workers of a service and directory left. All of its workers have one; one works.

    It acts on the lock's proof alone, and holds the slot's lock while it does. An agent that fails is asked again.
    Where there are *masters* that have something to tell, *receive* starts a guest that tells it, in the slot that the
    caretaker holds.
    """

    def __init__(
        self,
        agent: AgentAPI,
        *,
        directory: Path,
        service: str,
        host: str,
        masters: Callable[[], object] = lambda: None,
        receive: Callable[[slots.Slot], Awaitable[MasterTargetLike]] | None = None,
        adoption: AdoptionLike | None = None,
        patience: float = 1.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """*patience*: seconds that a guest may take to leave."""
        self._agent = agent
        self._directory = directory
        self._service = service
        self._host = host
        self._masters = masters
        self._receive = receive
        self._adoption = adoption
        self._patience = patience
        self._guest: MasterTargetLike | None = None
        self._log = ThrottledLogger(log)
        self._sleep = sleep

    async def run(self) -> None:
        """For ever; the lock that makes it the one that works goes with the process, or when this is cancelled."""
        while True:
            await self._sleep(ROUND)
            if slot := self._try(slots.MASTER):
                try:
                    while slot.intact:
                        await self._round(slot)
                        await self._rest()
                finally:
                    await self._leave(slot)

    async def _round(self, slot: slots.Slot) -> None:
        try:
            await self._tend(slot)
            if self._adoption:
                await self._adoption.turn()  # first: what is adopted need not be swept away
            await self.sweep()
        except OSError:  # no descriptor to read the directory with, say
            log.debug("a round in %s came to nothing", self._directory, exc_info=True)

    async def _rest(self) -> None:
        """Until the next round; where slots are adopted, until the directory tells that somebody came or went."""
        glances = GLANCES if self._adoption else 1
        before = slots.last_change(self._directory)
        for _ in range(glances):
            await self._sleep(ROUND / glances)
            if slots.last_change(self._directory) != before:
                return

    async def sweep(self) -> None:
        """Look at each slot whose process seems to be gone, once: what is settled is noted in its lock file."""
        for number in slots.abandoned(self._directory, self._service):
            if slot := self._try(number):
                try:
                    await self._bury(entry_id(self._service, self._host, number))
                    slot.settle()
                except AgentError:
                    log.debug("slot %d is looked at again", number, exc_info=True)
                finally:
                    slot.release()

    async def _bury(self, dead: str) -> None:
        entry = await self._agent.service(dead)
        if entry and is_of(entry.document, self._directory):
            await remove(self._agent, entry.document)
            log.info("removed %s: its worker is dead, since the lock of its slot is free", dead)

    async def _tend(self, slot: slots.Slot) -> None:
        """See to it that the masters' page is served while there are masters, and that its entry goes with them."""
        alive = bool(self._masters())
        if self._receive and alive and not self._guest:
            slot.occupy()  # before there may be an entry
            try:
                self._guest = await self._receive(slot)
            except ConsulPromError as error:
                self._log.failed("the page of Gunicorn's master is not served: %s", error)
            else:
                self._log.over("the page of Gunicorn's master is served")
        elif self._guest and not alive:
            await self._dismiss(slot)
        elif not self._guest and slot.note:  # of a caretaker that is dead
            with suppress(AgentError):
                await self._bury(entry_id(self._service, self._host, slot.number))
                slot.settle()

    async def _leave(self, slot: slots.Slot) -> None:
        leaving = [self._dismiss(slot), *([self._adoption.end()] if self._adoption else [])]
        try:
            await asyncio.gather(*leaving)
        finally:
            slot.release()

    async def _dismiss(self, slot: slots.Slot) -> None:
        """The guest is ours until it has retired: if we are cancelled in the middle of that, it is done again."""
        if self._guest:
            clean = await self._guest.retire(self._patience)
            self._guest = None
            if clean:
                slot.settle()

    def _try(self, number: int) -> slots.Slot | None:
        try:
            return slots.try_slot(self._directory, self._service, number)
        except OSError:
            log.debug("a lock in %s cannot be had", self._directory, exc_info=True)
            return None


async def run_leader(settings: Settings, client: AgentClient, site: TargetFactory, *, start_took: float) -> None:
    """For ever; whose pages have to be served, are guests of *site*. *start_took*: seconds that a worker's start takes.

    Raises nothing.
    """
    masters = MasterPage(settings.dir, settings.service)
    patience = 0.8 * settings.stop_timeout

    async def receive(slot: Slot) -> ServedTarget:
        return await site.receive(client, slot, masters.registry())

    async def adopt(slot: Slot, page: CollectorRegistry, port: int) -> ServedTarget:
        return await site.receive(client, slot, page, port=port, adopted=True)

    adoption = Adoption(
        settings.dir,
        settings.service,
        host=settings.host,
        retain=settings.retain,
        patience=patience,
        serve=adopt,
        complete=masters.complete,
        slowest_start=start_took,
    )
    caretaker = Leader(
        client,
        directory=settings.dir,
        service=settings.service,
        host=settings.host,
        masters=masters.living,
        receive=receive,
        adoption=adoption if settings.ledger and settings.retain else None,
        patience=patience,
    )
    try:
        await caretaker.run()
    except Exception:
        log.exception("consul-prom no longer looks after dead workers: an error that it did not expect")
