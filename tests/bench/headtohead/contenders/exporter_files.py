"""gunicorn-prometheus-exporter with files, under Gunicorn 23: its last release does not start under 27."""

from collections.abc import Mapping, MutableMapping
from typing import Any, Final

from tests.bench.headtohead.contender import Contender, Instruments, Place, static

REQUIREMENTS: Final[tuple[str, ...]] = ("gunicorn==23.0.0", "gunicorn-prometheus-exporter==0.2.4")


class Exporter(Contender):
    title = "gunicorn-prometheus-exporter, files"
    how = "Gunicorn 23 with its own worker class; the master merges the files"
    requirements = REQUIREMENTS
    libraries = ()
    each = False
    ready_hook = "default_when_ready"

    def environment(self, place: Place) -> Mapping[str, str]:
        files = place.directory / "files"
        files.mkdir(exist_ok=True)
        return {
            "PROMETHEUS_MULTIPROC_DIR": str(files),
            "PROMETHEUS_BIND_ADDRESS": place.address,
            "PROMETHEUS_METRICS_PORT": "9091",
            "GUNICORN_WORKERS": "4",
        }

    def prometheus(self, place: Place) -> Mapping[str, Any]:
        return {"scrape_configs": [static("shop", f"{place.address}:9091")]}

    def configure(self, place: Place, configuration: MutableMapping[str, Any]) -> None:
        from gunicorn_prometheus_exporter import hooks

        configuration.update(
            worker_class="gunicorn_prometheus_exporter.PrometheusWorker",
            on_starting=hooks.default_on_starting,
            when_ready=getattr(hooks, self.ready_hook),
            worker_int=hooks.default_worker_int,
            on_exit=hooks.default_on_exit,
        )

    def instruments(self, place: Place) -> Instruments:
        from tests.bench.headtohead import client

        return client.instruments(place)


CONTENDER = Exporter()
