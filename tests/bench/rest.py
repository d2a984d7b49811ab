"""What idle workers cost, themselves and their agent: requests, bytes, connections, CPU and threads, by minute.

    python -m tests.bench.rest [minutes]

Each worker is a `Worker` with a registry and an application's event loop, in a few processes that do nothing else; the
Consul is real. All they say to it passes a forwarder that counts; the agent's own checks do not. Bytes are HTTP's,
without TCP's. CPU is the scheduler's account of each thread, so that a busy machine matters little. Every figure is
the median of five equal parts of the time, and the spread.
"""

import asyncio
import json
import logging
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple, Self
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry

from consul_prom import Worker
from consul_prom.consul.registrar import WATCHING_SLOTS
from tests.services.consul import Consul
from tests.services.program import own_address
from tests.services.waiting import wait_until

ROOT: Final = Path(__file__).parents[2]
PARTS: Final = 5
SETTLE: Final = 15.0
FLEETS: Final = ((1, 1), (100, 10))
DEADLINE: Final = 60.0


class Load(NamedTuple):
    """What a thread, or all of a process, has used: seconds of CPU, and how often it was put on one."""

    cpu: float
    runs: int

    @classmethod
    def of(cls, pid: int, thread: int | None = None) -> "Load":
        """Nanoseconds of /proc/<pid>/task/<thread>/schedstat, where stat would round to hundredths of a second."""
        tasks = Path(f"/proc/{pid}/task")
        cpu = runs = 0
        for task in [tasks / str(thread)] if thread else list(tasks.iterdir()):
            with suppress(FileNotFoundError):  # it has ended just now
                used, _, times = (task / "schedstat").read_text(encoding="ascii").split()
                cpu, runs = cpu + int(used), runs + int(times)
        return cls(cpu / 1e9, runs)


