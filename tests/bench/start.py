"""How soon a worker is registered, how soon it is scraped, and how soon it has a slot that the caretaker had adopted.

    python -m tests.bench.start [rounds]

Seconds from `start()` of a new worker, under a Prometheus that runs already, by our snippet; and seconds from a
newborn's wish for a slot to its having it, in a Gunicorn that grows again after it has shrunk: median and spread.
"""

import os
import signal
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry

from consul_prom import Worker
from consul_prom.generate import scrape_config
from consul_prom.settings.settings import load
from consul_prom.slots.slots import path_of
from tests.services.consul import Consul
from tests.services.gunicorn import HOOKS, Gunicorn
from tests.services.prometheus import Prometheus
from tests.services.waiting import wait_until

WORKERS: Final = 8
FEWER: Final = 4


def main(rounds: int) -> None:
    """Print the figures."""
    registered, scraped = [], []
    with Consul() as consul, tempfile.TemporaryDirectory() as directory:
        scrape = scrape_config.prometheus(load({"service": "shop", "consul_http_addr": consul.url}, environ={}))
        with Prometheus(scrape):
            for _ in range(rounds):
                seconds = _one(consul.url, f"{directory}/slots")
                registered.append(seconds[0])
                scraped.append(seconds[1])
    with Consul() as consul:
        adopted = _newborns(consul, rounds)
    for name, values in (("registered", registered), ("first scrape", scraped), ("adopted slot", adopted)):
        print(f"{name:14}{statistics.median(values):8.3f} s ({min(values):.3f}-{max(values):.3f}), {len(values)} times")


def _one(agent: str, directory: str) -> tuple[float, float]:
    registry = CollectorRegistry()
    worker = Worker(registry=registry, service="shop", consul_http_addr=agent, dir=directory)
    begun = time.monotonic()
    worker.start()
    wait_until(lambda: worker.registered, within=30, what="registered", every=0.001)
    registered = time.monotonic() - begun
    scrapes = "consul_prom_scrapes_total"
    wait_until(lambda: registry.get_sample_value(scrapes), within=60, what="a scrape", every=0.01)
    scraped = time.monotonic() - begun
    worker.stop()
    return registered, scraped


def _newborns(consul: Consul, rounds: int) -> list[float]:
    """Of some workers each round; one that took a slot that was not the smallest would keep the next from beginning."""
    found: list[float] = []
    settings = {"CONSUL_PROM_SERVICE": "shop", "CONSUL_HTTP_ADDR": consul.url, "CONSUL_PROM_ADDRESS": consul.address}
    with (
        Gunicorn("tests.e2e.plain:aiohttp_app", workers=WORKERS, settings=settings, options=HOOKS) as shop,
        ThreadPoolExecutor(FEWER) as pool,
    ):
        for _ in range(rounds):
            wait_until(lambda: _slots(consul, adopted=False) == [*range(WORKERS)], within=60, what="the workers")
            _signal(shop, signal.SIGTTOU)
            wait_until(lambda: len(_slots(consul, adopted=True)) == FEWER, within=60, what="adopted slots")
            paths = [path_of(shop.directory / "slots", "shop", slot) for slot in _slots(consul, adopted=True)]
            waiting = [pool.submit(_wish, path) for path in paths]
            _signal(shop, signal.SIGTTIN)
            found += [one.result() for one in waiting]
    return found


def _signal(shop: Gunicorn, number: int) -> None:
    for _ in range(FEWER):
        os.kill(shop.pid, number)
        time.sleep(0.1)  # Gunicorn takes one at a time


def _slots(consul: Consul, *, adopted: bool) -> list[int]:
    entries: dict[str, Any] = consul.call("/v1/agent/services")[1]
    slots = [one["Meta"]["slot"] for one in entries.values() if ("adopted" in one["Meta"]) == adopted]
    return sorted(int(slot) for slot in slots if slot.isdecimal())


def _wish(path: Path) -> float:
    """Return the seconds from the note of a wish to that of the newborn, or between the looks that saw neither."""
    begun = time.monotonic()

    def taken() -> bool:
        nonlocal begun
        now, note = time.monotonic(), path.read_text(encoding="ascii")
        if "adopted" in note and "wanted" not in note:
            begun = now
        return bool(note) and "adopted" not in note

    wait_until(taken, within=60, what="a newborn", every=0.0005)
    return time.monotonic() - begun


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
