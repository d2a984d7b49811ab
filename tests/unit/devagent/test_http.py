"""The dev agent over HTTP, where it does what real Consul does not: faults, refusals, and life in a thread."""

import asyncio
import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
import trustme
from aiohttp import web
from yarl import URL

from consul_prom.devagent import DevAgent, Fault, running
from consul_prom.devagent.definition import parse
from tests.services.waiting import eventually

REGISTER = "/v1/agent/service/register"
SERVICE = "/v1/agent/service/shop.web-1.0"
SHOP: dict[str, Any] = {"Name": "shop", "ID": "shop.web-1.0", "Address": "127.0.0.1", "Port": 9100}


@pytest.fixture
async def agent() -> AsyncIterator[DevAgent]:
    async with DevAgent() as agent:
        yield agent


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        yield session


async def call(
    session: aiohttp.ClientSession, agent: DevAgent, method: str, path: str, body: Any = None
) -> tuple[int, str]:
    data = None if body is None else json.dumps(body)
    async with session.request(method, URL(agent.url + path, encoded=True), data=data) as response:
        return response.status, await response.text()


@pytest.mark.parametrize(
    ("method", "path", "what"),
    [
        ("GET", "/v1/kv/x", "the URL /v1/kv/x"),
        ("GET", "/", "the URL /"),
        ("PUT", "/v1/agent/service/maintenance/x", "the URL /v1/agent/service/maintenance/x"),
        ("GET", "/v1/health/service/shop?filter=x", "the parameter filter"),
        ("GET", "/v1/catalog/services?near=_agent", "the parameter near"),
    ],
)
async def test_unsupported(agent: DevAgent, session: aiohttp.ClientSession, method: str, path: str, what: str) -> None:
    """Agent says of what it cannot do that it cannot do it."""
    assert await call(session, agent, method, path) == (501, f"The dev agent does not support {what}")


@pytest.mark.parametrize(
    ("what", "expression"),
    [
        ("services", 'ID != "a"'),
        ("services", 'ID == "a" or ID == "b"'),
        ("services", 'not ID == "a"'),
        ("services", '(ID == "a")'),
        ("services", 'ID == "a" and'),
        ("services", 'ID == "a"and ID == "b"'),
        ("services", 'Meta == "a"'),
        ("services", 'ID.x == "a"'),
        ("services", 'ID matches "a"'),
        ("checks", 'Service == "a"'),
    ],
)
async def test_unsupported_filter(agent: DevAgent, session: aiohttp.ClientSession, what: str, expression: str) -> None:
    """Agent refuses a filter that it cannot apply, rather than to list too much."""
    answer = await call(session, agent, "GET", f"/v1/agent/{what}?filter={quote(expression)}")
    assert answer == (501, f"The dev agent does not support the filter {expression}")


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"Connect": {"Native": True}}, "Connect"),
        ({"Kind": "mesh-gateway"}, "Kind"),
        ({"Check": {"TTL": "10s"}}, "TTL"),
        ({"Check": {"ScriptArgs": ["true"], "Interval": "1s"}}, "ScriptArgs"),
    ],
)
async def test_unsupported_field(
    agent: DevAgent, session: aiohttp.ClientSession, fields: dict[str, Any], what: str
) -> None:
    """Agent refuses a registration with fields that it would have to ignore."""
    assert await call(session, agent, "PUT", REGISTER, SHOP | fields) == (501, f"The dev agent does not support {what}")
    assert agent.state.services == {}


async def test_empty_unsupported_field(agent: DevAgent, session: aiohttp.ClientSession) -> None:
    """Agent takes a field that it does not support when it is empty."""
    assert (await call(session, agent, "PUT", REGISTER, SHOP | {"Kind": "", "Connect": None}))[0] == 200


async def test_requests_are_remembered(agent: DevAgent, session: aiohttp.ClientSession) -> None:
    """Agent remembers what it was asked."""
    await call(session, agent, "PUT", REGISTER, SHOP)
    await call(session, agent, "GET", SERVICE + "?wait=1s")
    assert list(agent.requests) == [("PUT", REGISTER), ("GET", SERVICE)]


async def test_fault_status(agent: DevAgent, session: aiohttp.ClientSession) -> None:
    """Agent answers with the status, body and headers of a fault, until the fault is taken away."""
    agent.fault = Fault(status=500, body="No cluster leader", headers={"X-Consul-Reason": "test"})
    async with session.put(agent.url + REGISTER, json=SHOP) as response:
        assert (response.status, await response.text()) == (500, "No cluster leader")
        assert response.headers["X-Consul-Reason"] == "test"
    assert agent.state.services == {}
    agent.fault = None
    assert (await call(session, agent, "PUT", REGISTER, SHOP))[0] == 200


async def test_fault_concerns(agent: DevAgent, session: aiohttp.ClientSession) -> None:
    """Agent does wrong only what the fault concerns."""
    agent.fault = Fault(method="PUT", path="/v1/agent/service/deregister/", status=403)
    assert (await call(session, agent, "PUT", REGISTER, SHOP))[0] == 200
    assert (await call(session, agent, "GET", SERVICE))[0] == 200
    assert (await call(session, agent, "PUT", "/v1/agent/service/deregister/shop.web-1.0"))[0] == 403


