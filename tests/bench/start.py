"""How soon a worker is registered, and how soon it is scraped: a real Consul, a real Prometheus, our snippet.

    python -m tests.bench.start [rounds]

Seconds from `start()` of a new worker, under a Prometheus that runs already: median and spread.
"""

import statistics
import sys
import tempfile
import time

from prometheus_client import CollectorRegistry

from consul_prom import Worker, snippets
from consul_prom.settings import load
from tests.services.consul import Consul
from tests.services.prometheus import Prometheus
from tests.services.waiting import wait_until


def main(rounds: int) -> None:
    """Print both figures."""
    registered, scraped = [], []
    with Consul() as consul, tempfile.TemporaryDirectory() as directory:
        scrape = snippets.prometheus(load({"service": "shop", "consul_http_addr": consul.url}, environ={}))
        with Prometheus(scrape):
            for _ in range(rounds):
                seconds = _one(consul.url, f"{directory}/slots")
                registered.append(seconds[0])
                scraped.append(seconds[1])
    for name, values in (("registered", registered), ("first scrape", scraped)):
        print(f"{name:14}{statistics.median(values):8.3f} s ({min(values):.3f}-{max(values):.3f}), {rounds} rounds")


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


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
