"""What many workers cost one agent: how soon all are registered, then its CPU and memory, by the checks' interval.

    python -m tests.bench.scale [seconds]

A real Consul, and in one other process registrars that begin all at once, each with an `AgentClient` as a worker has
one, from one address; a stub answers all health checks. First with the 200 connections that an agent gives to one
address, then with as many as are asked for. Each row has an agent of its own, which is watched for so many *seconds*
with the registrars at rest, and as long with none, so that only the checks are left: reads are the difference. CPU is
seconds by minute: median of three parts, and spread. Of the refusals, the first are those until all were registered
(or the bench gave up), the second those by minute at rest.
"""

import asyncio
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, Self

from filelock import FileLock

from consul_prom.consul.client import AgentClient
from consul_prom.consul.registrar import WATCHING_SLOTS, Registrar
from consul_prom.consul.registration import build
from consul_prom.settings.settings import Settings, load
from consul_prom.slots.slots import Slot
from tests.bench.rest import ROOT, Load, resident, spread
from tests.services.consul import Consul

SIZES: Final = (300, 1000, 2000)
INTERVALS: Final = (10, 30, 60)
PARTS: Final = 3
SETTLE: Final = 10.0
DEADLINE: Final = 60.0
LIMIT: Final = 200
MANY: Final = 10000
ALIVE: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 3\r\nConnection: close\r\n\r\nOK\n"
COLUMNS: Final = "{:>8} {:>6} {:>16} {:>15} {:>20} {:>18} {:>6} {:>10} {:>9} {:>9}"


class _Check(asyncio.Protocol):
    """Answers whatever comes, and counts it."""

    answered = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        _Check.answered += 1
        self._transport.write(ALIVE)
        self._transport.close()


@contextmanager
def _stub() -> Iterator[int]:
    """The port of an endpoint that is always healthy, in a thread."""
    loop = asyncio.SelectorEventLoop()
    thread = threading.Thread(target=loop.run_forever, name="stub", daemon=True)
    thread.start()
    serve = loop.create_server(_Check, "127.0.0.1", 0, backlog=4000)
    server = asyncio.run_coroutine_threadsafe(serve, loop).result(DEADLINE)
    yield server.sockets[0].getsockname()[1]
    loop.call_soon_threadsafe(server.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(DEADLINE)
    loop.close()


class _Registrars:
    """A context manager: a process of *count* registrars."""

    def __init__(self, count: int, *, port: int, interval: float, agent: str, directory: str) -> None:
        settings = {"service": "shop", "host": "web-1", "dir": directory, "consul_http_addr": agent}
        self._task = [count, port, {**settings, "check_interval": interval}]

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.bench.scale", "registrars", json.dumps(self._task)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ask()  # it has imported what it needs
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.communicate(timeout=DEADLINE)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, what: str = "") -> "_State":
        """How they stand once *what* is done: nothing, "start" or "stop"."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return _State(*json.loads(self._process.stdout.readline()))


class _State(NamedTuple):
    """How many have been registered, and how many talks have failed until now."""

    registered: int
    refusals: int


async def _live(count: int, port: int, arguments: dict[str, Any]) -> None:
    """The process of `_Registrars`, until the end of its input."""
    logging.disable()  # each worker may say it once
    settings, refusals = load(arguments, environ={}), Counter[str]()
    agents = [AgentClient(settings) for _ in range(count)]
    registrars = [
        Registrar(
            agent,
            build(settings, slot=_slot(settings, number), address="127.0.0.1", port=port, version="0", pid=os.getpid()),
            watch=number < WATCHING_SLOTS,
            on_failure=lambda reason: refusals.update([reason]),
        )
        for number, agent in enumerate(agents)
    ]
    tasks: list[asyncio.Task[None]] = []
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        if line == b"start\n":
            tasks = [asyncio.create_task(registrar.run()) for registrar in registrars]
        if line == b"stop\n":
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*(agent.aclose() for agent in agents))
        print(json.dumps([sum(registrar._ever for registrar in registrars), refusals.total()]), flush=True)


def _slot(settings: Settings, number: int) -> Slot:
    """One that nobody holds: thousands of locks are another bench's."""
    return Slot(number, settings.dir, "0123456789abcdef", FileLock(settings.dir / f"shop.{number}.lock"))


