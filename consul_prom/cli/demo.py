"""The whole story: Gunicorn with four workers, a naive page that lies, and four targets that do not.

Everything is real but the Consul agent, which is the embedded one. Nothing outlives the demo.
"""

import http.client
import json
import os
import re
import signal
import site
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, Final, NamedTuple, Self, TypeVar

from consul_prom.cli.console import Screen
from consul_prom.consul.registration import origin
from consul_prom.devagent import DevAgent, running
from consul_prom.errors import DemoError
from consul_prom.generate import scrape_config
from consul_prom.settings.settings import child_environment, load

T = TypeVar("T")

WORKERS: Final = 4
REQUESTS: Final = 30
START_DEADLINE: Final = 15.0
TAKE_OVER_DEADLINE: Final = 10.0
STOP_DEADLINE: Final = 5.0
CALL_TIMEOUT: Final = 2.0
TICK: Final = 0.05

APPLICATION: Final = """\
from aiohttp import web
from prometheus_client import Counter, generate_latest

import consul_prom

REQS = Counter("reqs", "Requests.", ["view"])


async def fire(request):
    REQS.labels("fire").inc()
    return web.Response(text="fire")


async def naive(request):  # for comparison: what one had before
    return web.Response(body=generate_latest())


async def get_application():
    app = web.Application()
    app.router.add_get("/fire", fire)
    app.router.add_get("/metrics", naive)
    consul_prom.setup(app, service="shop")
    return app
"""


class Target(NamedTuple):
    """A worker as Consul tells it to Prometheus, with what its page says."""

    instance: str
    pid: int
    address: str
    port: int
    requests: int

    @property
    def url(self) -> str:
        return f"{origin(self.address, self.port)}/metrics"


def run(*, keep: bool = False, screen: Screen) -> None:
    """The demo; with *keep* its parts then run on until a signal.

    Raises:
        DemoError: something was not as it should be.
        KeyboardInterrupt: a signal ended it early.
    """
    if find_spec("gunicorn") is None:
        raise DemoError("the demo needs Gunicorn: pip install gunicorn")
    with _Signals() as signals, ExitStack() as parts:
        directory = Path(parts.enter_context(TemporaryDirectory(prefix="consul-prom-demo-")))
        agent = parts.enter_context(running())
        server = parts.enter_context(_Gunicorn(directory, agent))
        story = _Story(screen, agent, server, signals.check)
        try:
            story.start()
            story.count()
            story.kill()
            story.configure()
            if keep:
                story.keep()
        except (OSError, http.client.HTTPException, DemoError) as error:
            raise DemoError(f"{error}\n{server.last_words()}") from error


class _Story:
    """What is shown, in order. *check* is called between all steps; it raises where a signal came."""

    def __init__(self, screen: Screen, agent: DevAgent, server: "_Gunicorn", check: Callable[[], None]) -> None:
        self._screen = screen
        self._agent = agent
        self._server = server
        self._check = check
        self._targets: list[Target] = []

    def start(self) -> None:
        self._screen.say("An aiohttp application; what consul-prom needs of it is one line:")
        self._screen.verbatim('    consul_prom.setup(app, service="shop")')
        with self._screen.waiting(
            f"Starting gunicorn --workers={WORKERS} --worker-class=aiohttp.GunicornWebWorker ..."
        ):
            self._until(lambda: len(self._discover()) == WORKERS, START_DEADLINE, f"{WORKERS} workers registered")

    def count(self) -> None:
        with self._screen.progress("Requests sent to /fire", total=REQUESTS) as advance:
            for _ in range(REQUESTS):
                self._check()
                _get(self._server.url, "/fire")  # a connection each, so that any worker may get it
                advance()
        naive = [_requests(_get(self._server.url, "/metrics")) for _ in range(3)]
        self._screen.say()
        self._screen.say("A naive /metrics is answered by whichever worker is free. Asked three times, it says:")
        self._screen.verbatim("".join(f'    reqs_total{{view="fire"}} {count}\n' for count in naive))
        self._targets = self._discover()
        self._screen.say()
        self._screen.say("consul-prom makes each worker a target of its own, which Prometheus finds in Consul:")
        self._show(self._targets)
        total = sum(target.requests for target in self._targets)
        self._screen.say(f'sum(reqs_total{{view="fire"}}) = {total}', style="bold")
        if total != REQUESTS or len(self._targets) != WORKERS:
            raise DemoError(f"{REQUESTS} requests were sent, and {len(self._targets)} targets counted {total}.")

    def kill(self) -> None:
        victim = max(self._targets, key=lambda target: target.requests)
        self._screen.say()
        with self._screen.waiting(f"Killing the worker {victim.instance}: kill -9 {victim.pid} ..."):
            begun = time.monotonic()
            self._server.kill(victim.pid)
            successor = self._until(lambda: self._successor(victim), TAKE_OVER_DEADLINE, "the slot was taken over")
            assert successor  # noqa: S101  # `_until` gives nothing that is false
            seconds = time.monotonic() - begun
        self._screen.say(
            f"After {seconds:.1f} s Gunicorn's next worker has its slot: {victim.instance} is pid {successor.pid} "
            f"at port {successor.port} now, and nothing in Consul names pid {victim.pid} any more:"
        )
        now = self._discover()
        self._show(now)
        heir = victim._replace(pid=successor.pid, port=successor.port)
        if now != [target if target != victim else heir for target in self._targets]:
            raise DemoError(f"That is not as it should be; before it was {self._targets}.")
        total = sum(target.requests for target in now)
        self._screen.say(
            f"The {victim.requests} requests that it had counted live on in its slot's ledger, a mapped file, and its "
            f"successor goes on from there: the sum is still {total}."
        )

    def configure(self) -> None:
        settings = load({"service": "shop", "consul_http_addr": self._agent.url}, environ={})
        self._screen.say()
        self._screen.say("All that Prometheus needs (consul-prom config prometheus --service shop):")
        self._screen.say()
        self._screen.verbatim(scrape_config.prometheus(settings))
        self._screen.say()
        self._screen.say('    sum without (instance) (rate(reqs_total{job="shop"}[1m]))')

    def keep(self) -> None:
        self._screen.say()
        self._screen.say("All of this runs on until Ctrl-C:")
        urls = {"application": f"{self._server.url}/fire", "naive page": f"{self._server.url}/metrics"}
        urls["Consul"] = f"{self._agent.url}/v1/health/service/shop-metrics"
        urls.update({target.instance: target.url for target in self._discover()})
        width = max(map(len, urls))
        self._screen.verbatim("\n".join(f"    {name.ljust(width)}  {url}" for name, url in urls.items()))
        with suppress(KeyboardInterrupt):
            while True:
                self._check()
                self._server.check()
                time.sleep(TICK)

    def _show(self, targets: Sequence[Target]) -> None:
        columns = ("instance", "pid", "port", "requests")
        rows = [(target.instance, target.pid, target.port, target.requests) for target in targets]
        self._screen.table(columns, rows, numbers=columns[1:])

    def _discover(self) -> list[Target]:
        """As Prometheus does: what has the name in Consul, each with its own page."""
        found = json.loads(_get(self._agent.url, "/v1/health/service/shop-metrics"))
        return sorted(_target(entry["Service"]) for entry in found)

    def _successor(self, victim: Target) -> Target | None:
        return next((it for it in self._discover() if it.instance == victim.instance and it.pid != victim.pid), None)

    def _until(self, condition: Callable[[], T], deadline: float, what: str) -> T:
        ends_at = time.monotonic() + deadline
        while True:
            self._check()
            self._server.check()
            with suppress(OSError, http.client.HTTPException):  # a dead worker's endpoint may still be named
                result = condition()
                if result:
                    return result
            if time.monotonic() > ends_at:
                raise DemoError(f"It was not within {deadline:g} s that {what}.")
            time.sleep(TICK)


