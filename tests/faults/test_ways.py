"""Every way to the agent: unix socket, path prefix, IPv6, and the 200 connections that a client address may have."""

import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from consul_prom.generate import scrape_config
from consul_prom.settings.settings import load
from tests.faults.conftest import MakeScene
from tests.faults.fleet import Fleet
from tests.faults.scene import Scene, repair
from tests.services.binaries import require
from tests.services.consul import Consul
from tests.services.prometheus import HASTY, Prometheus
from tests.services.proxy import Proxy
from tests.services.waiting import wait_until

MOST_CONNECTIONS = 200
"""Consul's limits.http_max_conns_per_client."""


@pytest.fixture
def unix_path(tmp_path: Path) -> Path:
    return tmp_path / "consul.sock"


@pytest.fixture
def unix(unix_path: Path) -> Iterator[Consul]:
    """An agent that listens on a unix socket alone."""
    with Consul(config={"addresses": {"http": f"unix://{unix_path}"}}) as consul:
        yield consul


class TestUnixSocket:
    """The agent's unix socket, and how it comes and goes."""

    def test_moved(self, unix: Consul, unix_path: Path, tmp_path: Path, short_turns: None) -> None:
        """A socket that is gone is told by its name; once it is there again, the entry is repaired."""
        with Scene(unix, tmp_path, consul_http_addr=unix.url) as scene:
            scene.lose()
            unix_path.rename(tmp_path / "aside")
            wait_until(lambda: not scene.worker.registered, within=20, what="the loss noticed")
            assert scene.trouble == f"the Consul agent (CONSUL_HTTP_ADDR={unix.url}): No such file or directory"
            (tmp_path / "aside").rename(unix_path)
            repair([scene])

    def test_killed(self, unix: Consul, tmp_path: Path) -> None:
        """A killed agent leaves its socket behind, and the one that comes after replaces it."""
        with Scene(unix, tmp_path, consul_http_addr=unix.url) as scene:
            unix.kill()
            wait_until(lambda: not scene.worker.registered, within=20, what="the loss noticed")
            unix.start()
            repair([scene])
            scene.worker.stop()
            assert scene.entry is None


@pytest.mark.usefixtures("bystanders")
class TestPrefix:
    """An agent behind a proxy at a path of its own."""

    def test_prefix(self, consul: Consul, scene: MakeScene) -> None:
        """All that a worker does goes through the prefix, the stop included."""
        stage = scene(proxy=Proxy(consul.url, prefix="/tools/consul"))
        stage.lose()
        repair([stage])
        stage.worker.stop()
        assert stage.entry is None
        assert all(request.line.split()[1].startswith("/tools/consul/v1/") for request in stage.proxy.requests)

    def test_wrong_prefix(self, consul: Consul, scene: MakeScene) -> None:
        """A proxy that knows no such path is no agent that knows no such entry."""
        proxy = Proxy(consul.url, prefix="/tools/consul")
        with proxy:
            wrong = f"{proxy.url}s"
            stage = scene(registered=False, consul_http_addr=wrong, address=consul.address)
            wait_until(lambda: "confused" in stage.failures, within=20, what="the failure")
            assert "answered 404: <html>no such page</html>" in stage.trouble
            stage.worker.stop()
            assert len(stage.messages) == 1


def test_ipv6(consul: Consul, scene: MakeScene) -> None:
    """An agent and a worker at IPv6 addresses find each other, and again after a fault; the agent's check too."""
    stage = scene(proxy=Proxy(consul.url, listen="::1"), address="::1", check_interval=1)
    assert stage.proxy.url.startswith("http://[::1]:")
    stage.lose()
    repair([stage])
    check = f"/v1/agent/checks?filter=ServiceID==%22{stage.entry_id}%22"
    wait_until(lambda: "HTTP GET http://[::1]:" in str(consul.call(check)[1]), within=20, what="a check that has run")
    assert [each["Status"] for each in consul.call(check)[1].values()] == ["passing"]