def resident(pid: int) -> float:
    """MiB."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Median, least and most."""
    middle, least, most = (format(value, form) for value in (statistics.median(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least}-{most})"


@dataclass(slots=True)
class MasterStats:
    """What passed: requests, bytes either way, connections opened, and for how many seconds all in all."""

    requests: int = 0
    sent: int = 0
    received: int = 0
    opened: int = 0
    seconds: float = 0.0


@dataclass(eq=False, slots=True)
class _Connection:
    opened_at: float
    slot: int | None = None
    tally: MasterStats = field(default_factory=MasterStats)


class Forwarder:
    """A context manager: a TCP forwarder in a daemon thread to the agent at *upstream*, that counts by slot."""

    def __init__(self, upstream: str) -> None:
        self._upstream = urlsplit(upstream)
        self._address = own_address()
        self._open: set[_Connection] = set()
        self._closed: dict[int | None, MasterStats] = {}
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="forwarder", daemon=True)

    @property
    def url(self) -> str:
        return f"http://{self._address}:8500"

    def __enter__(self) -> Self:
        self._thread.start()
        serve = asyncio.start_server(self._accept, self._address, 8500, backlog=1000)
        self._server = asyncio.run_coroutine_threadsafe(serve, self._loop).result(DEADLINE)
        return self

    def __exit__(self, *_error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(DEADLINE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE)
        self._loop.close()

    def tally(self, wanted: Callable[[int], bool]) -> MasterStats:
        """Of the slots that are *wanted*, until now; not of what named none."""
        return asyncio.run_coroutine_threadsafe(self._sum(wanted), self._loop).result(DEADLINE)

    async def _sum(self, wanted: Callable[[int], bool]) -> MasterStats:
        total, now = MasterStats(), time.monotonic()
        for slot, tally in self._closed.items():
            if slot is not None and wanted(slot):
                _add(total, tally, tally.seconds)
        for connection in self._open:
            if connection.slot is not None and wanted(connection.slot):
                _add(total, connection.tally, now - connection.opened_at)
        return total

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(time.monotonic())
        connection.tally.opened = 1
        self._open.add(connection)

        def up(chunk: bytes) -> None:
            if connection.slot is None and (found := re.search(rb"shop\.web-1\.(\d+)", chunk)):
                connection.slot = int(found[1])
            connection.tally.requests += chunk.count(b" HTTP/1.1\r\n")
            connection.tally.sent += len(chunk)

        def down(chunk: bytes) -> None:
            connection.tally.received += len(chunk)

        try:
            back, on = await asyncio.open_connection(self._upstream.hostname, self._upstream.port)
            await asyncio.gather(_pump(reader, on, up), _pump(back, writer, down))
        except OSError:
            writer.close()
        finally:
            self._open.discard(connection)
            total = self._closed.setdefault(connection.slot, MasterStats())
            _add(total, connection.tally, time.monotonic() - connection.opened_at)

    async def _stop(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


def _add(total: MasterStats, tally: MasterStats, seconds: float) -> None:
    total.requests += tally.requests
    total.sent += tally.sent
    total.received += tally.received
    total.opened += tally.opened
    total.seconds += seconds


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: Callable[[bytes], None]) -> None:
    """Until either end closes."""
    try:
        while chunk := await reader.read(2**16):
            count(chunk)
            writer.write(chunk)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


@contextmanager
def _fleet(workers: int, processes: int, agent: str) -> Iterator[list[int]]:
    """The pids of *processes* that have *workers* workers between them; these are stopped at the end."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        pids = []
        settings = {"service": "shop", "host": "web-1", "dir": f"{directory}/slots", "consul_http_addr": agent}
        for number in range(processes):
            count = workers // processes + (number < workers % processes)
            command = [sys.executable, "-m", "tests.bench.rest", "workers", json.dumps([count, settings])]
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE)
            stack.callback(process.communicate, timeout=DEADLINE)
            pids.append(process.pid)
        yield pids


async def _live(count: int, settings: dict[str, str]) -> None:
    """A process of *count* workers whose application has nothing to do, until the end of its input."""
    logging.disable()  # nobody scrapes them, which each would say
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), ended.set)
    workers = [Worker(registry=CollectorRegistry(), **settings) for _ in range(count)]
    for worker in workers:
        worker.start(loop=loop)
    await ended.wait()
    for worker in workers:
        worker.stop()


class _Reading(NamedTuple):
    """Counters at a moment. `application` is the load of the main threads, which only our lag probe wakes."""

    at: float
    holding: MasterStats
    polling: MasterStats
    workers: Load
    application: Load
    agent: Load


def _read(forwarder: Forwarder, pids: Sequence[int], agent: int) -> _Reading:
    ours = [Load.of(pid) for pid in pids]
    theirs = [Load.of(pid, pid) for pid in pids]
    return _Reading(
        time.monotonic(),
        forwarder.tally(lambda slot: slot < WATCHING_SLOTS),
        forwarder.tally(lambda slot: slot >= WATCHING_SLOTS),
        Load(sum(load.cpu for load in ours), sum(load.runs for load in ours)),
        Load(sum(load.cpu for load in theirs), sum(load.runs for load in theirs)),
        Load.of(agent),
    )


def _watch(seconds: float, forwarder: Forwarder, pids: Sequence[int], agent: int) -> list[_Reading]:
    """One reading more than there are parts."""
    readings, begun = [_read(forwarder, pids, agent)], time.monotonic()
    for part in range(1, PARTS + 1):
        time.sleep(max(begun + seconds * part / PARTS - time.monotonic(), 0))
        readings.append(_read(forwarder, pids, agent))
    return readings


def _rates(readings: Sequence[_Reading], value: Callable[[_Reading], float], scale: float = 60.0) -> list[float]:
    """By part: how much *value* grew in *scale* seconds."""
    return [(value(after) - value(before)) / (after.at - before.at) * scale for before, after in pairwise(readings)]


def _print_talk(
    title: str, count: int, tallies: Callable[[_Reading], MasterStats], readings: Sequence[_Reading]
) -> None:
    if not count:
        return
    rows: dict[str, tuple[list[float], str]] = {
        "requests": (_rates(readings, lambda it: tallies(it).requests / count), ".1f"),
        "bytes to the agent": (_rates(readings, lambda it: tallies(it).sent / count), ",.0f"),
        "bytes back": (_rates(readings, lambda it: tallies(it).received / count), ",.0f"),
        "connections opened": (_rates(readings, lambda it: tallies(it).opened / count), ".1f"),
        "connections open, on average": (_rates(readings, lambda it: tallies(it).seconds / count, 1), ".2f"),
    }
    _print_rows(f"{count} {title}, each and by minute", rows)


def _print_cost(workers: int, threads: int, memory: float, readings: Sequence[_Reading], alone: float) -> None:
    rows: dict[str, tuple[list[float], str]] = {
        "CPU, all of the process (ms)": (_rates(readings, lambda it: it.workers.cpu * 1000 / workers), ".0f"),
        "CPU, the application's loop (ms)": (_rates(readings, lambda it: it.application.cpu * 1000 / workers), ".0f"),
        "wake-ups, all of the process": (_rates(readings, lambda it: it.workers.runs / workers), ".0f"),
        "threads": ([threads / workers], ".2f"),
        "CPU of the agent, beyond idle (ms)": (
            [(cpu - alone) * 1000 / workers for cpu in _rates(readings, lambda it: it.agent.cpu)],
            ".0f",
        ),
    }
    _print_rows(f"{workers} in all, each and by minute", rows)
    agent = spread(_rates(readings, lambda it: it.agent.cpu), ".2f")
    held = spread(_rates(readings, lambda it: it.holding.seconds + it.polling.seconds, 1), ".0f")
    print(f"  the agent in all: {agent} s of CPU by minute, {memory:.0f} MiB, {held} connections of ours")


def _print_rows(title: str, rows: Mapping[str, tuple[Sequence[float], str]]) -> None:
    print(f"\n{title}")
    for name, (values, form) in rows.items():
        print(f"  {name:36}{spread(values, form):>28}", flush=True)


def main(minutes: float, *, fleets: Sequence[tuple[int, int]] = FLEETS, settle: float = SETTLE) -> None:
    """Print the tables. *fleets* are pairs: how many workers, in how many processes."""
    with Consul() as consul:
        time.sleep(settle)
        with Forwarder(consul.url) as forwarder:
            alone = _watch(minutes * 60 / PARTS, forwarder, [], consul.pid)
        idle = _rates(alone, lambda it: it.agent.cpu)
        print(f"the agent alone: {spread(idle, '.2f')} s of CPU by minute, {resident(consul.pid):.0f} MiB", flush=True)
    for workers, processes in fleets:
        # Each fleet has an agent of its own, or the second would find a heap that the first has made large.
        with Consul() as consul, Forwarder(consul.url) as forwarder, _fleet(workers, processes, forwarder.url) as pids:

            def complete(consul: Consul = consul, workers: int = workers) -> bool:
                return len(consul.call("/v1/agent/services")[1]) == workers

            wait_until(complete, within=DEADLINE, what=f"{workers} workers registered", every=0.2)
            time.sleep(settle)
            readings = _watch(minutes * 60, forwarder, pids, consul.pid)
            threads = sum(len(list(Path(f"/proc/{pid}/task").iterdir())) - 1 for pid in pids)
            holding = min(workers, WATCHING_SLOTS)
            _print_talk("that hold a connection", holding, lambda it: it.holding, readings)
            _print_talk("that poll", workers - holding, lambda it: it.polling, readings)
            _print_cost(workers, threads, resident(consul.pid), readings, statistics.median(idle))


if __name__ == "__main__":
    if sys.argv[1:2] == ["workers"]:
        asyncio.run(_live(*json.loads(sys.argv[2])))
    else:
        main(float(sys.argv[1]) if len(sys.argv) > 1 else 5)
