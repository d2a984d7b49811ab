"""OpenTelemetry's SDK, which pushes OTLP over HTTP to Prometheus' own receiver."""

import math
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from tests.bench.headtohead.contender import BOUNDS, GUNICORN, Instruments, Place, Pusher

VERSION = "1.45.2"
MANY = 100_000
"""Of attribute sets an instrument; by default there are 2,000, and one more for all others."""


class _OpenTelemetry(Pusher):
    title = "OpenTelemetry → OTLP"
    how = "each worker pushes to Prometheus' receiver as often as others are scraped"
    requirements = (GUNICORN, f"opentelemetry-sdk=={VERSION}", f"opentelemetry-exporter-otlp-proto-http=={VERSION}")
    libraries = ("opentelemetry.sdk.metrics.export", "opentelemetry.exporter.otlp.proto.http.metric_exporter")
    scraped = False
    flags = ("--web.enable-otlp-receiver",)

    _provider: Any

    def environment(self, place: Place) -> Mapping[str, str]:
        return {"RECEIVER": f"http://{place.address}:9090/api/v1/otlp/v1/metrics", "OTEL_SERVICE_NAME": "shop"}

    def prometheus(self, place: Place) -> Mapping[str, Any]:
        return {"scrape_configs": [], "otlp": {"promote_resource_attributes": ["service.instance.id"]}}

    def instruments(self, place: Place) -> Instruments:
        """Made in the worker, since the resource names the process."""
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource

        reader = PeriodicExportingMetricReader(
            OTLPMetricExporter(os.environ["RECEIVER"]),
            export_interval_millis=math.inf,  # we push
            cardinality_limits={Counter: MANY, Histogram: MANY},
        )
        resource = Resource.create({"service.instance.id": str(os.getpid())})
        self._provider = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        meter = self._provider.get_meter("work")
        hits, births = meter.create_counter("work_hits"), meter.create_counter("worker_births")
        seconds = meter.create_histogram("work_seconds", unit="s", explicit_bucket_boundaries_advisory=BOUNDS)
        items = [{"item": str(item)} for item in range(max(place.counters, place.histograms))]
        for item in items[: place.counters]:
            hits.add(0, item)
        for item in items[: place.histograms]:
            seconds.record(0.001, item)
        return Instruments(
            counters=[partial(hits.add, 1, item) for item in items[: place.counters]],
            histograms=[partial(seconds.record, attributes=item) for item in items[: place.histograms]],
            born=lambda number: births.add(1, {"number": number}),
        )

    def push(self) -> None:
        self._provider.force_flush()


CONTENDER = _OpenTelemetry()
