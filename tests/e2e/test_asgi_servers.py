"""FastAPI, Starlette, Flask, Django and no framework at all, on the servers that run them, with a real Consul."""

import asyncio
import re
import socket
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.services.consul import Consul
from tests.services.gunicorn import Gunicorn
from tests.services.waiting import wait_until

WORKERS = 2
DEADLINE = 60.0
HOST = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())
ROUTES = ("/shop/{item}", "/shop/<item>", "/shop/<int:item>", "other")


class Other(Gunicorn):
    """Any other server, started by *command*, in which `{address}` stands for its address."""

    def __init__(self, *command: str, settings: dict[str, str]) -> None:
        super().__init__(settings=settings)
        self._command = command

    def _arguments(self) -> Sequence[str]:
        return ["-m", *(part.format(address=self.address) for part in self._command)]


class Shop:
    """A server under test, through what Consul knows of its workers."""

    def __init__(self, consul: Consul, server: Gunicorn, workers: int) -> None:
        self.server = server
        self._consul = consul
        self._workers = workers

    def entries(self) -> dict[str, dict[str, Any]]:
        status, found = self._consul.call("/v1/agent/services")
        assert status == 200
        return {key: entry for key, entry in found.items() if entry["Service"] == "shop-metrics"}

    def pids(self) -> set[int]:
        return {int(entry["Meta"]["pid"]) for entry in self.entries().values()}

    def settled(self) -> bool:
        """Whether each worker has an entry of its own."""
        return set(self.entries()) == {f"shop.{HOST}.{slot}" for slot in range(self._workers)} and (
            len(self.pids()) == self._workers
        )

    def serve_all(self, path: str) -> int:
        """Ask until each worker has counted a request to the route; how often that was."""
        asked = 0
        with ThreadPoolExecutor(8) as clients:

            def everyone() -> bool:
                nonlocal asked
                asked += len(list(clients.map(self.server.get, [path] * 16)))
                return all(counted for counted in self.totals(*ROUTES))

            wait_until(everyone, within=DEADLINE, what="each worker answered")
        return asked

    def totals(self, *routes: str, status: int = 200) -> list[float]:
        """What each worker counted."""
        return [
            sum(
                sample.value
                for family in text_string_to_metric_families(page)
                for sample in family.samples
                if sample.name == "http_requests_total"
                and sample.labels["route"] in routes
                and sample.labels["status"] == str(status)
            )
            for page in self.pages()
        ]

    def total(self, route: str, status: int) -> float:
        return sum(self.totals(route, status=status))

    def pages(self) -> list[str]:
        """The metrics of each worker."""
        return [_fetch(f"http://{entry['Address']}:{entry['Port']}/metrics") for entry in self.entries().values()]

    def stop(self) -> None:
        """SIGTERM; once the server has ended, no entry is left."""
        assert self.server.running
        self.server.stop(within=20)
        assert not self.entries()
        assert "consul-prom is off" not in self.server.log.read_text(errors="replace")


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return str(answer.read().decode())


@pytest.fixture(scope="module")
def consul() -> Iterator[Consul]:
    with Consul() as agent:
        yield agent


Make = Callable[[dict[str, str]], Gunicorn]


def _gunicorn(app: str, worker_class: str, *options: str) -> Make:
    return lambda settings: Gunicorn(
        app, workers=WORKERS, worker_class=worker_class, settings=settings, options=options
    )


def _uvicorn(app: str, *options: str) -> Make:
    command = ("uvicorn", app, "--host={address}", "--port=8000", f"--workers={WORKERS}", *options)
    return lambda settings: Other(*command, settings=settings)


def _hypercorn(app: str) -> Make:
    command = ("hypercorn", app, "--bind={address}:8000", f"--workers={WORKERS}")
    return lambda settings: Other(*command, settings=settings)


ASGI_SERVERS = {
    "uvicorn, FastAPI": _uvicorn("tests.e2e.asgi_app:fast"),
    "uvicorn, Starlette": _uvicorn("tests.e2e.asgi_app:star"),
    "hypercorn, FastAPI": _hypercorn("tests.e2e.asgi_app:fast"),
    "hypercorn, Starlette": _hypercorn("tests.e2e.asgi_app:star"),
    "gunicorn and uvicorn, FastAPI": _gunicorn("tests.e2e.asgi_app:fast", "uvicorn_worker.UvicornWorker"),
    "gunicorn and uvicorn, preloaded": _gunicorn(
        "tests.e2e.asgi_app:star", "uvicorn_worker.UvicornWorker", "--preload"
    ),
    "gunicorn's own, Starlette": _gunicorn("tests.e2e.asgi_app:star", "asgi"),
}


