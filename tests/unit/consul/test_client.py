"""The client against agents of every address form, and against agents that misbehave."""

import asyncio
import base64
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from consul_prom.consul.client import AgentClient
from consul_prom.consul.sync_client import deregister_sync, service_sync
from consul_prom.devagent import DevAgent, Fault
from consul_prom.errors import (
    AgentBusy,
    AgentConfused,
    AgentDenied,
    AgentError,
    AgentFailed,
    AgentRejected,
    AgentTimeout,
    AgentUnreachable,
)
from consul_prom.settings.settings import Settings, load

DOCUMENT: dict[str, Any] = {
    "ID": "shop.web-1.0",
    "Name": "shop-metrics",
    "Address": "127.0.0.1",
    "Port": 9100,
    "Tags": ["consul-prom"],
    "Meta": {"service": "shop"},
    "Check": {"HTTP": "http://127.0.0.1:9/-/healthy", "Interval": "30s", "Timeout": "1s", "Status": "passing"},
}


def settings(url: str, **arguments: Any) -> Settings:
    return load({"consul_http_addr": url, **arguments}, environ={})


@pytest.fixture
async def agent() -> AsyncIterator[DevAgent]:
    async with DevAgent() as agent:
        yield agent


@pytest.fixture
async def client(agent: DevAgent) -> AsyncIterator[AgentClient]:
    client = AgentClient(settings(agent.url), timeout=0.5)
    yield client
    await client.aclose()


async def round_trip(client: AgentClient, document: dict[str, Any] = DOCUMENT) -> None:
    """Register, read, deregister twice."""
    try:
        await client.register(document)
        entry = await client.service(document["ID"])
        assert entry
        assert entry.document["Meta"] == document["Meta"]
        assert entry.content_hash
        assert list(await client.services('"consul-prom" in Tags')) == [document["ID"]]
        assert [check["Status"] for check in await client.checks(document["ID"])] == ["passing"]
        assert await client.deregister(document["ID"]) is True
        assert await client.deregister(document["ID"]) is False
        assert await client.service(document["ID"]) is None
    finally:
        await client.aclose()


async def test_round_trip(client: AgentClient) -> None:
    """Client registers, reads and deregisters on the dev agent."""
    await round_trip(client)


async def test_closed(client: AgentClient) -> None:
    """A client that is closed in the midst of calls asks no more, and says so as it says what goes wrong."""
    await client.service("shop.web-1.0")
    await client.aclose()
    with pytest.raises(AgentUnreachable, match="not asked any more"):
        await client.service("shop.web-1.0")


async def test_ipv6() -> None:
    """Client reaches an agent at a bracketed IPv6 address."""
    async with DevAgent(host="::1") as agent:
        assert agent.url.startswith("http://[::1]:")
        await round_trip(AgentClient(settings(agent.url)))
        await round_trip(AgentClient(settings(agent.address)))


async def test_host_name(agent: DevAgent) -> None:
    """Client looks a name up without an executor, and remembers the address for the last moments."""
    before = set(threading.enumerate())
    client = AgentClient(settings(f"http://localhost:{agent.port}"))
    await client.services('Service == "x"')
    assert "127.0.0.1" in client.resolved
    await client.aclose()
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)


async def test_last_moments_by_several_addresses(agent: DevAgent, client: AgentClient) -> None:
    """The synchronous deregister tries the addresses in turn: the first may be one that the agent does not have."""
    await client.register(DOCUMENT)
    hosts = ("::1", "127.0.0.1")
    assert await asyncio.to_thread(deregister_sync, settings(agent.url), DOCUMENT["ID"], timeout=5, hosts=hosts)
    await agent.aclose()
    with pytest.raises(AgentUnreachable, match="Connection refused"):
        await asyncio.to_thread(deregister_sync, settings(agent.url), DOCUMENT["ID"], timeout=5, hosts=hosts)


async def test_entry_in_the_last_moments(agent: DevAgent, client: AgentClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The synchronous look gives the entry, or None, and trusts an answer no more than the other."""
    await client.register(DOCUMENT)
    found = await asyncio.to_thread(service_sync, settings(agent.url), DOCUMENT["ID"], timeout=5)
    assert found
    assert found["Meta"] == DOCUMENT["Meta"]
    assert await asyncio.to_thread(service_sync, settings(agent.url), "none", timeout=5) is None
    for body in ("{", "[1]", '{"Meta": 1}'):
        agent.fault = Fault(status=200, body=body)
        with pytest.raises(AgentConfused):
            await asyncio.to_thread(service_sync, settings(agent.url), "x", timeout=5)
    agent.fault = Fault(status=200, body="x" * 5000)
    monkeypatch.setattr("consul_prom.consul.sync_client.LARGEST_ENTRY", 4000)
    with pytest.raises(AgentConfused, match="CONSUL_HTTP_ADDR answered with more than"):
        await asyncio.to_thread(service_sync, settings(agent.url), "x", timeout=5)


async def test_no_thread_for_a_name(agent: DevAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system gives no thread to look a name up, the agent is unreachable for as long as that lasts."""
    client = AgentClient(settings(f"http://localhost:{agent.port}"))

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refuse)
        with pytest.raises(AgentUnreachable, match="can't start new thread"):
            await client.services('Service == "x"')
    assert await client.services('Service == "x"') == {}
    await client.aclose()


