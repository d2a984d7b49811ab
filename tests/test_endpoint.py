"""The metrics thread, its listening socket, and what it answers."""

import asyncio
import errno
import gc
import http.client
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from consul_prom import endpoint as module
from consul_prom.endpoint import Endpoint, MetricsThread, find_address, is_local, listen, route_address
from consul_prom.errors import AgentDenied, AgentTimeout, AgentUnreachable, EndpointError
from consul_prom.registration import HEALTH_PATH
from tests.services.waiting import wait_until

ROOT = Path(__file__).parent.parent
DEADLINE = 10.0
FOREIGN = "203.0.113.7"  # RFC 5737: no host has it

Headers = Mapping[str, str]


def _has_ip6() -> bool:
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


needs_ip6 = pytest.mark.skipif(not _has_ip6(), reason="this host has no IPv6")


class Answer:
    """One answer of a real connection."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()


class Served:
    """A running endpoint, and what was asked of its three functions."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.asked: list[tuple[str, str, list[str]]] = []
        self.took: list[float] = []
        self.written = 0
        self.page: Callable[[], bytes] = lambda: b"one 1.0\n"
        self.pieces = self._whole
        self.facts: dict[str, str] = {"service": "shop", "instance": "web-1:0"}
        self.thread = MetricsThread()
        self.listener = listen(address, [0])
        self.address, self.port = self.listener.getsockname()[:2]

    def render(self, accept: str, coding: str, names: list[str]) -> tuple[Headers, Iterator[bytes]]:
        self.asked.append((accept, coding, names))
        return {"Content-Type": "text/plain; version=0.0.4; charset=utf-8", "Vary": "Accept"}, self._pieces()

    def _pieces(self) -> Iterator[bytes]:
        self.written += 1
        yield from self.pieces()

    def _whole(self) -> Iterator[bytes]:
        yield self.page()

    @contextmanager
    def holding(self) -> Iterator[threading.Event]:
        """Meanwhile pages are begun, and ended only when the event is set."""
        event = threading.Event()

        def pieces() -> Iterator[bytes]:
            while not event.is_set():
                time.sleep(0.002)
                yield b""
            yield self.page()

        self.pieces = pieces
        try:
            yield event
        finally:
            event.set()
            self.pieces = self._whole

    def start(self) -> None:
        self.thread.start()
        self.endpoint: Endpoint = self.thread.spawn(self._serve()).result(DEADLINE)

    def stop(self) -> None:
        self.thread.spawn(self.endpoint.aclose()).result(DEADLINE)
        assert self.thread.stop(DEADLINE)

    def ask(self, path: str = "/metrics", method: str = "GET", **headers: str) -> Answer:
        connection = http.client.HTTPConnection(self.address, self.port, timeout=DEADLINE)
        try:
            connection.request(method, path, headers={key.replace("_", "-"): value for key, value in headers.items()})
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        return socket.create_connection((self.address, self.port), DEADLINE)

    async def _serve(self) -> Endpoint:
        endpoint = Endpoint(render=self.render, about=lambda: self.facts, on_scrape=self.took.append)
        await endpoint.serve(self.listener)
        return endpoint


@contextmanager
def _serving(address: str = "127.0.0.1") -> Iterator[Served]:
    served = Served(address)
    served.start()
    try:
        yield served
    finally:
        served.stop()


@pytest.fixture
def served() -> Iterator[Served]:
    with _serving() as served:
        yield served


@pytest.fixture
def thread() -> Iterator[MetricsThread]:
    thread = MetricsThread()
    thread.start()
    yield thread
    thread.stop(DEADLINE)


async def _nothing() -> None:
    pass


