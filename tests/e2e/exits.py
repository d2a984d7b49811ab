"""Ends processes in every way, and tells when their entries are gone, counted from the end, and who removed them."""

import http.client
import os
import re
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, Self

from tests.services.consul import Consul
from tests.services.gunicorn import Gunicorn
from tests.services.waiting import wait_until

WORKERS = 2
MAX_REQUESTS = 40
DEADLINE = 60.0
LOGGING = """
import logging
logging.basicConfig(level="INFO", format="%(process)d %(name)s: %(message)s")
"""
"""A gunicorn.conf.py: who removes an entry says so."""


class Gone(NamedTuple):
    """*after*: seconds from the process' end to its entry's; what is less than 0 came first."""

    after: float
    layer: str


class Watch:
    """What becomes of the workers that live now, and of their entries."""

    def __init__(self, consul: Consul, server: Gunicorn) -> None:
        self.server = server
        self.consul = consul
        found = entries(consul)
        self.entry_of = {pid: key for key, pid in workers_of(found).items()}
        self.pids = sorted(self.entry_of)
        self._log_from = server.log.stat().st_size
        self._handles = {pid: os.pidfd_open(pid) for pid in self.pids}
        self._ended: dict[int, float] = {}
        self._gone: dict[int, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles.values():
            os.close(handle)

    def until_ended(self) -> None:
        """Until all of them have ended, whatever they leave."""

        def ended() -> bool:
            self.look()
            return len(self._ended) == len(self.pids)

        wait_until(ended, within=DEADLINE, every=0.005, what="their end")

    def until_gone(self, count: int) -> list[Gone]:
        """Until *count* of them have ended, and no entry names one of those."""

        def gone() -> bool:
            self.look()
            return len(self._ended) >= count and set(self._ended) <= set(self._gone)

        try:
            wait_until(gone, within=DEADLINE, every=0.005, what="their entries gone")
        except AssertionError as error:
            log = f"ended {self._ended}, gone {self._gone}, of {self.entry_of}\n{self._log()[-5000:]}"
            raise AssertionError(f"{error}: {log}") from None
        return [Gone(self._gone[pid] - ended, self._layer(pid)) for pid, ended in self._ended.items()]

    def look(self) -> None:
        """Note who has ended, and whose entry is gone."""
        for pid, handle in self._handles.items():
            if pid not in self._ended and select.select([handle], [], [], 0)[0]:
                self._ended[pid] = time.monotonic()
        named, now = {entry["Meta"]["pid"] for entry in entries(self.consul).values()}, time.monotonic()
        for pid in self.pids:
            if pid not in self._gone and str(pid) not in named:
                self._gone[pid] = now

    def _layer(self, pid: int) -> str:
        own, log = re.escape(self.entry_of[pid]), self._log()
        if re.search(rf"^{pid} consul_prom\.[\w.]+: deregistered {own}$", log, re.MULTILINE):
            return "worker"
        found = re.search(rf"^\d+ consul_prom\.(gunicorn\.reaper|worker\.leader): removed {own}:", log, re.MULTILINE)
        return {"gunicorn.reaper": "master", "worker.leader": "caretaker"}[found[1]] if found else "successor"

    def _log(self) -> str:
        return self.server.log.read_text(errors="replace")[self._log_from :]

    def ask(self, path: str) -> threading.Thread:
        """A request that may never be answered."""

        def ask() -> None:
            with suppress(OSError, http.client.HTTPException, AssertionError):
                self.server.get(path, timeout=DEADLINE)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        return asking


Act = Callable[[Watch], object]


class Exit(NamedTuple):
    """*act* makes *number* workers end; *clean*: each may say farewell itself."""

    act: Act
    number: int = 1
    clean: bool = True


def to_worker(number: int) -> Act:
    return lambda watch: os.kill(watch.pids[0], number)


def to_master(number: int) -> Act:
    return lambda watch: os.kill(watch.server.pid, number)


def scale_down(watch: Watch) -> None:
    """One less, and one more for the next exit."""
    os.kill(watch.server.pid, signal.SIGTTOU)

    def fewer() -> bool:
        watch.look()
        return len(watch.server.workers()) < WORKERS

    wait_until(fewer, within=DEADLINE, every=0.005, what="one worker less")
    os.kill(watch.server.pid, signal.SIGTTIN)


def wear_out(watch: Watch) -> None:
    for _ in range(4 * MAX_REQUESTS):
        with suppress(OSError, http.client.HTTPException):
            watch.server.call("/pid", timeout=5)
        watch.look()


def stand_still(watch: Watch) -> None:
    """As a loop that is blocked does, whatever the model."""
    os.kill(watch.pids[0], signal.SIGSTOP)


def fail_at_boot(watch: Watch) -> None:
    """A worker that cannot start ends the server."""
    (watch.server.directory / "boom").touch()
    os.kill(watch.pids[0], signal.SIGKILL)


def in_flight(watch: Watch) -> None:
    """Requests that take longer than the graceful time-out."""
    for _ in range(4 * WORKERS):
        watch.ask("/nap?seconds=50")
    time.sleep(0.5)  # they shall have arrived
    os.kill(watch.server.pid, signal.SIGTERM)


def upgrade(watch: Watch) -> None:
    os.kill(watch.server.pid, signal.SIGUSR2)
    wait_until(
        lambda: len(workers_of(entries(watch.consul))) == 2 * WORKERS, within=DEADLINE, what="the new master's workers"
    )
    os.kill(watch.server.pid, signal.SIGQUIT)


OF_WORKERS = {
    "TERM to worker": Exit(to_worker(signal.SIGTERM)),
    "INT to worker": Exit(to_worker(signal.SIGINT)),
    "QUIT to worker": Exit(to_worker(signal.SIGQUIT)),
    "ABRT to worker": Exit(to_worker(signal.SIGABRT), clean=False),
    "kill -9 of worker": Exit(to_worker(signal.SIGKILL), clean=False),
    "time-out of worker": Exit(stand_still, clean=False),
    "max_requests": Exit(wear_out),
    "TTOU": Exit(scale_down),
    "HUP": Exit(to_master(signal.SIGHUP), WORKERS),
}
OF_MASTERS = {
    "TERM to master": Exit(to_master(signal.SIGTERM), WORKERS),
    "INT to master": Exit(to_master(signal.SIGINT), WORKERS),
    "QUIT to master": Exit(to_master(signal.SIGQUIT), WORKERS),
    "kill -9 of master": Exit(to_master(signal.SIGKILL), WORKERS),
    "failure at boot": Exit(fail_at_boot, WORKERS, clean=False),
    "request in flight": Exit(in_flight, WORKERS, clean=False),
    "USR2 and QUIT": Exit(upgrade, WORKERS),
}


def entries(consul: Consul) -> dict[str, dict[str, Any]]:
    status, found = consul.call("/v1/agent/services")
    assert status == 200
    return {key: entry for key, entry in found.items() if entry["Service"] == "shop-metrics"}


def workers_of(found: dict[str, dict[str, Any]]) -> dict[str, int]:
    """The processes of the entries, without the masters' page and those that only serve another's last."""
    live = {key: entry for key, entry in found.items() if "adopted" not in entry["Meta"]}
    return {key: int(entry["Meta"]["pid"]) for key, entry in live.items() if not key.endswith(".master")}
