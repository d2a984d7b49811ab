"""Time that goes wrong: a worker that stood still, a clock that jumps, and faults of an hour, in a moment."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from consul_prom.consul.client import AgentClient
from consul_prom.consul.registrar import Registrar
from consul_prom.consul.registration import MARKER, Registration
from consul_prom.errors import AgentBusy, AgentDenied, AgentError, AgentFailed, AgentTimeout, AgentUnreachable
from consul_prom.settings.settings import TAG, load
from tests.faults.fleet import Fleet
from tests.services.consul import Consul
from tests.services.waiting import eventually, wait_until

META = {**MARKER, "service": "shop", "instance": "web-1:0", "scheme": "http", "pid": "7", "dir": "abc:/slots"}
WANTED = Registration("shop.web-1.0", "shop-metrics", "127.0.0.1", 9100, (TAG,), META, 30, 5, 600, "/-/healthy")


def test_worker_stood_still(consul: Consul, tmp_path: Path) -> None:
    """What was lost while the worker stood still is repaired when it goes on."""
    with Fleet({"shop": 3}, directory=tmp_path, consul_http_addr=consul.url) as fleet:
        wait_until(lambda: fleet.settled(consul), within=20, what="registered")
        fleet.pause()
        for entry_id in fleet.ids:
            assert consul.call(f"/v1/agent/service/deregister/{entry_id}", method="PUT")[0] == 200
        fleet.resume()
        wait_until(lambda: fleet.settled(consul), within=20, what="registered again")
        assert fleet.end() == [0]
        assert not consul.call("/v1/agent/services")[1]


class Clock:
    """Real time, and how far it has jumped."""

    def __init__(self) -> None:
        self.jump = 0.0

    def __call__(self) -> float:
        return asyncio.get_running_loop().time() + self.jump


@pytest.mark.parametrize("jump", [-1e9, -3600, 3600, 1e9])
async def test_clock_jumps(consul: Consul, jump: float) -> None:
    """A clock that jumps, back or ahead, at work or in an outage, neither stops the registrar nor makes it race."""
    client = AgentClient(load({"consul_http_addr": consul.url}, environ={}))
    asked = 0

    class Counted(_Delegate):
        async def service(self, entry_id: str, *, content_hash: str = "", wait: float = 0) -> Any:
            nonlocal asked
            asked += 1
            return await client.service(entry_id, content_hash=content_hash, wait=wait)

    clock = Clock()
    registrar = Registrar(Counted(client), WANTED, clock=clock)
    running = asyncio.create_task(registrar.run())
    await eventually(lambda: registrar.registered, within=20, what="registered")
    clock.jump = jump
    assert await client.deregister(WANTED.id)
    await eventually(lambda: client.service(WANTED.id), within=20, what="registered again")
    await asyncio.to_thread(consul.kill)
    await eventually(lambda: not registrar.registered, within=20, what="the loss noticed")
    clock.jump *= 2
    await asyncio.to_thread(consul.start)
    await eventually(lambda: registrar.registered, within=20, what="registered after the outage")
    assert asked < 100
    running.cancel()
    assert await registrar.deregister()
    await client.aclose()


class _Delegate:
    """A client, for those that change one of its calls."""

    def __init__(self, client: AgentClient) -> None:
        self._client = client
        self.register, self.deregister, self.checks = client.register, client.deregister, client.checks
        self.catalogued, self.deregister_from_catalogue = client.catalogued, client.deregister_from_catalogue
        self.credentials = client.credentials


@dataclass(frozen=True)
class Entry:
    document: Mapping[str, Any]
    content_hash: str = "1"


class Agent:
    """An agent of one entry, in virtual time: `plan` tells what happens at a second of the hour."""

    def __init__(self, plan: Any) -> None:
        self.time = 0.0
        self.calls = 0
        self._plan = plan
        self._entry: Entry | None = None
        self._seen = -1

    credentials = 0

    def clock(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds
        await (asyncio.sleep(0) if self.time < 3600 else asyncio.Event().wait())

    async def service(self, entry_id: str, *, content_hash: str = "", wait: float = 0) -> Entry | None:
        if content_hash:
            await self.sleep(self._step("watch") or wait)
        self._step("read")
        return self._entry

    async def register(self, document: Mapping[str, Any]) -> None:
        self._step("register")
        self._entry = Entry({**document, "Service": document["Name"]})

    async def checks(self, entry_id: str) -> list[dict[str, Any]]:
        self._step("read")
        check = {"CheckID": f"service:{WANTED.id}", "Name": WANTED.check_name, "Notes": WANTED.check_notes}
        return [{**check, "Type": "http", "Interval": "30s", "Timeout": "5s", "Status": "passing"}]

    async def deregister(self, entry_id: str) -> bool:
        return False

    async def catalogued(self, name: str, entry_id: str, node: str) -> bool:
        return False

    async def deregister_from_catalogue(self, entry_id: str, node: str) -> None:
        pass

    def _step(self, call: str) -> float:
        self.calls += 1
        assert self.calls < 50_000, "it races"  # which would else be an hour of ours
        outcome = self._plan(call, int(self.time))
        if isinstance(outcome, AgentError):
            raise outcome
        if outcome == "lost":
            self._entry = None
        if outcome == "edited" and self._entry:
            self._entry = Entry({**self._entry.document, "Tags": ["edited"]}, "2")
        return 0.01 if outcome in {"lost", "edited"} else 0.0


KINDS: list[AgentError] = [AgentFailed("5"), AgentBusy("4"), AgentTimeout("3"), AgentUnreachable("2"), AgentDenied("1")]
PLANS = {
    "down": lambda _call, _second: KINDS[0],
    "down in many ways": lambda _call, second: KINDS[second // 7 % 5],
    "down each other minute": lambda _call, second: KINDS[0] if second // 60 % 2 else None,
    "down each other minute in many ways": lambda _call, second: KINDS[second // 120 % 5] if second // 60 % 2 else None,
    "down each other ten minutes": lambda _call, second: KINDS[0] if second // 600 % 2 else None,
    "up and down": lambda _call, second: KINDS[second // 20 % 5] if second // 10 % 2 else None,
    "no blocking read": lambda call, _second: KINDS[2] if call == "watch" else None,
    "no blocking read, but 429": lambda call, _second: KINDS[1] if call == "watch" else None,
    "no registration": lambda call, _second: KINDS[4] if call == "register" else "lost",
    "lost each minute": lambda call, second: "lost" if call == "watch" and second % 60 > 45 else None,
    "lost at once": lambda call, _second: "lost" if call == "watch" else None,
    "edited at once": lambda call, _second: "edited" if call == "watch" else None,
    "never there": lambda call, _second: "lost" if call == "read" else None,
}


@pytest.mark.parametrize("name", PLANS)
async def test_hour(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever goes wrong for an hour is at most ten lines, and not many more calls than a poll makes."""
    caplog.set_level(logging.INFO, "consul_prom.consul")
    agent = Agent(PLANS[name])
    registrar = Registrar(agent, WANTED, clock=agent.clock, sleep=agent.sleep)
    running = asyncio.create_task(registrar.run())
    await eventually(lambda: agent.time >= 3600, within=30, what="an hour", every=0.001)
    running.cancel()
    assert 1 <= len(caplog.records) <= 10, caplog.text
    assert agent.calls < 10_000
