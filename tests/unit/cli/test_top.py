"""The live table: what it makes of pages, and that it shows real workers in 80 columns."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from click.testing import CliRunner

from consul_prom.cli import main as cli_main
from consul_prom.cli import top
from consul_prom.cli.top import HEAD, Page, Reading, Target, Track, line, ordered, parse, quantile, sparkline, total

TARGET = Target("web-1:0", "http", "127.0.0.1", 9100, adopted=False)
BUCKETS = 'http_request_duration_seconds_bucket{{method="GET",route="/",le="{}"}} {}\n'


def page(at: float, requests: float = 0, **more: float) -> Page:
    values = {"http_requests_total": requests, "process_start_time_seconds": 90.0, "consul_prom_scrapes_total": at}
    return parse("".join(f"{name} {value}\n" for name, value in {**values, **more}.items()), at=at)


@contextmanager
def served(text: str) -> Iterator[int]:
    """A port that answers one request with *text*."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the library's name
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the library's name
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        yield server.server_port
        thread.join()


class TestPages:
    """What a page says."""

    def test_sums_labels(self) -> None:
        """Series of one name are added up, buckets by their bound; comments and what is no number of ours are not."""
        text = '# TYPE a counter\nhttp_requests_total{route="/a b",x="}"} 2.0\nhttp_requests_total{route="b"} 1e1\n'
        found = parse(text + BUCKETS.format("0.1", 3) + BUCKETS.format("+Inf", 4) * 2, at=5)
        assert found.values == {"http_requests_total": 12}
        assert found.buckets == {0.1: 3, math.inf: 8}

    @pytest.mark.parametrize(
        "line",
        [
            "http_requests_total abc",
            BUCKETS.format("x", 1).strip(),
            BUCKETS.format("nan", 1).strip(),
            BUCKETS.format("1e300", 1).strip(),
            BUCKETS.format("1", "1e400").strip(),
            "consul_prom_event_loop_lag_seconds -1e300",
            "process_resident_memory_bytes 1e300",
            "process_cpu_seconds_total NaN",
        ],
    )
    def test_odd_line(self, line: str) -> None:
        """A page with a figure that no worker has is unreadable; the other rows are shown."""
        with served(f"process_start_time_seconds 1\n{line}\n") as port:
            assert top.read(TARGET._replace(port=port)) == "broken"

    @pytest.mark.parametrize(
        ("share", "buckets", "expected"),
        [
            (0.5, {}, None),
            (0.5, {0.1: 0, math.inf: 0}, None),
            (0.5, {0.1: 10, math.inf: 10}, 0.05),
            (0.5, {0.1: 0, 0.2: 10, math.inf: 10}, 0.15),
            (0.99, {0.1: 50, 0.2: 90, math.inf: 100}, 0.2),
        ],
    )
    def test_quantile(self, share: float, buckets: dict[float, float], expected: float | None) -> None:
        """Percentiles are PromQL's."""
        assert quantile(share, buckets) == (expected if expected is None else pytest.approx(expected))


class TestWorker:
    """One worker over time."""

    def test_rates(self) -> None:
        """Rates are those between two looks; the first has none."""
        track = Track()
        first = track.row(TARGET, page(100, 10, process_cpu_seconds_total=1))
        assert (first.requests, first.state, first.age) == (None, "up", 10)
        second = track.row(TARGET, page(102, 30, process_cpu_seconds_total=2))
        assert (second.requests, second.cpu, second.history) == (10, 0.5, (10,))

    def test_successor(self) -> None:
        """Another process in the slot is no rate of before."""
        track = Track()
        track.row(TARGET, page(100, 1000))
        row = track.row(TARGET, page(102, 3, process_start_time_seconds=101.0))
        assert (row.requests, row.age) == (None, 1)

    def test_unreadable(self) -> None:
        """One that cannot be read shows why, and begins anew afterwards."""
        track = Track()
        track.row(TARGET, page(100, 10))
        assert track.row(TARGET, "refused") == Reading("web-1:0", "refused")
        assert track.row(TARGET, page(104, 20)).requests is None

    def test_scrapes_of_others(self) -> None:
        """Our own looks are no scrapes: only somebody else's count."""
        track = Track()
        row = track.row(TARGET, page(100, consul_prom_scrapes_total=7, consul_prom_last_scrape_timestamp_seconds=95.0))
        assert row.scraped == 5
        row = track.row(TARGET, page(102, consul_prom_scrapes_total=8, consul_prom_last_scrape_timestamp_seconds=100.0))
        assert row.scraped == 7
        row = track.row(
            TARGET, page(104, consul_prom_scrapes_total=10, consul_prom_last_scrape_timestamp_seconds=103.0)
        )
        assert row.scraped == 1

    def test_never_scraped(self) -> None:
        """Nobody scraped yet is no time."""
        row = Track().row(TARGET, page(100, consul_prom_scrapes_total=0, consul_prom_last_scrape_timestamp_seconds=0))
        assert row.scraped is None

    def test_clocks_differ(self) -> None:
        """A worker whose host's clock is ahead of ours is no younger than 0 s, and was scraped no later than now."""
        figures = {"process_start_time_seconds": 1e15, "consul_prom_last_scrape_timestamp_seconds": 1e15}
        row = Track().row(TARGET, page(100, **figures))
        assert (row.age, row.scraped) == (0, 0)

    def test_adopted(self) -> None:
        """The page of a slot without a worker is told apart, and shows nothing of a process."""
        track = Track()
        track.row(TARGET, page(99, process_cpu_seconds_total=7, consul_prom_last_scrape_timestamp_seconds=98.0))
        for at in (100, 102):
            last = parse("http_requests_total 10\nconsul_prom_scrapes_total 99\n", at=at)
            row = track.row(TARGET._replace(adopted=True), last)
            assert row.state == "adopted"
            assert {row.cpu, row.memory, row.age, row.lag, row.scraped} == {None}
        assert row.requests == 0


