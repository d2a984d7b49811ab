"""Where the endpoint listens."""

import asyncio
import errno
import logging
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from consul_prom.errors import AgentDenied, AgentTimeout, AgentUnreachable, EndpointError
from consul_prom.server import bind as module
from consul_prom.server.bind import find_address, is_local, listen, route_address
from consul_prom.worker.target_factory import TargetFactory
from tests.conftest import MakeSettings

FOREIGN = "203.0.113.7"  # RFC 5737: no host has it
DEADLINE = 10.0


def _has_ip6() -> bool:
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


needs_ip6 = pytest.mark.skipif(not _has_ip6(), reason="this host has no IPv6")


class TestListen:
    """One socket, of one family, where it was told."""

    def test_ephemeral(self) -> None:
        """Port 0 is a port of the system's choice, on that address, unseen by a program that is executed."""
        with listen("127.0.0.1", [0]) as server:
            address, port = server.getsockname()
            assert address == "127.0.0.1"
            assert port > 0
            assert server.family == socket.AF_INET
            assert not server.getblocking()
            assert not server.get_inheritable()

    def test_nowhere_else(self) -> None:
        """Another address of the same host does not answer."""
        with listen("127.0.0.1", [0]) as server:
            port = server.getsockname()[1]
            socket.create_connection(("127.0.0.1", port), DEADLINE).close()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", port), DEADLINE)

    def test_wildcard(self) -> None:
        """A wildcard answers on every address of its family."""
        with listen("0.0.0.0", [0]) as server:
            for address in ("127.0.0.1", "127.0.0.2"):
                socket.create_connection((address, server.getsockname()[1]), DEADLINE).close()

    @needs_ip6
    def test_ip6(self) -> None:
        """An IPv6 address gets an IPv6 socket."""
        with listen("::1", [0]) as server:
            assert server.family == socket.AF_INET6
            socket.create_connection(("::1", server.getsockname()[1]), DEADLINE).close()

    @needs_ip6
    def test_ip6_wildcard_is_not_ip4s(self) -> None:
        """IPv6's wildcard leaves IPv4 alone."""
        with listen("::", [0]) as server:
            port = server.getsockname()[1]
            socket.create_connection(("::1", port), DEADLINE).close()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), DEADLINE)

    def test_next_free_port(self) -> None:
        """Ports that are taken are passed over, in the order that was given."""
        with listen("127.0.0.1", [0]) as first, listen("127.0.0.1", [0]) as second:
            ports = [server.getsockname()[1] for server in (first, second)]
            with listen("127.0.0.1", [*ports, 0]) as third:
                assert third.getsockname()[1] not in ports
            second.close()
            with listen("127.0.0.1", ports) as again:
                assert again.getsockname()[1] == ports[1]

    def test_taken(self) -> None:
        """A single port that is taken is named, with the setting."""
        with listen("127.0.0.1", [0]) as server:
            port = server.getsockname()[1]
            wanted = f"port {port} is taken on 127.0.0.1: set CONSUL_PROM_PORT to others, or to 0"
            with pytest.raises(EndpointError, match=re.escape(wanted)):
                listen("127.0.0.1", [port])

    def test_range_exhausted(self) -> None:
        """A range whose ports are all taken is named by its ends."""
        with listen("127.0.0.1", [0]) as first, listen("127.0.0.1", [0]) as second:
            ports = [server.getsockname()[1] for server in (first, second)]
            wanted = f"ports {min(ports)} to {max(ports)} are taken on 127.0.0.1"
            with pytest.raises(EndpointError, match=wanted):
                listen("127.0.0.1", ports)

    def test_no_port_left(self) -> None:
        """A slot beyond the last port is told so."""
        with pytest.raises(EndpointError, match="CONSUL_PROM_PORT has no port up to 65535 left for this slot"):
            listen("127.0.0.1", [])

    def test_port_is_free_at_once(self) -> None:
        """The slot's next worker gets the port though old connections linger in the system."""
        with listen("127.0.0.1", [0]) as server:
            port = server.getsockname()[1]
            server.setblocking(True)
            client = socket.create_connection(("127.0.0.1", port), DEADLINE)
            accepted, _ = server.accept()
            accepted.close()  # the side that closes first is the one that lingers
            assert client.recv(1) == b""
            client.close()
        listen("127.0.0.1", [port]).close()

    def test_foreign_address(self) -> None:
        """An address of another host is refused with both settings that may help."""
        with pytest.raises(EndpointError, match=rf"{FOREIGN} is no address of this host") as caught:
            listen(FOREIGN, [0])
        assert "CONSUL_PROM_ADDRESS" in str(caught.value)
        assert "CONSUL_PROM_BIND" in str(caught.value)

    @pytest.mark.parametrize(
        ("number", "sentence"),
        [
            (errno.EACCES, "port 80 needs a right that we lack: set CONSUL_PROM_PORT to one above 1023"),
            (errno.EMFILE, "cannot listen on 127.0.0.1 port 80: Too many open files (CONSUL_PROM_ADDRESS,"),
        ],
    )
    def test_other_trouble(self, monkeypatch: pytest.MonkeyPatch, number: int, sentence: str) -> None:
        """What else the system refuses is told in its words, and no socket stays open."""

        def refuse(_socket: socket.socket, _address: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(socket.socket, "bind", refuse)
        with pytest.raises(EndpointError, match=re.escape(sentence)):
            listen("127.0.0.1", [80, 81])

    def test_is_local(self) -> None:
        """Loopback is ours; another host's address, a wildcard, a name and nothing are not."""
        assert is_local("127.0.0.1")
        for address in (FOREIGN, "0.0.0.0", "::", "", "localhost", "2001:db8::7"):
            assert not is_local(address), address

    @needs_ip6
    def test_is_local_ip6(self) -> None:
        """So is IPv6's loopback."""
        assert is_local("::1")

    def test_route_address(self) -> None:
        """The address of the default route, where there is one, is ours."""
        address = route_address()
        assert address is None or is_local(address)

    def test_no_route(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A host without a route has no such address."""

        def refuse(_socket: socket.socket, _address: object) -> None:
            raise OSError(errno.ENETUNREACH, "Network is unreachable")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        assert route_address() is None


class TestFindAddress:
    """The address to register, where none is set."""

    ROUTE = "192.0.2.7"

    @pytest.fixture(autouse=True)
    def _host(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A default route, and more patience than a test has."""
        monkeypatch.setattr(module, "ASK_AGENT", 60.0)
        monkeypatch.setattr(module, "route_address", lambda: self.ROUTE)

    async def test_advertised(self) -> None:
        """What the agent advertises of itself is taken if it is ours."""
        assert await find_address(_answering({"Member": {"Addr": "127.0.0.1"}})) == "127.0.0.1"

    @pytest.mark.parametrize(
        "answer",
        [
            {"Member": {"Addr": FOREIGN}},
            {"Member": {"Addr": "0.0.0.0"}},
            {"Member": {"Addr": "localhost"}},
            {"Member": {"Addr": None}},
            {"Member": {"Addr": 7}},
            {"Member": {}},
            {"Member": None},
            {"Member": "web-1"},
            {},
        ],
        ids=str,
    )
    async def test_not_ours(self, answer: dict[str, Any]) -> None:
        """Where it is not ours, or no answer that makes sense, the default route's is taken at once."""
        begun = time.monotonic()
        assert await find_address(_answering(answer)) == self.ROUTE
        assert time.monotonic() - begun < DEADLINE

    async def test_denied(self) -> None:
        """A token without agent:read is an answer too: nobody waits for another."""
        begun = time.monotonic()
        assert await find_address(_answering(AgentDenied("403"))) == self.ROUTE
        assert time.monotonic() - begun < DEADLINE

    async def test_silent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An agent that never answers is waited for a while, no longer."""

        async def hang() -> dict[str, Any]:
            await asyncio.sleep(3600)
            return {}

        monkeypatch.setattr(module, "ASK_AGENT", 0.3)
        begun = time.monotonic()
        assert await find_address(hang) == self.ROUTE
        assert 0.29 < time.monotonic() - begun < DEADLINE

    async def test_comes_up(self) -> None:
        """An agent that is down at first, and up before the patience ends, is believed."""
        down = [AgentUnreachable("refused"), AgentTimeout("late")]
        assert await find_address(_answering(*down, {"Member": {"Addr": "127.0.0.1"}})) == "127.0.0.1"

    async def test_down(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An agent that stays down is asked until the patience ends."""
        monkeypatch.setattr(module, "ASK_AGENT", 0.3)
        assert await find_address(_answering(AgentUnreachable("refused"))) == self.ROUTE

    async def test_neither(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """Without agent and route, one WARNING says what to set, and the search goes on until there is a route."""
        caplog.set_level(logging.INFO)
        monkeypatch.setattr(module, "ASK_AGENT", 0.05)
        routes = [None, None, None, self.ROUTE]
        monkeypatch.setattr(module, "route_address", lambda: routes.pop(0))
        assert await find_address(_answering(AgentDenied("403"))) == self.ROUTE
        assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
        assert "set CONSUL_PROM_ADDRESS" in caplog.text


def _answering(*answers: Exception | dict[str, Any]) -> Callable[[], Awaitable[dict[str, Any]]]:
    """Asks an agent that gives these answers, the last one for ever."""
    left = list(answers)

    async def ask() -> dict[str, Any]:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return ask


@pytest.mark.parametrize("number", [errno.EACCES, errno.EADDRINUSE])
def test_port_of_before(settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Where any port will do, one that was served before and cannot be had any more keeps nobody from another."""
    bind = socket.socket.bind

    def refuse(server: socket.socket, address: tuple[str, int]) -> None:
        if address[1] == 80:
            raise OSError(number, os.strerror(number))
        bind(server, address)

    monkeypatch.setattr(socket.socket, "bind", refuse)
    site = TargetFactory(settings(port="0"))
    site.settle("127.0.0.1")
    with site.listen(0, before=80) as listener:
        assert listener.getsockname()[1] not in {0, 80}
    with site.listen(0) as listener:
        before = listener.getsockname()[1]
    with site.listen(0, before=before) as listener:
        assert listener.getsockname()[1] == before


async def test_one_budget(settings: MakeSettings) -> None:
    """All endpoints of a process share its connections: a leader of many adopted slots has no more than others."""
    site = TargetFactory(settings(port="0"))
    first, second = (site.endpoint(CollectorRegistry(), about=dict) for _ in range(2))
    assert first._listener._connections is second._listener._connections