async def test_unknown_host() -> None:
    """A name that does not exist is unreachable, and the message names the setting."""
    client = AgentClient(settings("http://no-such-host.invalid:8500"))
    with pytest.raises(AgentUnreachable, match=r"CONSUL_HTTP_ADDR=http://no-such-host\.invalid:8500"):
        await client.self_()
    await client.aclose()


@pytest.mark.parametrize(("auth", "sent"), [("user:pa:ss", b"user:pa:ss"), ("user", b"user:")])
async def test_path_prefix_headers_and_scope(auth: str, sent: bytes) -> None:
    """Prefix, token, basic authentication, namespace and partition are sent with every call, quoted."""
    seen: list[tuple[str, dict[str, str]]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.split("\r\n")
        seen.append((first, dict(line.split(": ", 1) for line in lines if line)))
        writer.write(b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"ID": "a/b c.host.0"}')
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    secret = settings(
        f"http://127.0.0.1:{port}/proxy/consul/",
        consul_http_token="t-1",
        consul_http_auth=auth,
        consul_namespace="team a",
        consul_partition="eu",
    )
    client = AgentClient(secret)
    await client.service("a/b c.host.0")
    await client.aclose()
    await asyncio.to_thread(deregister_sync, secret, "a/b c.host.0", timeout=5)
    server.close()
    for (line, headers), path in zip(
        seen, ("GET /proxy/consul/v1/agent/service/", "PUT /proxy/consul/v1/agent/service/deregister/"), strict=True
    ):
        assert line == f"{path}a%2Fb%20c.host.0?ns=team+a&partition=eu HTTP/1.1"
        assert headers["X-Consul-Token"] == "t-1"
        assert headers["Authorization"] == "Basic " + base64.b64encode(sent).decode()


async def test_replaces_checks(agent: DevAgent, client: AgentClient) -> None:
    """A registration takes away the checks that are not in it, which python-consul2 cannot ask for."""
    await client.register(DOCUMENT)
    await client.register({**DOCUMENT, "Check": {**DOCUMENT["Check"], "CheckID": "other"}})
    assert [check["CheckID"] for check in await client.checks(DOCUMENT["ID"])] == ["other"]
    assert ("PUT", "/v1/agent/service/register") in {
        (method, path.partition("?")[0]) for method, path in agent.requests
    }


async def test_environment_is_not_read(agent: DevAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """python-consul2's habit of letting the environment beat the arguments does not reach us."""
    monkeypatch.setenv("CONSUL_HTTP_ADDR", "http://a:b:c:d")
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "from-the-environment")
    monkeypatch.setenv("CONSUL_HTTP_SSL", "true")
    await round_trip(AgentClient(settings(agent.url)))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, AgentRejected),
        (401, AgentDenied),
        (403, AgentDenied),
        (405, AgentRejected),
        (418, AgentConfused),
        (429, AgentBusy),
        (500, AgentFailed),
        (503, AgentFailed),
    ],
)
async def test_statuses(agent: DevAgent, client: AgentClient, status: int, kind: type[AgentError]) -> None:
    """Each status is an error of its own kind, with the agent's words in one line."""
    agent.fault = Fault(status=status, body="Permission\ndenied")
    for call in (client.service("x"), client.register(DOCUMENT), client.deregister("x"), client.services("x")):
        with pytest.raises(kind, match=f"answered {status}: Permission denied"):
            await call
    with pytest.raises(kind):
        await asyncio.to_thread(deregister_sync, settings(agent.url), "x", timeout=5)


@pytest.mark.parametrize(
    ("status", "location", "said"),
    [
        (301, "/v1/agent/self", "it redirects to /v1/agent/self"),
        (302, "https://sso.example/?next=%2Fv1", r"it redirects to https://sso\.example/\?next=%2Fv1"),
        (302, "", "Found"),
        (503, "", "Service Unavailable"),
        (299, "", "an empty answer"),
    ],
)
async def test_no_words(agent: DevAgent, client: AgentClient, status: int, location: str, said: str) -> None:
    """An answer without a text is an error that says what its status means; no redirect is followed."""
    agent.fault = Fault(status=status, body="", headers={"Location": location} if location else {})
    with pytest.raises(AgentError, match=f"answered {status}: {said}$"):
        await client.services("x")
    with pytest.raises(AgentError, match=f"answered {status}: {said}$"):
        await asyncio.to_thread(deregister_sync, settings(agent.url), "x", timeout=5)


