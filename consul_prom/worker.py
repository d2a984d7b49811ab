"""Composition root: slot → ledger → endpoint → registration → registrar, and back. Adapters start and stop it."""

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, Final, Unpack

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Info, Summary

from consul_prom import __version__, farewell
from consul_prom.address import find_address, listen, route_address
from consul_prom.adoption import Adoption
from consul_prom.caretaker import Caretaker
from consul_prom.client import AgentClient
from consul_prom.continued import ContinuedRegistry, watch
from consul_prom.endpoint import Endpoint
from consul_prom.errors import AgentError, ConsulPromError, EndpointError, LedgerError, SettingsError
from consul_prom.exposition import Renderer
from consul_prom.guest import Guest
from consul_prom.ledger import Ledger, discard, ledger_path
from consul_prom.linger import Signals, await_scrape
from consul_prom.registrar import Tenancy
from consul_prom.registration import Registration, build, origin
from consul_prom.settings import Arguments, Settings, check_worker, load, switch
from consul_prom.slots import Slot, acquire, process_age, process_identity
from consul_prom.tally import Masters
from consul_prom.thread import FORKING, MetricsThread
from consul_prom.vigil import Vigil
from consul_prom.webconfig import WebConfig
from consul_prom.wire import deregister_now

log = logging.getLogger(__name__)

JOB_LINGER: Final = 60.0


class Worker:
    """This process as one Prometheus target.

    `slot` and `instance` are known when `start` returns, `url` as soon as the address is; each is None before that,
    and where the worker is switched off or could not start.
    """

    def __init__(self, *, registry: CollectorRegistry = REGISTRY, **arguments: Unpack[Arguments]) -> None:
        """Reads the settings; opens nothing.

        Raises:
            SettingsError: an argument is wrong. What is wrong in the environment is said by `start`.
        """
        self._registry = registry
        self._settings: Settings | None = None
        self._misset: SettingsError | None = None
        self._required = switch("required", arguments)
        self._disabled = switch("disabled", arguments)
        self._life: _Life | None = None
        self._left = False
        try:
            self._settings = load(arguments)
            if self._settings.ledger and not self._disabled:
                watch(registry)
        except SettingsError as error:
            if error.from_code:
                raise
            self._misset = error

    def __repr__(self) -> str:
        return f"<Worker {self.instance} url={self.url} registered={self.registered}>"

    @property
    def request_metrics(self) -> bool:
        """Whether an adapter should count requests."""
        return bool(self._settings and self._settings.request_metrics and not self._disabled)

    @property
    def nameless(self) -> bool:
        """Whether nothing else is wrong than that there is no service, as where the environment is all there is."""
        return bool(self._settings and not self._settings.service)

    @property
    def linger(self) -> float:
        """Seconds that a job's end waits for a scrape."""
        linger = self._settings.linger if self._settings else 0.0
        return JOB_LINGER if linger is None else linger

    @property
    def slot(self) -> int | None:
        return self._life.tenancy.slot.number if self._life and not self._life.failure else None

    @property
    def instance(self) -> str | None:
        return self._life.tenancy.instance if self._life and not self._life.failure else None

    @property
    def url(self) -> str | None:
        return self._life.url if self._life else None

    @property
    def registered(self) -> bool:
        return bool(self._life and self._life.tenancy.registered)

    def start(self, *, loop: asyncio.AbstractEventLoop | None = None, keeps: bool = True) -> None:
        """Serve and register this process; a second call does nothing. Waits for the metrics thread, for nothing else.

        Where another Worker of this process serves the registry already, this one shares its slot, port and entry.
        *loop* is the application's, whose lag is measured. *keeps*: whether the entry stays for its sake when all
        others leave. What fails is one ERROR line and the application goes on.

        Raises:
            ConsulPromError: only where REQUIRED: it could not start, or was not registered within START_TIMEOUT.
        """
        if (self._life and self._life.mine) or self._disabled:
            return
        try:
            if self._misset:
                raise self._misset
            assert self._settings  # noqa: S101  # one of the two is there
            check_worker(self._settings)
            farewell.expect(self.stop)  # first: who lingers must see its handler
            with _Life.sharing:
                self._life = _Life.shared(self._settings, self._registry)
                self._life.start(loop)
                if not keeps:
                    self._left = True
                    self._life.leavers += 1
            if self._required:
                self._await_registration(self._life, self._settings.start_timeout)
        except ConsulPromError as error:
            self.stop()
            if self._required:
                raise
            log.error("consul-prom is off: %s", error)

    async def leave(self) -> None:
        """Deregister within STOP_TIMEOUT, without blocking the caller's loop; the endpoint goes on until `stop`.

        Where `stop` will linger, that is left to it.
        """
        if self._life and self._life.mine and not self._left and not self._life.lingers:
            self._left = True
            self._life.leavers += 1
            if self._life.leavers == self._life.users:
                await self._life.leave_in_thread()

    def stop(self, *, last: bool = False, linger: float | None = None) -> None:
        """Deregister, close and give the slot up; within STOP_TIMEOUT, or one log line says what is left over.

        Before that it waits for a scrape, for *linger* seconds or, where a signal told the process to end, LINGER.
        *last*: the process ends, whoever else has not stopped.
        """
        try:
            if self._life and self._life.mine and (last or self._life.users == 1):
                self._life.linger(linger)
        finally:  # somebody may press Ctrl-C
            with farewell.said(self.stop):
                self._stop(last=last)

    def _stop(self, *, last: bool) -> None:
        life, self._life = self._life, None
        if life and life.mine:
            with _Life.sharing:
                life.users -= 1
                life.leavers -= self._left
                self._left = False
                last = last or not life.users
            if last:
                life.stop()

    def _await_registration(self, life: "_Life", timeout: float) -> None:
        ends_at = time.monotonic() + timeout
        while not life.tenancy.registered:
            if life.failure:
                raise life.failure
            if time.monotonic() > ends_at:
                raise EndpointError(f"not registered within CONSUL_PROM_START_TIMEOUT: {life.tenancy.trouble}")
            time.sleep(0.01)


