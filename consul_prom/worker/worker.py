"""A worker, which every adapter starts and stops; what it has while it is started is its life."""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Unpack

from prometheus_client import REGISTRY, CollectorRegistry

from consul_prom.errors import ConsulPromError, EndpointError, SettingsError
from consul_prom.ledger.parent_counts import FORK
from consul_prom.logs import first_time
from consul_prom.process import exit_hooks
from consul_prom.settings.settings import NO_SERVICE, Arguments, Settings, check_worker, load, switch
from consul_prom.worker.runtime import WorkerRuntime

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
        self._life: WorkerRuntime | None = None
        self._ending: WorkerRuntime | None = None
        self._left = False
        try:
            self._settings = load(arguments)
            if self._settings.ledger and not self._disabled:
                FORK.watch(registry)
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
        slot = self._life.tenancy.slot if self._life and not self._life.failure else None
        return slot.number if slot else None

    @property
    def instance(self) -> str | None:
        return self._life.tenancy.instance if self._life and self.slot is not None else None

    @property
    def url(self) -> str | None:
        return self._life.url if self._life else None

    @property
    def registered(self) -> bool:
        return bool(self._life and self._life.tenancy.registered)

    @property
    def served(self) -> bool:
        """Whether this process serves the registry: after our own stop, Gunicorn's hooks or others may go on."""
        life = WorkerRuntime.of_registry.get(self._registry)
        return bool(life and life.mine)

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
            self._begin(loop, keeps=keeps)
        except ConsulPromError as error:
            self.stop()
            if self._required:
                raise
            wrong_setting = NO_SERVICE if self.nameless else str(error)
            if not isinstance(error, SettingsError) or first_time(wrong_setting):
                log.error("consul-prom is off: %s", error)
        except Exception as error:
            self.stop()
            if self._required:
                raise EndpointError("an error that consul-prom did not expect") from error
            log.exception("consul-prom is off: an error that it did not expect")

    def _begin(self, loop: asyncio.AbstractEventLoop | None, *, keeps: bool) -> None:
        if self._misset:
            raise self._misset
        assert self._settings  # noqa: S101  # one of the two is there
        check_worker(self._settings)
        exit_hooks.expect(self.stop)  # first: who lingers must see its handler
        with WorkerRuntime.sharing:
            self._life = WorkerRuntime.shared(self._settings, self._registry)
            self._life.start(loop)
            if not keeps:
                self._left = True
                self._life.leavers += 1
        if self._required:
            self._await_registration(self._life, self._settings.start_timeout)

    def start_leaving(self) -> None:
        """Deregister while the caller goes on. `stop` waits for it; the endpoint serves until then.

        Where `stop` will linger, that is left to it.
        """
        if self._life and self._life.mine and not self._left and not self._life.lingers:
            self._left = True
            self._life.leavers += 1
            if self._life.leavers == self._life.users:
                self._life.start_leaving()

    async def leave(self) -> None:
        """The same, and wait for it, within STOP_TIMEOUT and without blocking the caller's loop."""
        self.start_leaving()
        if self._life and self._life.mine:
            await self._life.wait_until_left()

    def hurry(self, seconds: float) -> None:
        """Let a stop, also one that is under way, take *seconds* at most, where STOP_TIMEOUT is more."""
        if life := self._life or self._ending:
            life.hurry(seconds)

    def stop(self, *, last: bool = False, linger: float | None = None) -> None:
        """Deregister, close and give the slot up; within STOP_TIMEOUT, or one log line says what is left over.

        Before that it waits for a scrape, for *linger* seconds or, where a signal told the process to end, LINGER.
        *last*: the process ends, whoever else has not stopped.
        """
        try:
            if self._life and self._life.mine and (last or self._life.users == 1):
                self._life.linger(linger)
        finally:  # somebody may press Ctrl-C
            with exit_hooks.said(self.stop):
                self._stop(last=last)

    def _stop(self, *, last: bool) -> None:
        life, self._life = self._life, None
        if life and life.mine:
            with WorkerRuntime.sharing:
                life.users -= 1
                life.leavers -= self._left
                self._left = False
                last = last or not life.users
            if last:
                self._ending = life
                life.stop()
                self._ending = None

    def _await_registration(self, life: "WorkerRuntime", timeout: float) -> None:
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
    except KeyboardInterrupt:  # somebody wants it to be over
        worker.stop()
        raise
    finally:
        worker.stop(linger=worker.linger)
