"""The application that all contenders serve, and Gunicorn's configuration: both halves of ``-c python:… serve:app``."""

import importlib
import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

from tests.bench.headtohead.contender import Instruments, Place, load

PLACE = Place.here()
CONTENDER = load(PLACE.contender)
for library in CONTENDER.libraries:
    importlib.import_module(library)

bind = f"{PLACE.address}:8000"
worker_class = "sync"


def post_fork(_server: Any, worker: Any) -> None:
    """Gunicorn's hook: a worker's start begins here."""
    (PLACE.notes / f"forked-{worker.age}").write_text(str(time.time()), encoding="ascii")


def post_worker_init(worker: Any) -> None:
    """Gunicorn's hook, once the application is loaded."""
    CONTENDER.start(PLACE, worker.age)
    worker.wsgi.instruments.born(str(worker.age))


def worker_exit(_server: Any, worker: Any) -> None:
    """Gunicorn's hook."""
    if worker.booted:
        CONTENDER.stop()


class Application:
    """Counts one hit and one time a request, of another item each time; made in the worker."""

    def __init__(self) -> None:
        self.instruments: Instruments = CONTENDER.instruments(PLACE)
        self._hits = itertools.cycle(self.instruments.counters)
        self._seconds = itertools.cycle(self.instruments.histograms)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            body = CONTENDER.page()
        elif path == "/cost":
            body = self._cost(parse_qs(environ["QUERY_STRING"]))
        else:
            begun = time.perf_counter()
            body = b"".join(b"%d\n" % (number * number) for number in range(500))  # some work
            next(self._hits)()
            next(self._seconds)(time.perf_counter() - begun)
        start_response("200 OK", [("Content-Type", "text/plain; version=0.0.4"), ("Content-Length", str(len(body)))])
        return [body]

    def _cost(self, query: dict[str, list[str]]) -> bytes:
        """Seconds of one call of an instrument, beyond an empty loop."""
        times = range(int(query["times"][0]))
        if query["what"] == ["inc"]:
            inc = self.instruments.counters[0]
            begun = time.perf_counter()
            for _ in times:
                inc()
        else:
            observe = self.instruments.histograms[0]
            begun = time.perf_counter()
            for _ in times:
                observe(0.03)
        ended = time.perf_counter()
        for _ in times:
            pass
        return str((2 * ended - begun - time.perf_counter()) / len(times)).encode()


def app() -> Application:
    """What Gunicorn calls for the application, ``serve:app()``."""
    return Application()


CONTENDER.configure(PLACE, globals())
