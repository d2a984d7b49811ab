"""Who may come, how many, and for how long; on real sockets."""

import asyncio
import errno
import logging
import os
import resource
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import trustme

from consul_prom.server import listener as module
from consul_prom.server.listener import Connection, Connections, Listener
from tests.services.waiting import eventually

DEADLINE = 10.0
ELSEWHERE = "127.1.2.3"  # not the address that is listened on, but loopback


class Echo(asyncio.Protocol):
    """Sends back what comes, and tells its connection."""

    def __init__(self, house: "House", connection: Connection) -> None:
        self.house = house
        self.connection = connection
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.house.inside.add(self)

    def data_received(self, data: bytes) -> None:
        assert self.transport
        self.connection.heard()
        self.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.house.inside.discard(self)


class House:
    """A listening socket behind a door."""

    def __init__(self, **options: object) -> None:
        self.inside: set[Echo] = set()
        self.connections = Connections()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self.listener.setblocking(False)
        self.door = Listener(lambda connection: Echo(self, connection), **{"connections": self.connections, **options})  # type: ignore[arg-type]
        self.door.open(self.listener)
        self.address = self.listener.getsockname()

    async def connect(self, source: str = "127.0.0.1", **options: object) -> "ServedTarget":
        reader, writer = await asyncio.open_connection(*self.address, local_addr=(source, 0), **options)  # type: ignore[arg-type]
        return ServedTarget(reader, writer)

    async def close(self) -> None:
        self.door.close()
        for echo in list(self.inside):
            assert echo.transport
            echo.transport.abort()
        await eventually(lambda: not self.inside, within=DEADLINE, what="all have gone")


class ServedTarget:
    """A client's side."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def say(self) -> bool:
        """Whether there is an answer."""
        with suppress(ConnectionError):
            self.writer.write(b"hello")
            return await asyncio.wait_for(self.reader.read(5), DEADLINE) == b"hello"
        return False

    async def sent_away(self) -> bool:
        with suppress(ConnectionError):
            return await asyncio.wait_for(self.reader.read(1), DEADLINE) == b""
        return True

    def leave(self) -> None:
        self.writer.close()


@pytest.fixture
async def house() -> AsyncIterator[House]:
    house = House()
    yield house
    await house.close()


async def test_comes_in(house: House) -> None:
    """Who comes is served, by a protocol of their own."""
    first, second = await house.connect(), await house.connect()
    assert await first.say()
    assert await second.say()
    assert len(house.inside) == 2
    first.leave()
    second.leave()


async def test_newcomer_takes_the_place_of_the_silent(house: House) -> None:
    """With all places taken, whoever was silent for longest has to go, not whoever talks."""
    house.connections.most = 3
    guests = [await house.connect() for _ in range(3)]
    await eventually(lambda: len(house.inside) == 3, within=DEADLINE, what="three inside")
    assert await guests[0].say()  # guests[1] is now the one that was silent for longest
    late = await house.connect()
    assert await late.say()
    assert await guests[1].sent_away()
    assert await guests[0].say()
    assert await guests[2].say()
    for guest in (*guests, late):
        guest.leave()


async def test_place_is_free_again(house: House) -> None:
    """Who has left takes no place, and nobody is sent away for it."""
    house.connections.most = 2
    stays = await house.connect()
    assert await stays.say()
    for _ in range(5):
        guest = await house.connect()
        assert await guest.say()
        guest.leave()
        await eventually(lambda: len(house.inside) == 1, within=DEADLINE, what="the guest has left")
    assert await stays.say()
    stays.leave()


async def test_thousands(house: House) -> None:
    """Of thousands who only sit there few are let stay, and the next who asks is answered."""
    crowd = []
    for _ in range(1000):
        crowd.append(socket.create_connection(house.address, DEADLINE))
        await asyncio.sleep(0)
    guest = await house.connect()
    assert await guest.say()
    assert len(house.inside) <= module.MAX_CONNECTIONS
    guest.leave()
    for client in crowd:
        client.close()


async def test_silence_has_an_end(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first request has its time, each next one another; bytes that make no request win none."""
    monkeypatch.setattr(module, "FIRST_REQUEST", 0.2)
    monkeypatch.setattr(module, "LOOK", 0.05)
    guest, talker = await house.connect(), await house.connect()
    assert await talker.say()
    assert await guest.sent_away()
    assert await talker.say()
    monkeypatch.setattr(module, "IDLE_TIMEOUT", 0.2)
    assert await talker.say()
    assert await talker.sent_away()
    guest.leave()
    talker.leave()