async def test_fault_reset(agent: DevAgent, session: aiohttp.ClientSession) -> None:
    """Agent breaks the connection, and nothing was done."""
    agent.fault = Fault(reset=True)
    with pytest.raises(aiohttp.ClientOSError, match="reset by peer"):
        await call(session, agent, "PUT", REGISTER, SHOP)
    assert agent.state.services == {}


async def test_fault_hang(agent: DevAgent, session: aiohttp.ClientSession) -> None:
    """Agent never answers, and nothing is done; when it stops, it does not wait for those who wait."""
    agent.fault = Fault(hang=True)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await call(session, agent, "PUT", REGISTER, SHOP)
    waiting = asyncio.ensure_future(call(session, agent, "GET", SERVICE))
    await eventually(lambda: len(agent.requests) == 2, within=5, what="the second request")
    async with asyncio.timeout(0.9):
        await agent.aclose()
    with pytest.raises(aiohttp.ClientError):
        await waiting
    assert agent.state.services == {}


async def test_fault_delay(agent: DevAgent, session: aiohttp.ClientSession) -> None:
    """Agent takes its time, and then does what was asked, even if nobody waits any more."""
    agent.fault = Fault(delay=0.5)
    start = time.monotonic()
    assert (await call(session, agent, "GET", "/v1/status/leader"))[0] == 200
    assert time.monotonic() - start >= 0.5
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await call(session, agent, "PUT", REGISTER, SHOP)
    assert agent.state.services == {}
    await eventually(lambda: agent.state.services, within=5, what="registered after all")


@pytest.mark.parametrize(
    "fault", [Fault(reset=True, late=True), Fault(hang=True, late=True), Fault(status=500, late=True)]
)
async def test_fault_late(agent: DevAgent, session: aiohttp.ClientSession, fault: Fault) -> None:
    """Agent does what was asked and loses the answer."""
    agent.fault = fault
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
        async with asyncio.timeout(0.3):
            assert (await call(session, agent, "PUT", REGISTER, SHOP))[0] == 500
    assert list(agent.state.services) == ["shop.web-1.0"]