@pytest.mark.parametrize("body", ["<html>proxy</html>", "[1, 2]", '"text"', "{", ""])
async def test_confusion(agent: DevAgent, client: AgentClient, body: str) -> None:
    """An answer that is no JSON object is an error, not a surprise further on."""
    agent.fault = Fault(status=200, body=body)
    for call in (client.service("x"), client.services("x"), client.checks("x"), client.self_()):
        with pytest.raises(AgentConfused):
            await call


async def test_deadline(agent: DevAgent, client: AgentClient) -> None:
    """An agent that accepts and never answers, or answers by the drop, runs into the deadline."""
    agent.fault = Fault(hang=True)
    for call in (client.service("x"), client.register(DOCUMENT), client.deregister("x")):
        with pytest.raises(AgentTimeout, match=r"within 0\.5 s"):
            await call
    with pytest.raises(AgentTimeout, match=r"within 0\.2 s"):
        await asyncio.to_thread(deregister_sync, settings(agent.url), "x", timeout=0.2)


async def test_reset_and_refusal(agent: DevAgent, client: AgentClient) -> None:
    """A reset and a refused connection are the same to us: unreachable."""
    agent.fault = Fault(reset=True)
    for call in (client.service("x"), client.register(DOCUMENT)):
        with pytest.raises(AgentUnreachable):
            await call
    with pytest.raises(AgentUnreachable):
        await asyncio.to_thread(deregister_sync, settings(agent.url), "x", timeout=5)
    await agent.aclose()
    with pytest.raises(AgentUnreachable, match="CONSUL_HTTP_ADDR"):
        await client.service("x")


async def test_flood(agent: DevAgent, client: AgentClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer without end is cut off: memory stays bounded."""
    monkeypatch.setattr("consul_prom.consul.client.LARGEST_ANSWER", 10_000)
    agent.fault = Fault(status=200, body="x" * 200_000)
    with pytest.raises(AgentConfused, match="more than"):
        await client.services("x")


async def test_blocking_read(agent: DevAgent, client: AgentClient) -> None:
    """The blocking read outlasts the call's deadline, ends at once on a change, and is None on a loss.

    It waits for a second at least: none would be five minutes to Consul.
    """
    await client.register(DOCUMENT)
    entry = await client.service(DOCUMENT["ID"])
    assert entry
    begun = time.monotonic()
    same = await client.service(DOCUMENT["ID"], content_hash=entry.content_hash, wait=0.3)
    assert same
    assert same.content_hash == entry.content_hash
    assert time.monotonic() - begun >= 1
    waiting = asyncio.ensure_future(client.service(DOCUMENT["ID"], content_hash=entry.content_hash, wait=60))
    other = AgentClient(settings(agent.url))
    await asyncio.sleep(0)
    await other.register({**DOCUMENT, "Tags": ["edited"]})
    changed = await waiting
    assert changed
    assert changed.document["Tags"] == ["edited"]
    waiting = asyncio.ensure_future(client.service(DOCUMENT["ID"], content_hash=changed.content_hash, wait=60))
    await other.deregister(DOCUMENT["ID"])
    assert await waiting is None
    await other.aclose()


async def test_token_file(agent: DevAgent, tmp_path: Path) -> None:
    """The token file is read for each call; one that cannot be read or sent is named, its content is not."""
    file = tmp_path / "token"
    client = AgentClient(settings(agent.url, consul_http_token_file=str(file)))
    with pytest.raises(AgentDenied, match=f"CONSUL_HTTP_TOKEN_FILE='{file}' cannot be read"):
        await client.self_()
    file.write_text("a-token\n")
    await client.self_()
    file.write_text("hush\nhush")
    with pytest.raises(AgentDenied, match="no HTTP header can carry") as caught:
        await client.self_()
    assert "hush" not in str(caught.value)
    await client.aclose()


def test_no_thread_is_left() -> None:
    """A name server that hangs keeps neither a call nor the process' end."""
    program = (
        "import asyncio, socket, time\n"
        "socket.getaddrinfo = lambda *a, **k: time.sleep(60)\n"
        "from consul_prom.consul.client import AgentClient\n"
        "from consul_prom.errors import AgentTimeout\n"
        "from consul_prom.settings.settings import load\n"
        "async def main():\n"
        "    client = AgentClient(load({'consul_http_addr': 'http://consul.example:8500'}), timeout=0.3)\n"
        "    try:\n"
        "        await client.self_()\n"
        "    except AgentTimeout:\n"
        "        print('timed out')\n"
        "    await client.aclose()\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "timed out\n"
