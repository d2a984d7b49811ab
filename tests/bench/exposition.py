"""What a page costs against prometheus_client's `generate_latest`, both in one run, in turns.

    python -m tests.bench.exposition [rounds] [series]

Mixed series: two fifths counters, three tenths gauges, the rest histograms' lines, of which the median and the spread
are shown; with their values in memory, and in a ledger. Memory is what the kept page takes, in pages.
"""

import gc
import random
import statistics
import sys
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.openmetrics.exposition import generate_latest

from consul_prom.exposition.renderer import Renderer
from consul_prom.ledger.file import Ledger
from consul_prom.ledger.registry import LedgerRegistry

ACCEPT = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8"
LINES = 17  # of a histogram of the default buckets
FAMILY = 1000

library = partial(generate_latest, escaping="allow-utf-8")


def main(rounds: int, series: int) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as directory:
        registries = [fill(series), fill(series)]
        ledger = Ledger.take_over(Path(directory, "shop.0.ledger"), boot="b", instance="web-1:0")
        sources = [
            Side("", registries[0][0], registries[0][1]),
            Side("ledger: ", LedgerRegistry(registries[1][0], ledger), registries[1][1]),
        ]
        measure(sources, rounds)
        page = write(Renderer(sources[0].source))
    for level in (1, 2, 4, 6, 9):
        times = [_seconds(partial(zlib.compress, page, level, wbits=31)) for _ in range(rounds)]
        share = 100 * len(zlib.compress(page, level, wbits=31)) / len(page)
        print(f"gzip, level {level}           {_spread([1000 * each for each in times], 'ms')}   {share:8.1f} %")


class Side(NamedTuple):
    """One way to count: what its rows are called, where pages come from, and for each series what changes it."""

    name: str
    source: CollectorRegistry | LedgerRegistry
    uses: list[Callable[[], Any]]


def measure(sides: list[Side], rounds: int) -> None:
    """Print what each kind of page takes, and how often `generate_latest` of the plain registry takes that."""
    found: dict[str, list[float]] = {}
    renderers = {side.name: kept(side) for side in sides}
    for _ in range(rounds):
        for side in sides:
            renderer = renderers[side.name]
            for name, changed, source in (
                ("generate_latest", 0, library),
                ("first scrape", 0, lambda source: write(Renderer(source))),
                ("all changed", len(side.uses), lambda _, renderer=renderer: write(renderer)),
                ("10 % changed", len(side.uses) // 10, lambda _, renderer=renderer: write(renderer)),
                ("none changed", 0, lambda _, renderer=renderer: write(renderer)),
            ):
                for use in random.sample(side.uses, changed):
                    use()
                found.setdefault(side.name + name, []).append(_seconds(partial(source, side.source)))
            if write(renderer) != library(side.source):
                raise SystemExit("the pages differ")
    for name, times in found.items():
        ratios = [each / ours for each, ours in zip(found["generate_latest"], times, strict=True)]
        print(f"{name:24}{_spread([1000 * each for each in times], 'ms')}{_spread(ratios, 'x')}")


def kept(side: Side) -> Renderer:
    """A renderer that has written a page; print what it keeps of it."""
    tracemalloc.start()
    renderer = Renderer(side.source)
    size = len(write(renderer))
    gc.collect()
    pages = tracemalloc.get_traced_memory()[0] / size
    print(f"{side.name}{len(side.uses)} series, {size} bytes; what is kept takes {pages:.2f} pages")
    tracemalloc.stop()
    return renderer


def fill(series: int) -> tuple[CollectorRegistry, list[Callable[[], Any]]]:
    """A registry, and for each of its series what changes it."""
    registry = CollectorRegistry()
    uses: list[Callable[[], Any]] = []
    for number in range(series * 2 // 5):
        if number % FAMILY == 0:
            counter = Counter(f"app_requests_{number}", "Requests.", ["method", "route", "status"], registry=registry)
        uses.append(counter.labels("GET", f"/api/v1/items/{number}", "200").inc)
    for number in range(series * 3 // 10):
        if number % FAMILY == 0:
            gauge = Gauge(f"app_depth_{number}", "Depth.", ["queue"], registry=registry)
        uses.append(partial(gauge.labels(f"queue-{number}").inc, 0.25))
    for number in range(series * 3 // 10 // LINES):
        if number % (FAMILY // LINES) == 0:
            histogram = Histogram(f"app_took_{number}_seconds", "Took.", ["route"], registry=registry)
        uses.append(partial(histogram.labels(f"/api/v1/things/{number}").observe, 0.01 * number))
    for use in uses:
        use()
    return registry, uses


def write(renderer: Renderer) -> bytes:
    """The whole page, as the endpoint puts it together."""
    _, _, pieces = renderer.render(ACCEPT, "")
    return b"".join(pieces)


def _seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _spread(found: list[float], unit: str) -> str:
    return f"{statistics.median(found):9.2f} {unit} ({min(found):.2f}-{max(found):.2f})"


if __name__ == "__main__":
    main(*(int(argument) for argument in (*sys.argv[1:], *("9", "20000")[len(sys.argv) - 1 :])))
