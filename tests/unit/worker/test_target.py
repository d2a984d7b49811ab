"""A page that is not the process' own, as a target of its own."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, Gauge

from consul_prom.consul.client import AgentClient
from consul_prom.devagent import DevAgent, Fault
from consul_prom.gunicorn.stats import MasterStats
from consul_prom.settings.settings import Settings
from consul_prom.slots import slots
from consul_prom.slots.directory import prepare
from consul_prom.worker.target import ServedTarget
from consul_prom.worker.target_factory import TargetFactory
from consul_prom.worker.worker import running
from tests.conftest import MakeSettings
from tests.services.waiting import eventually
from tests.services.workers import meta, put


@pytest.fixture
async def agent() -> AsyncIterator[DevAgent]:
    async with DevAgent() as agent:
        yield agent


@pytest.fixture
async def client(agent: DevAgent, settings: MakeSettings) -> AsyncIterator[AgentClient]:
    client = AgentClient(settings(consul_http_addr=agent.url))
    yield client
    await client.aclose()


@pytest.fixture
def slot(slot_directory: Path) -> slots.Slot:
    prepare(slot_directory)
    slot = slots.try_slot(slot_directory, "shop", slots.MASTER)
    assert slot
    return slot


class Host:
    """Receives guests on loopback."""

    def __init__(self, client: AgentClient, settings: Settings, slot: slots.Slot) -> None:
        self.client = client
        self.settings = settings
        self.slot = slot
        self.registry = CollectorRegistry()
        Gauge("page", "Somebody else's.", registry=self.registry).set(7)

    async def receive(self) -> tuple[ServedTarget, int]:
        site = TargetFactory(self.settings)
        site.settle("127.0.0.1")
        guest = await site.receive(self.client, self.slot, self.registry)
        return guest, guest._wanted.port


@pytest.fixture
def host(client: AgentClient, settings: MakeSettings, slot: slots.Slot) -> Host:
    return Host(client, settings(), slot)


async def registered(agent: DevAgent, port: int) -> None:
    def found() -> bool:
        return "shop.web-1.master" in agent.state.services and agent.state.services["shop.web-1.master"].port == port

    await eventually(found, within=10, what="the guest's entry")


async def fetch(port: int, path: str, *, source: str = "127.0.0.1") -> str:
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(local_addr=(source, 0))) as session,
        session.get(f"http://127.0.0.1:{port}{path}") as answer,
    ):
        return await answer.text()


async def refused(port: int) -> bool:
    try:
        await fetch(port, "/metrics")
    except aiohttp.ClientConnectionError:
        return True
    return False


async def test_serves(agent: DevAgent, host: Host) -> None:
    """A guest has its own entry, health, page for people and metrics."""
    guest, port = await host.receive()
    await registered(agent, port)
    entry = agent.state.services["shop.web-1.master"]
    assert (entry.name, entry.meta["slot"], entry.meta["instance"]) == ("shop-metrics", "master", "web-1:master")
    assert "page 7.0" in await fetch(port, "/metrics")
    assert "healthy" in await fetch(port, "/-/healthy")
    assert "web-1:master" in await fetch(port, "/")
    assert await guest.retire(5)


async def test_guarded(agent: DevAgent, slot_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker lets the same networks in to the page that it serves for the masters as to its own."""
    prepare(slot_directory)
    tally = MasterStats(slot_directory, "shop")
    common = {"consul_http_addr": agent.url, "dir": str(slot_directory), "host": "web-1", "address": "127.0.0.1"}
    with running(service="shop", linger=0, allow="127.0.0.3/32", registry=CollectorRegistry(), **common):
        await eventually(lambda: len(agent.state.services) == 2, within=10, what="the worker's and the guest's entry")
        monkeypatch.setattr("ipaddress.IPv4Address.is_loopback", property(lambda _self: False))
        for entry in list(agent.state.services.values()):
            assert "TYPE" in await fetch(entry.port, "/metrics", source="127.0.0.3")
            with pytest.raises(aiohttp.ClientConnectionError):
                await fetch(entry.port, "/metrics", source="127.0.0.2")
    tally.close()


async def test_retires(agent: DevAgent, host: Host) -> None:
    """What retires leaves neither an entry nor a socket."""
    guest, port = await host.receive()
    await registered(agent, port)
    assert await guest.retire(5)
    assert not agent.state.services
    assert await refused(port)


async def test_gives_up(agent: DevAgent, host: Host) -> None:
    """What gives up leaves its entry to the next, and neither overwrites that nor serves any more."""
    guest, port = await host.receive()
    await registered(agent, port)
    async with asyncio.timeout(5):
        await guest.give_up()
    assert await refused(port)
    assert agent.state.services["shop.web-1.master"].port == port
    follower, next_port = await host.receive()
    await registered(agent, next_port)
    assert await follower.retire(5)


async def test_entry_comes_back(agent: DevAgent, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that the agent loses is registered again, by polls: a guest holds no connection."""
    monkeypatch.setattr("consul_prom.consul.registrar.TURN", 0.1)
    guest, port = await host.receive()
    await registered(agent, port)
    assert not any("hash=" in path for _, path in agent.requests)
    del agent.state.services["shop.web-1.master"]
    await registered(agent, port)
    assert await guest.retire(5)


async def test_hanging_agent(agent: DevAgent, host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """Where the agent hangs, retiring ends in time and says what is left."""
    guest, port = await host.receive()
    await registered(agent, port)
    agent.fault = Fault(delay=20)
    async with asyncio.timeout(10):
        assert not await guest.retire(0.3)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == (
        "shop.web-1.master may still be registered: the agent did not answer within CONSUL_PROM_STOP_TIMEOUT; "
        "`consul-prom deregister --id shop.web-1.master` removes it"
    )
    assert await refused(port)


async def test_cancelled(agent: DevAgent, host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """A retirement that is cancelled, since its worker has no more time, says what is left."""
    guest, port = await host.receive()
    await registered(agent, port)
    agent.fault = Fault(hang=True)
    retiring = asyncio.create_task(guest.retire(20))
    await asyncio.sleep(0)
    retiring.cancel()
    await asyncio.wait({retiring}, timeout=10)
    assert retiring.cancelled()
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "shop.web-1.master may still be registered"
    ]
    agent.fault = None


async def test_never_asked(agent: DevAgent, host: Host) -> None:
    """What never reached the agent does not say that there is no entry."""
    put_entry = asyncio.to_thread(put, agent, "shop.web-1.master", meta(slot="master", instance="web-1:master"))
    await put_entry
    agent.fault = Fault(status=500)
    guest, _ = await host.receive()
    await eventually(lambda: agent.requests, within=10, what="a question")
    assert not await guest.retire(0.3)
    assert list(agent.state.services) == ["shop.web-1.master"]


async def test_lost_right(agent: DevAgent, host: Host, slot_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the slot's file is another's, the entry goes, and the end is still a clean one."""
    monkeypatch.setattr("consul_prom.consul.registrar.TURN", 0.1)
    guest, port = await host.receive()
    await registered(agent, port)
    slots.path_of(slot_directory, "shop", slots.MASTER).unlink()
    await eventually(lambda: not agent.state.services, within=10, what="no entry")
    await guest.retire(5)
