"""The measurements. Each is of one contender; those of all are taken in turn, so that the machine's moods meet all."""

import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path
from typing import Final

from tests.bench.headtohead.contender import Unavailable
from tests.bench.headtohead.load import Load, Paced, saturate
from tests.bench.headtohead.plan import CONTROL, Cell, Plan
from tests.bench.headtohead.programs import program
from tests.bench.headtohead.system import System, cpu, memory
from tests.bench.rest import resident
from tests.services.waiting import wait_until

Figures = Mapping[str, Sequence[float]]
"""By row of the table: what was measured, once or several times."""
SETTLED: Final = 30.0
"""Seconds in which Prometheus must have all series."""
FAILURES: Final = (Unavailable, AssertionError, OSError, ValueError, HTTPException, subprocess.SubprocessError)
AT_ONCE: Final = 20
"""Requests that one hey asks for: where each takes its 5 s, with 4 at a time, that are 25 s."""
A_COST: Final = 0.05
"""Seconds that a round of one cost takes, about."""


def costs(names: Sequence[str], plan: Plan) -> Iterator[tuple[str, Figures, str]]:
    """Of one `inc` and one `observe`, in µs: all contenders stand, and are asked round by round."""
    with ExitStack() as stack:
        systems = []
        for name in names:
            try:
                systems.append(stack.enter_context(System(name, workers=1, series=200, interval=15, scraped=False)))
            except FAILURES as error:
                yield name, {}, reason(error)
        for what in ("inc", "observe"):
            times = {system: max(int(A_COST / _cost(system, what, 100)), 100) for system in systems}
            rounds = [{system: _cost(system, what, times[system]) for system in systems} for _ in range(plan.costs)]
            for system in systems:
                yield system.name, {f"one {what}, µs": [each[system] * 1e6 for each in rounds]}, ""


def _cost(system: System, what: str, times: int) -> float:
    return float(system.server.call(f"/cost?what={what}&times={times}", timeout=60)[1])


def cell(cell: Cell, name: str, plan: Plan) -> Iterator[Figures]:
    """All that is taken of one server."""
    eager = plan.eager or not cell.births
    with System(name, workers=cell.workers, series=cell.series, interval=cell.intervals[0], eager=eager) as system:
        if name != CONTROL:
            system.wait_seen(within=SETTLED)
        for interval in cell.intervals:
            if interval != cell.intervals[0]:
                system.set_interval(interval)
            yield _window(system, cell, interval, plan)
            yield _scrapes(system, f"{cell}, scraped each {interval} s", plan.window if interval == 1 else 0)
        if name != CONTROL:
            yield {f"counters in Prometheus, %: {cell}": [system.seen * 100]}
        if cell.details:
            yield _sizes(system, cell)
            system.set_interval(1)
            rates = [saturate(system.place.address, seconds=plan.saturation / 2) for _ in range(2)]
            yield {f"requests a second at most: {cell}, scraped each 1 s": rates}
        if cell.births and name != CONTROL:
            yield {"worker start to its first sample, s": [system.birth() for _ in range(plan.births)]}


def _window(system: System, cell: Cell, interval: int, plan: Plan) -> Figures:
    """Under a steady load: CPU by part, times of requests and of scrapes."""
    seconds, parts = (plan.window, plan.parts) if interval == 1 else (float(interval), 1)
    paced = Paced(system.place.address, rate=plan.rate, seconds=seconds)
    pids = system.pids()
    paced.begin()
    readings = [_cpu(pids)]
    begun = time.monotonic()
    for part in range(1, parts + 1):
        time.sleep(max(begun + seconds * part / parts - time.monotonic(), 0))
        readings.append(_cpu(pids))
    load = paced.end()
    where = f"{cell}, scraped each {interval} s"
    thousands = plan.rate * seconds / parts / 1000
    figures: dict[str, Sequence[float]] = {
        f"CPU of {part}, s per 1,000 requests: {where}": [
            (after[part] - before[part]) / thousands for before, after in pairwise(readings)
        ]
        for part in readings[0]
    }
    figures[f"CPU of the load generator, s per 1,000 requests: {where}"] = [load.cpu / plan.rate / seconds * 1000]
    return {**figures, **_latencies(load, where)}


def _cpu(pids: Mapping[str, Sequence[int]]) -> dict[str, float]:
    by_part = {part: cpu(members) for part, members in pids.items()}
    return {"everything": sum(by_part.values()), **by_part}


