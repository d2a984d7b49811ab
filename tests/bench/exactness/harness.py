"""How exactly each way counts, against the application's own truth: real Gunicorn, real Consul, two real Prometheus.

    python -m tests.bench.exactness [--requests=3000] [--interval=1] [scenario or way ...]

Counted are the raw samples of each series: its first value and its positive steps. Beside it, what `increase` and a
plain sum say at the end, by how much the plain sum ever fell, for how many seconds of the run it was lower than before,
and what the ledgers hold.
"""

import http.client
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from consul_prom.generate import scrape_config
from consul_prom.ledger.file import read
from consul_prom.settings.settings import load
from tests.services.consul import Consul
from tests.services.gunicorn import Gunicorn
from tests.services.prometheus import Prometheus
from tests.services.waiting import wait_until

WAYS: Final = ("ledger", "multiprocess", "port")
PACE: Final = 100.0
CLIENTS: Final = 8
MOST: Final = 1_000_000


@dataclass(frozen=True)
class Scenario:
    """What happens to the server while it is asked: each of *acts* in turn, *every* so many seconds.

    *ends*: it is stopped for good afterwards. *settings* are consul-prom's.
    """

    name: str
    every: float = 5.0
    acts: tuple[Callable[["Stage"], None], ...] = ()
    options: tuple[str, ...] = ()
    workers: int = 4
    sync: bool = False
    ends: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """Of one way in one scenario; the errors are counted less truth."""

    truth: int
    answered: int
    counted: tuple[int, int]
    observed: tuple[int, int]
    increase: float
    plain: float
    fall: float
    low: int
    saved: int

    @property
    def errors(self) -> tuple[int, int]:
        return self.counted[0] - self.truth, self.counted[1] - self.truth


class _Script(Gunicorn):
    """Started by its script, so that USR2 can start it anew."""

    def _arguments(self) -> Sequence[str]:
        _module, _name, *rest = super()._arguments()
        return [str(Path(sys.executable).with_name("gunicorn")), *rest]


