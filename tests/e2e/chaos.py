"""Random faults, from a seed, on a real Gunicorn, a real Consul and a real Prometheus, while clients ask."""

import http.client
import itertools
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from consul_prom.consul.registration import is_worker
from consul_prom.generate import scrape_config
from consul_prom.settings.settings import load
from tests.services.consul import Consul
from tests.services.gunicorn import HOOKS, Gunicorn
from tests.services.prometheus import Prometheus
from tests.services.proxy import NONE, Fault, Proxy, answer
from tests.services.waiting import wait_until

WORKERS = 8
TOKEN = "6f1c2c5e-0b52-4f8e-9d3b-2f6d8c1a7e44"
PACE = 0.02
BROKEN = ConnectionResetError, BrokenPipeError, http.client.IncompleteRead
BEFORE, AFTER = 3.0, 0.5
"""Seconds around a worker's end in which it drops connections: idle ones when it begins to stop, which takes
STOP_TIMEOUT longer while the agent hangs, the others when it ends."""


@contextmanager
def meanwhile(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """*work* goes on in a thread, until its event is set."""
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@dataclass
class Clients:
    """A client that asks all the time; `failures` are (time, error)."""

    shop: Gunicorn
    failures: list[tuple[float, Exception]] = field(default_factory=list)
    asked: int = 0

    def asking(self) -> AbstractContextManager[None]:
        return meanwhile(self._ask)

    def _ask(self, over: threading.Event) -> None:
        while not over.wait(PACE):
            self.asked += 1
            try:
                self.shop.get("/fire", timeout=20)
            except Exception as error:  # noqa: BLE001  # whatever a client sees counts
                self.failures.append((time.monotonic(), error))


@dataclass
class Ends:
    """When workers really ended, whatever was the reason: `at`."""

    shop: Gunicorn
    at: list[float] = field(default_factory=list)

    def noted(self) -> AbstractContextManager[None]:
        return meanwhile(self._note)

    def _note(self, over: threading.Event) -> None:
        before = self.shop.workers()
        while not over.wait(PACE):
            now = {pid for pid in before | self.shop.workers() if Path(f"/proc/{pid}").exists()}
            self.at += [time.monotonic()] * len(before - now)
            before = now

    def excuse(self, when: float) -> bool:
        """Whether the end of a worker may explain that a client was disappointed."""
        return any(end - BEFORE < when < end + AFTER for end in self.at)


class Chaos:
    """The stage and what can go wrong on it; with an even seed, Gunicorn has our hooks."""

    def __init__(self, seed: int, *, enabled: bool) -> None:
        self._hooks = HOOKS if seed % 2 == 0 else ()
        self.random = random.Random(seed)
        self.enabled = enabled
        self.done: list[str] = []
        self.extra = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        enter = self._stack.enter_context
        self.consul = enter(Consul(dev=False))
        self.proxy = enter(Proxy(self.consul.url))
        settings = {
            "CONSUL_HTTP_ADDR": self.proxy.url,
            "CONSUL_HTTP_TOKEN": TOKEN,
            "CONSUL_PROM_DISABLED": str(not self.enabled).lower(),
        }
        self.shop = enter(Gunicorn(workers=WORKERS, settings=settings, options=[*self._hooks, "--timeout=60"]))
        scrape = scrape_config.prometheus(load({"service": "shop", "consul_http_addr": self.consul.url}, environ={}))
        self.prometheus = enter(Prometheus(scrape))
        self.clients = Clients(self.shop)
        self.ends = Ends(self.shop)
        self.calm()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def calm(self) -> None:
        """Wait until the entries are those of the live workers, one each, beside the caretaker's pages."""
        if self.enabled:
            try:
                wait_until(self.settled, within=150, what="an entry a worker")
            except AssertionError as error:
                entries = {key: entry["Meta"]["pid"] for key, entry in self.entries().items()}
                story = f"{self.done}\nentries {entries}\nworkers {self.shop.workers()}"
                raise AssertionError(f"{error}\n{story}\n{self.shop.log.read_text()[-5000:]}") from None

    def settled(self) -> bool:
        metas = [entry["Meta"] for entry in self.entries().values()]
        found = [int(meta["pid"]) for meta in metas if is_worker(meta)]
        live = self.shop.workers()
        return len(found) == len(set(found)) == len(live) == WORKERS and set(found) == live

    def targets(self) -> list[str]:
        """The instances of Prometheus' targets, each that is not up with the reason."""
        return sorted(
            target["labels"]["instance"] + (f" {target['lastError']}" if target["health"] != "up" else "")
            for target in self.prometheus.targets()
        )

    def entries(self) -> dict[str, dict[str, Any]]:
        status, found = self.consul.call("/v1/agent/services")
        assert status == 200
        return {key: entry for key, entry in found.items() if entry["Service"] == "shop-metrics"}

    def rage(self, seconds: float) -> None:
        """One thing after the other goes wrong for so long; then the number of workers is as at first."""
        ends = time.monotonic() + seconds
        faults: list[Callable[[], None]] = [
            *(self.kill_worker, self.kill_agent, self.reload, self.more, self.fewer),
            *(self.hang, self.reset, self.refuse, self.deregister, self.confuse),
        ]
        with self.ends.noted(), self.clients.asking():
            for step in itertools.count():
                if time.monotonic() > ends:
                    break
                fault = faults[step] if step < len(faults) else self.random.choice(faults)
                if (fault == self.more and self.extra >= 2) or (fault == self.fewer and self.extra <= -2):
                    continue
                fault()
                self.done.append(fault.__name__)
                time.sleep(self.random.uniform(0.3, 2))  # how long the fault is left to work, not a wait for something
            self.proxy.fault = NONE
            while self.extra:
                (self.fewer if self.extra > 0 else self.more)()
            self.calm()

    def tell(self, number: signal.Signals) -> None:
        """A signal to the master, which two of a kind would reach as one."""
        os.kill(self.shop.pid, number)
        wait_until(lambda: not self._pending(number), within=10, what=f"{number.name} delivered", every=0.001)

    def _pending(self, number: signal.Signals) -> bool:
        status = Path(f"/proc/{self.shop.pid}/status").read_text(encoding="ascii")
        found = re.search(r"^ShdPnd:\s*([0-9a-f]+)$", status, re.MULTILINE)
        assert found
        return bool(int(found[1], 16) >> (number - 1) & 1)

    def kill_worker(self) -> None:
        """SIGKILL of a worker."""
        with suppress(ProcessLookupError):
            os.kill(self.random.choice(sorted(self.shop.workers())), signal.SIGKILL)

    def kill_agent(self) -> None:
        """SIGKILL of the agent, which comes back with its data."""
        self.consul.kill()
        time.sleep(self.random.uniform(0, 2))
        self.consul.start()

    def reload(self) -> None:
        """SIGHUP, with which Gunicorn also goes back to the number of workers that it was started with."""
        before = self.shop.workers()
        self.tell(signal.SIGHUP)
        self.extra = 0
        wait_until(lambda: not before & self.shop.workers(), within=60, what="new workers")

    def more(self) -> None:
        """One worker more."""
        self.tell(signal.SIGTTIN)
        self.extra += 1

    def fewer(self) -> None:
        """One worker less."""
        self.tell(signal.SIGTTOU)
        self.extra -= 1

    def hang(self) -> None:
        """The agent takes what is asked and does not answer."""
        self.proxy.fault = Fault(hang=True)

    def reset(self) -> None:
        """The agent's answers break off."""
        self.proxy.fault = Fault(reset_after=self.random.randrange(200))

    def refuse(self) -> None:
        """The agent cannot be reached."""
        self.proxy.fault = Fault(refuse=True)

    def confuse(self) -> None:
        """Something else answers in the agent's stead; then all is well."""
        self.proxy.fault = Fault(answer=answer(200, "<html>Welcome</html>"))
        time.sleep(self.random.uniform(0, 1))
        self.proxy.fault = NONE

    def deregister(self) -> None:
        """Somebody removes an entry."""
        self.proxy.fault = NONE
        found = sorted(self.entries())
        if found:
            self.consul.call(f"/v1/agent/service/deregister/{self.random.choice(found)}", method="PUT")

    def unexcused(self) -> list[tuple[float, Exception]]:
        """The failures of clients that are no broken connections, or that no end of a worker explains."""
        return [
            (when, error)
            for when, error in self.clients.failures
            if not (isinstance(error, BROKEN) and self.ends.excuse(when))
        ]
