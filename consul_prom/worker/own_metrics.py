"""What a worker tells of itself."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Info, Summary

from consul_prom import __version__
from consul_prom.errors import EndpointError
from consul_prom.process.fork import FORK_LOCK


class OwnMetrics:
    """Metrics in the registry that the worker serves; gone from it when the worker stops."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Raises EndpointError where the application has a metric of such a name."""
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
        except Exception as error:
            self.close()
            if isinstance(error, ValueError):
                raise EndpointError(f"the application has metrics of our names: {error}") from error
            raise
        self._lag_gauge.set_function(self._lag_now)

    def show(self, registered: Callable[[], bool]) -> None:
        self._registered.set_function(registered)

    def tell(self, *, host: str, slot: int) -> None:
        with FORK_LOCK:
            self._info.info({"version": __version__, "host": host, "slot": str(slot)})

    def registered(self, reason: str) -> None:
        with FORK_LOCK:
            self._registrations.labels(reason).inc()

    def failed(self, reason: str) -> None:
        with FORK_LOCK:
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