@contextmanager
def running(*, registry: CollectorRegistry = REGISTRY, **arguments: Unpack[Arguments]) -> Iterator[Worker]:
    """A worker for as long as the context lasts: for scripts, jobs, and servers that have no adapter of ours.

    At its end it waits for one more scrape, LINGER at most: a job's last counts would be seen at its next run only.

    Raises:
        SettingsError: an argument is wrong.
        ConsulPromError: with REQUIRED, it could not start.
    """
    worker = Worker(registry=registry, **arguments)
    try:
        worker.start()
        yield worker
    finally:
        worker.stop(linger=worker.linger)


class _Life:
    """What a started worker has; one for each registry of the process, however many Workers it has.

    Its coroutines run in the metrics thread.
    """

    of_registry: ClassVar[dict[CollectorRegistry, "_Life"]] = {}
    sharing: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, settings: Settings, registry: CollectorRegistry) -> None:
        self.settings = settings
        self.users = self.leavers = 0
        self.url: str | None = None
        self.failure: ConsulPromError | None = None
        self.thread = MetricsThread()
        self._pid = os.getpid()
        self._registry = registry
        self._address = ""
        self._listener: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._caring: asyncio.Task[None] | None = None
        self._client: AgentClient | None = None
        self._endpoint: Endpoint | None = None
        self._ends_at: float | None = None
        self._probes: list[Future[Any]] = []
        self._web = WebConfig(settings.web_config) if settings.web_config else None
        self._signals = Signals()
        self._start_took = process_age(process_identity(self._pid))
        slot = acquire(settings.dir, settings.service)
        try:
            self._metrics = _OwnMetrics(registry)
        except ValueError as error:
            slot.release()
            raise EndpointError(f"the application has metrics of our names: {error}") from error
        self.tenancy = Tenancy(settings, slot, on_registration=self._registered, on_failure=self._metrics.failed)
        self._metrics.show(lambda: self.tenancy.registered)
        self._first_slot = slot
        self._ledger: Ledger | None = None
        self._continued = self._continue()

    @classmethod
    def shared(cls, settings: Settings, registry: CollectorRegistry) -> "_Life":
        """The life that the registry has in this process, or a new one."""
        life = cls.of_registry.get(registry)
        if life and not life.mine:
            life.disown()
        elif life and life.tenancy.left:
            life.stop()  # on its way out: it would not register again
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

    def _continue(self) -> ContinuedRegistry | None:
        """The registry with the counters of the slot's workers before us; None where its values stay in memory."""
        slot, settings = self.tenancy.slot, self.settings
        path = ledger_path(slot.directory, settings.service, slot.number)
        try:
            if settings.ledger and slot.boot:
                ledger = Ledger.take_over(path, boot=slot.boot, instance=self.tenancy.instance)
                continued = ContinuedRegistry(self._registry, ledger)
                self._ledger = ledger
                return continued
        except LedgerError as error:
            log.warning("the counters of %s live in memory: %s (CONSUL_PROM_LEDGER)", self.tenancy.instance, error)
        except Exception:
            log.exception("the counters of %s live in memory: an error not expected", self.tenancy.instance)
        discard(path)  # or a later worker would continue it from below what we show
        return None

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

        Says what nobody has scraped.
        """
        seconds = (self.settings.linger if self.lingers else 0) if seconds is None else seconds
        if seconds:
            await_scrape(self._scraped_since, goes_on=lambda: self.tenancy.registered, timeout=seconds)
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
            if self.settings.address or self.settings.port.first:
                self.listen(self.settings.address or route_address())
            self.thread.spawn(self.run())
        if loop:
            self._probes.append(self.thread.spawn(self._metrics.probe(loop)))

    async def leave_in_thread(self) -> None:
        with suppress(EndpointError):
            leaving = asyncio.wrap_future(self.thread.spawn(self.leave(self._remaining())))
            await asyncio.wait({leaving}, timeout=self._remaining())

    def stop(self) -> None:
        if self.of_registry.get(self._registry) is self:
            del self.of_registry[self._registry]
        for probe in self._probes:
            probe.cancel()
        if not self.tenancy.left:
            self._within(self.leave(0.9 * self._remaining()))  # so that it has ended when the wait for it ends
        if not self.tenancy.left:
            self.leave_now(self._remaining())
        self._within(self.close())
        if not self.thread.stop(self._remaining()):
            log.warning("the metrics thread of %s did not end within CONSUL_PROM_STOP_TIMEOUT", self.tenancy.instance)
        self.dispose()

    def _remaining(self) -> float:
        """Seconds left of the one STOP_TIMEOUT that all parts of a stop share; never quite none."""
        self._ends_at = self._ends_at or time.monotonic() + self.settings.stop_timeout
        return max(self._ends_at - time.monotonic(), 0.1)

    def _within(self, coroutine: Coroutine[Any, Any, None]) -> None:
        with suppress(EndpointError):
            wait([self.thread.spawn(coroutine)], self._remaining())

    def listen(self, address: str | None) -> None:
        if address is None:
            raise EndpointError("this host has no default route to tell its address by: set CONSUL_PROM_ADDRESS")
        self._address = address
        before = self._ledger.port if self._ledger else 0
        self._listener = self._listen(address, self.tenancy.slot.number, before=before)
        port = self._listener.getsockname()[1]
        self.url = f"{origin(address, port, scheme=self._scheme)}/metrics"
        if self._ledger:
            self._ledger.port = port

    @property
    def _scheme(self) -> str:
        return self._web.scheme if self._web else "http"

    def _listen(self, address: str, slot: int, *, before: int) -> socket.socket:
        """On a port for *slot*: on the one *before* where any will do, since scrapers know it."""
        ports = self.settings.port.candidates(slot)
        return listen(self.settings.bind or address, [before, *ports] if before and ports == [0] else ports)

    async def run(self) -> None:
        """From the address on, until cancelled."""
        self._task = asyncio.current_task()
        try:
            with FORKING:  # a child forked in the middle of an import could never import the same
                self._client = AgentClient(self.settings)
            if self._listener is None:
                self.listen(await find_address(self._client.self_))
            self._endpoint = Endpoint(
                render=Renderer(self._continued or self._registry).render,
                about=self._about,
                on_scrape=self._scraped,
                allow=self.settings.allow,
                web=self._web,
            )
            assert self._listener  # noqa: S101  # `listen` has set it or raised
            await self._endpoint.serve(self._listener)
            self._caring = asyncio.create_task(self._take_care(self._client))
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

    async def _take_care(self, client: AgentClient) -> None:
        settings = self.settings
        masters = Masters(settings.dir, settings.service)

        async def receive(slot: Slot) -> Guest:
            return await self._receive(client, slot, masters.registry())

        async def adopt(slot: Slot, page: CollectorRegistry, port: int) -> Guest:
            return await self._receive(client, slot, page, port=port, adopted=True)

        adoption = Adoption(
            settings.dir,
            settings.service,
            host=settings.host,
            retain=settings.retain,
            patience=0.8 * settings.stop_timeout,
            serve=adopt,
            complete=masters.complete,
            slowest_start=self._start_took,
        )
        caretaker = Caretaker(
            client,
            directory=settings.dir,
            service=settings.service,
            host=settings.host,
            masters=masters.living,
            receive=receive,
            adoption=adoption if settings.ledger and settings.retain else None,
            patience=0.8 * settings.stop_timeout,
        )
        try:
            await caretaker.run()
        except Exception:
            log.exception("consul-prom no longer looks after dead workers: an error that it did not expect")

    async def _receive(
        self, client: AgentClient, slot: Slot, registry: CollectorRegistry, *, port: int = 0, adopted: bool = False
    ) -> Guest:
        """A guest in *slot*, on a socket of its own; *port* is where the slot was served before."""
        listener = self._listen(self._address, slot.number, before=port)
        guest = Guest(
            client,
            self._registration(slot, listener, adopted=adopted),
            listener,
            render=Renderer(registry).render,
            intact=lambda: slot.intact,
            allow=self.settings.allow,
            web=self._web,
        )
        await guest.start()
        return guest

    def _scraped(self, seconds: float) -> None:
        self._metrics.scraped(seconds)
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

        await Vigil(
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
        try:
            if self._client and self.tenancy.registered:
                deregister_now(self.settings, self.tenancy.entry_id, timeout=timeout, hosts=self._client.resolved)
        except AgentError as error:
            self.tenancy.left_over(error)

    async def close(self) -> None:
        try:
            if self._endpoint:
                await self._endpoint.aclose()
        finally:
            if self._client:
                await self._client.aclose()

    def dispose(self) -> None:
        """What needs no event loop: registry, socket and slot are as before the start."""
        if self._continued:
            self._continued.close()  # first: a metric that leaves the registry leaves the ledger too
        self._metrics.close()
        self._signals.close()
        if self._listener:
            self._listener.close()
        self.url = None
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
            discard(ledger_path(slot.directory, self.settings.service, slot.number))
        return self._registration(slot, self._listener)

    def _registration(self, slot: Slot, listener: socket.socket, *, adopted: bool = False) -> Registration:
        return build(
            self.settings,
            slot=slot,
            address=self._address,
            port=listener.getsockname()[1],
            version=__version__,
            pid=self._pid,
            scheme=self._scheme,
            tcp_check=bool(self._web and self._web.requires_certificate),
            adopted=adopted,
        )

    def _registered(self, reason: str) -> None:
        self._metrics.registered(reason)
        if self._client and self._client.resolved:
            self.tenancy.slot.occupy(self._client.resolved)

    def _about(self) -> dict[str, str]:
        return {
            "service": self.settings.service,
            "instance": self.tenancy.instance,
            "pid": str(self._pid),
            "registered": "yes" if self.tenancy.registered else f"no: {self.tenancy.trouble}",
        }


async def _end_of(task: asyncio.Task[None], timeout: float) -> None:
    await asyncio.wait({task}, timeout=timeout)


class _OwnMetrics:
    """What a worker tells of itself, in the registry that it serves; gone from it when the worker stops."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Raises ValueError where the application has a metric of such a name."""
        self._registry = registry
        self._lag = 0.0
        self._asked_at: float | None = None
        try:
            self._info = Info("consul_prom_worker", "This worker.", registry=registry)
            self._registered = Gauge(
                "consul_prom_registered", "Whether the agent holds this worker's entry.", registry=registry
            )
            self._registrations = Counter(
                "consul_prom_registrations", "Registrations, by what called for them.", ["reason"], registry=registry
            )
            self._failures = Counter(
                "consul_prom_sync_failures",
                "Talks with the agent that failed, by reason.",
                ["reason"],
                registry=registry,
            )
            self._scrapes = Counter("consul_prom_scrapes", "Scrapes of this worker.", registry=registry)
            self._duration = Summary(
                "consul_prom_scrape_duration_seconds", "Time to render a scrape.", registry=registry
            )
            self._last_scrape = Gauge(
                "consul_prom_last_scrape_timestamp_seconds", "When the last scrape was, since 1970.", registry=registry
            )
            self._lag_gauge = Gauge(
                "consul_prom_event_loop_lag_seconds",
                "How long the application's event loop takes, or took at last, to run a callback.",
                registry=registry,
            )
        except ValueError:
            self.close()
            raise
        self._lag_gauge.set_function(self._lag_now)

    def show(self, registered: Callable[[], bool]) -> None:
        self._registered.set_function(registered)

    def tell(self, *, host: str, slot: int) -> None:
        with FORKING:
            self._info.info({"version": __version__, "host": host, "slot": str(slot)})

    def registered(self, reason: str) -> None:
        with FORKING:
            self._registrations.labels(reason).inc()

    def failed(self, reason: str) -> None:
        with FORKING:
            self._failures.labels(reason).inc()

    def scraped(self, seconds: float) -> None:
        self._scrapes.inc()
        self._duration.observe(seconds)
        self._last_scrape.set_to_current_time()

    async def probe(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ask the application's loop for a callback each second; one that hangs shows a lag that grows."""
        with suppress(RuntimeError):  # the loop was closed
            while True:
                if self._asked_at is None:
                    self._asked_at = time.perf_counter()
                    loop.call_soon_threadsafe(self._answered)
                await asyncio.sleep(1)
        self._asked_at = None

    def close(self) -> None:
        for metric in vars(self).values():
            if isinstance(metric, Info | Gauge | Counter | Summary):
                with suppress(KeyError):
                    self._registry.unregister(metric)

    def _answered(self) -> None:
        if self._asked_at is not None:
            self._lag = time.perf_counter() - self._asked_at
        self._asked_at = None

    def _lag_now(self) -> float:
        asked_at = self._asked_at
        return max(self._lag, time.perf_counter() - asked_at) if asked_at is not None else self._lag
