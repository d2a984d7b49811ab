"""What counting costs: in the ledger, in prometheus_client's memory, and in its multiprocess mode.

    python -m tests.bench.hotpath [rounds]

Each figure is of a fresh process, the three ways in turn; the ratio is of neighbours in time. Median and spread.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from typing import Final

WAYS: Final = ("memory", "ledger", "multiprocess")
BIRTHS: Final = 2000
MEASURE: Final = """
import json, os, sys, time
from pathlib import Path
way, directory, incs = sys.argv[1], sys.argv[2], int(sys.argv[3])
if way == "multiprocess":
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
from prometheus_client import CollectorRegistry, Counter, Histogram
registry = CollectorRegistry()
if way == "ledger":
    from consul_prom.ledger.registry import LedgerRegistry
    from consul_prom.ledger.file import Ledger
    LedgerRegistry(registry, Ledger.take_over(Path(directory, "shop.0.ledger"), boot="b", instance="web-1:0"))
counter, histogram = Counter("c", "-", registry=registry), Histogram("h", "-", registry=registry)
counters = Counter("cs", "-", ["method", "route"], registry=registry)
histograms = Histogram("hs", "-", ["method", "route"], registry=registry)
def timed(count, act):
    best = float("inf")
    for batch in range(5):
        begun = time.perf_counter()
        act(count // 5, batch)
        best = min(best, (time.perf_counter() - begun) / (count // 5))
    return best * 1e6
def inc(count, _):
    inc = counter.inc
    for _ in range(count):
        inc()
def observe(count, _):
    observe = histogram.observe
    for _ in range(count):
        observe(0.3)
def birth(parent):
    def act(count, batch):
        for number in range(count):
            parent.labels("GET", f"/{batch}/{number}")
    return act
births = int(sys.argv[4])
print(json.dumps({"inc": timed(incs, inc), "observe": timed(incs, observe),
                  "birth of a counter": timed(births, birth(counters)),
                  "birth of a histogram": timed(births // 4, birth(histograms))}))
"""


def main(rounds: int, *, incs: int = 200_000, births: int = BIRTHS) -> None:
    """Print microseconds a way, and how the ledger compares."""
    runs: list[dict[str, dict[str, float]]] = []
    for _ in range(rounds):
        runs.append({})
        for way in WAYS:
            with tempfile.TemporaryDirectory() as directory:
                command = [sys.executable, "-c", MEASURE, way, directory, str(incs), str(births)]
                runs[-1][way] = json.loads(subprocess.check_output(command, text=True))
    print(f"{'us':22}" + "".join(f"{way:>22}" for way in WAYS) + f"{'ledger/memory':>22}{'ledger/multiprocess':>22}")
    for what in runs[0]["memory"]:
        times = [_spread([run[way][what] for run in runs]) for way in WAYS]
        ratios = [
            _spread([run["ledger"][what] / run[other][what] for run in runs]) for other in ("memory", "multiprocess")
        ]
        print(f"{what:22}" + "".join(f"{text:>22}" for text in times + ratios))


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