async def test_caller_leaves(agent: DevAgent, session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture) -> None:
    """Agent makes no noise about a caller that leaves in the middle of a request."""
    caplog.set_level("DEBUG", logger="consul_prom")
    _, writer = await asyncio.open_connection(agent.host, agent.port)
    writer.write(b"PUT /v1/agent/service/register HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    await eventually(lambda: agent.requests, within=5, what="the request")
    writer.transport.abort()
    await eventually(lambda: "The caller left" in caplog.text, within=5, what="noticed")
    assert {record.levelname for record in caplog.records if record.name != "asyncio"} == {"DEBUG"}
    assert (await call(session, agent, "GET", "/v1/status/leader"))[0] == 200


async def test_restart(session: aiohttp.ClientSession) -> None:
    """Agent comes back empty, on the same port, and with a greater index."""
    agent = DevAgent()
    indexes = []
    for stop in (agent.kill, agent.aclose):
        await agent.start()
        port = agent.port
        assert agent.state.services == {}
        await call(session, agent, "PUT", REGISTER, SHOP)
        async with session.get(agent.url + "/v1/health/service/shop") as response:
            indexes.append(int(response.headers["X-Consul-Index"]))
        await stop()
        assert agent.port == port
    assert indexes[0] < indexes[1]


async def test_stop_twice() -> None:
    """Agent does not mind being stopped when it does not run, but it cannot be started twice."""
    agent = DevAgent()
    await agent.aclose()
    await agent.kill()
    await agent.start()
    with pytest.raises(RuntimeError, match="running already"):
        await agent.start()
    await agent.aclose()
    await agent.aclose()
    await agent.kill()


async def test_ipv6(session: aiohttp.ClientSession) -> None:
    """Agent listens on an IPv6 address."""
    async with DevAgent(host="::1") as agent:
        assert agent.url == f"http://[::1]:{agent.port}"
        assert await call(session, agent, "GET", "/v1/status/leader") == (200, '"[::1]:8300"')


@contextlib.asynccontextmanager
async def serving(status: int = 200, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    async def answer(request: web.BaseRequest) -> web.Response:
        return web.Response(status=status)

    runner = web.ServerRunner(web.Server(answer, access_log=None), shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    yield f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}/"
    await runner.cleanup()


async def test_reaps(session: aiohttp.ClientSession) -> None:
    """Agent probes a service, finds it gone, and deregisters it, in scaled time."""
    async with DevAgent(reap_interval=0.05, check_interval_at_least=0.01) as agent:
        agent.state.reap_after_at_least = 0.3
        async with serving() as url:
            check = {"HTTP": url, "Interval": "20ms", "DeregisterCriticalServiceAfter": "1ms"}
            await call(session, agent, "PUT", REGISTER, SHOP | {"Check": check})
            await eventually(lambda: agent.state.status_of("shop.web-1.0") == "passing", within=5, what="passing")
            watch = asyncio.ensure_future(call(session, agent, "GET", await watch_path(session, agent)))
        died = time.monotonic()
        assert await watch == (404, "unknown service ID: shop.web-1.0")
        assert time.monotonic() - died > 0.25


async def watch_path(session: aiohttp.ClientSession, agent: DevAgent) -> str:
    known = json.loads((await call(session, agent, "GET", SERVICE))[1])["ContentHash"]
    return f"{SERVICE}?hash={known}&wait=60s"


async def test_interval_has_a_minimum(agent: DevAgent, session: aiohttp.ClientSession) -> None:
    """Agent probes at most once a second, as Consul does, however short the interval."""
    async with serving() as url:
        await call(session, agent, "PUT", REGISTER, SHOP | {"Check": {"HTTP": url, "Interval": "1ms"}})
        passed = asyncio.Event()
        times: list[float] = []
        update = agent.state.update_check

        def note(check_id: str, status: str, output: str) -> None:
            times.append(time.monotonic())
            update(check_id, status, output)
            if len(times) == 2:
                passed.set()

        agent.state.update_check = note  # type: ignore[method-assign]
        async with asyncio.timeout(10):
            await passed.wait()
        assert times[1] - times[0] > 0.9


async def test_https(session: aiohttp.ClientSession) -> None:
    """Agent probes over TLS, and looks at the certificate unless told not to."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(tls)
    async with DevAgent(check_interval_at_least=0.01) as agent, serving(tls=tls) as url:
        check: dict[str, Any] = {"HTTP": url, "Interval": "50ms", "Status": "passing"}
        await call(session, agent, "PUT", REGISTER, SHOP | {"Check": check})
        await eventually(lambda: agent.state.status_of("shop.web-1.0") == "critical", within=5, what="critical")
        assert "certificate" in agent.state.checks["service:shop.web-1.0"].output
        check["TLSSkipVerify"] = True
        await call(session, agent, "PUT", REGISTER, SHOP | {"Check": check})
        await eventually(lambda: agent.state.status_of("shop.web-1.0") == "passing", within=5, what="passing")


@pytest.mark.parametrize("check", [{"HTTP": "no-scheme"}, {"HTTP": "ftp://127.0.0.1/"}, {"TCP": "127.0.0.1:99999"}])
async def test_probe_of_nonsense(session: aiohttp.ClientSession, check: dict[str, str]) -> None:
    """Agent calls critical what cannot be probed, and goes on."""
    async with DevAgent(check_interval_at_least=0.01) as agent:
        body = SHOP | {"Check": check | {"Interval": "10ms", "Status": "passing"}}
        await call(session, agent, "PUT", REGISTER, body)
        await eventually(lambda: agent.state.status_of("shop.web-1.0") == "critical", within=5, what="critical")


async def test_stop_during_probe(session: aiohttp.ClientSession) -> None:
    """Agent does not wait for its probes when it stops."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with DevAgent(check_interval_at_least=0.01) as agent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
            await call(session, agent, "PUT", REGISTER, SHOP | {"Check": {"HTTP": url, "Interval": "10ms"}})
            connection, _ = await asyncio.to_thread(silent.accept)
            with connection:
                async with asyncio.timeout(1):
                    await agent.aclose()


# In a thread


def test_running() -> None:
    """Agent in a thread answers, and leaves no thread."""
    with running() as agent, socket.create_connection((agent.host, agent.port), timeout=5) as client:
        client.sendall(b"GET /v1/status/leader HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        assert "consul-prom-devagent" in {thread.name for thread in threading.enumerate()}
    assert "consul-prom-devagent" not in {thread.name for thread in threading.enumerate()}


def test_running_on_a_taken_port() -> None:
    """Agent in a thread tells its caller that the port is taken, and leaves no thread."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        agent = DevAgent(port=taken.getsockname()[1])
        with pytest.raises(OSError, match="in use"), running(agent):
            pass
    assert "consul-prom-devagent" not in {thread.name for thread in threading.enumerate()}


def test_running_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agent in a thread tells its caller that there is no thread to be had."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="new thread"), running():
        pass


def test_running_stops_in_time() -> None:
    """Agent in a thread stops at once although somebody waits for an answer."""
    with running() as agent:
        agent.fault = Fault(hang=True)
        client = socket.create_connection((agent.host, agent.port), timeout=5)
        client.sendall(b"GET /v1/status/leader HTTP/1.1\r\nHost: x\r\n\r\n")
        start = time.monotonic()
    assert time.monotonic() - start < 3
    client.close()


def test_change_from_another_thread() -> None:
    """Agent in a thread wakes those who block when the caller's thread changes its state."""
    with running() as agent, socket.create_connection((agent.host, agent.port), timeout=5) as client:
        client.sendall(b"GET /v1/catalog/services?index=%d HTTP/1.1\r\nHost: x\r\n\r\n" % agent.state.catalog_index)
        with contextlib.suppress(TimeoutError):
            client.settimeout(0.3)
            assert not client.recv(100), "did not block"
        agent.state.register(parse(json.dumps(SHOP).encode()))
        client.settimeout(5)
        assert client.recv(100).startswith(b"HTTP/1.1 200")
