"""A contender at work: Gunicorn with the application, the programs beside it, and a Prometheus."""

import http.client
import os
import signal
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, Self, TypeVar

import yaml

from tests.bench.headtohead.contender import Contender, Helper, Place, load
from tests.bench.headtohead.programs import program
from tests.bench.headtohead.venvs import python
from tests.services.program import Program, own_address
from tests.services.prometheus import Prometheus
from tests.services.waiting import wait_until

P = TypeVar("P", bound=Program)
ROOT: Final = Path(__file__).parents[3]
EAGER: Final = "--scrape.discovery-reload-interval=1s"
TICKS: Final = os.sysconf("SC_CLK_TCK")
OWN: Final = {"PYTHONPATH": str(ROOT), "PROMETHEUS_DISABLE_CREATED_SERIES": "true"}
"""`_created` would be a series more for each counter, of some contenders only."""


class _Beside(Program):
    """A helper."""

    def __init__(self, helper: Helper, place: Place) -> None:
        self.name = helper.program
        super().__init__(address=place.address, binary=program(helper.program), env=None)
        self.url = f"http://{place.address}:{helper.port}"
        self._helper = helper

    def _arguments(self) -> Sequence[str]:
        return self._helper.arguments

    def _ready(self) -> bool:
        try:
            if self._helper.path:
                return self.call(self._helper.path, timeout=2.0)[0] == 200
            with socket.create_connection((self.address, self._helper.port), timeout=2.0):
                return True
        except (OSError, http.client.HTTPException):
            return False


class _Server(Program):
    """Gunicorn."""

    name = "gunicorn"

    def __init__(self, contender: Contender, place: Place, options: Sequence[str]) -> None:
        environment = {**OWN, **place.environment(), **contender.environment(place)}
        super().__init__(address=place.address, binary=python(contender), env=environment)
        self.url = f"http://{place.address}:8000"
        self._options = options

    def _arguments(self) -> Sequence[str]:
        serve = "tests.bench.headtohead.serve"
        return [
            "-m",
            "gunicorn",
            f"--config=python:{serve}",
            "--timeout=120",
            "--log-level=warning",
            *self._options,
            f"{serve}:app()",
        ]

    def _ready(self) -> bool:
        try:
            return self.call("/", timeout=2.0)[0] == 200
        except (OSError, http.client.HTTPException):
            return False


class System:
    """A context manager. Without *scraped* there is no Prometheus; *eager* it looks for targets each second.

    *options* are Gunicorn's.

    Raises:
        Unavailable: something that the contender needs cannot be had.
    """

    def __init__(
        self,
        name: str,
        *,
        workers: int,
        series: int,
        interval: float = 1,
        scraped: bool = True,
        eager: bool = False,
        options: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.contender = load(name)
        self.workers = workers
        self._interval = interval
        self._scraped = scraped
        self._flags = [EAGER] if eager else []
        self._series = series
        self._options = [f"--workers={workers}", *options]
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{self.name}-")))
            self.place = Place(self.name, own_address(), directory, self._series)
            self.place.notes.mkdir()
            self.place.set_interval(self._interval)
            server = _Server(self.contender, self.place, self._options)
            self.beside = [self._start(_Beside(helper, self.place)) for helper in self.contender.helpers(self.place)]
            self.prometheus = self._start(self._prometheus()) if self._scraped else None
            self.server = self._start(server)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def started(self) -> int:
        """How many workers have been started until now."""
        return len(list(self.place.notes.glob("forked-*")))

    @property
    def disk(self) -> float:
        """MiB on disk that the contender has."""
        files = [path for path in self.place.directory.rglob("*") if path.parent != self.place.notes]
        return sum(file.stat().st_blocks for file in files if file.is_file()) * 512 / 2**20

    def pids(self) -> dict[str, list[int]]:
        """By part: the server with its workers, the programs beside it, Prometheus."""
        return {
            "workers": [self.server.pid, *self.children()],
            "beside": [helper.pid for helper in self.beside],
            "prometheus": [self.prometheus.pid] if self.prometheus else [],
        }

    def children(self) -> list[int]:
        """The workers."""
        pid = self.server.pid
        children: list[int] = []
        for thread in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (thread / "children").read_text(encoding="ascii").split())
        return children

    def birth(self) -> float:
        """Seconds from the start of one more worker until Prometheus has a sample of it."""
        number = self.started + 1
        os.kill(self.server.pid, signal.SIGTTIN)
        begun = self.place.notes / f"forked-{number}"
        wait_until(begun.exists, within=10, what="another worker", every=0.005)
        births = f'worker_births_total{{number="{number}"}}'
        wait_until(lambda: self.ask(births), within=60, what="its sample", every=0.01)
        return time.time() - float(begun.read_text(encoding="ascii"))

    def set_interval(self, seconds: float) -> None:
        """From now on Prometheus scrapes each so many *seconds*, or the workers push."""
        self.place.set_interval(seconds)
        assert self.prometheus
        configuration = self.prometheus.config
        configuration["global"] |= {"scrape_interval": f"{seconds:g}s"}
        file = self.prometheus.directory / "prometheus.yml"
        file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
        assert self.prometheus.call("/-/reload", method="POST")[0] == 200

    def ask(self, promql: str) -> float | None:
        """One value of Prometheus."""
        assert self.prometheus
        return self.prometheus.query_value(promql)

    @property
    def seen(self) -> float:
        """The share of the application's counters that Prometheus has."""
        count = self.place.counters * (self.workers if self.contender.each else 1)
        return (self.ask("count(work_hits_total)") or 0) / count

    def wait_seen(self, *, within: float) -> None:
        """Until Prometheus has all counters; who does not get there is measured as it is."""
        with suppress(AssertionError):
            wait_until(lambda: self.seen >= 1, within=within, what="all counters in Prometheus", every=0.1)

    def _start(self, one: P) -> P:
        self._stack.enter_context(one)
        return one

    def _prometheus(self) -> Prometheus:
        return Prometheus(
            self.contender.prometheus(self.place),
            interval=f"{self._interval:g}s",
            flags=["--web.enable-lifecycle", *self._flags, *self.contender.flags],
            address=self.place.address,
        )


def cpu(pids: Sequence[int]) -> float:
    """Seconds that the processes have used, all threads that have ended included."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def memory(pids: Sequence[int]) -> float:
    """MiB, each shared page divided among those that share it, as the workers do with their master."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024
