"""prometheus_async's web server in a thread of each worker; Prometheus reads the ports from files.

Its own registration in Consul gives all workers one ID.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.bench.headtohead.contender import Contender, Instruments, Place


class _AsyncServer(Contender):
    title = "prometheus_async server"
    how = "a web server in each worker; we write its port into a file for Prometheus"
    libraries = ("prometheus_client", "prometheus_async.aio.web")

    _file: Path

    def prometheus(self, place: Place) -> Mapping[str, Any]:
        files = f"{place.directory}/targets/*.json"
        return {"scrape_configs": [{"job_name": "shop", "file_sd_configs": [{"files": [files]}]}]}

    def environment(self, place: Place) -> Mapping[str, str]:
        (place.directory / "targets").mkdir(exist_ok=True)
        return {}

    def instruments(self, place: Place) -> Instruments:
        from tests.bench.headtohead import client

        return client.instruments(place)

    def start(self, place: Place, number: int) -> None:
        from prometheus_async.aio.web import start_http_server_in_thread

        server = start_http_server_in_thread(addr=place.address)
        fresh = place.directory / f"targets/{number}.new"
        fresh.write_text(json.dumps([{"targets": [f"{place.address}:{server.socket.port}"]}]), encoding="ascii")
        self._file = fresh.rename(fresh.with_suffix(".json"))

    def stop(self) -> None:
        self._file.unlink()


CONTENDER = _AsyncServer()
