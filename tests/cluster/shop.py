"""A real Gunicorn beside the client agent of a cluster, and what must be true of it."""

import http.client
import os
import signal
import threading
import time
from functools import partial
from types import TracebackType
from typing import Any, Self

from tests.cluster.cluster import Cluster
from tests.services.consul import Consul
from tests.services.gunicorn import Gunicorn
from tests.services.waiting import wait_until

FOREIGN = {"ID": "shop-1", "Name": "shop", "Address": "127.0.0.1", "Port": 8000, "Tags": ["web"], "Meta": {"a": "b"}}


class Shop(Gunicorn):
    """Three workers that register with the agent of *cluster*, and an entry of somebody else's beside theirs."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(
            workers=3, settings={"CONSUL_HTTP_ADDR": cluster.agent.url, "CONSUL_PROM_CHECK_INTERVAL": "1s"}
        )
        self._cluster = cluster
        status, answer = cluster.agent.call("/v1/agent/service/register", method="PUT", body=FOREIGN)
        assert status == 200, answer

    def scale(self, by: int) -> None:
        """One worker more, or one less, and wait for it."""
        wanted = len(self.workers()) + by
        os.kill(self.pid, signal.SIGTTIN if by > 0 else signal.SIGTTOU)
        wait_until(lambda: len(self.workers()) == wanted, within=30, what=f"{wanted} workers")

    def entries(self) -> dict[str, dict[str, Any]]:
        """What the agent has of the workers; and it has the foreign entry as it was."""
        status, found = self._cluster.agent.call("/v1/agent/services", timeout=2)
        assert status == 200, found
        foreign = found.pop(FOREIGN["ID"])
        assert {key: foreign[key] for key in ("ID", "Address", "Port", "Tags", "Meta")} == {
            key: FOREIGN[key] for key in ("ID", "Address", "Port", "Tags", "Meta")
        }
        return dict(found)

    def settled(self) -> bool:
        """Whether the agent's entries are those of the live workers, one each, besides the last pages of others."""
        try:
            found = self.entries().values()
            pids = [int(entry["Meta"]["pid"]) for entry in found if "adopted" not in entry["Meta"]]
        except (OSError, http.client.HTTPException):
            return False
        return len(pids) == len(set(pids)) and set(pids) == self.workers()

    def catalogued(self, server: Consul) -> bool:
        """Whether *server* has the same entries as the agent, and all pass."""
        try:
            there = self._cluster.catalogue(server, "shop-metrics")
            foreign = self._cluster.catalogue(server, "shop")
        except (OSError, http.client.HTTPException):
            return False
        here = {key: (entry["Port"], entry["Meta"]) for key, entry in self.entries().items()}
        same = here == {key: (entry["Port"], entry["Meta"]) for key, entry in there.items()}
        return same and set(foreign) == {FOREIGN["ID"]}

    def wait_settled(self, *, within: float) -> None:
        """Wait until agent and catalogue have the live workers; the catalogue is read at every running server."""
        begun = time.monotonic()
        wait_until(self.settled, within=within, what="the live workers in the agent")
        tell("in the agent", since=begun)
        for server in self._cluster.servers:
            if server.running:
                wait_until(partial(self.catalogued, server), within=within, what="the same in the catalogue")
        tell("in the catalogue", since=begun)
        assert self.settled()


def tell(what: str, *, since: float) -> None:
    """For `pytest -rP`."""
    print(f"repaired {what}: {time.monotonic() - since:.2f} s")


class Traffic:
    """Requests of the shop without pause, as a context manager; none may fail."""

    def __init__(self, shop: Gunicorn) -> None:
        self.answered = 0
        self._shop = shop
        self._failures: list[str] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                wait_until(lambda: self._failures or self.answered > 50, within=60, what="answers")
        finally:
            self._end.set()
            self._thread.join(30)
        if kind is None:
            assert not self._failures, self._failures[:3]

    def _ask(self) -> None:
        while not self._end.wait(0.01):
            try:
                self._shop.get("/fire", timeout=10)
            except (OSError, http.client.HTTPException, AssertionError) as error:
                self._failures.append(repr(error))
            else:
                self.answered += 1
