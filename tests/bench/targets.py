"""What many workers cost Prometheus and Consul, without checks: discovery, memory a target, where it bends; and rules.

    python -m tests.bench.targets [seconds]

A real Consul server with as many real agents as it takes at 2,000 workers each, with which `AgentClient` registers the
documents of the workers, a hundred a host; a real Prometheus with our configuration, a fresh one for each row, scrapes
each *seconds*. One process answers for all workers: one
socket, but an address of 127.0.0.0/8 for each, so that Prometheus has a connection a target as it would have in life.
"One more" is a worker that is registered when all is at rest: until Prometheus knows its target, and what CPU that
took beyond the rest's, of server, agents and Prometheus. CPU is seconds by minute, memory the resident set.
"""

import asyncio
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from consul_prom.consul.client import AgentClient
from consul_prom.consul.registration import build
from consul_prom.generate import scrape_config
from consul_prom.settings.settings import load
from tests.bench.rest import ROOT, Load, resident
from tests.bench.scale import _slot
from tests.services.consul import Consul
from tests.services.prometheus import Prometheus
from tests.services.waiting import wait_until

SIZES: Final = (1000, 3000, 10_000)
NARROW: Final = 10
WIDE: Final = 110
"""Series of a worker; the wide one is for the slope, with the first of the sizes."""
A_HOST: Final = 100
AN_AGENT: Final = 2000
PORT: Final = 9100
AT_A_TIME: Final = 4
DEADLINE: Final = 120.0
RECORDED: Final = "route_status:http_requests:rate1m"
QUERY: Final = "sum without (instance) (rate(http_requests_total[1m]))"
COLUMNS: Final = "{:>8} {:>7} {:>11} {:>15} {:>15} {:>9} {:>11} {:>9} {:>8} {:>11} {:>6} {:>11}"
HEADS: Final = (
    *("workers", "series", "registered", "server", "an agent", "answer", "discovered", "one more", "its CPU"),
    *("Prometheus", "MiB", "series all"),
)


def _address(number: int) -> str:
    return f"127.1.{number // 250}.{number % 250 + 1}"


def _document(number: int, agent: str) -> dict[str, Any]:
    """Of a worker, as it would register, but for the check."""
    host = f"web-{number // A_HOST}"
    settings = load({"service": "shop", "host": host, "consul_http_addr": agent, "dir": "/run/shop"}, environ={})
    slot = _slot(settings, number % A_HOST)
    registration = build(settings, slot=slot, address=_address(number), port=PORT, version="0", pid=1)
    return {**registration.document(), "Check": None}


async def _register(numbers: Sequence[int], agents: Sequence[str]) -> None:
    """All of them with their agents, four at a time."""

    async def some(mine: Sequence[int]) -> None:
        clients = [_client(agent) for agent in agents]
        for number in mine:
            await clients[number // AN_AGENT].register(_document(number, agents[number // AN_AGENT]))
        for client in clients:
            await client.aclose()

    await asyncio.gather(*(some(numbers[first::AT_A_TIME]) for first in range(AT_A_TIME)))


def _client(agent: str) -> AgentClient:
    return AgentClient(load({"service": "shop", "consul_http_addr": agent}, environ={}), timeout=DEADLINE)


class _Page(asyncio.Protocol):
    """Answers each request of a connection with the page, whose values grow."""

    series = NARROW
    made_at = 0
    answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, _data: bytes) -> None:
        if (now := int(time.monotonic())) != _Page.made_at:
            _Page.made_at, _Page.answer = now, _answer(now, self.series)
        self._transport.write(_Page.answer)


def _answer(value: int, series: int) -> bytes:
    lines = [f'http_requests_total{{route="/{number}",status="200"}} {value}\n' for number in range(series)]
    body = "".join(["# TYPE http_requests_total counter\n", *lines]).encode()
    return (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )


async def _serve(series: int) -> None:
    """The process of `_pages`, until the end of its input."""
    _Page.series = series
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), ended.set)
    server = await loop.create_server(_Page, "0.0.0.0", PORT, backlog=4000)
    print("ready", flush=True)
    await ended.wait()
    server.close()