ROWS = [
    Reading("web-1:0", "up", requests=5.0, history=(1, 5), memory=2.0**20, lag=0.001, p99=0.1),
    Reading("web-1:10", "up", requests=50.0, history=(50,), memory=3 * 2.0**20, lag=0.5),
    Reading("web-1:2", "refused"),
]


class TestTable:
    """How rows are shown."""

    def test_order(self) -> None:
        """The name's order is that of numbers; by a figure the largest comes first, what is unknown last."""
        assert [row.instance for row in ordered(ROWS, by="instance")] == ["web-1:0", "web-1:2", "web-1:10"]
        assert [row.instance for row in ordered(ROWS, by="requests")] == ["web-1:10", "web-1:0", "web-1:2"]
        assert [row.instance for row in ordered(ROWS, by="lag", containing=":1")] == ["web-1:10"]

    def test_total(self) -> None:
        """The sum line adds what can be added, and has the largest of the others."""
        row = total(ROWS)
        assert (row.instance, row.state, row.requests) == ("3 workers", "2 up", 55)
        assert (row.memory, row.lag, row.p99, row.history) == (4 * 2.0**20, 0.5, 0.1, (1, 55))
        assert total([]).requests is None

    def test_adopted_total(self) -> None:
        """A page that is served for another is no worker, and what it counts is counted."""
        row = total([*ROWS, Reading("web-1:3", "adopted", requests=0.0)])
        assert (row.instance, row.state, row.requests) == ("3 workers", "2 up", 55)

    @pytest.mark.parametrize(
        "row",
        [
            Reading("x" * 200, "adopted", 1e12, (1.0,) * 6, 1e7, 1e6, 1e6, 1e16, 99.99, 1e6, 8e7, 1e7),
            Reading("a:0", "up", 9999.4, (0.0,) * 6, 9999, 59.94, 0.9994, 9999.4 * 2**20, 1.0, 0.9994, 86400, 9.94),
            Reading("a:0", "up", 1e18, (1e18,), 1e15, 1e15, 1e15, 1e15, 1e15, 1e15, 1e15, 1e15),
            Reading("a:0", "silent"),
            *ROWS,
        ],
    )
    def test_width(self, row: Reading) -> None:
        """Whatever the figures, a row fits 80 columns, and its columns are below their heads."""
        assert len(line(row)) <= 80
        assert len(HEAD) <= 80
        assert line(row)[HEAD.index("state") - 1] == " "

    def test_sparkline(self) -> None:
        """The highest is the highest bar; nothing is the lowest."""
        assert sparkline((0, 5, 10)) == "\u2581\u2584\u2588"
        assert sparkline((0, 0)) == "\u2581\u2581"
        assert sparkline(()) == ""


Run = Callable[..., Any]


def test_needs_a_service() -> None:
    """Without a service there is nothing to show."""
    result = CliRunner().invoke(cli_main.commands, ("top", "--once"), env={"CONSUL_PROM_SERVICE": None})
    assert result.exit_code == 2
    assert "no service name" in result.stderr