def _latencies(load: Load, where: str) -> Figures:
    """Of the requests: each half's, for the spread."""
    if len(load.times) < 200:
        return {f"requests failed: {where}": [load.failed]}
    halves = [load.times[: len(load.times) // 2], load.times[len(load.times) // 2 :]]
    percentiles = [statistics.quantiles(half, n=100) for half in halves]
    return {
        f"request p50, ms: {where}": [each[49] * 1000 for each in percentiles],
        f"request p99, ms: {where}": [each[98] * 1000 for each in percentiles],
        f"requests failed: {where}": [load.failed],
    }


def _scrapes(system: System, where: str, seconds: float) -> Figures:
    """Over the last *seconds*, or the last ones only."""
    if not system.contender.scraped:
        return {}
    duration, up = "scrape_duration_seconds", "up"
    if seconds:
        duration, up = (f"avg_over_time({name}[{seconds:g}s])" for name in (duration, up))
    took, missed = system.ask(f"sum({duration})"), system.ask(f"avg(1 - {up})")
    assert took is not None, "no scrape"
    assert missed is not None, "no scrape"
    return {
        f"one scrape of all workers, ms: {where}": [took * 1000],
        f"scrapes missed, %: {where}": [missed * 100],
    }


def _sizes(system: System, cell: Cell) -> Figures:
    pids = system.pids()
    assert system.prometheus
    series = system.prometheus.call("/api/v1/status/tsdb")[1]["data"]["headStats"]["numSeries"]
    return {
        f"memory a worker, MiB: {cell}": [memory(pids["workers"]) / cell.workers],
        f"memory of what runs beside, MiB: {cell}": [sum(map(resident, pids["beside"]))],
        f"series in Prometheus: {cell}": [series],
    }


def recycles(name: str, plan: Plan) -> Iterator[Figures]:
    """Each request ends a worker, until enough have been replaced: what has grown, and what a scrape takes then."""
    with System(name, workers=4, series=200, interval=15, eager=True, options=["--max-requests=1"]) as system:
        _rest(system)
        before, started = _kept(system), system.started
        ends_at = time.monotonic() + plan.recycling
        while (left := started + plan.recycles - system.started) > 0 and time.monotonic() < ends_at:
            some = ["-n", str(max(min(left, AT_ONCE), 4)), "-c", "4", "-t", "5", "-disable-keepalive"]
            subprocess.run([str(program("hey")), *some, system.url], capture_output=True, timeout=60, check=True)
        _rest(system)
        done, where = system.started - started, f"by {plan.recycles:,} recycles"
        yield {
            f"{what} {where}": [(after - first) * plan.recycles / done]
            for (what, after), first in zip(_kept(system).items(), before.values(), strict=True)
        }
        if system.contender.scraped:
            system.set_interval(5)  # which is the time that a scrape has, too
            wait_until(lambda: system.ask("min(min_over_time(up[10s]))"), within=60, what="all of them scraped")
            took = system.ask("sum(avg_over_time(scrape_duration_seconds[10s]))")
            assert took is not None, "no scrape"
            yield {
                f"one scrape of all workers, ms: 4 workers x 200 series, after {plan.recycles:,} recycles": [
                    took * 1000
                ]
            }
        assert left <= 0, f"{done} recycles in {plan.recycling:g} s: growth is scaled, and a scrape is after so many"


def _kept(system: System) -> dict[str, float]:
    beside = sum(map(resident, system.pids()["beside"]))
    return {"more on disk, MiB:": system.disk, "more memory of what runs beside, MiB:": beside}


def _rest(system: System) -> None:
    """Until all workers are there and no more are being started."""

    def quiet() -> bool:
        before = system.started
        time.sleep(0.5)
        return system.started == before and len(system.children()) == system.workers

    wait_until(quiet, within=30, what="workers at rest")


def guarded(measurements: Iterator[Figures]) -> tuple[Figures, str]:
    """The figures until the end, or until something failed; then, in one line, what."""
    figures: dict[str, Sequence[float]] = {}
    try:
        for some in measurements:
            figures |= some
    except FAILURES as error:
        return figures, reason(error)
    return figures, ""


def reason(error: Exception) -> str:
    """In one line why something was not measured."""
    if isinstance(error, subprocess.TimeoutExpired):  # whose text has the whole command, paths of this machine too
        first = f"{Path(error.cmd[0]).name} took more than {error.timeout:.0f} s"
    else:
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"{'not run' if isinstance(error, Unavailable) else 'failed'}: {first}"
