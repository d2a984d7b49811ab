"""Run all contenders on the same work and write the table and the chart.

python -m tests.bench.headtohead [--quick] [--only ours,multiprocess] [--into FOLDER]

In one run, and in turn: first what one `inc` and one `observe` cost, then each server of `plan`, then the recycling.
Needs Linux, Go, and for two contenders Debian's packages redis-server and prometheus-pushgateway; what cannot be had
is a line that says so. About 25 minutes on two cores, with --quick two.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

from tests.bench import bytecode
from tests.bench.headtohead.chart import svg
from tests.bench.headtohead.measure import Figures, cell, costs, guarded, recycles
from tests.bench.headtohead.plan import CONTENDERS, FULL, QUICK, Plan
from tests.bench.headtohead.report import Results, machine, markdown

FOLDER: Final = Path(__file__).parents[1] / "results"


def run(names: Sequence[str], plan: Plan) -> Results:
    """All of the plan."""
    bytecode.prepare()
    results, begun, turns = Results(names), time.monotonic(), list[str]()

    def turn(part: str, measure: Callable[[str], Iterator[Figures]], *, at_once: int = 1) -> None:
        def one(name: str) -> None:
            figures, reason = guarded(measure(name))
            results.add(name, part, figures, reason)
            print(f"{time.monotonic() - begun:6.0f} s  {part:28} {name:20} {reason or _brief(figures)}", flush=True)

        first = len(turns) * 2 % len(names)  # nobody is always first, whatever the machine does at that time
        turns.append(part)
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(one, [*names[first:], *names[:first]]))

    for name, figures, reason in costs(names, plan):
        results.add(name, "cost of a call", figures, reason)
    for one in plan.cells:
        turn(str(one), partial(cell, one, plan=plan))
    if plan.recycles:
        turn("recycles", lambda name: recycles(name, plan), at_once=2)  # Gunicorn mostly sleeps between two forks
    results.even()
    return results


def write(results: Results, into: Path, *, head: str) -> None:
    """headtohead.md and headtohead.svg."""
    into.mkdir(parents=True, exist_ok=True)
    (into / "headtohead.md").write_text(markdown(results, head=head), encoding="utf-8")
    (into / "headtohead.svg").write_text(svg(results, head=head), encoding="utf-8")


def _brief(figures: Figures) -> str:
    first = {row: values for row, values in figures.items() if row.startswith(("CPU of everything", "more on disk"))}
    return ", ".join(f"{row.split(',')[0]} {sum(values) / len(values):.3g}" for row, values in first.items())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.headtohead")
    parser.add_argument("--quick", action="store_true", help="a trial of everything, in two minutes")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, parted by commas")
    parser.add_argument("--into", type=Path, default=FOLDER, help="where the table and the chart are written")
    options = parser.parse_args()
    busy = os.getloadavg()[0]
    results = run(options.only.split(","), QUICK if options.quick else FULL)
    head = f"{machine()}; load average before {busy:.1f}{'; QUICK, a trial only' if options.quick else ''}"
    write(results, options.into, head=head)
    print(markdown(results, head=head))


if __name__ == "__main__":
    main()