class Stage:
    """The programs of a run."""

    def __init__(self, scenario: Scenario, way: str, *, interval: str) -> None:
        self.scenario, self.way = scenario, way
        self.random = random.Random(scenario.name)
        self._answers: list[int] = []  # of which threads may append at once
        self._interval = interval
        self._asked = iter(range(MOST))
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        enter = self._stack.enter_context
        self.consul = enter(Consul(dev=False))
        directory = Path(enter(tempfile.TemporaryDirectory()))
        self.truth = directory / "truth"
        self.truth.write_bytes(bytes(MOST))
        (directory / "multiprocess").mkdir()
        self._pidfile = directory / "pid"
        environ = {
            **self.scenario.settings,
            "CONSUL_HTTP_ADDR": self.consul.url,
            "CONSUL_PROM_ADDRESS": "127.0.0.1",
            "EXACTNESS_WAY": self.way,
            "EXACTNESS_TRUTH": str(self.truth),
            "EXACTNESS_HOST": "127.0.0.1",
        }
        if self.way == "multiprocess":
            environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory / "multiprocess")
        app, options = "sync" if self.scenario.sync else "get_application", self.scenario.options
        if self.way == "ledger":
            environ["CONSUL_PROM_SERVICE"] = "shop"
            options = (*options, "--config=python:consul_prom.gunicorn")
        self.shop = enter(
            _Script(
                f"tests.bench.exactness.app:{app}",
                workers=self.scenario.workers,
                worker_class="sync" if self.scenario.sync else "aiohttp.GunicornWebWorker",
                settings=environ,
                options=(*options, f"--pid={self._pidfile}"),
            )
        )
        self._stack.callback(self.end)
        self.servers = [enter(Prometheus(self._scrape(), interval=self._interval)) for _ in range(2)]
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def _scrape(self) -> Any:
        if self.way == "multiprocess":
            return [{"job_name": "shop", "static_configs": [{"targets": [f"{self.shop.address}:8000"]}]}]
        if self.way == "port":
            found = {"server": self.consul.url.removeprefix("http://"), "services": ["shop-metrics"]}
            return [{"job_name": "shop", "consul_sd_configs": [{**found, "refresh_interval": "1s"}]}]
        return scrape_config.prometheus(load({"service": "shop", "consul_http_addr": self.consul.url}, environ={}))

    @contextmanager
    def asking(self) -> Iterator[None]:
        over = threading.Event()
        threads = [threading.Thread(target=self._ask, args=(over,)) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def _ask(self, over: threading.Event) -> None:
        while not over.wait(CLIENTS / PACE):
            with suppress(OSError, http.client.HTTPException):
                if self.shop.call(f"/count/{next(self._asked)}")[0] == 200:
                    self._answers.append(1)

    @property
    def master(self) -> int:
        """The process id of Gunicorn's master, which an upgrade changes."""
        return int(self._pidfile.read_text(encoding="ascii"))

    def workers(self, master: int = 0) -> list[int]:
        pid = master or self.master
        return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()))

    def upgrade(self) -> None:
        """USR2 starts another master beside the first, QUIT ends that."""
        old, another = self.master, self._pidfile.with_name("pid.2")
        os.kill(old, signal.SIGUSR2)
        wait_until(another.exists, within=30, what="another master")
        new = int(another.read_text(encoding="ascii"))
        wait_until(lambda: len(self.workers(new)) == self.scenario.workers, within=30, what="its workers")
        time.sleep(2)  # they are up, as an operator would see to
        os.kill(old, signal.SIGTERM)
        wait_until(lambda: not lives(old), within=30, what="the old one's end")

    def end(self) -> None:
        """Stop the server for good, whichever master it has by now."""
        with suppress(OSError, ValueError):
            master = self.master
            os.kill(master, signal.SIGTERM)
            wait_until(lambda: not lives(master), within=40, what="its end")

    @property
    def answered(self) -> int:
        return len(self._answers)

    def counted_truth(self) -> int:
        return self.truth.read_bytes().count(1)

    def saved(self) -> int:
        """What the ledgers hold."""
        paths = (self.shop.directory / "slots").glob("*.ledger")
        return int(
            sum(
                series.values[0]
                for contents in map(read, paths)
                if contents
                for series in contents.series
                if series.family.name == "hits"
            )
        )


def run(scenario: Scenario, way: str, requests: int, *, interval: int = 1) -> Result:
    """One way in one scenario, until so many requests were answered and every live worker was scraped since."""
    with Stage(scenario, way, interval=f"{interval}s") as stage:
        wait_until(lambda: all(_up(server) for server in stage.servers), within=150, what="targets")
        begun = time.monotonic()
        with stage.asking():
            act_at, acts = begun + scenario.every, itertools.cycle(scenario.acts)
            while stage.answered < requests:
                time.sleep(0.05)
                if scenario.acts and time.monotonic() > act_at:
                    next(acts)(stage)
                    act_at += scenario.every
        if scenario.ends:
            stage.end()
        time.sleep(12 + 3 * interval)  # a worker that has just begun is a target within 9 s, and then it is scraped
        window = f"[{int(time.monotonic() - begun + 60)}s]"
        fall, low = _falls(stage.servers[0], f"sum(hits_total){window[:-1]}:1s]")
        return Result(
            truth=stage.counted_truth(),
            answered=stage.answered,
            counted=_both([_steps(server, f"hits_total{window}") for server in stage.servers]),
            observed=_both([_steps(server, f"took_seconds_count{window}") for server in stage.servers]),
            increase=stage.servers[0].query_value(f"sum(increase(hits_total{window}))") or 0.0,
            plain=stage.servers[0].query_value("sum(hits_total)") or 0.0,
            fall=fall,
            low=low,
            saved=stage.saved() if way == "ledger" else 0,
        )


def _up(server: Prometheus) -> bool:
    targets = server.targets()
    return bool(targets) and all(target["health"] == "up" for target in targets)


def _steps(server: Prometheus, selector: str) -> int:
    total = 0.0
    for series in server.query(selector):
        before = 0.0
        for _, text in series["values"]:
            value = float(text)
            total += value - before if value >= before else value
            before = value
    return int(total)