class _Gunicorn:
    """Gunicorn with the demo's application, on a free port; ended with all its workers."""

    def __init__(self, directory: Path, agent: DevAgent) -> None:
        self._directory = directory
        self._agent = agent
        self._log = directory / "gunicorn.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def __enter__(self) -> Self:
        (self._directory / "app.py").write_text(APPLICATION, encoding="utf-8")
        ours = {"CONSUL_HTTP_ADDR": self._agent.url, "CONSUL_PROM_DIR": str(self._directory / "slots")}
        environment = child_environment({**ours, "PYTHONDONTWRITEBYTECODE": "1"})
        package = str(Path(__file__).parents[2])
        if package not in (*site.getsitepackages(), site.getusersitepackages()):  # it runs from where it lies
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
        with socket.create_server(("127.0.0.1", 0)) as listener, self._log.open("wb") as log:
            self.url = origin(*listener.getsockname())
            self._process = subprocess.Popen(  # noqa: S603  # all of it is ours
                (
                    *(sys.executable, "-m", "gunicorn", "app:get_application", f"--bind=fd://{listener.fileno()}"),
                    *(f"--workers={WORKERS}", "--worker-class=aiohttp.GunicornWebWorker", "--graceful-timeout=2"),
                    *("--no-control-socket", f"--worker-tmp-dir={self._directory}"),
                ),
                cwd=self._directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(listener.fileno(),),
                start_new_session=True,  # a terminal's Ctrl-C is ours to pass on
            )
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._process is None:
            return
        pid, ends_at = self._process.pid, time.monotonic() + STOP_DEADLINE
        os.kill(pid, signal.SIGTERM)
        # Not reaped before its group was killed, so that the group's number cannot be another's by then.
        while time.monotonic() < ends_at and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(TICK)
        os.killpg(pid, signal.SIGKILL)
        self._process.wait()

    def kill(self, pid: int) -> None:
        """SIGKILL for one of its workers; anybody may tell a pid to an agent without ACLs."""
        if self._process is None or os.getpgid(pid) != self._process.pid:
            raise DemoError(f"The process {pid} that the agent names is none of Gunicorn's workers.")
        os.kill(pid, signal.SIGKILL)

    def check(self) -> None:
        if self._process and os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            raise DemoError("Gunicorn ended.")

    def last_words(self) -> str:
        """Of its log what matters: from the first error on, else the end."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        first = next((number for number, line in enumerate(lines) if "[ERROR]" in line), max(len(lines) - 20, 0))
        return "\n".join(("Gunicorn's log:", *lines[first : first + 40]))


class _Signals:
    """Notes the signals that end a program; `check` raises KeyboardInterrupt, so at places where that is harmless."""

    def __init__(self) -> None:
        self._caught = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        if self._caught:
            raise KeyboardInterrupt

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._caught = True


def _get(url: str, path: str) -> str:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=CALL_TIMEOUT)
    with closing(connection):
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        body = response.read().decode()
    if response.status != http.client.OK:
        raise DemoError(f"{url}{path} answered {response.status}: {body[:200]}")
    return body


def _requests(page: str) -> int:
    """Of a page in Prometheus' text format; a worker that got no request yet has no such line."""
    found = re.search(r'^reqs_total\{view="fire"\} (\S+)$', page, re.MULTILINE)
    return int(float(found[1])) if found else 0


def _target(service: dict[str, Any]) -> Target:
    address, port, meta = service["Address"], service["Port"], service["Meta"]
    return Target(meta["instance"], int(meta["pid"]), address, port, _requests(_get(origin(address, port), "/metrics")))
