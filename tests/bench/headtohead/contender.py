"""What a contender is: a few lines for the bench, a few for Gunicorn's master, and a few for each worker.

Its worker's half runs in a venv that may hold little, so that nothing is imported at the top but the standard library.
"""

import importlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

BOUNDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
"""Of all histograms, in seconds: with +Inf, sum and count that is `A_HISTOGRAM` series."""
A_HISTOGRAM: Final = len(BOUNDS) + 3
GUNICORN: Final = "gunicorn==27.0.1"
_PLACE: Final = "HEADTOHEAD"


class Unavailable(Exception):
    """The contender cannot be had on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a contender runs: an address of its own, on which all ports are free, and a directory."""

    contender: str
    address: str
    directory: Path
    series: int

    @classmethod
    def here(cls) -> "Place":
        """The one that the bench has put this process into."""
        fields = json.loads(os.environ[_PLACE])
        return cls(**{**fields, "directory": Path(fields["directory"])})

    def environment(self) -> dict[str, str]:
        fields = {"contender": self.contender, "address": self.address, "series": self.series}
        return {_PLACE: json.dumps({**fields, "directory": str(self.directory)})}

    @property
    def counters(self) -> int:
        """How many there are, of one name: half of the series."""
        return self.series // 2

    @property
    def histograms(self) -> int:
        """How many there are, of one name: the other half of the series."""
        return max(self.series // 2 // A_HISTOGRAM, 1)

    @property
    def notes(self) -> Path:
        """What the bench writes for itself."""
        return self.directory / "bench"

    @property
    def interval(self) -> float:
        """Seconds between two scrapes, which the bench may change; who pushes does it as often."""
        return float((self.notes / "interval").read_text(encoding="ascii"))

    def set_interval(self, seconds: float) -> None:
        (self.notes / "interval").write_text(str(seconds), encoding="ascii")


class Instruments(NamedTuple):
    """What the application counts with: the `inc` of each counter, the `observe` of each histogram.

    *born* counts the start of a worker, by its number.
    """

    counters: Sequence[Callable[[], Any]]
    histograms: Sequence[Callable[[float], Any]]
    born: Callable[[str], Any]


class Helper(NamedTuple):
    """A program beside the workers; ready when *path* answers 200, or when it listens."""

    program: str
    arguments: Sequence[str]
    port: int
    path: str = ""


class Contender:
    """One way to do it; all that is not said here is what most do."""

    title: ClassVar[str]
    how: ClassVar[str]
    """One line for the reader."""
    requirements: ClassVar[tuple[str, ...]] = ()
    """A venv of its own has these; without any it is the bench's."""
    libraries: ClassVar[tuple[str, ...]] = ("prometheus_client",)
    """What Gunicorn's master imports, so that the workers share it."""
    each: ClassVar[bool] = True
    """Whether Prometheus has the series of each worker, and not of all together."""
    scraped: ClassVar[bool] = True
    flags: ClassVar[tuple[str, ...]] = ()
    """Prometheus'."""

    # In the bench

    def helpers(self, place: Place) -> Sequence[Helper]:
        return ()

    def environment(self, place: Place) -> Mapping[str, str]:
        return {}

    def prometheus(self, place: Place) -> Mapping[str, Any]:
        """Its configuration."""
        return {"scrape_configs": [static("shop", f"{place.address}:8000")]}

    # In Gunicorn's master

    def configure(self, place: Place, configuration: MutableMapping[str, Any]) -> None:
        """Add hooks."""

    # In each worker

    def instruments(self, place: Place) -> Instruments:
        raise NotImplementedError

    def page(self) -> bytes:
        """What the application answers at /metrics."""
        return b""

    def start(self, place: Place, number: int) -> None:
        """After the fork, once the application is loaded."""

    def stop(self) -> None:
        """Before the process ends."""


class Pusher(Contender):
    """Who pushes as often as others are scraped, at the start and at the end."""

    _ended: threading.Event
    _thread: threading.Thread

    def push(self) -> None:
        raise NotImplementedError

    def start(self, place: Place, number: int) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._push_on, args=[place], daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _push_on(self, place: Place) -> None:
        due = time.monotonic()
        while not self._ended.wait(max(due - time.monotonic(), 0)):
            self._try()
            due = max(due, time.monotonic() - place.interval) + place.interval
        self._try()

    def _try(self) -> None:
        with suppress(OSError):  # refused or late: the next one tells as much
            self.push()


def static(job: str, *targets: str) -> dict[str, Any]:
    """A scrape configuration."""
    return {"job_name": job, "static_configs": [{"targets": list(targets)}]}


def load(name: str) -> Contender:
    """The contender of the module of that name."""
    module = importlib.import_module(f"tests.bench.headtohead.contenders.{name}")
    contender: Contender = module.CONTENDER
    return contender