class TestConnections:
    """The limit of connections, which is shared by all of a client address, or all of a unix socket."""

    @pytest.mark.full
    @pytest.mark.parametrize("way", ["tcp", "unix"])
    def test_none_left(
        self, request: pytest.FixtureRequest, tmp_path: Path, unix_path: Path, short_turns: None, way: str
    ) -> None:
        """A worker that gets no connection says so, as what it is, and goes on when there is one."""
        agent: Consul = request.getfixturevalue("consul" if way == "tcp" else "unix")

        def connect() -> socket.socket:
            if way == "tcp":
                return socket.create_connection((agent.address, 8500), timeout=5)
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(unix_path))
            return connection

        with Scene(agent, tmp_path, consul_http_addr=agent.url) as scene:
            with taken(connect):
                wait_until(lambda: scene.failures.get("busy", 0) > 1, within=60, what="some tries")
                assert not scene.worker.registered
            repair([scene])
            assert set(scene.failures) == {"busy"}
            assert len(scene.warnings) == 1

    def test_calls(self, tmp_path: Path) -> None:
        """An agent that may ask its servers no more has the entry, and drops it, as soon as ever; nobody is warned."""
        with (
            Consul(config={"limits": {"rpc_rate": 0.5, "rpc_max_burst": 1}}) as consul,
            Scene(consul, tmp_path) as scene,
        ):
            scene.lose()
            repair([scene])
            wait_until(lambda: busy(consul), within=20, what="the limit reached")
            scene.worker.stop()
            assert scene.entry is None
            assert not scene.warnings

    @pytest.mark.full
    @pytest.mark.parametrize(
        "services",
        [{"shop": 300}, dict.fromkeys(("shop", "pay", "mail", "search", "stock"), 60)],
        ids=["one service", "five services"],
    )
    def test_three_hundred(self, consul: Consul, tmp_path: Path, services: Mapping[str, int]) -> None:
        """All of 300 workers of one address are registered, and the others of that address get their connections."""
        settings = {"consul_http_addr": consul.url, "address": consul.address}
        with Fleet(services, directory=tmp_path, processes=3, **settings) as fleet:
            wait_until(lambda: answered(consul) and fleet.settled(consul), within=100, what="all registered")
            scrape = scrape_config.prometheus(load({"service": "shop", "consul_http_addr": consul.url}, environ={}))
            with Prometheus(scrape, interval="5s", flags=HASTY) as prometheus:
                for _ in range(100):
                    assert answered(consul), "the consul command gets no connection"
                assert consul.call("/v1/agent/service/deregister/shop.web-1.0", method="PUT")[0] == 200
                wait_until(lambda: fleet.settled(consul), within=30, what="registered again")
                wait_until(lambda: scraped(prometheus) == services["shop"], within=60, what="Prometheus scrapes all")
                assert re.search(r"^prometheus_sd_consul_rpc_failures_total 0$", own_page(prometheus), re.MULTILINE)
            assert fleet.end() == [0, 0, 0]
        assert not consul.call("/v1/agent/services")[1]
        assert len([line for line in fleet.lines if line.startswith("WARNING")]) <= 300


@contextmanager
def taken(connect: Callable[[], socket.socket]) -> Iterator[None]:
    """All connections that the agent allows, and those that it closes are tried again."""
    held: list[socket.socket] = []
    stop = threading.Event()

    def hold() -> None:
        while not stop.wait(0.01):
            for connection in list(held):
                with suppress(BlockingIOError, OSError):
                    connection.setblocking(False)
                    if connection.recv(1, socket.MSG_PEEK) is not None:  # the agent's 429, or its end
                        held.remove(connection)
                        connection.close()
            while len(held) < MOST_CONNECTIONS + 1:
                held.append(connect())

    holding = threading.Thread(target=hold)
    holding.start()
    try:
        yield
    finally:
        stop.set()
        holding.join()
        for connection in held:
            connection.close()


def busy(consul: Consul) -> bool:
    """Whether the catalogue cannot be read."""
    return consul.call("/v1/catalog/service/shop-metrics") == (429, "RPC rate limit exceeded")


def answered(consul: Consul) -> bool:
    """Whether the consul command, which comes anew each time, has its answer."""
    command = [str(require("consul")), "members", f"-http-addr={consul.url}"]
    return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0


def scraped(prometheus: Prometheus) -> int:
    return sum(target["health"] == "up" for target in prometheus.targets())


def own_page(prometheus: Prometheus) -> str:
    return str(prometheus.call("/metrics")[1])