def _falls(server: Prometheus, query: str) -> tuple[float, int]:
    """By how much the values of a range ever fell from the highest before, and how many were lower than that."""
    highest, fall, low = 0.0, 0.0, 0
    for series in server.query(query):
        for _, text in series["values"]:
            highest = max(highest, float(text))
            fall = max(fall, highest - float(text))
            low += float(text) < highest
    return fall, low


def _both(numbers: Sequence[int]) -> tuple[int, int]:
    first, second = numbers
    return first, second


def kill_worker(stage: Stage) -> None:
    with suppress(ProcessLookupError):
        os.kill(stage.random.choice(stage.workers()), signal.SIGKILL)


def reload(stage: Stage) -> None:
    os.kill(stage.master, signal.SIGHUP)


def down_and_up(stage: Stage) -> None:
    before = len(stage.workers())
    for _ in range(4):
        os.kill(stage.master, signal.SIGTTOU if before > 4 else signal.SIGTTIN)
        time.sleep(0.1)  # Gunicorn takes one at a time


def kill_all(stage: Stage) -> None:
    pids = [stage.master, *stage.workers()]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    stage.shop.kill()
    wait_until(lambda: not any(map(lives, pids)), within=10, what="their end")
    stage.shop.start()


def restart(stage: Stage) -> None:
    stage.shop.stop(within=30)
    stage.shop.start()


def wipe(stage: Stage) -> None:
    shutil.rmtree(stage.shop.directory / "slots", ignore_errors=True)  # a newborn may be at it


def lives(pid: int) -> bool:
    with suppress(OSError):
        return "Z" not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2]
    return False


RECYCLING: Final = ("--max-requests=200", "--max-requests-jitter=50")
SCENARIOS: Final = (
    Scenario("steady"),
    Scenario("recycling", options=RECYCLING),
    Scenario("sync, recycling", options=RECYCLING, sync=True),
    Scenario("short lives", options=("--max-requests=15",)),
    Scenario("kill -9", acts=(kill_worker,)),
    Scenario("kill -9 + recycling", acts=(kill_worker,), options=RECYCLING),
    Scenario("HUP", every=10, acts=(reload,)),
    Scenario("USR2", every=15, acts=(Stage.upgrade,)),
    Scenario("TTOU 8 to 4, back", every=9, acts=(down_and_up,), workers=8),
    Scenario("stop, start", every=12, acts=(restart,)),
    Scenario("kill -9 of all", every=12, acts=(kill_all,)),
    Scenario("directory wiped", every=12, acts=(wipe,)),
    Scenario("stop for good", ends=True),
    Scenario("the same, LINGER=3s", ends=True, settings={"CONSUL_PROM_LINGER": "3s"}),
    Scenario("kill, recycle, HUP", every=3, acts=(kill_worker, reload, kill_worker), options=RECYCLING),
)


def main(names: Sequence[str], *, requests: int, interval: int) -> None:
    """Print the table."""
    print(f"{'scenario':22}{'way':14}{'truth':>7}{'answered':>9}{'error A':>9}{'error B':>9}{'observed':>9}", end="")
    print(f"{'increase':>10}{'sum':>9}{'fall':>7}{'low, s':>8}{'ledgers':>9}")
    scenarios = [scenario for scenario in SCENARIOS if scenario.name in names] or SCENARIOS
    ways = [way for way in WAYS if way in names] or WAYS
    for scenario, way in itertools.product(scenarios, ways):
        if way in {"ledger", *(() if scenario.sync else WAYS)}:  # the others' application is aiohttp's
            result = run(scenario, way, requests, interval=interval)
            print(f"{scenario.name:22}{way:14}{result.truth:7}{result.answered:9}", end="")
            print(f"{result.errors[0]:9}{result.errors[1]:9}{result.observed[0] - result.truth:9}", end="")
            print(f"{result.increase:10.0f}{result.plain:9.0f}{result.fall:7.0f}{result.low:8}", end="")
            print(f"{result.saved:9}", flush=True)
