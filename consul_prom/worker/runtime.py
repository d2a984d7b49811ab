"""What a started worker has: slot → ledger → endpoint → registration → registrar, and back."""

import asyncio
import logging
import os
import socket
import threading
import time
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final

from prometheus_client import CollectorRegistry

from consul_prom.consul.client import AgentClient
from consul_prom.consul.registration import Registration
from consul_prom.consul.slot_registration import SlotRegistration
from consul_prom.errors import ConsulPromError, EndpointError, LedgerError, SlotError
from consul_prom.ledger.file import Ledger, discard, is_large, ledger_path
from consul_prom.ledger.registry import LedgerRegistry
from consul_prom.process import exit_hooks
from consul_prom.process.fork import FORK_LOCK
from consul_prom.process.identity import process_age, process_identity
from consul_prom.process.metrics_thread import MetricsThread
from consul_prom.process.signals import Signals
from consul_prom.server.bind import find_address, route_address
from consul_prom.server.endpoint import Endpoint
from consul_prom.settings.settings import Settings
from consul_prom.slots.slots import Slot
from consul_prom.worker.drain import await_scrape
from consul_prom.worker.leader import run_leader
from consul_prom.worker.own_metrics import OwnMetrics
from consul_prom.worker.scrape_watchdog import ScrapeWatchdog
from consul_prom.worker.target_factory import TargetFactory

log = logging.getLogger(__name__)

LEAST: Final = 0.1


