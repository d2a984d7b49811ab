"""The workers of a service across its hosts, as they are now: each worker's own page is read, not Prometheus.

A page is asked for the few series that are shown. Rates and percentiles are those between two looks.
"""

import asyncio
import http.client
import math
import re
import ssl
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode

from consul_prom.consul import stale
from consul_prom.consul.client import AgentClient
from consul_prom.consul.registration import is_worker
from consul_prom.errors import AgentDenied
from consul_prom.settings.settings import Settings

READERS: Final = 32
PATIENCE: Final = 2.0
HISTORY: Final = 6
_BARS: Final = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_SHOWN: Final = (
    *("http_requests_total", "http_requests_in_progress", "http_request_duration_seconds_bucket"),
    *("process_resident_memory_bytes", "process_cpu_seconds_total", "process_start_time_seconds"),
    *("consul_prom_event_loop_lag_seconds", "consul_prom_scrapes_total", "consul_prom_last_scrape_timestamp_seconds"),
)
_QUERY: Final = urlencode([("name[]", name) for name in _SHOWN])
_SAMPLE: Final = re.compile(r"^([a-z_]+)(?:\{(.*)\})? ([^ ]+)$", re.MULTILINE)
_LE: Final = re.compile(r'(?:^|,)le="([^"]+)"')
MOST: Final = 1e15
"""No figure of a worker is larger, a process' bytes and its requests of a century included."""


class Target(NamedTuple):
    """Where its page is, by its entry."""

    instance: str
    scheme: str
    address: str
    port: int
    adopted: bool


