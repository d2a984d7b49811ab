"""The metrics thread, its listening socket, and what it answers."""

import asyncio
import base64
import http.client
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import bcrypt
import pytest

from consul_prom.consul.registration import HEALTH_PATH
from consul_prom.process.metrics_thread import MetricsThread
from consul_prom.server import basic_auth, listener, metrics_handler
from consul_prom.server.bind import listen
from consul_prom.server.endpoint import Endpoint
from consul_prom.server.web_config import WebConfig
from tests import ROOT
from tests.services.waiting import wait_until

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
        self.web: WebConfig | None = None
        self.pieces = self._whole
        self.facts: dict[str, str] = {"service": "shop", "instance": "web-1:0"}
        self.thread = MetricsThread()
        self.listener = listen(address, [0])
        self.address, self.port = self.listener.getsockname()[:2]

    def render(
        self, accept: str, coding: str, names: list[str]
    ) -> tuple[Headers, frozenset[str] | None, Iterator[bytes]]:
        self.asked.append((accept, coding, names))
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8", "Vary": "Accept"}
        return headers, frozenset(names) if names else None, self._pieces()

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
        endpoint = Endpoint(render=self.render, about=lambda: self.facts, on_scrape=self.took.append, web=self.web)
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

    def test_blank_name(self, served: Served) -> None:
        """A blank ``name[]`` chooses nothing, as in prometheus_client: the page is whole."""
        served.ask("/metrics?name[]=&name[]=a")
        served.ask("/metrics?name[]=")
        assert [names for *_, names in served.asked] == [["a"], []]

    def test_header_in_two_lines(self, served: Served) -> None:
        """A list that comes in two header lines is one list (RFC 9110, 5.3)."""
        with served.connect() as connection:
            lines = (
                "Accept: text/html\r\nAccept: text/plain\r\nAccept-Encoding: br\r\nAccept-Encoding: identity;q=0\r\n"
            )
            connection.sendall(f"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{lines}\r\n".encode())
            while connection.recv(4096):
                pass
        assert served.asked[-1][:2] == ("text/html,text/plain", "br,identity;q=0")

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
        assert not served.endpoint.scrapes.last
        before = time.time()
        served.ask()
        assert before <= (served.endpoint.scrapes.last or 0) <= time.time()


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

    def test_many_pages_of_chosen_names(self, served: Served) -> None:
        """Of different pages of chosen names a few are written at once, and more are refused; whole pages never are."""
        with served.holding() as event, ThreadPoolExecutor(40) as pool:
            chosen = [
                pool.submit(served.ask, f"/metrics?name[]={number}") for number in range(metrics_handler.CHOSEN_AT_ONCE)
            ]
            wait_until(lambda: len(served.asked) == metrics_handler.CHOSEN_AT_ONCE, within=DEADLINE, what="pages begun")
            refused = served.ask("/metrics?name[]=another")
            again, whole = pool.submit(served.ask, "/metrics?name[]=1&name[]=1"), pool.submit(served.ask)
            wait_until(lambda: len(served.asked) == metrics_handler.CHOSEN_AT_ONCE + 3, within=DEADLINE, what="more")
            event.set()
            assert {answer.result(DEADLINE).status for answer in [*chosen, again, whole]} == {200}
        assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
        assert b"name[]" in refused.body
        assert served.ask("/metrics?name[]=another").status == 200

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
        for number in range(metrics_handler.PAGES_READ + 2):
            client = served.connect()
            stalled.append(client)
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            wait_until(lambda: len(served.took) == number + 1, within=DEADLINE, what="the page is written")  # noqa: B023
        assert len(served.endpoint.scrapes._read) == metrics_handler.PAGES_READ
        served.page = lambda: b"one 1.0\n"
        assert served.ask().body == b"one 1.0\n"
        whole = [_is_whole(client, 20_000_000) for client in stalled]
        assert whole == [False] * 3 + [True] * (metrics_handler.PAGES_READ - 1)
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
        monkeypatch.setattr(metrics_handler, "READING", 0.2)
        served.page = lambda: b"x" * 20_000_000
        with served.connect() as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            wait_until(lambda: served.took, within=DEADLINE, what="the page is written")
            (page,) = served.endpoint.scrapes._read
            wait_until(lambda: not page.readers, within=DEADLINE, what="it is cut off")
            assert not _is_whole(client, 20_000_000)

    def test_crowd(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        """A crowd of silent connections cuts off no scraper, neither while its page is written nor while it is read."""
        monkeypatch.setattr(listener, "STALL", 60)
        size, crowd = 20_000_000, []
        served.page = lambda: b"x" * size
        with served.holding() as go_on, served.connect() as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            wait_until(lambda: served.written, within=DEADLINE, what="the page is begun")
            crowd += [served.connect() for _ in range(2 * listener.MAX_CONNECTIONS)]
            assert served.ask(HEALTH_PATH).status == 200
            go_on.set()
            wait_until(lambda: served.took, within=DEADLINE, what="the page is written")
            crowd += [served.connect() for _ in range(2 * listener.MAX_CONNECTIONS)]
            assert served.ask(HEALTH_PATH).status == 200
            assert _is_whole(client, size)
        for silent in crowd:
            silent.close()

    def test_since(self, served: Served) -> None:
        """A scrape has been when its page is sent to its end, begun since then, to all that are still connected."""
        since, size = served.endpoint.scrapes.since, 20_000_000
        served.page = lambda: b"x" * size
        begun = time.time()
        with served.connect() as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            wait_until(lambda: served.took, within=DEADLINE, what="the page is written")
            assert not since(begun), "nobody has it yet"
            assert _is_whole(client, size)
            wait_until(lambda: since(begun), within=DEADLINE, what="it is sent")
            later = time.time()
            assert not since(later), "it is of before"
            served.page = lambda: b"one 1.0\n"
            served.ask()
            assert not since(later), "one who is still connected has only an older page"
        wait_until(lambda: since(later), within=DEADLINE, what="it went away")
        with served.holding() as ends, served.connect() as client:
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            wait_until(lambda: served.written == 3, within=DEADLINE, what="a page is begun")
            latest = time.time()
            ends.set()
            assert _all_of(client).endswith(b"one 1.0\n")
        wait_until(lambda: len(served.took) == 3, within=DEADLINE, what="it is sent")
        assert not since(latest), "it was begun before"

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
        """It is a 500 each time and one WARNING with the traceback, and one when a page could be rendered again."""
        for _ in range(2):
            served.page = _raising(LookupError("s3cret detail"))
            for _ in range(3):
                answer = served.ask()
                assert answer.status == 500
                assert answer.body == b"a collector raised LookupError\n"
            served.page = lambda: b"one 1.0\n"
            assert served.ask().status == 200
        assert [(record.name, record.levelname) for record in caplog.records] == [
            ("consul_prom.server.metrics_handler", "WARNING")
        ] * 4
        assert ["can be rendered again" in message for message in caplog.messages] == [False, True] * 2
        assert "cannot be rendered" in caplog.records[0].message
        assert caplog.records[0].exc_info
        assert isinstance(caplog.records[0].exc_info[1], LookupError)
        assert len(served.took) == 2

    def test_failure_of_ours_is_logged(self, served: Served, caplog: pytest.LogCaptureFixture) -> None:
        """What the page for people raises is our own mistake, and not kept quiet."""
        served.facts = {"one": 1}  # type: ignore[dict-item]
        assert served.ask("/").status == 500
        assert [(record.name, record.levelname) for record in caplog.records] == [
            ("consul_prom.server.endpoint", "ERROR")
        ]

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


class TestWebConfig:
    """With passwords."""

    @pytest.fixture
    def guarded(self, tmp_path: Path) -> Iterator[Served]:
        hashed = bcrypt.hashpw(b"hunter2", bcrypt.gensalt(4)).decode()
        headers = "http_server_config: {headers: {X-Frame-Options: deny}}"
        (tmp_path / "web.yml").write_text(f"basic_auth_users: {{me: {hashed}}}\n{headers}\n")
        served = Served()
        served.web = WebConfig(str(tmp_path / "web.yml"))
        served.start()
        yield served
        served.stop()

    @pytest.mark.parametrize("path", ["/metrics", "/", "/no", "/-/healthy/", "//-/healthy"])
    def test_password(self, guarded: Served, path: str) -> None:
        """Without the password nothing is told, not even which paths there are; with it all is as ever."""
        for headers in ({}, {"Authorization": "Basic bWU6d3Jvbmc="}):
            answer = guarded.ask(path, **headers)
            assert (answer.status, answer.headers["WWW-Authenticate"], answer.body) == (401, "Basic", b"unauthorized\n")
        assert guarded.ask(path, Authorization="Basic bWU6aHVudGVyMg==").status in {200, 404}
        assert len(guarded.asked) == (path == "/metrics")

    def test_is_remembered_until_a_scrape(self, guarded: Served) -> None:
        """Who had no password, or was turned away, is no cause any more of what comes after a scrape."""
        right = {"Authorization": "Basic bWU6aHVudGVyMg=="}

        def turned_away() -> str:
            return guarded.endpoint.turned_away

        guarded.ask()
        guarded.ask("/", **right)
        assert "came without a password" in turned_away()
        guarded.ask(**right)
        assert not turned_away()
        guarded.endpoint._listener.turned_away = "192.0.2.1 was turned away"
        guarded.ask(HEALTH_PATH)
        assert turned_away()
        guarded.ask(**right)
        assert not turned_away()

    def test_guesses(self, guarded: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        """Guesses of one client on many connections get a 503, except for one, and the right password is let in."""
        gate = threading.Event()
        matches = basic_auth._bcrypt_matches
        monkeypatch.setattr(
            basic_auth, "_bcrypt_matches", lambda password, hashed: gate.wait(DEADLINE) and matches(password, hashed)
        )
        clients = [guarded.connect() for _ in range(20)]
        for number, client in enumerate(clients):
            token = base64.b64encode(f"me:{number}".encode()).decode()
            client.sendall(f"GET /metrics HTTP/1.0\r\nAuthorization: Basic {token}\r\n\r\n".encode())
        wait_until(lambda: len(select.select(clients, [], [], 0)[0]) == 19, within=DEADLINE, what="19 answers")
        gate.set()
        statuses = sorted(_all_of(client).split(b" ", 2)[1] for client in clients)
        assert statuses == [b"401", *[b"503"] * 19]
        assert guarded.ask(Authorization="Basic bWU6aHVudGVyMg==").status == 200
        for client in clients:
            client.close()

    def test_no_thread(self, guarded: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where no password can be checked, that is said with a 503, and nothing else is told."""

        def refuse(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        answer = guarded.ask(Authorization="Basic bWU6aHVudGVyMg==")
        assert (answer.status, answer.body) == (503, b"no thread to check a password in\n")
        assert not guarded.asked
        monkeypatch.undo()
        assert guarded.ask(Authorization="Basic bWU6aHVudGVyMg==").status == 200

    def test_agent(self, guarded: Served) -> None:
        """The agent's check, which has no password, is answered."""
        assert guarded.ask(HEALTH_PATH).status == 200

    def test_headers(self, guarded: Served) -> None:
        """The file's headers are in every answer."""
        for path in (HEALTH_PATH, "/metrics"):
            assert guarded.ask(path).headers["X-Frame-Options"] == "deny"


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

    @pytest.mark.parametrize(
        "junk", [b"\0" * 100_000, b"GET /metrics HTTP/1.1\r\nX\xff<b>\r\n\r\n"], ids=["NULs", "markup"]
    )
    def test_error_answer(self, served: Served, junk: bytes) -> None:
        """The answer to what is no HTTP repeats nothing of it, and names no version."""
        with served.connect() as client:
            with suppress(ConnectionError):
                client.sendall(junk)
            answer = _all_of(client)
        assert answer.startswith(b"HTTP/1.0 400 Bad Request\r\n")
        assert answer.endswith(b"\r\n\r\nBad Request\n")
        assert b"Server: consul-prom\r\n" in answer

    @pytest.mark.parametrize("path", ["/metrics", "/", "/no", HEALTH_PATH])
    def test_server(self, served: Served, path: str) -> None:
        """No answer names aiohttp or Python, and with them their versions."""
        for method in ("GET", "POST"):
            assert served.ask(path, method).headers.get_all("Server") == ["consul-prom"]
        served.facts = {"one": 1}  # type: ignore[dict-item]
        assert served.ask("/").headers.get_all("Server") == ["consul-prom"]

    def test_client_that_sends_no_more(self, served: Served) -> None:
        """A client that ends its side after its request gets the answer, and then the end."""
        with served.holding() as go_on, served.connect() as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            client.shutdown(socket.SHUT_WR)
            wait_until(lambda: served.written, within=DEADLINE, what="the page is begun")
            go_on.set()
            assert _all_of(client).endswith(b"one 1.0\n")

    def test_client_that_sends_nothing_more(self, served: Served) -> None:
        """A client that ends its side without a request, or in the middle of one, is disconnected."""
        for head in (b"", b"GET /metrics HTTP/1.1\r\nHost:", b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n"):
            with served.connect() as client:
                client.sendall(head)
                if head.endswith(b"\r\n\r\n"):
                    assert client.recv(1000).endswith(b"healthy\n")
                client.shutdown(socket.SHUT_WR)
                assert _all_of(client) == b""


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

    def test_never_served(self) -> None:
        """An endpoint that was never served can be closed."""
        nothing: Callable[[], Headers] = dict

        async def close() -> None:
            await Endpoint(render=lambda *_: ({}, None, []), about=nothing, on_scrape=lambda _seconds: None).aclose()

        asyncio.run(close())

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
from consul_prom.server.bind import listen
from consul_prom.server.endpoint import Endpoint
from consul_prom.process.metrics_thread import MetricsThread

async def serve():
    page = {}, None, [b"one 1.0\\n"]
    await Endpoint(render=lambda *_: page, about=dict, on_scrape=lambda seconds: None).serve(server)

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