@pytest.fixture
def start(consul: Consul) -> Iterator[Callable[..., Shop]]:
    """Starts a server and waits for an entry a worker."""
    servers: list[Gunicorn] = []

    def run(make: Make, workers: int = WORKERS, poke: str = "") -> Shop:
        server = make({"CONSUL_HTTP_ADDR": consul.url, "CONSUL_PROM_ADDRESS": consul.address})
        servers.append(server)
        shop = Shop(consul, server.start(), workers)

        def settled() -> bool:
            if poke:
                server.get(poke)
            return shop.settled()

        wait_until(settled, within=DEADLINE, what="an entry a worker")
        return shop

    yield run
    for server in servers:
        server.close()


@pytest.mark.parametrize("make", ASGI_SERVERS.values(), ids=ASGI_SERVERS.keys())
def test_asgi(start: Callable[..., Shop], make: Make) -> None:
    """Each worker is an entry of its own and counts its requests by template; SIGTERM leaves no entry."""
    shop = start(make)
    asked = shop.serve_all("/shop/7")
    assert shop.total("/shop/{item}", 200) == asked
    assert shop.server.call("/fail")[0] == 500
    assert shop.server.call("/nothing/at/all")[0] == 404
    asyncio.run(_talk(shop))
    _leave(shop)
    wait_until(lambda: shop.total("/stream", 499) == 1, within=DEADLINE, what="the client that left was counted")
    wait_until(lambda: shop.total("/chat/{room}", 101) == 1, within=DEADLINE, what="the websocket was counted")
    assert (shop.total("/fail", 500), shop.total("other", 404)) == (1, 1)
    assert all("consul_prom_event_loop_lag_seconds" in page for page in shop.pages())
    shop.stop()


async def _talk(shop: Shop) -> None:
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{shop.server.url}/chat/7") as talk:
        await talk.send_str("hello")
        assert await talk.receive_str(timeout=10) == "hello"


def _leave(shop: Shop) -> None:
    """A client that goes away in the middle of an answer."""
    with socket.create_connection((shop.server.address, 8000), 10) as client:
        client.sendall(b"GET /stream HTTP/1.1\r\nHost: shop.test\r\n\r\n")
        assert client.recv(100)


def test_lifespan_off(start: Callable[..., Shop]) -> None:
    """Without lifespan a worker is registered from its first request on, and leaves as Python exits."""
    shop = start(_gunicorn("tests.e2e.asgi_app:star", "asgi", "--asgi-lifespan=off"), poke="/shop/7")
    assert sum(shop.totals("/shop/{item}")) > 0
    shop.stop()


def test_agent_never_comes() -> None:
    """Without any agent uvicorn serves, and its stop is not held up."""
    settings = {"CONSUL_HTTP_ADDR": "127.0.0.1:1", "CONSUL_PROM_ADDRESS": "127.0.0.1"}
    with _uvicorn("tests.e2e.asgi_app:fast")(settings) as server:
        assert server.call("/shop/7")[0] == 200
        server.stop(within=10)
        assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("worker_class", ["sync", "gthread"])
def test_wsgi(start: Callable[..., Shop], worker_class: str) -> None:
    """Flask on Gunicorn: a hook starts each worker, and the requests are counted by rule."""
    make = _gunicorn("tests.e2e.wsgi_app:app", worker_class, "-c=python:tests.e2e.wsgi_app", "--threads=2")
    shop = start(make)
    asked = shop.serve_all("/shop/7")
    assert shop.total("/shop/<item>", 200) == asked
    assert shop.server.call("/fail")[0] == 500
    assert "The WSGI applications" in shop.server.get("/file")
    _leave(shop)
    wait_until(lambda: shop.total("/stream", 499) == 1, within=DEADLINE, what="the client that left was counted")
    wait_until(lambda: shop.total("/file", 200) == 1, within=DEADLINE, what="the file was counted")
    assert shop.total("/fail", 500) == 1
    shop.stop()


@pytest.mark.parametrize("worker_class", ["sync", "gevent"])
def test_django(start: Callable[..., Shop], worker_class: str) -> None:
    """Django on Gunicorn: the same, by route."""
    shop = start(_gunicorn("tests.e2e.django_app:app", worker_class, "-c=python:tests.e2e.wsgi_app"))
    asked = shop.serve_all("/shop/7")
    assert shop.total("/shop/<int:item>", 200) == asked
    assert shop.server.call("/fail")[0] == 500
    assert shop.total("/fail", 500) == 1
    shop.stop()


def test_wsgiref(start: Callable[..., Shop]) -> None:
    """A bare application in `running`, on the server of the standard library."""
    lone = {"CONSUL_PROM_LINGER": "0"}  # nobody scrapes it
    shop = start(lambda settings: Other("tests.e2e.wsgi_app", "{address}", settings={**settings, **lone}), workers=1)
    assert shop.pids() == {shop.server.pid}
    before = shop.total("other", 200)
    assert {int(shop.server.get("/shop/7")) for _ in range(10)} == {shop.server.pid}
    assert shop.total("other", 200) == before + 10
    shop.stop()
