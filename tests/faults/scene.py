"""A worker behind a proxy of its own, on a real agent, and what it goes through."""

import logging
import re
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prometheus_client import CollectorRegistry

from consul_prom import Worker
from tests.services.consul import Consul
from tests.services.proxy import NONE, Fault, Proxy
from tests.services.waiting import wait_until

GOAL = 2.0
"""Seconds from the end of a fault of less than a minute to its repair; a test waits ten times as long."""

LOGGER = logging.getLogger("consul_prom.consul")

READ = r"^GET \S*/v1/agent/service/(?!.*[?&]hash=)"
WATCH = r"^GET \S*/v1/agent/service/.*[?&]hash="
REGISTER = r"^PUT \S*/v1/agent/service/register"
DEREGISTER = r"^PUT \S*/v1/agent/service/deregister/"

Document = dict[str, Any]


class Scene:
    """A context manager: the worker is started, and stopped in the end, when no fault is left.

    It has the *fault* from the start; if it is to be *registered*, that is waited for.
    `lines` are the records of what the registrar logged about it, given that `LOGGER` lets it.
    """

    def __init__(
        self,
        consul: Consul,
        directory: Path,
        host: str = "web-1",
        *,
        proxy: Proxy | None = None,
        fault: Fault = NONE,
        registered: bool = True,
        **arguments: Any,
    ) -> None:
        self.consul = consul
        self.host = host
        self.proxy = proxy or Proxy(consul.url)
        self.registry = CollectorRegistry()
        self.lines: list[logging.LogRecord] = []
        self.worker: Worker
        self._fault = fault
        self._registered = registered
        self._arguments = {"service": "shop", "host": host, "dir": directory / "slots", **arguments}
        self._handler = _Collector(self.lines, host)

    def __enter__(self) -> Self:
        self.proxy.__enter__()
        LOGGER.addHandler(self._handler)
        try:
            self.worker = Worker(
                registry=self.registry,
                **{"consul_http_addr": self.proxy.url, **self._arguments},
            )
            self.proxy.fault = self._fault
            self.worker.start()
            if self._registered:
                wait_until(self.settled, within=20, what=f"{self.host} registered")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.proxy.fault = NONE
        self.worker.stop()
        LOGGER.removeHandler(self._handler)
        self.proxy.__exit__(kind, error, tb)

    @property
    def entry_id(self) -> str:
        return f"shop.{self.host}.{self._slot}"

    @property
    def entry(self) -> Document | None:
        """What the agent has, asked behind the proxy's back."""
        status, found = self.consul.call(f"/v1/agent/service/{self.entry_id}")
        return found if status == 200 else None

    @property
    def trouble(self) -> str:
        """Why it is not registered."""
        life = self.worker._life
        assert life, f"{self.host} does not run"
        return life.tenancy.trouble

    @property
    def messages(self) -> list[str]:
        return [record.getMessage() for record in self.lines]

    @property
    def warnings(self) -> list[str]:
        """All but those that a failure is over."""
        loud = [record.getMessage() for record in self.lines if record.levelno >= logging.WARNING]
        return [line for line in loud if "is registered again" not in line]

    @property
    def failures(self) -> dict[str, float]:
        """Failed talks with the agent, by reason."""
        return self._counts("consul_prom_sync_failures_total")

    @property
    def registrations(self) -> dict[str, float]:
        """Registrations, by reason."""
        return self._counts("consul_prom_registrations_total")

    def settled(self) -> bool:
        """Whether the agent has what the worker is, with one check, and the worker knows it."""
        _, found = self.consul.call(f"/v1/agent/health/service/id/{self.entry_id}")
        entry, checks = found["Service"], found["Checks"]
        if not entry or [check["Notes"].partition(" ")[0] for check in checks] != ["GET"]:
            return False
        address = f"[{entry['Address']}]" if ":" in entry["Address"] else entry["Address"]
        same_place = f"http://{address}:{entry['Port']}/metrics" == self.worker.url
        if not same_place or entry["Service"] != "shop-metrics" or "consul-prom" not in entry["Tags"]:
            return False
        return self.worker.registered  # asked last: it is not from before a repair is written until that is told

    def lose(self) -> None:
        """Deregister the entry, as somebody else would."""
        status, _ = self.consul.call(f"/v1/agent/service/deregister/{self.entry_id}", method="PUT")
        assert status in {200, 404}

    def strike(self, fault: Fault) -> None:
        """From now on the fault, on new connections, and the entry is lost."""
        self.proxy.fault = fault
        if not fault.cut:
            self.proxy.drop()
        self.lose()

    def _counts(self, name: str) -> dict[str, float]:
        return {
            sample.labels["reason"]: sample.value
            for metric in self.registry.collect()
            for sample in metric.samples
            if sample.name == name
        }

    @property
    def _slot(self) -> int:
        return 0 if self.worker.slot is None else self.worker.slot


class _Collector(logging.Handler):
    def __init__(self, lines: list[logging.LogRecord], host: str) -> None:
        super().__init__()
        self._lines = lines
        self._about = re.compile(rf"shop\.{re.escape(host)}\.\d")

    def emit(self, record: logging.LogRecord) -> None:
        if self._about.search(record.getMessage()):
            self._lines.append(record)


def repair(scenes: Iterable[Scene], *, within: float = 10 * GOAL) -> dict[Scene, float]:
    """Wait until all are settled, and tell after how many seconds each was."""
    begun, took, waiting = time.monotonic(), dict[Scene, float](), list(scenes)

    def all_settled() -> bool:
        for scene in [scene for scene in waiting if scene.settled()]:
            took[scene] = time.monotonic() - begun
            waiting.remove(scene)
        assert not waiting, f"{[(scene.host, scene.worker, scene.messages) for scene in waiting]}"
        return True

    wait_until(all_settled, within=within, what="what the agent has is what lives", every=0.01)
    return took
