"""The statsd client, a datagram for each increment and observation, and the real statsd_exporter."""

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from tests.bench.headtohead.contender import BOUNDS, GUNICORN, Contender, Helper, Instruments, Place, static

MAPPING = f"""
defaults: {{observer_type: histogram, histogram_options: {{buckets: {list(BOUNDS)}}}}}
mappings:
- {{match: "hits.*", name: work_hits_total, labels: {{item: $1}}}}
- {{match: "seconds.*", name: work_seconds, labels: {{item: $1}}}}
- {{match: "births.*", name: worker_births_total, labels: {{number: $1}}}}
"""


class _Statsd(Contender):
    title = "statsd → statsd_exporter"
    how = "a datagram each time; one exporter keeps the sums"
    requirements = (GUNICORN, "statsd==4.0.1")
    libraries = ("statsd",)
    each = False

    def helpers(self, place: Place) -> Sequence[Helper]:
        mapping = place.directory / "mapping.yml"
        mapping.write_text(MAPPING, encoding="ascii")
        listen = [f"--statsd.listen-udp={place.address}:9125", "--statsd.listen-tcp=", "--log.level=error"]
        options = [f"--statsd.mapping-config={mapping}", f"--web.listen-address={place.address}:9102", *listen]
        return [Helper("statsd_exporter", options, 9102, "/-/ready")]

    def environment(self, place: Place) -> Mapping[str, str]:
        return {"STATSD": place.address}

    def prometheus(self, place: Place) -> Mapping[str, Any]:
        return {"scrape_configs": [static("shop", f"{place.address}:9102")]}

    def instruments(self, place: Place) -> Instruments:
        from statsd import StatsClient

        client = StatsClient(os.environ["STATSD"], 9125)
        for first in range(0, max(place.counters, place.histograms), 100):  # so that all series are there
            with client.pipeline() as pipe:
                for item in range(first, min(first + 100, place.counters)):
                    pipe.incr(f"hits.{item}", 0)
                for item in range(first, min(first + 100, place.histograms)):
                    pipe.timing(f"seconds.{item}", 1)
            time.sleep(0.001)  # a datagram too many is lost
        return Instruments(
            counters=[partial(client.incr, f"hits.{item}") for item in range(place.counters)],
            histograms=[partial(_observe, client, f"seconds.{item}") for item in range(place.histograms)],
            born=lambda number: client.incr(f"births.{number}"),
        )


def _observe(client: Any, name: str, seconds: float) -> None:
    client.timing(name, seconds * 1000)


CONTENDER = _Statsd()