class _Cost(NamedTuple):
    """By minute: CPU seconds of the agent, by part, and of the registrars; checks; refusals. And MiB of the agent."""

    agent: list[float]
    registrars: float
    checks: float
    refusals: float
    memory: float


def _watch(seconds: float, agent: int, registrars: _Registrars) -> _Cost:
    checks, own, state = _Check.answered, Load.of(registrars.pid), registrars.ask()
    parts, memory, begun = [], [], time.monotonic()
    for part in range(1, PARTS + 1):
        before, at = Load.of(agent), time.monotonic()
        time.sleep(max(begun + seconds * part / PARTS - at, 0))
        parts.append((Load.of(agent).cpu - before.cpu) / (time.monotonic() - at) * 60)
        memory.append(resident(agent))
    minutes = (time.monotonic() - begun) / 60
    return _Cost(
        agent=parts,
        registrars=(Load.of(registrars.pid).cpu - own.cpu) / minutes,
        checks=(_Check.answered - checks) / minutes,
        refusals=(registrars.ask().refusals - state.refusals) / minutes,
        memory=statistics.median(memory),
    )


class _Row(NamedTuple):
    """Of one agent: how many workers, its CPU with them and with their checks only, its memory."""

    size: int
    cpu: float
    checks_only: float
    memory: float


def _point(size: int, *, interval: float, limit: int, port: int, seconds: float, settle: float) -> _Row:
    """Measure and print one row."""
    config = {"limits": {"http_max_conns_per_client": limit}}
    with tempfile.TemporaryDirectory() as directory, Consul(config=config) as consul:
        with _Registrars(size, port=port, interval=interval, agent=consul.url, directory=directory) as registrars:
            begun, state = time.monotonic(), registrars.ask("start")
            while state.registered < size and time.monotonic() < begun + DEADLINE:
                time.sleep(0.05)
                state = registrars.ask()
            took = time.monotonic() - begun
            time.sleep(settle)
            rest = _watch(seconds, consul.pid, registrars)
            registrars.ask("stop")
            time.sleep(settle)  # the agent goes on with what nobody waits for any more
            silent = _watch(seconds, consul.pid, registrars)
        critical = len(consul.call("/v1/health/state/critical", timeout=DEADLINE)[1])
    cells = [size, f"{interval:g} s", f"{took:.1f} s" if state.registered == size else f"{state.registered} only"]
    cells += [f"{state.refusals}, {rest.refusals:.0f}", spread(rest.agent), spread(silent.agent), f"{rest.memory:.0f}"]
    cells += [f"{silent.checks / size:.1f}", critical, f"{rest.registrars / size * 1000:.0f}"]
    print(COLUMNS.format(*cells), flush=True)
    return _Row(size, statistics.median(rest.agent), statistics.median(silent.agent), rest.memory)


def _print_slopes(rows: Sequence[_Row]) -> None:
    columns = list(zip(*rows, strict=True))
    cpu, checks, memory = (statistics.linear_regression(columns[0], column).slope * 1000 for column in columns[1:])
    print(f"  1,000 more: {cpu:.1f} s of CPU by minute, {checks:.1f} with checks only, {memory:.0f} MiB\n", flush=True)


def main(
    seconds: float,
    *,
    sizes: Sequence[int] = SIZES,
    intervals: Sequence[float] = INTERVALS,
    settle: float = SETTLE,
) -> None:
    """Print the tables; the first is of the middle interval."""
    heads = ("workers", "checks", "all registered", "refusals", "CPU of the agent", "of it for checks", "MiB")
    tables = [(LIMIT, intervals[len(intervals) // 2]), *((MANY, interval) for interval in intervals)]
    with _stub() as port:
        for limit, interval in tables:
            print(f"{limit} connections from one address")
            print(COLUMNS.format(*heads, "checks/min", "critical", "ms/worker"), flush=True)
            _print_slopes(
                [
                    _point(size, interval=interval, limit=limit, port=port, seconds=seconds, settle=settle)
                    for size in sizes
                ]
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["registrars"]:
        asyncio.run(_live(*json.loads(sys.argv[2])))
    else:
        main(float(sys.argv[1]) if len(sys.argv) > 1 else 20)