class TestThread:
    """The daemon thread with a loop of its own."""

    def test_runs_coroutines(self, thread: MetricsThread) -> None:
        """What is spawned runs in a daemon thread that a stack dump shows by name."""

        async def where() -> threading.Thread:
            return threading.current_thread()

        found = thread.spawn(where()).result(DEADLINE)
        assert found is not threading.current_thread()
        assert found.daemon
        assert found.name == "consul-prom"

    def test_leaves_signals_to_the_main_thread(self, thread: MetricsThread) -> None:
        """No signal is delivered to it, or the main thread would sleep on."""

        async def blocked() -> set[Any]:
            return signal.pthread_sigmask(signal.SIG_BLOCK, [])

        assert thread.spawn(blocked()).result(DEADLINE) >= {
            signal.SIGTERM,
            signal.SIGINT,
            signal.SIGHUP,
            signal.SIGUSR1,
        }

    def test_exception_reaches_the_caller(self, thread: MetricsThread) -> None:
        """An exception of a coroutine is its future's, and the thread goes on."""

        async def fail() -> None:
            raise LookupError("mine")

        with pytest.raises(LookupError, match="mine"):
            thread.spawn(fail()).result(DEADLINE)
        thread.spawn(_nothing()).result(DEADLINE)

    def test_no_thread_to_be_had(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A system that gives no thread is an exception in the caller, and there is nothing to stop."""

        def refuse(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        thread = MetricsThread()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(EndpointError, match="the metrics thread cannot start: can't start new thread"):
                thread.start()
        assert thread.stop(0.1)
        with pytest.raises(EndpointError, match="does not run"):
            thread.spawn(_nothing())

    def test_no_descriptors_to_be_had(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A system that gives no descriptors for a loop is an exception in the caller."""

        def refuse() -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(asyncio, "SelectorEventLoop", refuse)
        with pytest.raises(EndpointError, match=r"cannot start: .*Too many open files"):
            MetricsThread().start()

    def test_loop_that_does_not_come_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A thread that hangs before its loop runs is an exception after the deadline, never a hang."""
        release, loop = threading.Event(), asyncio.SelectorEventLoop()

        def hang() -> asyncio.SelectorEventLoop:
            release.wait(DEADLINE)
            return loop

        monkeypatch.setattr(module, "START_DEADLINE", 0.1)
        monkeypatch.setattr(asyncio, "SelectorEventLoop", hang)
        thread = MetricsThread()
        with pytest.raises(EndpointError, match="the metrics thread cannot start: TimeoutError"):
            thread.start()
        loop.call_soon_threadsafe(loop.stop)
        release.set()
        wait_until(loop.is_closed, within=DEADLINE, what="the late thread has ended")

    def test_not_started(self) -> None:
        """What is spawned before the start is refused, and its coroutine closed."""
        coroutine = _nothing()
        with pytest.raises(EndpointError, match="the metrics thread does not run"):
            MetricsThread().spawn(coroutine)
        with pytest.raises(RuntimeError, match="cannot reuse"):
            coroutine.send(None)
        assert MetricsThread().stop(0.1)

    def test_stopped(self) -> None:
        """After the stop nothing can be spawned, and a second stop does nothing."""
        thread = MetricsThread()
        thread.start()
        assert thread.stop(DEADLINE)
        assert thread.stop(DEADLINE)
        with pytest.raises(EndpointError, match="does not run"):
            thread.spawn(_nothing())

    def test_stop_cancels_what_runs(self, thread: MetricsThread) -> None:
        """A task that would run for ever is cancelled, and its clean-up runs to the end."""
        cleaned = threading.Event()

        async def run() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                await asyncio.sleep(0.01)
                cleaned.set()

        future = thread.spawn(run())
        thread.spawn(_nothing()).result(DEADLINE)
        assert thread.stop(DEADLINE)
        assert cleaned.is_set()
        assert future.cancelled()

    def test_stop_lets_a_closing_task_end(self, thread: MetricsThread) -> None:
        """A task that is about to end is not cancelled."""

        async def close() -> str:
            await asyncio.sleep(0.05)
            return "closed"

        future = thread.spawn(close())
        assert thread.stop(DEADLINE)
        assert future.result(0) == "closed"

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_stop_does_not_wait_for_a_task_that_will_not_end(self, thread: MetricsThread) -> None:
        """A task that refuses to be cancelled delays the stop by a moment, and the thread ends."""

        async def refuse() -> None:
            while True:
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(3600)

        thread.spawn(refuse())
        begun = time.monotonic()
        assert thread.stop(DEADLINE)
        assert time.monotonic() - begun < DEADLINE / 2
        gc.collect()

    def test_stop_has_a_deadline(self, thread: MetricsThread) -> None:
        """A task that blocks the loop cannot delay the caller beyond the deadline, which is told."""
        release, blocking = threading.Event(), threading.Event()

        async def block() -> None:
            blocking.set()
            release.wait(DEADLINE)

        thread.spawn(block())
        assert blocking.wait(DEADLINE)
        begun = time.monotonic()
        assert not thread.stop(0.1)
        assert time.monotonic() - begun < 5
        release.set()
        assert thread.stop(DEADLINE)

    def test_process_does_not_wait_for_it(self) -> None:
        """A process that never stops its thread ends all the same."""
        code = """
import asyncio
from consul_prom.endpoint import MetricsThread
thread = MetricsThread()
thread.start()
thread.spawn(asyncio.sleep(3600))
"""
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environ, timeout=DEADLINE, check=True, capture_output=True
        )
        assert done.stderr == b""


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
        monkeypatch.setattr(module, "ASK_AGENT", 0.05)
        routes = [None, None, None, self.ROUTE]
        monkeypatch.setattr(module, "route_address", lambda: routes.pop(0))
        assert await find_address(_answering(AgentDenied("403"))) == self.ROUTE
        assert [record.levelname for record in caplog.records] == ["WARNING"]
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


class TestMetrics:
    """``/metrics``."""

    def test_page(self, served: Served) -> None:
        """The page is what is rendered, with its headers, and the time that it took is told."""
        answer = served.ask("/metrics", Accept="text/plain", Accept_Encoding="gzip")
        assert (answer.status, answer.body) == (200, b"one 1.0\n")
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert answer.headers["Vary"] == "Accept"
        assert served.asked == [("text/plain", "", [])]
        assert len(served.took) == 1
        assert 0 <= served.took[0] < DEADLINE

    @pytest.mark.parametrize(
        ("accepted", "is_asked"),
        [
            ("gzip", False),
            ("gzip, identity;q=0.5", False),
            ("gzip, identity;q=0.05", False),
            ("gzip, identity;q=0", True),
            ("gzip;q=1.0, Identity ; q=0.000", True),
            ("*;q=0, gzip", True),
        ],
    )
    def test_nothing_is_compressed_over_loopback(self, served: Served, accepted: str, *, is_asked: bool) -> None:
        """Over loopback the page is not to be compressed, unless plain pages are refused."""
        served.ask("/metrics", Accept_Encoding=accepted)
        assert [coding for _, coding, _ in served.asked] == [accepted if is_asked else ""]

    def test_no_headers_at_all(self, served: Served) -> None:
        """A request without Accept headers asks for nothing special."""
        with served.connect() as client:
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert b"one 1.0\n" in _all_of(client)
        assert served.asked == [("", "", [])]

    def test_names(self, served: Served) -> None:
        """``name[]`` may come several times, encoded or not; other parameters are ignored."""
        served.ask("/metrics?name[]=a&name%5B%5D=b%20c&x=1&name=d")
        assert served.asked[0][2] == ["a", "b c"]

    def test_head(self, served: Served) -> None:
        """HEAD has the headers of GET and no body, and the connection goes on."""
        with served.connect() as client:
            client.sendall(b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\nGET /metrics HTTP/1.0\r\n\r\n")
            head, body = _all_of(client).split(b"\r\n\r\n", 1)
        assert b"Content-Length: 8" in head
        assert body.startswith(b"HTTP/1.")
        assert body.endswith(b"one 1.0\n")

    def test_many_at_once(self, served: Served) -> None:
        """Several scrapers on connections of their own are all answered."""
        clients = [served.connect() for _ in range(20)]
        for client in clients:
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        for client in clients:
            with client:
                assert b"one 1.0\n" in _all_of(client)
        assert len(served.took) == 20

    def test_client_that_says_nothing(self, served: Served) -> None:
        """A connection that stays silent, or stops in the middle, holds nobody up."""
        with served.connect(), served.connect() as half:
            half.sendall(b"GET /metrics HTTP/1.1\r\nHost:")
            assert served.ask().status == 200

    def test_client_that_goes_away(self, served: Served, caplog: pytest.LogCaptureFixture) -> None:
        """A scraper that hangs up before the page is out leaves no line in the log."""
        served.page = lambda: b"x" * 10_000_000
        client = served.connect()
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        client.recv(10)
        client.close()
        served.page = lambda: b""
        assert served.ask().status == 200
        assert caplog.records == []

    def test_last_scrape(self, served: Served) -> None:
        """When the last scrape was is noted, and the agent's check does not count as one."""
        served.ask(HEALTH_PATH)
        assert not served.endpoint.last_scrape
        before = time.time()
        served.ask()
        assert before <= (served.endpoint.last_scrape or 0) <= time.time()


class TestReaders:
    """Readers that are many, slow, or gone."""

    def test_same_page_at_once(self, served: Served) -> None:
        """Who asks for a page that is being written gets the same one."""
        with served.holding() as go_on:
            clients = [served.connect() for _ in range(100)]
            for client in clients:
                client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            wait_until(lambda: len(served.asked) == 100, within=DEADLINE, what="all have asked")
            go_on.set()
        assert [_all_of(client).endswith(b"one 1.0\n") for client in clients] == [True] * 100
        for client in clients:
            client.close()
        assert served.written == 1
        assert len(served.took) == 100
        served.ask()
        assert served.written == 2

    def test_other_page_at_once(self, served: Served) -> None:
        """A page of other names is another one, and waits until the first is written."""
        with served.holding() as go_on, served.connect() as first, served.connect() as second:
            first.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            second.sendall(b"GET /metrics?name[]=a HTTP/1.0\r\n\r\n")
            wait_until(lambda: len(served.asked) == 2, within=DEADLINE, what="both have asked")
            assert served.ask(HEALTH_PATH).status == 200
            assert served.written == 1
            go_on.set()
            assert _all_of(first).endswith(b"one 1.0\n")
            assert _all_of(second).endswith(b"one 1.0\n")
        assert served.written == 2

    def test_one_that_asked_first_goes_away(self, served: Served) -> None:
        """Who shares a page with one that goes away still gets it."""
        with served.holding() as go_on, served.connect() as second:
            with served.connect() as first:
                first.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                wait_until(lambda: served.written, within=DEADLINE, what="the page is begun")
            second.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            wait_until(lambda: len(served.asked) == 2, within=DEADLINE, what="both have asked")
            go_on.set()
            assert _all_of(second).endswith(b"one 1.0\n")

    def test_stalled_readers(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        """Readers that stall hold a few pages at most; then the oldest are cut off, and others are served as ever."""
        served.page = lambda: os.urandom(1) * 20_000_000
        stalled = []
        for number in range(module.PAGES_READ + 2):
            client = served.connect()
            stalled.append(client)
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            wait_until(lambda: len(served.took) == number + 1, within=DEADLINE, what="the page is written")  # noqa: B023
        assert len(served.endpoint._read) == module.PAGES_READ
        served.page = lambda: b"one 1.0\n"
        assert served.ask().body == b"one 1.0\n"
        whole = [_is_whole(client, 20_000_000) for client in stalled]
        assert whole == [False] * 3 + [True] * (module.PAGES_READ - 1)
        for client in stalled:
            client.close()

    def test_many_stalled_readers_of_one_page(self, served: Served) -> None:
        """A hundred readers that stall in the same page cost it once, and a buffer each."""
        served.page = lambda: b"x" * 20_000_000
        served.ask()
        before = _resident()
        with served.holding() as go_on:
            stalled = [served.connect() for _ in range(100)]
            for client in stalled:
                client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            wait_until(lambda: len(served.asked) == 101, within=DEADLINE, what="all have asked")
            go_on.set()
        wait_until(lambda: len(served.took) == 101, within=DEADLINE, what="the page is written")
        assert served.ask(HEALTH_PATH).status == 200
        assert _resident() - before < 200_000_000
        for client in stalled:
            client.close()

    def test_reader_that_never_ends(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        """A reader that has not taken the page in time is cut off."""
        monkeypatch.setattr(module, "READING", 0.2)
        served.page = lambda: b"x" * 20_000_000
        with served.connect() as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            wait_until(lambda: served.took, within=DEADLINE, what="the page is written")
            (page,) = served.endpoint._read
            wait_until(lambda: not page.readers, within=DEADLINE, what="it is cut off")
            assert not _is_whole(client, 20_000_000)

    def test_page_in_slices(self, served: Served) -> None:
        """While a page is written others are answered."""
        begun = threading.Event()

        def pieces() -> Iterator[bytes]:
            while not ends.is_set():
                begun.set()
                time.sleep(0.002)
                yield b""
            yield b"one 1.0\n"

        ends = threading.Event()
        served.pieces = pieces
        with served.connect() as client:
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert begun.wait(DEADLINE)
            assert served.ask(HEALTH_PATH).status == 200
            ends.set()
            assert _all_of(client).endswith(b"one 1.0\n")


def _is_whole(client: socket.socket, size: int) -> bool:
    """Whether an answer of so many bytes came; it is read now."""
    read = 0
    with suppress(ConnectionError):
        while read < size and (found := client.recv(1_000_000)):
            read += len(found)
    return read >= size


def _resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class TestBrokenCollector:
    """A collector of the application that raises."""

    def test_is_told_once(self, served: Served, caplog: pytest.LogCaptureFixture) -> None:
        """It is a 500 each time and one WARNING with the traceback, until a page could be rendered."""
        for _ in range(2):
            served.page = _raising(LookupError("s3cret detail"))
            for _ in range(3):
                answer = served.ask()
                assert answer.status == 500
                assert answer.body == b"a collector raised LookupError\n"
            served.page = lambda: b"one 1.0\n"
            assert served.ask().status == 200
        assert [(record.name, record.levelname) for record in caplog.records] == [
            ("consul_prom.endpoint", "WARNING")
        ] * 2
        assert "cannot be rendered" in caplog.records[0].message
        assert caplog.records[0].exc_info
        assert isinstance(caplog.records[0].exc_info[1], LookupError)
        assert len(served.took) == 2

    def test_failure_of_ours_is_logged(self, served: Served, caplog: pytest.LogCaptureFixture) -> None:
        """What the page for people raises is our own mistake, and not kept quiet."""
        served.facts = {"one": 1}  # type: ignore[dict-item]
        assert served.ask("/").status == 500
        assert [(record.name, record.levelname) for record in caplog.records] == [("consul_prom.endpoint", "ERROR")]

    def test_others_go_on(self, served: Served) -> None:
        """The agent's check and the page for people still work."""
        served.page = _raising(ZeroDivisionError())
        assert served.ask().status == 500
        assert served.ask(HEALTH_PATH).status == 200
        assert served.ask("/").status == 200


class TestHealthy:
    """``/-/healthy``, which the agent asks each interval."""

    def test_is_tiny_and_constant(self, served: Served) -> None:
        """It is the same few bytes each time, as a changing body would be a changed check; nothing is rendered."""
        bodies = {served.ask(HEALTH_PATH, User_Agent="Consul Health Check", Connection="close").body for _ in range(3)}
        assert bodies == {b"healthy\n"}
        assert served.asked == []

    def test_head(self, served: Served) -> None:
        """A check by HEAD works as well."""
        answer = served.ask(HEALTH_PATH, "HEAD")
        assert (answer.status, answer.body) == (200, b"")


class TestHome:
    """``/``, for people."""

    def test_shows_what_is_told(self, served: Served) -> None:
        """It shows what the worker tells of itself, when it was scraped last, and two links."""
        answer = served.ask("/")
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        page = answer.body.decode()
        assert "<tr><th>instance</th><td>web-1:0</td></tr>" in page
        assert "<tr><th>last scrape</th><td>never</td></tr>" in page
        assert f'href="{HEALTH_PATH}"' in page
        assert 'href="/metrics"' in page
        served.ask()
        assert "<tr><th>last scrape</th><td>0 s ago</td></tr>" in served.ask("/").body.decode()

    def test_is_escaped(self, served: Served) -> None:
        """What an agent answered may not become markup."""
        served.facts = {"<b>": "no: <script>alert('&\"{}')</script> ü"}
        page = served.ask("/").body.decode()
        assert "<script>" not in page
        assert "<b>" not in page
        assert "&lt;script&gt;alert(&#x27;&amp;&quot;{}&#x27;)&lt;/script&gt; ü" in page


class TestRefusals:
    """What is not served."""

    @pytest.mark.parametrize("path", ["/metric", "/metrics/", "//metrics", "/-/ready", "/favicon.ico", "/../etc", "/%"])
    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_unknown_path(self, served: Served, path: str, method: str) -> None:
        """Any other path is a 404, whatever the method."""
        assert served.ask(path, method).status == 404

    @pytest.mark.parametrize("path", ["/metrics", "/", HEALTH_PATH])
    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
    def test_wrong_method(self, served: Served, path: str, method: str) -> None:
        """Any other method is a 405 that names the right ones."""
        answer = served.ask(path, method)
        assert answer.status == 405
        assert answer.headers["Allow"] == "GET, HEAD"
        assert served.asked == []

    @pytest.mark.parametrize(
        "head",
        [
            b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: " + b"a" * 65_536 + b"\r\n\r\n",
            b"GET /metrics HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"a" * 100) for n in range(700)),
            b"GET /" + b"a" * 65_536 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
            b"GET /metrics HTTP/9.9\r\n\r\n",
            b"BREW /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
            b"\r\n\r\n\x00\x00\r\n\r\n",
        ],
        ids=["one header of 64 KB", "700 headers", "path of 64 KB", "TLS", "HTTP/9.9", "BREW", "NUL"],
    )
    def test_hostile_request(self, served: Served, caplog: pytest.LogCaptureFixture, head: bytes) -> None:
        """A request that no scraper sends is refused without a stack trace, and the next scrape is answered."""
        with served.connect() as client:
            with suppress(ConnectionError):
                client.sendall(head)
                client.shutdown(socket.SHUT_WR)
            assert b"one 1.0" not in _all_of(client)
        assert served.ask().status == 200
        assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


class TestClose:
    """The end."""

    def test_nobody_is_let_in(self) -> None:
        """A closed endpoint refuses connections, and those that idle are closed."""
        with _serving() as served:
            idle = served.connect()
            idle.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200 OK" in idle.recv(1000)
            served.thread.spawn(served.endpoint.aclose()).result(DEADLINE)
            assert _all_of(idle).endswith((b"", b"one 1.0\n"))
            idle.close()
            with pytest.raises(ConnectionRefusedError):
                served.connect()

    def test_client_that_does_not_read(self) -> None:
        """A scraper that takes no bytes does not hold the end up."""
        with _serving() as served, served.connect() as client:
            served.page = lambda: b"x" * 50_000_000
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            wait_until(lambda: served.took, within=DEADLINE, what="the page is rendered")
            begun = time.monotonic()
            served.thread.spawn(served.endpoint.aclose(grace=0.1)).result(DEADLINE)
            assert time.monotonic() - begun < DEADLINE / 2

    def test_never_served(self, thread: MetricsThread) -> None:
        """An endpoint that was never served can be closed."""
        nothing: Callable[[], Headers] = dict

        async def close() -> None:
            await Endpoint(render=lambda *_: ({}, []), about=nothing, on_scrape=lambda _seconds: None).aclose()

        thread.spawn(close()).result(DEADLINE)

    @needs_ip6
    def test_ip6(self) -> None:
        """An endpoint on IPv6 is scraped like any other."""
        with _serving("::1") as served:
            assert served.ask().status == 200


class TestBlockedApplication:
    """The application's main thread, stuck."""

    def test_is_scraped(self) -> None:
        """A process whose main thread sleeps, or computes without end, is scraped meanwhile."""
        code = """
import sys, time
from consul_prom.endpoint import Endpoint, MetricsThread, listen

async def serve():
    await Endpoint(render=lambda *_: ({}, [b"one 1.0\\n"]), about=dict, on_scrape=lambda seconds: None).serve(server)

server = listen("127.0.0.1", [0])
thread = MetricsThread()
thread.start()
thread.spawn(serve()).result(5)
print(server.getsockname()[1], flush=True)
if sys.argv[1] == "sleep":
    time.sleep(60)
while True:
    pass
"""
        for way in ("sleep", "compute"):
            environ = {**os.environ, "PYTHONPATH": str(ROOT)}
            with subprocess.Popen([sys.executable, "-c", code, way], env=environ, stdout=subprocess.PIPE) as program:
                try:
                    assert program.stdout
                    port = int(program.stdout.readline())
                    for _ in range(3):
                        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                        connection.request("GET", "/metrics")
                        assert connection.getresponse().read() == b"one 1.0\n"
                        connection.close()
                finally:
                    program.kill()


def _all_of(client: socket.socket) -> bytes:
    """What comes until the other side closes."""
    chunks = []
    with suppress(ConnectionError):
        while chunk := client.recv(65_536):
            chunks.append(chunk)
    return b"".join(chunks)


def _raising(error: Exception) -> Callable[[], bytes]:
    def fail() -> bytes:
        raise error

    return fail
