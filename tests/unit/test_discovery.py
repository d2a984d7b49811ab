"""prometheus_async's own servers with our discovery, where its stock agent fails."""

import asyncio
import logging
import queue
import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_async.aio.web import ThreadedMetricsHTTPServer, start_http_server, start_http_server_in_thread

from consul_prom import ConsulDiscovery
from consul_prom.devagent import DevAgent, Fault
from consul_prom.errors import ConsulPromError, EndpointError, SettingsError
from consul_prom.server.bind import route_address
from tests.services.waiting import eventually, wait_until
from tests.services.workers import Workers


@pytest.fixture
def arguments(agent: DevAgent, tmp_path: Path) -> dict[str, Any]:
    return {"service": "shop", "host": "web-1", "consul_http_addr": agent.url, "dir": tmp_path / "slots"}


async def test_server(agent: DevAgent, arguments: dict[str, Any]) -> None:
    """A server on one address is registered as it is, answers the agent's check, and is gone when it is closed."""
    server = await start_http_server(addr="127.0.0.1", service_discovery=ConsulDiscovery(**arguments))
    assert server.is_registered
    await eventually(lambda: agent.state.services, within=10, what="an entry")
    entry = agent.state.services["shop.web-1.0"]
    assert (entry.address, entry.port, entry.meta["instance"]) == ("127.0.0.1", server.socket.port, "web-1:0")
    await server.close()
    assert not agent.state.services


async def test_all_interfaces(agent: DevAgent, arguments: dict[str, Any]) -> None:
    """A server on all interfaces, which Consul refuses as it stands, is registered with an address and its port."""
    server = await start_http_server(service_discovery=ConsulDiscovery(**arguments))
    await eventually(lambda: agent.state.services, within=10, what="an entry")
    entry = agent.state.services["shop.web-1.0"]
    assert entry.address == "127.0.0.1"
    _, writer = await asyncio.open_connection(entry.address, entry.port)
    writer.close()
    await server.close()


async def test_route(agent: DevAgent, arguments: dict[str, Any]) -> None:
    """Where the agent does not tell an address, that is the default route's; ADDRESS beats both."""
    agent.fault = Fault(path="/v1/agent/self", status=403)
    for more, address in (({}, route_address()), ({"address": "203.0.113.5"}, "203.0.113.5")):
        server = await start_http_server(service_discovery=ConsulDiscovery(**arguments, **more))
        await eventually(lambda: agent.state.services, within=10, what="an entry")
        assert agent.state.services["shop.web-1.0"].address == address
        await server.close()


async def test_two_servers(agent: DevAgent, arguments: dict[str, Any]) -> None:
    """Two servers of one service do not overwrite each other."""
    servers = [
        await start_http_server(addr="127.0.0.1", service_discovery=ConsulDiscovery(**arguments)) for _ in range(2)
    ]
    await eventually(lambda: len(agent.state.services) == 2, within=10, what="two entries")
    for server in servers:
        await server.close()


