"""The instruments of those that count with prometheus_client."""

from prometheus_client import Counter, Histogram

from tests.bench.headtohead.contender import BOUNDS, Instruments, Place


def instruments(place: Place) -> Instruments:
    """In the default registry, all of them made."""
    hits = Counter("work_hits", "Hits by item.", ["item"])
    seconds = Histogram("work_seconds", "Seconds by item.", ["item"], buckets=BOUNDS)
    births = Counter("worker_births", "Starts of workers.", ["number"])
    return Instruments(
        counters=[hits.labels(str(item)).inc for item in range(place.counters)],
        histograms=[seconds.labels(str(item)).observe for item in range(place.histograms)],
        born=lambda number: births.labels(number).inc(),
    )
