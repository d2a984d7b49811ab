"""What scrapes cost the application while they go on: its requests' times, and how long it ever stands still.

    python -m tests.bench.pauses [rounds] [seconds] [series]

Each round has all ways in turns, each in a process of its own, whose main thread first serves a trivial request and
then does nothing but look at the clock: the longest time between two looks is how long the interpreter was kept from
it. Without scrapes, at both ends of each round, is what the machine itself does to both: a difference that these two
have as well says nothing. What the application made before, Python's garbage collector has seen when a round begins:
that is no scrape's doing, though the first might set it off.
"""

import asyncio
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from consul_prom.exposition.renderer import Renderer
from consul_prom.ledger.file import Ledger
from consul_prom.ledger.registry import LedgerRegistry
from consul_prom.process.metrics_thread import MetricsThread
from consul_prom.server.bind import listen
from consul_prom.server.endpoint import Endpoint
from consul_prom.server.metrics_handler import Render
from tests.bench.exposition import ACCEPT, fill, library

WAYS = ("no scrapes", "memory", "ledger", "generate_latest", "again none")
USES = 20  # of metrics in a request
SCRAPER = """
import http.client, sys, time
while True:
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
    connection.request("GET", "/metrics", headers={"Accept": sys.argv[2]})
    connection.getresponse().read()
    connection.close()
    time.sleep(1)
"""
CLIENT = """
import json, socket, sys, time
server = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
took, ends_at = [], time.monotonic() + float(sys.argv[2])
while time.monotonic() < ends_at:
    begun = time.perf_counter()
    server.sendall(b"x")
    server.recv(1)
    took.append(time.perf_counter() - begun)
    time.sleep(0.002)
print(json.dumps(took))
"""


def main(rounds: int, seconds: float, series: int) -> None:
    """Print the table: milliseconds, the median of the rounds and the range."""
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for way in WAYS:
            command = [sys.executable, "-m", "tests.bench.pauses", "--way", way, str(seconds), str(series)]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            for column, value in json.loads(answer).items():
                found.setdefault((way, column), []).append(value)
    columns = list(dict.fromkeys(column for _, column in found))
    print(f"{'ms':16}" + "".join(f"{column:>26}" for column in columns))
    for way in WAYS:
        print(f"{way:16}" + "".join(f"{_spread(found[way, column]):>26}" for column in columns))


def measure(way: str, seconds: float, series: int) -> dict[str, float]:
    """One way's figures, in milliseconds."""
    with ExitStack() as stack:
        registry, uses = fill(series)
        gc.collect()
        renders: dict[str, Any] = {
            "memory": Renderer(registry).render,
            "generate_latest": lambda *_: ({}, (library(registry) for _ in "1")),
        }
        if way == "ledger":
            path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "shop.0.ledger")
            ledger = Ledger.take_over(path, boot="b", instance="web-1:0")
            renders[way] = Renderer(LedgerRegistry(registry, ledger)).render
        if way in renders:
            stack.enter_context(scraped(renders[way]))
        took = sorted(asyncio.run(serve(uses, seconds)))
        return {
            "p50": 1000 * took[len(took) // 2],
            "p99": 1000 * took[len(took) * 99 // 100],
            "longest standstill": 1000 * standstill(seconds),
        }


@contextmanager
def scraped(render: Render) -> Iterator[None]:
    """Meanwhile the endpoint serves, and somebody scrapes it each second."""
    server, thread = listen("127.0.0.1", [0]), MetricsThread()
    thread.start()

    async def endpoint() -> Endpoint:
        made = Endpoint(render=render, about=dict, on_scrape=lambda _seconds: None)
        await made.serve(server)
        return made

    serving = thread.spawn(endpoint()).result(10)
    with subprocess.Popen([sys.executable, "-c", SCRAPER, str(server.getsockname()[1]), ACCEPT]) as scraper:
        try:
            yield
        finally:
            scraper.kill()
            thread.spawn(serving.aclose()).result(10)
            thread.stop(10)


async def serve(uses: Sequence[Any], seconds: float) -> list[float]:
    """What requests took, in seconds, each of which counts some metrics."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1):
            for use in random.choices(uses, k=USES):
                use()
            writer.write(b"y")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        command = [sys.executable, "-c", CLIENT, str(port), str(seconds)]
        client = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        printed, _ = await client.communicate()
    return list(json.loads(printed))


def standstill(seconds: float) -> float:
    """The longest time between two looks at the clock, in seconds."""
    longest, last, ends_at = 0.0, time.perf_counter(), time.perf_counter() + seconds
    while last < ends_at:
        now = time.perf_counter()
        longest = max(longest, now - last)
        last = now
    return longest


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--way"]:
        print(json.dumps(measure(sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))))
    else:
        given = [int(argument) for argument in sys.argv[1:]]
        main(*[*given, *(5, 8, 20_000)[len(given) :]])