async def test_agent_absent(agent: DevAgent, arguments: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """An agent that is not there raises nothing; once it comes, the server is registered, and stays so."""
    agent.fault = Fault(reset=True)
    server = await start_http_server(addr="127.0.0.1", service_discovery=ConsulDiscovery(**arguments))
    await eventually(lambda: caplog.records, within=10, what="a warning")
    agent.fault = None
    for _ in range(2):
        await eventually(lambda: agent.state.services, within=20, what="an entry")
        agent.state.deregister("shop.web-1.0")
    await server.close()
    assert {record.levelname for record in caplog.records} <= {"WARNING", "INFO", "DEBUG"}


async def test_required(agent: DevAgent, arguments: dict[str, Any]) -> None:
    """With REQUIRED, a server that cannot be registered in time is an error, and nothing is left of it."""
    before = set(asyncio.all_tasks())
    agent.fault = Fault(status=500)
    discovery = ConsulDiscovery(**arguments, required=True, start_timeout=0.3)
    with pytest.raises(EndpointError, match="CONSUL_PROM_START_TIMEOUT"):
        await start_http_server(addr="127.0.0.1", service_discovery=discovery)
    agent.fault = None
    await eventually(lambda: set(asyncio.all_tasks()) == before, within=10, what="no task of ours")
    server = await start_http_server(addr="127.0.0.1", service_discovery=discovery)
    assert "shop.web-1.0" in agent.state.services
    await server.close()


def test_thread(agent: DevAgent, arguments: dict[str, Any]) -> None:
    """The server in a thread starts with and without an agent, and is gone when it is closed."""
    for fault in (None, Fault(reset=True)):
        agent.fault = fault
        server = start_http_server_in_thread(addr="127.0.0.1", service_discovery=ConsulDiscovery(**arguments))
        if not fault:
            wait_until(lambda: agent.state.services, within=10, what="an entry")
        server.close()
        assert not agent.state.services
        assert not any(thread.name == "PrometheusAsyncWebEndpoint" for thread in threading.enumerate())


async def test_directory_fails(
    agent: DevAgent, arguments: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A directory that fails for a moment is tried again; with REQUIRED it is an error that says so."""
    arguments["dir"] = tmp_path / "slots"
    arguments["dir"].touch()
    discovery = ConsulDiscovery(**arguments, required=True, start_timeout=0.3)
    with pytest.raises(EndpointError, match=r"CONSUL_PROM_START_TIMEOUT: CONSUL_PROM_DIR=.* is not a directory"):
        await start_http_server(addr="127.0.0.1", service_discovery=discovery)
    caplog.clear()
    server = await start_http_server(addr="127.0.0.1", service_discovery=ConsulDiscovery(**arguments))
    await eventually(lambda: caplog.records, within=10, what="a warning")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    arguments["dir"].unlink()
    await eventually(lambda: agent.state.services, within=20, what="an entry")
    await server.close()
    assert not agent.state.services


def test_required_in_thread(
    agent: DevAgent, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """REQUIRED does not hang prometheus_async's server in a thread, which waits forever for one that raises."""
    agent.fault = Fault(reset=True)
    monkeypatch.setenv("CONSUL_PROM_CHECK_INTERVAL", "often")
    usable: dict[str, Any] = {"check_interval": 30, "start_timeout": 0.1}
    for more in (usable, {}):
        started = queue.SimpleQueue[ThreadedMetricsHTTPServer]()

        def start(discovery: ConsulDiscovery, started: Any = started) -> None:
            started.put(start_http_server_in_thread(addr="127.0.0.1", service_discovery=discovery))

        discovery = ConsulDiscovery(**arguments, **more, required=True, stop_timeout=0.1)
        threading.Thread(target=start, args=(discovery,), daemon=True).start()
        started.get(timeout=60).close()
        assert "use start_http_server" in caplog.text
        caplog.clear()


IN_THREAD = """
import os, signal, sys, time, urllib.request
from prometheus_async.aio.web import start_http_server_in_thread
from consul_prom import ConsulDiscovery

def wait():
    while b"shop" not in urllib.request.urlopen(os.environ["CONSUL_HTTP_ADDR"] + "/v1/agent/services").read():
        time.sleep(0.02)
    print("registered", flush=True)

server = start_http_server_in_thread(addr="127.0.0.1", service_discovery=ConsulDiscovery())
wait()
"""
IN_LOOP = """
import asyncio, os, signal, sys, time, urllib.request
from prometheus_async.aio.web import start_http_server
from consul_prom import ConsulDiscovery

def wait():
    while b"shop" not in urllib.request.urlopen(os.environ["CONSUL_HTTP_ADDR"] + "/v1/agent/services").read():
        time.sleep(0.02)
    print("registered", flush=True)

async def main():
    server = await start_http_server(addr="127.0.0.1", service_discovery=ConsulDiscovery())
    await asyncio.to_thread(wait)
    {end}

asyncio.run(main())
"""


@pytest.mark.parametrize("script", [IN_THREAD + "{end}", IN_LOOP], ids=["thread", "loop"])
@pytest.mark.parametrize(
    "end",
    [
        *("pass", "sys.exit(3)", "raise LookupError", "signal.raise_signal(signal.SIGINT)"),
        *("signal.raise_signal(signal.SIGTERM)", "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"),
    ],
)
def test_ends(agent: DevAgent, workers: Workers, end: str, script: str) -> None:
    """The entry of a server that nobody closes does not outlive its process, which ends as it would without us."""
    done = workers.run_any(script.format(end=end))
    assert done.stdout == "registered\n", done.stderr
    assert done.returncode == {"sys": 3, "rai": 1, "pas": 0}.get(end[:3], done.returncode)
    assert not agent.state.services


async def test_trouble(agent: DevAgent, arguments: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """A wrong argument raises at once; what is wrong around it is one ERROR, and the server serves."""
    with pytest.raises(SettingsError, match="service='Shop'"):
        ConsulDiscovery(service="Shop")
    wrong = {**arguments, "service": None}
    server = await start_http_server(addr="127.0.0.1", service_discovery=ConsulDiscovery(**wrong))
    assert not server.is_registered
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    caplog.clear()
    await server.close()
    with pytest.raises(ConsulPromError):
        await start_http_server(addr="127.0.0.1", service_discovery=ConsulDiscovery(**wrong, required=True))
    server = await start_http_server(addr="127.0.0.1", service_discovery=ConsulDiscovery(**arguments, disabled=True))
    assert not server.is_registered
    await server.close()
