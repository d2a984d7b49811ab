"""prometheus_client's multiprocess mode: files that whichever worker is asked merges."""

from collections.abc import Mapping, MutableMapping
from typing import Any

from tests.bench.headtohead.contender import Contender, Instruments, Place


class _Multiprocess(Contender):
    title = "multiprocess mode"
    how = "prometheus_client's files, merged by whichever worker answers /metrics"
    each = False

    def environment(self, place: Place) -> Mapping[str, str]:
        files = place.directory / "files"
        files.mkdir(exist_ok=True)
        return {"PROMETHEUS_MULTIPROC_DIR": str(files)}

    def configure(self, place: Place, configuration: MutableMapping[str, Any]) -> None:
        from prometheus_client import multiprocess

        def child_exit(_server: Any, worker: Any) -> None:
            multiprocess.mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]

        configuration["child_exit"] = child_exit

    def instruments(self, place: Place) -> Instruments:
        from tests.bench.headtohead import client

        return client.instruments(place)

    def page(self) -> bytes:
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.multiprocess import MultiProcessCollector

        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


CONTENDER = _Multiprocess()