class WorkerRuntime:
    """What a started worker has; one for each registry of the process, however many Workers it has.

    Its coroutines run in the metrics thread.
    """

    of_registry: ClassVar[dict[CollectorRegistry, "WorkerRuntime"]] = {}
    sharing: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, settings: Settings, registry: CollectorRegistry) -> None:
        self.settings = settings
        self.users = self.leavers = 0
        self.url: str | None = None
        self.failure: ConsulPromError | None = None
        self.thread = MetricsThread()
        self._pid = os.getpid()
        self._registry = registry
        self._site = TargetFactory(settings)
        self._listener: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._caring: asyncio.Task[None] | None = None
        self._client: AgentClient | None = None
        self._endpoint: Endpoint | None = None
        self._ends_at: float | None = None
        self._leaving: Future[None] | None = None
        self._stop_timeout = settings.stop_timeout
        self._probes: list[Future[Any]] = []
        self._signals = Signals()
        self._start_took = process_age(process_identity(self._pid))
        self._metrics = OwnMetrics(registry)
        self.tenancy = SlotRegistration(settings, on_registration=self._registered, on_failure=self._metrics.failed)
        self._metrics.show(lambda: self.tenancy.registered)
        self._first_slot: Slot | None = None
        self._ledger: Ledger | None = None
        self._continued: LedgerRegistry | None = None
        self._decided = False
        with suppress(SlotError):  # `run` tries it again, and logs why
            slot = self._enter()
            if not is_large(self._path_of(slot)):
                self._continue(slot)

    @classmethod
    def shared(cls, settings: Settings, registry: CollectorRegistry) -> "WorkerRuntime":
        """The life that the registry has in this process, or a new one."""
        life = cls.of_registry.get(registry)
        if life and not life.mine:
            life.disown()
        elif life and life.leaving:
            life.stop()
            life = None
        if life is None or not life.mine:
            life = cls.of_registry[registry] = cls(settings, registry)
        elif life.settings.service != settings.service:
            ours, theirs = settings.service, life.settings.service
            log.warning("this process is registered as %r already; service=%r is not used", theirs, ours)
        life.users += 1
        return life

    def disown(self) -> None:
        """In a child: our metrics, copied with all of the parent, make room for the child's own."""
        self._metrics.close()

    def _enter(self) -> Slot:
        """Take a slot; raises SlotError."""
        self._first_slot = self.tenancy.enter()
        return self._first_slot

    def _path_of(self, slot: Slot) -> Path:
        return ledger_path(slot.directory, self.settings.service, slot.number)

    def _continue(self, slot: Slot) -> None:
        """Count on from where the slot's workers before us were, unless values stay in memory."""
        self._decided = True
        try:
            if self.settings.ledger and slot.boot:
                ledger = Ledger.take_over(self._path_of(slot), boot=slot.boot, instance=self.tenancy.instance)
                self._continued = LedgerRegistry(self._registry, ledger)
                self._ledger = ledger
                return
        except LedgerError as error:
            log.warning("the counters of %s live in memory: %s (CONSUL_PROM_LEDGER)", self.tenancy.instance, error)
        except Exception:
            log.exception("the counters of %s live in memory: an error not expected", self.tenancy.instance)
        discard(self._path_of(slot))  # or a later worker would continue it from below what we show

    @property
    def mine(self) -> bool:
        """False in a child that the application forked: all of this is its parent's."""
        return self._pid == os.getpid()

    @property
    def lingers(self) -> bool:
        """Whether a stop would wait for a scrape of itself."""
        return self._signals.came and bool(self.settings.linger)

    def linger(self, seconds: float | None) -> None:
        """Stay as we are until a scrape has begun, for *seconds* or as `lingers` tells; nobody finds the unregistered.

        Who has only just begun may still register, within STOP_TIMEOUT. Says what nobody has scraped.
        """
        seconds = (self.settings.linger if self.lingers else 0) if seconds is None else seconds
        patience_ends_at = time.monotonic() + self._stop_timeout

        def may_be_found() -> bool:
            beginning = self.tenancy.unasked and not self.failure and time.monotonic() < patience_ends_at
            return self.tenancy.registered or beginning

        if seconds:
            log.info("%s waits for a scrape, for %.0f s at most (CONSUL_PROM_LINGER)", self.tenancy.instance, seconds)
            await_scrape(
                self._scraped_since,
                goes_on=may_be_found,
                timeout=seconds,
                told=self._signals.came,
            )
        if self._ledger and self._ledger.unscraped:
            log.info(
                "%s has counted since its last scrape; that is in its ledger, and shown by the slot's next worker "
                "(CONSUL_PROM_LINGER lets it wait for a scrape)",
                self.tenancy.instance,
            )

    def _scraped_since(self, when: float) -> bool:
        return bool(self._endpoint and self._endpoint.scrapes.since(when))

    def start(self, loop: asyncio.AbstractEventLoop | None) -> None:
        if self.users == 1:
            if self.settings.linger:
                self._signals.watch()
            self.thread.start()
            if self.tenancy.slot and self._address_is_set:
                with suppress(EndpointError):  # `run` tries it again, and logs why
                    self.listen(self.tenancy.slot, self.settings.address or route_address())
            self.thread.spawn(self.run())
        if loop:
            self._probes.append(self.thread.spawn(self._metrics.probe(loop)))

    @property
    def leaving(self) -> bool:
        """Whether it is on its way out, and would not register again."""
        return self._leaving is not None or self.tenancy.left

    def start_leaving(self) -> None:
        """In the metrics thread, which takes less time than there is."""
        if not self.leaving:
            with suppress(EndpointError):
                self._leaving = self.thread.spawn(self.leave(0.9 * self._remaining()))

    async def wait_until_left(self) -> None:
        """Without blocking the caller's loop."""
        if self._leaving:
            leaving = asyncio.wrap_future(self._leaving)
            while (await asyncio.wait({leaving}, timeout=LEAST))[1] and self._remaining() > LEAST:
                pass  # `hurry` may come meanwhile
            leaving.cancel()

    def hurry(self, seconds: float) -> None:
        """From now on, or once it has begun, a stop takes no longer than that."""
        self._stop_timeout = min(self._stop_timeout, seconds)
        if self._ends_at:
            self._ends_at = min(self._ends_at, time.monotonic() + seconds)

    def stop(self) -> None:
        if self.of_registry.get(self._registry) is self:
            del self.of_registry[self._registry]
        for probe in self._probes:
            probe.cancel()
        self.start_leaving()
        if self._leaving:
            self._wait_for(self._leaving)
        if not self.tenancy.left:
            self.leave_now(self._remaining())
        with suppress(EndpointError):
            self._wait_for(self.thread.spawn(self.close()))
        if not self.thread.stop(self._remaining()):
            log.warning("the metrics thread of %s did not end within CONSUL_PROM_STOP_TIMEOUT", self.tenancy.instance)
        if not exit_hooks.dying():
            self.dispose()

    def _remaining(self) -> float:
        """Seconds left of the time that all parts of a stop share; never quite none."""
        self._ends_at = self._ends_at or time.monotonic() + self._stop_timeout
        return max(self._ends_at - time.monotonic(), LEAST)

    def _wait_for(self, doing: Future[None]) -> None:
        while wait([doing], LEAST).not_done and self._remaining() > LEAST:
            pass  # `hurry` may come meanwhile
        doing.cancel()

    @property
    def _address_is_set(self) -> bool:
        """Whether the agent need not be asked."""
        return bool(self.settings.address or self.settings.port.first)

    def listen(self, slot: Slot, address: str | None) -> None:
        self._site.settle(address)
        before = self._ledger.port if self._ledger else 0
        self._listener = self._site.listen(slot.number, before=before)
        self.url = self._site.url(self._listener)

    async def _settle(self, client: AgentClient) -> socket.socket:
        """Take a slot, continue its counters and listen, as far as that has not been done yet.

        Raises SlotError or EndpointError, which may pass.
        """
        slot = self.tenancy.slot or self._enter()
        if not self._decided:
            self._continue(slot)
        if self._listener is None:
            if self._address_is_set:
                address = self.settings.address or route_address()
            else:
                address = await find_address(client.self_, on_failure=self.tenancy.set_trouble)
            self.listen(slot, address)
        assert self._listener  # noqa: S101  # `listen` has set it or raised
        return self._listener

    async def run(self) -> None:
        """From the address on, until cancelled."""
        self._task = asyncio.current_task()
        try:
            with FORK_LOCK:  # a child forked in the middle of an import could never import the same
                self._client = AgentClient(self.settings)
            listener = await self.tenancy.persist(partial(self._settle, self._client))
            registry = self._continued or self._registry
            self._endpoint = self._site.endpoint(registry, about=self._about, on_scrape=self._scraped)
            if self._ledger:
                self._ledger.port = listener.getsockname()[1]
            await self._endpoint.serve(listener)
            self._caring = asyncio.create_task(
                run_leader(self.settings, self._client, self._site, start_took=self._start_took)
            )
            vigil = asyncio.create_task(self._vigil(self._endpoint))
            try:
                await self.tenancy.run(self._client, self._describe)
            finally:
                vigil.cancel()
        except ConsulPromError as error:
            log.error("consul-prom is off: %s", error)
            await self._fail(error)
        except Exception:
            log.exception("consul-prom is off: an error that it did not expect")
            await self._fail(EndpointError("an error that consul-prom did not expect"))

    def _scraped(self, seconds: float) -> None:
        self._metrics.scraped(seconds)
        if self._continued:
            self._continued.tell()
        if self._ledger:
            self._ledger.scraped(time.time())

    async def _vigil(self, endpoint: Endpoint) -> None:
        def cause() -> str:
            if endpoint.turned_away:
                return endpoint.turned_away
            reach = f"does not reach {self.url} (CONSUL_PROM_ADDRESS)"
            if endpoint.scrapes.last:
                return f"Prometheus has ended, or {reach}"
            name = self.settings.consul_service
            return f"Prometheus does not look for {name} (consul-prom config prometheus), or {reach}"

        await ScrapeWatchdog(
            who=lambda: self.tenancy.instance,
            registered=lambda: self.tenancy.registered,
            last_scrape=lambda: endpoint.scrapes.last,
            cause=cause,
        ).run()

    async def leave(self, timeout: float) -> None:
        if self._task:
            self._task.cancel()
        leaving = [self.tenancy.leave(timeout)]
        if self._caring:
            self._caring.cancel()
            leaving.append(_end_of(self._caring, timeout))
        await asyncio.gather(*leaving)

    def leave_now(self, timeout: float) -> None:
        """The same from outside of the metrics thread, which does not answer."""
        self.tenancy.leave_now(timeout, hosts=self._client.resolved if self._client else ())

    async def close(self) -> None:
        try:
            if self._endpoint:
                await self._endpoint.aclose()
        finally:
            if self._client:
                await self._client.aclose()

    def dispose(self) -> None:
        """What needs no event loop: registry, socket and slot are as before the start."""
        continued, self._continued, self._ledger = self._continued, None, None
        if continued:
            continued.close()  # first: a metric that leaves the registry leaves the ledger too
        self._metrics.close()
        self._signals.close()
        if self._listener:
            self._listener.close()
        self.url = None
        if self.tenancy.slot:
            self.tenancy.slot.release()

    async def _fail(self, error: ConsulPromError) -> None:
        self._task = None  # which this is
        try:
            await self.leave(self.settings.stop_timeout)
        finally:
            await self.close()
            self.dispose()
            self.failure = error

    def _describe(self, slot: Slot) -> Registration:
        assert self._listener  # noqa: S101  # `run` has it
        self._metrics.tell(host=self.settings.host, slot=slot.number)
        if slot is not self._first_slot:  # the directory was wiped, and our ledger with it; we count on in its memory
            discard(self._path_of(slot))
            self._ledger = None
        return self._site.registration(slot, self._listener)

    def _registered(self, reason: str) -> None:
        self._metrics.registered(reason)
        if self._client and self._client.resolved and self.tenancy.slot:
            self.tenancy.slot.occupy(self._client.resolved)

    def _about(self) -> dict[str, str]:
        return {
            "service": self.settings.service,
            "instance": self.tenancy.instance,
            "pid": str(self._pid),
            "registered": "yes" if self.tenancy.registered else f"no: {self.tenancy.trouble}",
        }


os.register_at_fork(after_in_child=WorkerRuntime.sharing._at_fork_reinit)  # type: ignore[attr-defined]  # noqa: SLF001


async def _end_of(task: asyncio.Task[None], timeout: float) -> None:
    """Of one that was cancelled. Cancelled again when its time is up, it says what it leaves."""
    try:
        await asyncio.wait({task}, timeout=timeout)
    finally:
        task.cancel()