async def test_nobody_is_looked_after(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty house is not looked at again and again."""
    monkeypatch.setattr(module, "LOOK", 0.01)
    guest = await house.connect()
    assert await guest.say()
    guest.leave()
    await eventually(lambda: house.connections._timer is None, within=DEADLINE, what="nobody looks")
    again = await house.connect()
    assert await again.say()
    assert house.connections._timer is not None
    again.leave()


class TestAnswering:
    """Requests that are being answered."""

    async def test_keeps_its_place(self, house: House) -> None:
        """A connection with a request in flight stays, however many others come; afterwards it may have to go."""
        house.connections.most = 3
        scraper = await house.connect()
        assert await scraper.say()
        (echo,) = house.inside
        with echo.connection.answering():
            crowd = [await house.connect() for _ in range(10)]
            for guest in crowd[:-2]:
                assert await guest.sent_away()
            assert await scraper.say()
        late = [await house.connect() for _ in range(3)]
        assert await scraper.sent_away()
        for guest in (scraper, *crowd, *late):
            guest.leave()

    async def test_client_that_stalls(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        """A client that does not take its answer loses its place to a new one after a while, unless it goes on."""
        monkeypatch.setattr(module, "STALL", 0)
        house.connections.most = 2
        guests = [await house.connect() for _ in range(2)]
        for guest in guests:
            assert await guest.say()
        first, second = (echo.connection for echo in house.inside)
        with first.answering(), second.answering():
            first.stalled()
            second.stalled()
            second.resumed()
            late = await house.connect()
            assert await late.say()
            assert (first.is_open, second.is_open) == (False, True)
        for guest in (*guests, late):
            guest.leave()

    async def test_all_are_in_flight(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        """With requests in flight everywhere, a new connection waits until one has been answered."""
        monkeypatch.setattr(module, "LOOK", 0.05)
        house.connections.most = 2
        guests = [await house.connect() for _ in range(2)]
        for guest in guests:
            assert await guest.say()
        with ExitStack() as answering:
            for echo in house.inside:
                answering.enter_context(echo.connection.answering())
            late = await house.connect()
            answer = asyncio.create_task(late.say())
            await eventually(lambda: not _watched(house.listener), within=DEADLINE, what="nothing is accepted")
            assert len(house.inside) == 2
        assert await answer
        for guest in (*guests, late):
            guest.leave()

    async def test_deadline(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        """A request that is in flight has a deadline, too."""
        monkeypatch.setattr(module, "IDLE_TIMEOUT", 0.2)
        monkeypatch.setattr(module, "LOOK", 0.05)
        guest = await house.connect()
        assert await guest.say()
        (echo,) = house.inside
        with echo.connection.answering():
            assert await guest.sent_away()
        guest.leave()


def _watched(listener: socket.socket) -> bool:
    loop: Any = asyncio.get_running_loop()
    return listener.fileno() in loop._selector.get_map()


class TestManyListeners:
    """Doors that share their connections."""

    @pytest.mark.parametrize("number", [10, 61])
    async def test_descriptors(self, number: int) -> None:
        """Silent connections to all listeners of a process hold no more descriptors than those to one."""
        connections = Connections()
        houses = [House(connections=connections) for _ in range(number)]
        before, most = _descriptors(), 0
        crowd = []
        for turn in range(500):
            crowd.append(socket.create_connection(houses[turn % number].address, DEADLINE))
            await asyncio.sleep(0)
            most = max(most, _descriptors() - before - len(crowd))
        guest = await houses[0].connect()
        assert await guest.say()
        guest.leave()
        assert most <= connections.most + 2 * connections.most // module.TURNS  # closing takes a turn or two
        for client in crowd:
            client.close()
        for house in houses:
            await house.close()

    async def test_crowd_at_another_port(self) -> None:
        """A crowd at one port does not keep clients of another one waiting."""
        connections = Connections(8)
        crowded, calm = (House(connections=connections) for _ in range(2))
        crowd = [socket.create_connection(crowded.address, DEADLINE) for _ in range(200)]
        guest = await calm.connect()
        assert await guest.say()
        assert crowded.inside
        guest.leave()
        for client in crowd:
            client.close()
        for house in (crowded, calm):
            await house.close()

    @pytest.mark.parametrize(("soft", "most"), [(256, 32), (1024, 128), (65536, 128), (resource.RLIM_INFINITY, 128)])
    def test_budget(self, monkeypatch: pytest.MonkeyPatch, soft: int, most: int) -> None:
        """The budget is an eighth of the process' descriptors, and 128 at most."""
        monkeypatch.setattr(resource, "getrlimit", lambda _which: (soft, soft))
        assert Connections().most == most


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class TestAllow:
    """CONSUL_PROM_ALLOW."""

    @pytest.fixture
    async def strict(self) -> AsyncIterator[House]:
        house = House(allow=[ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")])
        yield house
        await house.close()

    async def test_this_host(self, strict: House) -> None:
        """This host comes in whatever is allowed: its agent checks the worker."""
        for source in ("127.0.0.1", ELSEWHERE):
            guest = await strict.connect(source)
            assert await guest.say()
            guest.leave()

    @pytest.mark.parametrize(
        ("peer", "ours", "expected"),
        [
            ("10.1.2.3", "10.9.9.9", True),
            ("192.0.2.1", "10.9.9.9", False),
            ("192.0.2.1", "192.0.2.1", True),
            ("2001:db8::5", "2001:db8::9", True),
            ("fe80::1%eth0", "2001:db8::9", False),
            ("::1", "2001:db8::9", True),
        ],
    )
    async def test_others(self, strict: House, peer: str, ours: str, *, expected: bool) -> None:
        """Others come in by their network, of either family."""
        assert strict.door._welcome(peer, ours) is expected

    async def test_nothing_set(self, house: House) -> None:
        """Where nothing is set, all may come."""
        assert house.door._welcome("192.0.2.1", "10.9.9.9")

    async def test_is_turned_away(
        self, strict: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Who is not welcome is hung up on before anything was read, and the log says so once."""
        monkeypatch.setattr("ipaddress.IPv4Address.is_loopback", property(lambda _self: False))
        for _ in range(3):
            guest = await strict.connect(ELSEWHERE)
            assert not await guest.say()
            guest.leave()
        assert not strict.inside
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert f"{ELSEWHERE} was turned away: it is in none of the networks of CONSUL_PROM_ALLOW" in caplog.text


class TestTrouble:
    """What the system refuses."""

    async def test_no_descriptors(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without descriptors the door rests, without keeping the processor busy, and opens again."""
        tries = 0
        accept = socket.socket.accept

        def refuse(listener: socket.socket) -> tuple[socket.socket, object]:
            nonlocal tries
            tries += 1
            if tries < 3:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return accept(listener)

        monkeypatch.setattr(module, "LOOK", 0.1)
        monkeypatch.setattr(socket.socket, "accept", refuse)
        begun = time.monotonic()
        guest = await house.connect()
        assert await guest.say()
        assert time.monotonic() - begun >= 0.2
        assert tries >= 3
        guest.leave()

    async def test_client_that_has_gone(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        """A connection that ended before it was accepted is none."""
        errors: list[OSError] = [ConnectionAbortedError(), BlockingIOError()]
        accept = socket.socket.accept

        def refuse(listener: socket.socket) -> tuple[socket.socket, object]:
            if errors:
                raise errors.pop()
            return accept(listener)

        monkeypatch.setattr(socket.socket, "accept", refuse)
        guest = await house.connect()
        assert await guest.say()
        guest.leave()

    async def test_closed_while_it_rests(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A door that was closed while it rested stays closed."""
        monkeypatch.setattr(module, "LOOK", 0.05)
        house = House()
        house.door.rest()
        house.door.close()
        await asyncio.sleep(0.1)
        with pytest.raises(ConnectionRefusedError):
            await house.connect()
        await house.close()


class TestTLS:
    """With a context."""

    @pytest.fixture
    def context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
        return context

    @pytest.fixture
    async def house(self, context: ssl.SSLContext) -> AsyncIterator[House]:
        house = House(tls=lambda: context)
        yield house
        await house.close()

    @staticmethod
    def _client() -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context

    async def test_speaks_it(self, house: House) -> None:
        """Who speaks TLS is served."""
        guest = await house.connect(ssl=self._client())
        assert await guest.say()
        guest.leave()

    async def test_does_not(self, house: House, caplog: pytest.LogCaptureFixture) -> None:
        """Who does not is hung up on, without a word in the log."""
        guest = await house.connect()
        assert not await guest.say()
        guest.leave()
        assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []

    async def test_handshake_that_stands_still(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        """A handshake that never comes is ended in time, and takes no place from those who come after."""
        monkeypatch.setattr(module, "FIRST_REQUEST", 0.3)
        monkeypatch.setattr(module, "LOOK", 0.05)
        house.connections.most = 2
        silent = [await house.connect() for _ in range(4)]
        guest = await house.connect(ssl=self._client())
        assert await guest.say()
        for client in silent:
            assert await client.sent_away()
            client.leave()
        guest.leave()

    async def test_close_in_the_middle(self, context: ssl.SSLContext) -> None:
        """A door that closes ends the handshakes that are going on."""
        house = House(tls=lambda: context)
        guest = await house.connect()
        await eventually(lambda: len(house.door._entering) == 1, within=DEADLINE, what="a handshake begun")
        await house.close()
        assert await guest.sent_away()
        guest.leave()
        await eventually(lambda: not house.door._entering, within=DEADLINE, what="no handshake")