@contextmanager
def _pages(series: int) -> Iterator[None]:
    """A process that answers for all workers."""
    command = [sys.executable, "-m", "tests.bench.targets", "pages", str(series)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    try:
        yield
    finally:
        process.communicate(timeout=DEADLINE)


class _Monitor(Prometheus):
    """Prometheus with our configuration, and a rule."""

    def __init__(self, agent: str, rules: Path, seconds: float, flags: Sequence[str]) -> None:
        rule = {"record": RECORDED, "expr": QUERY}
        rules.write_text(yaml.safe_dump({"groups": [{"name": "shop", "rules": [rule]}]}), encoding="utf-8")
        scrape = scrape_config.prometheus(load({"service": "shop", "consul_http_addr": agent}, environ={}))
        config = {**yaml.safe_load(scrape), "rule_files": [str(rules)]}
        super().__init__(config, interval=f"{seconds:g}s", flags=flags)

    def own(self, name: str) -> float:
        """A metric of its own."""
        found = re.search(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", self.call("/metrics")[1], re.MULTILINE)
        return float(found[1]) if found else 0.0

    def discovered(self) -> int:
        return int(self.own("prometheus_target_scrape_pool_targets"))

    def time(self, promql: str) -> float:
        """Seconds that a query takes: median of nine."""

        def once() -> float:
            begun = time.perf_counter()
            assert self.query(promql)
            return time.perf_counter() - begun

        return statistics.median(once() for _ in range(9))


class _Point(NamedTuple):
    """A row: MiB and series of Prometheus, its seconds for both forms of the query and for the rule."""

    targets: int
    memory: float
    series: float
    asked: float
    looked_up: float
    evaluated: float


@dataclass(frozen=True, slots=True)
class _Bench:
    server: Consul
    agents: Sequence[Consul]
    directory: Path
    seconds: float
    flags: Sequence[str]

    def register(self, numbers: Sequence[int]) -> float:
        """Seconds that it took."""
        begun = time.monotonic()
        asyncio.run(_register(numbers, [agent.url for agent in self.agents]))
        return time.monotonic() - begun

    def point(self, size: int, series: int, registered: str) -> _Point:
        """Measure and print one row; so many workers are registered."""
        file = self.directory / "rules.yml"
        with _pages(series), _Monitor(self.agents[0].url, file, self.seconds, self.flags) as prometheus:
            discovered = _since(lambda: prometheus.discovered() >= size, "all targets known")
            _since(lambda: prometheus.query_value('sum(up{job="shop"})') == size, "all targets scraped")
            pids = [self.server.pid, self.agents[0].pid, prometheus.pid]
            server, agent, own = self._rest(pids)
            one_more, beyond = self._one_more(size, prometheus, pids, (server + agent + own) / 60)
            memory, all_series = resident(prometheus.pid), prometheus.own("prometheus_tsdb_head_series")
            wait_until(lambda: prometheus.query(RECORDED), within=60, what="the rule")
            asked, looked_up = prometheus.time(QUERY), prometheus.time(RECORDED)
            evaluated = prometheus.own("prometheus_rule_group_last_duration_seconds")
        cells = [
            size,
            series,
            registered,
            *(f"{cpu:.1f} s {resident(pid):.0f} MiB" for cpu, pid in ((server, pids[0]), (agent, pids[1]))),
        ]
        cells += [f"{self._answer() / 2**20:.1f} MiB", f"{discovered:.1f} s", f"{one_more:.1f} s", f"{beyond:.2f} s"]
        print(COLUMNS.format(*cells, f"{own:.1f} s", f"{memory:.0f}", f"{all_series:.0f}"), flush=True)
        return _Point(size, memory, all_series, asked, looked_up, evaluated)

    def _rest(self, pids: Sequence[int]) -> list[float]:
        """Seconds of CPU by minute, over one interval."""
        before, at = [Load.of(pid).cpu for pid in pids], time.monotonic()
        time.sleep(self.seconds)
        minutes = (time.monotonic() - at) / 60
        return [(Load.of(pid).cpu - cpu) / minutes for pid, cpu in zip(pids, before, strict=True)]

    def _one_more(self, size: int, prometheus: _Monitor, pids: Sequence[int], rest: float) -> tuple[float, float]:
        """Seconds until another worker's target is known, and of CPU beyond the *rest*'s by second."""
        before, at = sum(Load.of(pid).cpu for pid in pids), time.monotonic()
        number = size - 1 + A_HOST * A_HOST  # of a host that is not there yet
        document = {**_document(number, self.agents[0].url), "Address": _address(size)}
        asyncio.run(self._call(lambda client: client.register(document)))
        took = _since(lambda: prometheus.discovered() > size, "one more target known")
        time.sleep(2)  # it is at rest again
        beyond = sum(Load.of(pid).cpu for pid in pids) - before - rest * (time.monotonic() - at)
        asyncio.run(self._call(lambda client: client.deregister(document["ID"])))
        return took, max(beyond, 0)

    async def _call(self, what: Callable[[AgentClient], Awaitable[Any]]) -> None:
        client = _client(self.agents[0].url)
        await what(client)
        await client.aclose()

    def _answer(self) -> int:
        """Bytes that Prometheus gets at each change."""
        with urllib.request.urlopen(f"{self.agents[0].url}/v1/health/service/shop-metrics", timeout=DEADLINE) as answer:
            return len(answer.read())


@contextmanager
def _datacentre(workers: int) -> Iterator[tuple[Consul, list[Consul]]]:
    """A server, and agents for so many workers."""
    with ExitStack() as stack:
        server = stack.enter_context(Consul(dev=False))
        config = {"server": False, "bootstrap_expect": None, "performance": None, "retry_join": [server.address]}
        agents = [Consul(dev=False, config=config) for _ in range(-(-workers // AN_AGENT))]
        for agent in agents:
            stack.callback(agent.close)
            stack.callback(agent.kill)  # leaving would take seconds
            agent.start()
        yield server, agents


def _since(check: Callable[[], bool], what: str) -> float:
    """Seconds until *check* holds."""
    begun = time.monotonic()
    wait_until(check, within=DEADLINE, what=what)
    return time.monotonic() - begun


def _print_slopes(narrow: Sequence[_Point], wide: _Point) -> None:
    by_series = (wide.memory - narrow[0].memory) / (wide.series - narrow[0].series)
    own = [(point.targets, point.memory - by_series * point.series) for point in narrow]
    by_target = statistics.linear_regression(*zip(*own, strict=True)).slope if len(own) > 1 else 0.0
    print(
        f"  memory of Prometheus: {by_series * 1024:.1f} KiB a series, {by_target * 1024:.0f} KiB a target beyond them"
    )
    last = narrow[-1]
    print(
        f"  rules, {last.targets} workers: the sum takes {last.asked * 1000:.0f} ms a query, as a recorded series "
        f"{last.looked_up * 1000:.1f} ms; to record it {last.evaluated * 1000:.0f} ms each interval",
        flush=True,
    )


def main(seconds: float, *, sizes: Sequence[int] = SIZES, flags: Sequence[str] = ()) -> None:
    """Print the table; sizes grow. *flags* are given to Prometheus."""
    print(COLUMNS.format(*HEADS), flush=True)
    with tempfile.TemporaryDirectory() as directory, _datacentre(sizes[-1]) as (server, agents):
        bench = _Bench(server, agents, Path(directory), seconds, flags)
        narrow, have = [], 0
        for size in sizes:
            took = bench.register(range(have, size))
            rate = f"{(size - have) / took:.0f}/s"
            have = size
            narrow.append(bench.point(size, NARROW, rate))
            if size == sizes[0]:
                wide = bench.point(size, WIDE, "")
        _print_slopes(narrow, wide)


if __name__ == "__main__":
    if sys.argv[1:2] == ["pages"]:
        asyncio.run(_serve(int(sys.argv[2])))
    else:
        main(float(sys.argv[1]) if len(sys.argv) > 1 else 15)
