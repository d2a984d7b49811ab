"""Request metrics, alike for every framework: how many, how long, how many at once, by method, route and status."""

import collections
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, ClassVar, Final, TypeVar
from weakref import WeakKeyDictionary

from prometheus_async.aio import track_inprogress
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric

log = logging.getLogger(__name__)

METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"})
CANCELLED: Final = 499
UNKNOWN_ROUTE: Final = "other"

T = TypeVar("T")


class OpenRequest:
    """A request in progress, of an application that tells its route only on the way."""

    def __init__(self, metrics: "RequestMetrics", method: str, route: Callable[[], str | None]) -> None:
        self._metrics = metrics
        self._method = method
        self._route = route
        self._begun = time.perf_counter()

    def labels(self) -> tuple[str, str]:
        """Method and route, as far as it is known by now."""
        try:
            route = self._route() or UNKNOWN_ROUTE
        except Exception:
            log.debug("what the framework left is not what was expected", exc_info=True)
            route = UNKNOWN_ROUTE
        return _method(self._method), _clean(route)

    def end(self, status: int, *, timed: bool = True) -> None:
        """Count it, and no longer as in progress; a second call does nothing."""
        if self in self._metrics.in_progress.open:
            self._metrics.in_progress.open.discard(self)
            method, route = self.labels()
            self._metrics.in_progress.labels(method, route)
            seconds = time.perf_counter() - self._begun if timed else None
            self._metrics.count(method=method, route=route, status=status, seconds=seconds)


class _InProgress(Gauge):
    """Beside what was counted up and down, the requests in `open`, each by the route that it has when asked."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.open: set[OpenRequest] = set()
        super().__init__(*arguments, **options)

    def collect(self) -> Iterator[Metric]:
        found = collections.Counter(request.labels() for request in self.open.copy())
        for labels in found:
            self.labels(*labels)
        for family in super().collect():
            for number, sample in enumerate(family.samples):
                more = found[sample.labels["method"], sample.labels["route"]]
                family.samples[number] = sample._replace(value=sample.value + more)
            yield family


class RequestMetrics:
    """The three metrics, in *registry* until `close`.

    Raises:
        ValueError: the application has a metric of such a name already.
    """

    of_registry: ClassVar[WeakKeyDictionary[CollectorRegistry, "RequestMetrics"]] = WeakKeyDictionary()

    def __init__(self, registry: CollectorRegistry) -> None:
        self.users = 1
        self._registry = registry
        self._mine: list[Counter | Gauge | Histogram] = []
        try:
            self._total = self._add(
                Counter("http_requests", "HTTP requests.", ["method", "route", "status"], registry=registry)
            )
            self._duration = self._add(
                Histogram(
                    "http_request_duration_seconds",
                    "From a request's head to its answer's last byte.",
                    ["method", "route"],
                    registry=registry,
                )
            )
            self.in_progress = self._add(
                _InProgress(
                    "http_requests_in_progress",
                    "HTTP requests that are being answered.",
                    ["method", "route"],
                    registry=registry,
                )
            )
        except ValueError:
            self.close()
            raise

    async def track(self, answer: Awaitable[T], *, method: str, route: str) -> T:
        """Await *answer*, in progress meanwhile."""
        return await track_inprogress(self.in_progress.labels(_method(method), _clean(route)), answer)

    def count(self, *, method: str, route: str, status: int, seconds: float | None) -> None:
        """One request that is over; *seconds* is None where a duration means nothing, as for a websocket."""
        method, route = _method(method), _clean(route)
        self._total.labels(method, route, str(status)).inc()
        if seconds is not None:
            self._duration.labels(method, route).observe(seconds)

    def close(self, *, served: bool = False) -> None:
        """Take the metrics out of the registry, when the last of their users has closed them.

        Not from one that is still *served*: what leaves it leaves the ledger too, and others are to show it.
        """
        self.users -= 1
        if not self.users and not served:
            for metric in self._mine:
                self._registry.unregister(metric)
            self._mine.clear()
            self.of_registry.pop(self._registry, None)

    def _add(self, metric: "M") -> "M":
        self._mine.append(metric)
        return metric


M = TypeVar("M", bound=Counter | Gauge | Histogram)


class Requests:
    """The requests of one application, counted from the first on: by then its own metrics are there."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._installed = False
        self._metrics: RequestMetrics | None = None

    def begin(self, method: str, route: Callable[[], str | None]) -> OpenRequest | None:
        """A request whose *route* is asked for when it matters; None where request metrics are off."""
        if not self._installed:
            with self._lock:
                if not self._installed:
                    self._metrics, self._installed = install(self._registry), True
        if self._metrics is None:
            return None
        request = OpenRequest(self._metrics, method, route)
        self._metrics.in_progress.open.add(request)
        return request

    def close(self, *, served: bool) -> None:
        """Take the metrics out of the registry, unless it is still *served*, until the next request."""
        with self._lock:
            metrics, self._metrics, self._installed = self._metrics, None, False
        if metrics:
            metrics.close(served=served)


def install(registry: CollectorRegistry) -> RequestMetrics | None:
    """The request metrics of a registry, which all applications that count there share; each closes them once.

    None, and one WARNING, where the application has metrics of such names.
    """
    metrics = RequestMetrics.of_registry.get(registry)
    if metrics:
        metrics.users += 1
        return metrics
    try:
        metrics = RequestMetrics.of_registry[registry] = RequestMetrics(registry)
    except ValueError as error:
        log.warning("request metrics are off: %s; CONSUL_PROM_REQUEST_METRICS=false silences this", error)
        return None
    return metrics


def _method(method: str) -> str:
    return method if method in METHODS else "OTHER"


def _clean(route: str) -> str:
    """A lone surrogate, as of a route that is no valid UTF-8, would make the whole page impossible to encode."""
    return route.encode("utf-8", "replace").decode()
