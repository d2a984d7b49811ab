"""The application that is counted, in one of three ways of telling Prometheus; and its own truth, beside them.

A request's number is marked in a shared file right after it was counted: what a killed worker counted, it marked too.
"""

import json
import mmap
import os
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

import consul_prom

WAY = os.environ["EXACTNESS_WAY"]
with Path(os.environ["EXACTNESS_TRUTH"]).open("r+b") as file:
    TRUTH = mmap.mmap(file.fileno(), 0)
HITS = Counter("hits", "-", ["view"])
TOOK = Histogram("took_seconds", "-", ["view"])


def count(number: int) -> None:
    view = f"v{number % 3}"
    HITS.labels(view).inc()
    TOOK.labels(view).observe(number % 7)
    TRUTH[number] = 1


def page() -> bytes:
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return bytes(generate_latest(registry))


def register() -> str:
    """The endpoint of a worker on a random port, with an entry of its own; its id."""
    host = os.environ["EXACTNESS_HOST"]
    server, _ = start_http_server(0, addr=host)
    port = server.server_port
    body = {"ID": f"shop-{port}", "Name": "shop-metrics", "Address": host, "Port": port}
    _put("register", body)
    return f"shop-{port}"


def _put(what: str, body: object = None) -> None:
    url = f"{os.environ['CONSUL_HTTP_ADDR']}/v1/agent/service/{what}"
    request = urllib.request.Request(url, json.dumps(body).encode(), method="PUT")
    urllib.request.urlopen(request, timeout=5).close()


async def get_application() -> web.Application:
    async def counted(request: web.Request) -> web.Response:
        count(int(request.match_info["number"]))
        return web.Response(text="counted")

    async def pid(_request: web.Request) -> web.Response:
        return web.Response(text=str(os.getpid()))

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(body=page(), headers={"Content-Type": "text/plain; version=0.0.4"})

    app = web.Application()
    app.add_routes([web.get("/count/{number}", counted), web.get("/pid", pid), web.get("/metrics", metrics)])
    if WAY == "ledger":
        consul_prom.setup(app, service="shop", request_metrics=False)
    if WAY == "port":
        entry = register()

        async def leave(_app: web.Application) -> None:
            _put(f"deregister/{entry}")

        app.on_shutdown.append(leave)
    return app


def sync(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """The same for Gunicorn's sync workers, which the hooks alone serve."""
    path = environ["PATH_INFO"]
    if path.startswith("/count/"):
        count(int(path.removeprefix("/count/")))
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"counted"]
