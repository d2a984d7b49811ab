"""The WSGI applications of the end-to-end tests, hooks that start the worker, and a server of the standard library."""

import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import flask

import consul_prom

shop = flask.Flask("shop", static_folder=None)
worker = consul_prom.Worker(service="shop")


@shop.get("/pid")
def pid() -> str:
    return str(os.getpid())


@shop.get("/shop/<item>")
def item(item: str) -> str:
    time.sleep(0.01)  # some work, so that one worker cannot take all of a short burst
    return f"{item} by {os.getpid()}"


@shop.get("/stream")
def stream() -> flask.Response:
    def endless() -> Iterable[str]:
        while True:
            yield "x" * 10_000
            time.sleep(0.01)

    return flask.Response(endless())


@shop.get("/file")
def file() -> flask.Response:
    return flask.send_file(Path(__file__), mimetype="text/plain")


@shop.get("/fail")
def fail() -> str:
    raise LookupError("mine")


def bare(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["PATH_INFO"].encode() and str(os.getpid()).encode()]


app = consul_prom.wsgi.instrument(shop)
bare_app = consul_prom.wsgi.instrument(bare)


def post_worker_init(_worker: Any) -> None:
    """Gunicorn's hook, for ``-c python:tests.e2e.wsgi_app``."""
    worker.start()


def worker_exit(_server: Any, _worker: Any) -> None:
    """Gunicorn's hook, for ``-c python:tests.e2e.wsgi_app``."""
    worker.stop()


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_arguments: Any) -> None:
        pass


def main(address: str) -> None:
    """Serve the bare application until SIGTERM."""

    def end(_number: int, _frame: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, end)
    with (
        consul_prom.running(service="shop"),
        make_server(address, 8000, bare_app, handler_class=_Quiet) as server,
    ):
        server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1])