@dataclass(frozen=True)
class Page:
    """What a worker's page said, and when; *buckets* are the requests up to each number of seconds."""

    at: float
    values: Mapping[str, float]
    buckets: Mapping[float, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """A worker as it is shown. None is what cannot be known, yet or at all."""

    instance: str
    state: str
    requests: float | None = None
    history: tuple[float, ...] = ()
    in_progress: float | None = None
    p50: float | None = None
    p99: float | None = None
    memory: float | None = None
    cpu: float | None = None
    lag: float | None = None
    age: float | None = None
    scraped: float | None = None


def parse(text: str, *, at: float) -> Page:
    """Raise ValueError if a line that is shown has no figure that a worker can have."""
    values: Counter[str] = Counter()
    buckets: Counter[float] = Counter()
    for name, labels, number in _SAMPLE.findall(text):
        if name == "http_request_duration_seconds_bucket":
            if bound := _LE.search(labels):
                upper = math.inf if bound[1] == "+Inf" else _figure(bound[1])
                buckets[upper] += _figure(number)  # type: ignore[assignment]
        else:
            values[name] += _figure(number)  # type: ignore[assignment]
    return Page(at, values, buckets)


def _figure(text: str) -> float:
    value = float(text)
    if not 0 <= value <= MOST:
        raise ValueError(f"{text} is no figure of a worker")
    return value


def quantile(share: float, buckets: Mapping[float, float]) -> float | None:
    """As PromQL's histogram_quantile: within a bucket by proportion; None without a request."""
    bounds = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0
    if total <= 0:
        return None
    wanted, below, lower = share * total, 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= wanted:
            if math.isinf(bound):
                return lower
            inside = buckets[bound] - below
            return lower + (bound - lower) * ((wanted - below) / inside if inside else 1)
        below, lower = buckets[bound], bound
    return None


class Track:
    """One target over time."""

    def __init__(self) -> None:
        self._before: Page | None = None
        self._rates: deque[float] = deque(maxlen=HISTORY)
        self._scraped_at: float | None = None

    def row(self, target: Target, page: Page | str) -> Reading:
        """What to show of *page*, or of the word why there is none."""
        if isinstance(page, str):
            self._before = None
            return Reading(target.instance, page)
        before, values = self._before, page.values
        self._before = page
        if target.adopted:
            self._scraped_at = None  # its page does not tell
        else:
            self._note_scrape(before, values)
        if before and values["process_start_time_seconds"] != before.values["process_start_time_seconds"]:
            before = None  # another process has the slot
        rates: dict[str, Any] = {}
        if before:
            seconds = max(page.at - before.at, 0.001)
            rate = max(values["http_requests_total"] - before.values["http_requests_total"], 0) / seconds
            self._rates.append(rate)
            cpu = values.get("process_cpu_seconds_total", math.nan) - before.values["process_cpu_seconds_total"]
            deltas = {bound: count - before.buckets.get(bound, 0) for bound, count in page.buckets.items()}
            rates = {
                "requests": rate,
                "cpu": None if math.isnan(cpu) else cpu / seconds,
                "p50": quantile(0.5, deltas),
                "p99": quantile(0.99, deltas),
            }
        return Reading(
            target.instance,
            "adopted" if target.adopted else "up",
            history=tuple(self._rates),
            in_progress=values.get("http_requests_in_progress"),
            memory=values.get("process_resident_memory_bytes"),
            lag=values.get("consul_prom_event_loop_lag_seconds"),
            age=_since(values.get("process_start_time_seconds"), page.at),
            scraped=_since(self._scraped_at, page.at),
            **rates,
        )

    def _note_scrape(self, before: Page | None, values: Mapping[str, float]) -> None:
        """Our own look counts as a scrape: between two of them, only more than one was somebody else's."""
        scrapes = values["consul_prom_scrapes_total"] - (before.values["consul_prom_scrapes_total"] if before else 0)
        if scrapes > (1 if before else 0):
            self._scraped_at = values["consul_prom_last_scrape_timestamp_seconds"] or None


def _since(moment: float | None, now: float) -> float | None:
    """The clocks of two hosts differ: not below 0."""
    return None if moment is None else max(now - moment, 0)


async def watch(
    settings: Settings, agent: AgentClient, *, interval: float, look: Callable[[Target], Page | str] | None = None
) -> AsyncGenerator[list[Reading]]:
    """The rows of all workers, each *interval* seconds, for ever."""
    tracks: dict[str, Track] = {}
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(READERS) as readers:
        while True:
            begun = time.monotonic()
            targets = await _targets(settings, agent)
            pages = await asyncio.gather(*(loop.run_in_executor(readers, look or read, target) for target in targets))
            yield [
                tracks.setdefault(target.instance, Track()).row(target, page)
                for target, page in zip(targets, pages, strict=True)
            ]
            await asyncio.sleep(max(begun + interval - time.monotonic(), 0))


async def _targets(settings: Settings, agent: AgentClient) -> list[Target]:
    """Of the catalogue, which has all hosts'; with a token that may not read nodes, of the agent.

    The page of Gunicorn's masters is no worker's.
    """
    try:
        found = await agent.catalogue(settings.consul_service)
        pairs = [(entry["ServiceMeta"] or {}, entry["ServiceAddress"], entry["ServicePort"]) for entry in found]
    except AgentDenied:
        entries = await stale.entries(agent, service=settings.service)
        pairs = [(entry["Meta"], entry["Address"], entry["Port"]) for entry in entries]
    return [
        Target(meta["instance"], meta.get("scheme", "http"), address, port, "adopted" in meta)
        for meta, address, port in pairs
        if "instance" in meta and (is_worker(meta) or "adopted" in meta)
    ]


def read(target: Target) -> Page | str:
    """A worker's page, or in a word why there is none. Whom it belongs to is not verified: it is only shown."""
    connection: http.client.HTTPConnection
    if target.scheme == "https":
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(target.address, target.port, timeout=PATIENCE, context=context)
    else:
        connection = http.client.HTTPConnection(target.address, target.port, timeout=PATIENCE)
    try:
        with closing(connection):
            connection.request("GET", f"/metrics?{_QUERY}", headers={"Accept": "text/plain;version=0.0.4"})
            answer = connection.getresponse()
            text = answer.read().decode()
        return parse(text, at=time.time()) if answer.status == http.client.OK else str(answer.status)
    except TimeoutError:
        return "silent"
    except ConnectionRefusedError:
        return "refused"
    except (OSError, ValueError, http.client.HTTPException):
        return "broken"


def ordered(rows: Iterable[Reading], *, by: str, containing: str = "") -> list[Reading]:
    """The largest first, or by the name; what is not known comes last."""
    chosen = sorted((row for row in rows if containing in row.instance), key=lambda row: _natural(row.instance))
    if by == "instance":
        return chosen
    return sorted(chosen, key=lambda row: -math.inf if getattr(row, by) is None else getattr(row, by), reverse=True)


def _natural(instance: str) -> tuple[str, int]:
    host, _, slot = instance.rpartition(":")
    return host, int(slot) if slot.isdecimal() else -1


def total(rows: Sequence[Reading]) -> Reading:
    """The sum line; percentiles cannot be summed, and the largest is what matters of lag, age and scrape.

    An adopted slot has no worker.
    """
    workers = [row for row in rows if row.state != "adopted"]
    up = sum(row.state == "up" for row in workers)

    def over(name: str, combine: Callable[[list[float]], float]) -> float | None:
        known = [getattr(row, name) for row in rows if getattr(row, name) is not None]
        return combine(known) if known else None

    sums = {name: over(name, sum) for name in ("requests", "in_progress", "memory", "cpu")}
    worst = {name: over(name, max) for name in ("p50", "p99", "lag", "age", "scraped")}
    lengths = max((len(row.history) for row in rows), default=0)
    history = tuple(
        sum(row.history[index - lengths] for row in rows if len(row.history) >= lengths - index)
        for index in range(lengths)
    )
    return Reading(f"{len(workers)} workers", f"{up} up", history=history, **sums, **worst)


HEAD: Final = (
    f"{'instance':14} {'req/s':>6} {'':{HISTORY}} {'prog':>4} {'p50':>5} {'p99':>5} {'MiB':>5} {'cpu%':>4} {'lag':>5} "
    f"{'age':>4} {'scr':>4} state"
)


def line(row: Reading) -> str:
    """A row in 80 columns."""
    name = row.instance if len(row.instance) <= 14 else f"\u2026{row.instance[-13:]}"
    memory = None if row.memory is None else row.memory / 2**20
    return (
        f"{name:14} {_number(row.requests):>6} {sparkline(row.history):{HISTORY}} {_number(row.in_progress):>4} "
        f"{_time(row.p50):>5} {_time(row.p99):>5} {_number(memory):>5} "
        f"{_number(None if row.cpu is None else row.cpu * 100):>4} {_time(row.lag):>5} {_time(row.age):>4} "
        f"{_time(row.scraped):>4} {row.state:7}"
    ).rstrip()


def sparkline(values: Sequence[float]) -> str:
    most = max(values, default=0)
    return "".join(_BARS[int(value / most * (len(_BARS) - 1)) if most else 0] for value in values)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    for unit in ("", "k", "M", "G", "T"):
        if value < (999.5 if unit else 9999.5):
            return f"{value:.1f}{unit}" if value < 9.95 and value != int(value) else f"{value:.0f}{unit}"
        value /= 1000
    return f"{value:.0f}P"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    for size, unit in ((60, "s"), (60, "m"), (48, "h")):
        if seconds < size:
            return f"{seconds:.1f}{unit}" if seconds < 10 and unit == "s" else f"{seconds:.0f}{unit}"
        seconds /= size if unit != "h" else 24
    return f"{seconds:.0f}d" if seconds < 999 else ">2y"
