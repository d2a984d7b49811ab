"""How large a directory gets: workers that each count label sets of their own, one after the other, in one slot.

python -m tests.bench.growth [--lives=10000] [--sets=3]
"""

import argparse
import tempfile
import time
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram

from consul_prom.ledger.file import Ledger, ledger_path
from consul_prom.ledger.registry import LedgerRegistry


def live(path: Path, life: int, sets: int) -> float:
    """One worker's life; the seconds that its take-over took."""
    registry = CollectorRegistry()
    hits = Counter("hits", "-", ["route"], registry=registry)
    took = Histogram("took", "-", ["route"], registry=registry)
    begun = time.perf_counter()
    ledger = Ledger.take_over(path, boot="b", instance="web-1:0")
    seconds = time.perf_counter() - begun
    continued = LedgerRegistry(registry, ledger)
    for number in range(sets):
        hits.labels(f"/{life}/{number}").inc()
    took.labels(f"/{life}").observe(1)
    continued.close()
    return seconds


def main(lives: int, sets: int) -> None:
    """Print the size on disk and the time of a take-over, as the lives go by."""
    print(f"{'lives':>8}{'series ever':>13}{'KiB on disk':>13}{'take-over, ms':>15}")
    with tempfile.TemporaryDirectory() as folder:
        path = ledger_path(Path(folder), "shop", 0)
        for life in range(1, lives + 1):
            seconds = live(path, life, sets)
            if life in {1, 10, 100, 1000} or life % 2000 == 0:
                size = sum(file.stat().st_blocks for file in Path(folder).iterdir()) / 2
                print(f"{life:8}{life * (sets + 1):13}{size:13.0f}{1000 * seconds:15.1f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.growth")
    parser.add_argument("--lives", type=int, default=10_000)
    parser.add_argument("--sets", type=int, default=3, help="new label sets of a counter a life, beside a histogram's")
    given = parser.parse_args()
    main(given.lives, given.sets)
