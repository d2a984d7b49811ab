"""Request metrics, without a framework."""

import asyncio
from collections.abc import Awaitable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.parser import text_string_to_metric_families

from consul_prom.http_metrics.request_metrics import CANCELLED, METHODS, RequestMetrics, install
from tests.unit.pages import render

NAMES = ["http_requests", "http_request_duration_seconds", "http_requests_in_progress"]


@pytest.fixture
def metrics(registry: CollectorRegistry) -> RequestMetrics:
    return RequestMetrics(registry)


def _families(registry: CollectorRegistry) -> set[str]:
    return {family.name for family in registry.collect()}


class TestCount:
    """A request that is over."""

    def test_total_and_duration(self, metrics: RequestMetrics, registry: CollectorRegistry) -> None:
        """It counts by method, route and status, and its duration by method and route."""
        metrics.count(method="GET", route="/shop/{id}", status=200, seconds=0.3)
        metrics.count(method="GET", route="/shop/{id}", status=404, seconds=0.2)
        labels = {"method": "GET", "route": "/shop/{id}"}
        assert registry.get_sample_value("http_requests_total", {**labels, "status": "200"}) == 1
        assert registry.get_sample_value("http_requests_total", {**labels, "status": "404"}) == 1
        assert registry.get_sample_value("http_request_duration_seconds_count", labels) == 2
        assert registry.get_sample_value("http_request_duration_seconds_sum", labels) == pytest.approx(0.5)

    def test_without_duration(self, metrics: RequestMetrics, registry: CollectorRegistry) -> None:
        """Where a duration means nothing, there is no series of it."""
        metrics.count(method="GET", route="/chat", status=101, seconds=None)
        labels = {"method": "GET", "route": "/chat"}
        assert registry.get_sample_value("http_requests_total", {**labels, "status": "101"}) == 1
        assert registry.get_sample_value("http_request_duration_seconds_count", labels) is None

    @pytest.mark.parametrize("method", ["get", "BREW", "", "PROPFIND", "GET\n", "\udcff"])
    def test_unknown_method(self, metrics: RequestMetrics, registry: CollectorRegistry, method: str) -> None:
        """A method that is not HTTP's own is OTHER, so that nobody can make series at will."""
        metrics.count(method=method, route="/", status=405, seconds=0)
        labels = {"method": "OTHER", "route": "/", "status": "405"}
        assert registry.get_sample_value("http_requests_total", labels) == 1

    @pytest.mark.parametrize("method", sorted(METHODS))
    def test_known_method(self, metrics: RequestMetrics, registry: CollectorRegistry, method: str) -> None:
        """RFC 9110's methods and PATCH keep their names."""
        metrics.count(method=method, route="/", status=200, seconds=0)
        assert registry.get_sample_value("http_requests_total", {"method": method, "route": "/", "status": "200"}) == 1
        assert registry.get_sample_value("http_request_duration_seconds_count", {"method": method, "route": "/"}) == 1

    @pytest.mark.parametrize("route", ["/a\nb", '/a"b', "/a\\b", "/a{b}", "/ü", "/\udcff\ud800", "", "/a\r\n# HELP x"])
    @pytest.mark.parametrize("accept", ["", "application/openmetrics-text"])
    def test_odd_route(self, metrics: RequestMetrics, registry: CollectorRegistry, route: str, accept: str) -> None:
        """A route with a newline, quote, backslash or invalid UTF-8 leaves the page whole."""
        metrics.count(method="GET", route=route, status=200, seconds=0)
        page = render(registry, accept=accept, accept_encoding="").body.decode()
        samples = [line for line in page.splitlines() if line.startswith("http_requests_total{")]
        assert len(samples) == 1
        shown = route.encode(errors="replace").decode()
        if not accept and "\r" not in route:
            (family, *_) = text_string_to_metric_families(page)
            assert family.samples[0].labels["route"] == shown

    @given(st.text(), st.text(), st.integers(100, 999))
    def test_anything(self, method: str, route: str, status: int) -> None:
        """Whatever a client sends, the page can be encoded."""
        registry = CollectorRegistry()
        RequestMetrics(registry).count(method=method, route=route, status=status, seconds=1)
        assert b"http_requests_total" in render(registry, accept="", accept_encoding="").body


class TestTrack:
    """A request that is being answered."""

    @staticmethod
    def _in_progress(registry: CollectorRegistry) -> float | None:
        return registry.get_sample_value("http_requests_in_progress", {"method": "GET", "route": "/"})

    @staticmethod
    def _track(metrics: RequestMetrics, answer: Awaitable[str]) -> Awaitable[str]:
        return metrics.track(answer, method="GET", route="/")

    async def test_in_progress(self, metrics: RequestMetrics, registry: CollectorRegistry) -> None:
        """It is in progress until it is answered, and the answer passes."""
        seen = []

        async def answer() -> str:
            seen.append(self._in_progress(registry))
            return "done"

        assert await self._track(metrics, answer()) == "done"
        assert seen == [1]
        assert self._in_progress(registry) == 0

    async def test_exception(self, metrics: RequestMetrics, registry: CollectorRegistry) -> None:
        """An exception passes, and the request is no longer in progress."""

        async def answer() -> str:
            raise LookupError("mine")

        with pytest.raises(LookupError, match="mine"):
            await self._track(metrics, answer())
        assert self._in_progress(registry) == 0

    async def test_cancelled(self, metrics: RequestMetrics, registry: CollectorRegistry) -> None:
        """A cancelled request is no longer in progress."""
        begun = asyncio.Event()

        async def answer() -> str:
            begun.set()
            await asyncio.sleep(3600)
            return "never"

        task = asyncio.ensure_future(self._track(metrics, answer()))
        await begun.wait()
        assert self._in_progress(registry) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert self._in_progress(registry) == 0

    async def test_method_and_route_are_cleaned(self, metrics: RequestMetrics, registry: CollectorRegistry) -> None:
        """The labels are the same as those of the count."""

        async def answer() -> str:
            return ""

        await metrics.track(answer(), method="BREW", route="/\udcff")
        assert registry.get_sample_value("http_requests_in_progress", {"method": "OTHER", "route": "/?"}) == 0


class TestRegistry:
    """Where the metrics are."""

    def test_until_close(self, registry: CollectorRegistry) -> None:
        """They are in the registry until they are closed, and then may come again."""
        metrics = RequestMetrics(registry)
        assert _families(registry) == set(NAMES)
        metrics.close()
        assert _families(registry) == set()
        metrics.close()
        assert install(registry)

    @pytest.mark.parametrize("name", NAMES)
    def test_name_is_taken(self, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture, name: str) -> None:
        """A name of the application's own is left to it: one WARNING, and none of ours is there."""
        Gauge(name, "The application's own.", registry=registry).set(7)
        assert install(registry) is None
        assert _families(registry) == {name}
        assert registry.get_sample_value(name) == 7
        (record,) = caplog.records
        assert (record.name, record.levelname) == ("consul_prom.http_metrics.request_metrics", "WARNING")
        assert "request metrics are off" in record.message
        assert "CONSUL_PROM_REQUEST_METRICS=false" in record.message

    def test_same_name_as_a_counter(self, registry: CollectorRegistry) -> None:
        """A counter that the application calls http_requests_total is one of these names."""
        mine = Counter("http_requests_total", "The application's own.", registry=registry)
        mine.inc(3)
        assert install(registry) is None
        assert registry.get_sample_value("http_requests_total") == 3

    def test_cancelled_has_a_status(self) -> None:
        """A cancelled request has the status that nginx gave it."""
        assert CANCELLED == 499
