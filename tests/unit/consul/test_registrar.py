"""The registrar: single turns against an agent, and the passing of time without waiting for it."""

import asyncio
import itertools
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pytest
from consul.base import Consul as Consul2
from consul.base import Response
from hypothesis import given
from hypothesis import strategies as st

from consul_prom.consul.client import AgentClient, _Groups
from consul_prom.consul.registrar import MOST_REPAIRS, TURN, Registrar, backoff
from consul_prom.consul.registration import MARKER, Registration
from consul_prom.devagent import DevAgent, Fault
from consul_prom.errors import (
    AgentBusy,
    AgentConfused,
    AgentError,
    AgentTimeout,
    AgentUnreachable,
    EntryTaken,
    SlotError,
)
from consul_prom.settings.settings import TAG, load
from tests.services.waiting import eventually


def registration(**changes: Any) -> Registration:
    meta = {**MARKER, "service": "shop", "instance": "web-1:0", "scheme": "http", "pid": "7", "dir": "abc:/slots"}
    fields: dict[str, Any] = {
        "id": "shop.web-1.0",
        "name": "shop-metrics",
        "address": "127.0.0.1",
        "port": 9100,
        "tags": (TAG,),
        "meta": meta,
        "check_interval": 30,
        "check_timeout": 5,
        "deregister_after": 600,
        "health_path": "/-/healthy",
    }
    return Registration(**{**fields, **changes, "meta": {**meta, **changes.get("meta", {})}})


WANTED = registration()


@pytest.fixture
async def agent() -> AsyncIterator[DevAgent]:
    async with DevAgent() as agent:
        yield agent


@pytest.fixture
async def client(agent: DevAgent) -> AsyncIterator[AgentClient]:
    client = AgentClient(load({"consul_http_addr": agent.url}, environ={}), timeout=0.5)
    yield client
    await client.aclose()


@pytest.fixture
async def other(agent: DevAgent) -> AsyncIterator[AgentClient]:
    """Somebody else's client."""
    client = AgentClient(load({"consul_http_addr": agent.url}, environ={}))
    yield client
    await client.aclose()


def asked(agent: DevAgent, what: str) -> int:
    """How often the agent was asked for *what*."""
    return sum(path.startswith(f"/v1/agent/service/{what}") for _, path in agent.requests)


class TestSync:
    """One turn."""

    async def test_first_turn(self, client: AgentClient) -> None:
        """The first turn registers, and says so."""
        reasons: list[str] = []
        registrar = Registrar(client, WANTED, on_registration=reasons.append)
        assert not registrar.registered
        await registrar.sync()
        assert (registrar.registered, registrar.trouble, reasons) == (True, "", ["start"])
        entry = await client.service(WANTED.id)
        assert entry
        assert (entry.document["Port"], entry.document["Meta"]) == (9100, WANTED.meta)

    async def test_idle_turn(self, agent: DevAgent, client: AgentClient) -> None:
        """A turn that finds all as wanted writes nothing, and reads the entry and its checks."""
        registrar = Registrar(client, WANTED)
        await registrar.sync()
        agent.requests.clear()
        await registrar.sync()
        assert [method for method, _ in agent.requests] == ["GET", "GET"]

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"port": 9999}, "Port"),
            ({"address": "127.0.0.2"}, "Address"),
            ({"tags": (TAG, "extra")}, "Tags"),
            ({"meta": {"note": "edited"}}, "Meta.note"),
            ({"meta": {"pid": "8"}}, "Meta.pid"),
            ({"name": "other-metrics"}, "Service"),
        ],
    )
    async def test_repair(
        self, client: AgentClient, other: AgentClient, caplog: pytest.LogCaptureFixture, change: Any, field: str
    ) -> None:
        """An edited entry is put right, and the log names the field."""
        reasons: list[str] = []
        registrar = Registrar(client, WANTED, on_registration=reasons.append)
        await registrar.sync()
        await other.register(registration(**change).document())
        with caplog.at_level(logging.INFO):
            await registrar.sync()
        assert reasons == ["start", "changed"]
        assert f"differed in {field}" in caplog.text
        entry = await client.service(WANTED.id)
        assert entry
        assert (entry.document["Port"], entry.document["Tags"]) == (9100, [TAG])

    async def test_loss(self, client: AgentClient, other: AgentClient) -> None:
        """A lost entry is registered again."""
        reasons: list[str] = []
        registrar = Registrar(client, WANTED, on_registration=reasons.append)
        await registrar.sync()
        await other.deregister(WANTED.id)
        await registrar.sync()
        assert reasons == ["start", "lost"]

    async def test_empty_yes(self, agent: DevAgent, client: AgentClient) -> None:
        """A registration that was answered by something else than the agent, with a 200, is none."""
        registrar = Registrar(client, WANTED)
        agent.fault = Fault(path="/v1/agent/service/register", status=200, body="<html>")
        with pytest.raises(AgentConfused, match="CONSUL_HTTP_ADDR"):
            await registrar.sync()
        assert not registrar.registered

    async def test_predecessor(self, client: AgentClient, other: AgentClient) -> None:
        """The entry of the slot's dead worker, of the same directory, is taken over."""
        await other.register(registration(port=1, meta={"pid": "6"}).document())
        await Registrar(client, WANTED).sync()
        entry = await client.service(WANTED.id)
        assert entry
        assert entry.document["Meta"]["pid"] == "7"

    async def test_other_directory(self, client: AgentClient, other: AgentClient) -> None:
        """A live entry of another directory is left alone, whoever came first; the message says what to set."""
        theirs = registration(port=1, meta={"dir": "xyz:/other", "pid": "99"})
        await other.register(theirs.document())
        registrar = Registrar(client, WANTED)
        with pytest.raises(EntryTaken, match=r"pid 99 of another directory \(xyz:/other\): set CONSUL_PROM_HOST"):
            await registrar.sync()
        assert await registrar.deregister() is False
        entry = await client.service(WANTED.id)
        assert entry
        assert entry.document["Meta"]["pid"] == "99"

    async def test_replaced_directory(self, client: AgentClient, other: AgentClient) -> None:
        """If the other directory was ours before it was replaced, the message says what ends that."""
        before = {"dir": f"xyz:{WANTED.meta['dir'].partition(':')[2]}", "pid": "99", "proc": "boot.4026.100"}
        await other.register(registration(port=1, meta=before).document())
        registrar = Registrar(client, registration(meta={"proc": "boot.4026.200"}))
        with pytest.raises(EntryTaken, match=r"pid 99, .* was emptied or replaced .*: retrying until") as caught:
            await registrar.sync()
        assert "CONSUL_PROM_HOST" not in str(caught.value)
        container = Registrar(client, registration(meta={"proc": "boot.4027.200"}))
        with pytest.raises(EntryTaken, match="set CONSUL_PROM_HOST"):
            await container.sync()

    async def test_other_directory_critical(self, client: AgentClient, other: AgentClient) -> None:
        """A critical entry of another directory is taken over: its process does not answer."""
        await other.register(registration(port=1, check_interval=1, meta={"dir": "xyz:/other"}).document())
        await eventually(lambda: _tried(other), within=20, what="a check that found nobody")
        await Registrar(client, WANTED).sync()
        entry = await client.service(WANTED.id)
        assert entry
        assert entry.document["Port"] == 9100

    async def test_a_moment_later(self, client: AgentClient, other: AgentClient) -> None:
        """Of two that register at the same moment, the one who was first finds the other's entry, and knows."""
        registrar = Registrar(_Hindmost(client, other), WANTED)
        with pytest.raises(EntryTaken, match="pid 8 of another directory"):
            await registrar.sync()
        assert not registrar.registered
        assert await registrar.deregister() is False

    async def test_foreign(self, client: AgentClient, other: AgentClient) -> None:
        """An entry without our marker is never touched, critical or not."""
        document = registration(meta={"managed_by": "someone"}).document()
        document["Check"]["Status"] = "critical"
        await other.register(document)
        registrar = Registrar(client, WANTED)
        with pytest.raises(EntryTaken, match="not ours"):
            await registrar.sync()
        assert await registrar.deregister() is False
        assert await client.service(WANTED.id)


class TestDeregister:
    """The end of an entry."""

    async def test_idempotent(self, client: AgentClient) -> None:
        """Deregistering removes the entry once and then finds nothing to do."""
        registrar = Registrar(client, WANTED)
        await registrar.sync()
        assert await registrar.deregister() is True
        assert registrar.registered is False
        assert await registrar.deregister() is False

    async def test_nothing_asked(self, agent: DevAgent, client: AgentClient) -> None:
        """A registrar that never asked for an entry has nothing to take back."""
        assert await Registrar(client, WANTED).deregister() is False
        assert not agent.requests

    async def test_after_lost_answer(self, agent: DevAgent, client: AgentClient) -> None:
        """A registration whose answer never came may have taken effect, and is taken back."""
        agent.fault = Fault(method="PUT", path="/v1/agent/service/register", hang=True, late=True)
        registrar = Registrar(client, WANTED)
        with pytest.raises(AgentTimeout):
            await registrar.sync()
        agent.fault = None
        assert await client.service(WANTED.id)
        assert await registrar.deregister() is True

    async def test_during_registration(self, agent: DevAgent, client: AgentClient) -> None:
        """A stop in the middle of a registration waits for it, and leaves no entry."""
        agent.fault = Fault(method="PUT", path="/v1/agent/service/register", delay=0.2)
        registrar = Registrar(client, WANTED)
        running = asyncio.ensure_future(registrar.run())
        await eventually(lambda: asked(agent, "register"), within=5, what="registering")
        running.cancel()
        assert await registrar.deregister() is True
        assert await client.service(WANTED.id) is None

    async def test_somebody_else_has_it(self, client: AgentClient, other: AgentClient) -> None:
        """An entry that another directory has taken over meanwhile is not ours to remove."""
        registrar = Registrar(client, WANTED)
        await registrar.sync()
        await other.register(registration(meta={"dir": "xyz:/other"}).document())
        assert await registrar.deregister() is False
        assert await client.service(WANTED.id)


class TestRun:
    """Turns in time."""

    @pytest.fixture
    async def run(self) -> AsyncIterator[Callable[[Registrar], "asyncio.Task[None]"]]:
        tasks = []

        def begin(registrar: Registrar) -> "asyncio.Task[None]":
            tasks.append(asyncio.create_task(registrar.run()))
            return tasks[-1]

        yield begin
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def test_watch(
        self, agent: DevAgent, client: AgentClient, other: AgentClient, run: Callable[[Registrar], Any]
    ) -> None:
        """A loss and an edit are repaired by the blocking read alone, without any poll."""
        registrar = Registrar(client, WANTED, sleep=_never)
        run(registrar)
        await eventually(lambda: registrar.registered, within=5, what="registered")
        for _ in range(3):
            await other.deregister(WANTED.id)
            await eventually(lambda: other.service(WANTED.id), within=5, what="registered again")
        await other.register(registration(tags=("edited",)).document())
        await eventually(lambda: _tags(other, [TAG]), within=5, what="tags put right")

    async def test_poll(
        self, agent: DevAgent, client: AgentClient, other: AgentClient, run: Callable[[Registrar], Any]
    ) -> None:
        """Without the blocking read, the registrar looks every 8 to 12 s, and holds no connection."""
        clock = Ticks()
        randoms = itertools.cycle([0.0, 1.0, 0.5])
        watchless = _Wrapped(client)
        registrar = Registrar(watchless, WANTED, watch=False, sleep=clock.sleep, random=lambda: next(randoms))
        run(registrar)
        await eventually(lambda: clock.waiting == pytest.approx(TURN * 0.8), within=5, what="the first wait")
        await other.deregister(WANTED.id)
        clock.tick()
        await eventually(lambda: other.service(WANTED.id), within=5, what="registered again")
        assert clock.waiting == pytest.approx(TURN * 1.2)

    async def test_busy(self, agent: DevAgent, client: AgentClient, run: Callable[[Registrar], Any]) -> None:
        """An agent with no connection to spare for a blocking read is polled, and that is no failure."""
        clock, failures = Ticks(), list[str]()
        registrar = Registrar(_BusyWatch(client), WANTED, sleep=clock.sleep, on_failure=failures.append)
        run(registrar)
        await eventually(lambda: clock.waiting, within=5, what="the wait for the next poll")
        assert TURN * 0.8 <= clock.waiting <= TURN * 1.2
        assert (registrar.registered, failures) == (True, [])

    async def test_early_return(self, client: AgentClient, run: Callable[[Registrar], Any]) -> None:
        """A blocking read that ends early without news, as of an agent that shuts down, makes no tight loop."""
        clock = Ticks()
        registrar = Registrar(_HastyWatch(client), WANTED, sleep=clock.sleep)
        run(registrar)
        await eventually(lambda: clock.waiting, within=5, what="a wait")
        assert 0.5 <= clock.waiting <= 1.5

    async def test_outage(
        self, agent: DevAgent, client: AgentClient, run: Callable[[Registrar], Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        """An outage is one WARNING, and one more when it is over; the reason's change is one more."""
        caplog.set_level(logging.INFO, "consul_prom.consul.registrar")
        failures = list[str]()
        registrar = Registrar(client, WANTED, sleep=_soon, on_failure=failures.append)
        agent.fault = Fault(status=500, body="No cluster leader")
        run(registrar)
        await eventually(lambda: len(failures) > 5, within=5, what="some failures")
        assert "No cluster leader" in registrar.trouble
        agent.fault = Fault(status=403, body="Permission denied")
        await eventually(lambda: failures[-5:] == ["denied"] * 5, within=5, what="denials")
        agent.fault = None
        await eventually(lambda: registrar.registered, within=5, what="registered")
        levels = [record.levelname for record in caplog.records]
        assert levels == ["WARNING", "WARNING", "INFO", "WARNING"]
        assert 'the token needs the rule: service "shop-metrics" { policy = "write" }' in caplog.records[1].getMessage()

    async def test_outage_of_an_hour(
        self, agent: DevAgent, client: AgentClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An outage of an hour is said once in ten minutes."""
        caplog.set_level(logging.INFO, "consul_prom.consul.registrar")
        clock = Ticks()
        agent.fault = Fault(status=500, body="No cluster leader")
        registrar = Registrar(client, WANTED, sleep=clock.pass_by, clock=clock.now, random=lambda: 0.5)
        task = asyncio.create_task(registrar.run())
        await eventually(lambda: clock.time > 3600, within=30, what="an hour")
        task.cancel()
        assert len(caplog.records) == 6

    async def test_slot_lost(self, client: AgentClient) -> None:
        """A registrar whose slot is no longer ours takes its entry back and ends."""
        intact = True
        registrar = Registrar(client, WANTED, intact=lambda: intact, watch=False, sleep=_soon)
        task = asyncio.create_task(registrar.run())
        await eventually(lambda: registrar.registered, within=5, what="registered")
        intact = False
        with pytest.raises(SlotError, match="CONSUL_PROM_DIR"):
            await task
        assert await client.service(WANTED.id) is None

    async def test_agent_restarts_empty(
        self, agent: DevAgent, client: AgentClient, other: AgentClient, run: Callable[[Registrar], Any]
    ) -> None:
        """An agent that comes back empty has the entry again."""
        registrar = Registrar(client, WANTED)
        run(registrar)
        await eventually(lambda: registrar.registered, within=5, what="registered")
        await agent.kill()
        await eventually(lambda: not registrar.registered, within=5, what="the loss noticed")
        await agent.start()
        await eventually(lambda: other.service(WANTED.id), within=20, what="registered again")

    async def test_agent_restarts_often(
        self, agent: DevAgent, client: AgentClient, other: AgentClient, run: Callable[[Registrar], Any]
    ) -> None:
        """An agent that restarts within each pause is still watched: a loss is repaired without a poll."""
        pauses = list[float]()
        restarted = asyncio.Event()

        async def pause(seconds: float) -> None:
            pauses.append(seconds)
            await restarted.wait()
            restarted.clear()

        watched = _Watched(client)
        registrar = Registrar(watched, WANTED, sleep=pause)
        run(registrar)
        for number in range(MOST_REPAIRS + 1):
            await eventually(lambda: registrar.registered and watched.watching, within=10, what="a blocking read")
            await agent.kill()
            await eventually(lambda: len(pauses) > number, within=10, what="a pause")  # noqa: B023
            await agent.start()
            restarted.set()
        await eventually(lambda: registrar.registered and watched.watching, within=10, what="a blocking read")
        await other.deregister(WANTED.id)
        await eventually(lambda: other.service(WANTED.id), within=5, what="registered again")

    async def test_impatient_proxy(self, client: AgentClient, run: Callable[[Registrar], Any]) -> None:
        """The registrar polls if the blocking read fails again and again while the agent answers at once."""
        clock = Ticks()
        registrar = Registrar(_CutWatch(client), WANTED, sleep=clock.sleep)
        run(registrar)
        await eventually(lambda: clock.waiting, within=10, what="the wait for the next poll")
        assert TURN * 0.8 <= clock.waiting <= TURN * 1.2
        assert registrar.registered


def test_backoff() -> None:
    """Waits begin at random, stay within 2 s for a minute and within 15 s after it, and never end."""
    now = 0.0
    delays = backoff(lambda: now, lambda: 1.0)
    first = [next(delays) for _ in range(8)]
    assert first == [1.0, 0.5, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    now = 61.0
    assert [next(delays) for _ in range(6)] == [4.0, 8.0, 15.0, 15.0, 15.0, 15.0]
    assert next(backoff(lambda: now, lambda: 0.0)) == 0.0
    assert min(itertools.islice(backoff(lambda: now, lambda: 0.0), 1, 9)) >= 0.25


class Ticks:
    """Sleeps that end when the test says so."""

    def __init__(self) -> None:
        self.time = 0.0
        self.waiting = 0.0
        self._gate = asyncio.Event()

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.waiting = seconds
        await self._gate.wait()
        self._gate.clear()

    async def pass_by(self, seconds: float) -> None:
        """An hour of sleeps, and then one without end."""
        self.time += seconds
        await (asyncio.sleep(0) if self.time <= 3600 else self._gate.wait())

    def tick(self) -> None:
        self.waiting = 0.0
        self._gate.set()


class _Wrapped:
    """A client with a watch of its own."""

    def __init__(self, client: AgentClient) -> None:
        self._client = client
        self.register, self.deregister, self.checks = client.register, client.deregister, client.checks
        self.catalogued, self.deregister_from_catalogue = client.catalogued, client.deregister_from_catalogue
        self.credentials = client.credentials

    async def service(self, entry_id: str, *, content_hash: str = "", wait: float = 0) -> Any:
        if content_hash:
            assert TURN * 0.8 <= wait <= TURN * 1.2
            return await self.watch(entry_id)
        return await self._client.service(entry_id)

    async def watch(self, entry_id: str) -> Any:
        raise NotImplementedError


class _Watched(_Wrapped):
    """Tells whether a blocking read is under way."""

    watching = False

    async def service(self, entry_id: str, *, content_hash: str = "", wait: float = 0) -> Any:
        self.watching = bool(content_hash)
        try:
            return await self._client.service(entry_id, content_hash=content_hash, wait=wait)
        finally:
            self.watching = False


class _BusyWatch(_Wrapped):
    async def watch(self, entry_id: str) -> Any:
        raise AgentBusy("Your IP is issuing too many concurrent connections")


class _CutWatch(_Wrapped):
    async def watch(self, entry_id: str) -> Any:
        raise AgentUnreachable("Connection reset by peer")


class _HastyWatch(_Wrapped):
    async def watch(self, entry_id: str) -> Any:
        return await self._client.service(entry_id)


class _Hindmost(_Wrapped):
    """Somebody of another directory registers at the same moment, and is the last who does."""

    def __init__(self, client: AgentClient, other: AgentClient) -> None:
        super().__init__(client)

        async def both(document: Mapping[str, Any]) -> None:
            await client.register(document)
            await other.register(registration(port=9101, meta={"dir": "xyz:/other", "pid": "8"}).document())

        self.register = both


async def _never(_seconds: float) -> None:
    await asyncio.Event().wait()


async def _soon(_seconds: float) -> None:
    await asyncio.sleep(0.001)


async def _tags(client: AgentClient, tags: list[str]) -> bool:
    entry = await client.service(WANTED.id)
    return bool(entry and entry.document["Tags"] == tags)


async def _tried(client: AgentClient) -> bool:
    return [check["Status"] for check in await client.checks(WANTED.id) if check["Output"]] == ["critical"]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.sampled_from(["critical", "passing", "30s"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)

GONE = object()


def spoilt(document: Mapping[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The *document*, with anything in place of some of what it has, or nothing."""
    changes = st.dictionaries(st.sampled_from(sorted(document)), ANYTHING | st.just(GONE), max_size=2)
    return changes.map(lambda new: {key: it for key, it in {**document, **new}.items() if it is not GONE})


CHECK = {
    "Node": "node",
    "CheckID": f"service:{WANTED.id}",
    "Name": WANTED.check_name,
    "Notes": WANTED.check_notes,
    "Type": "http",
    "Interval": "30s",
    "Timeout": "5s",
    "Status": "critical",
    "Output": "connection refused",
}
BARE = {key: it for key, it in {**WANTED.document(), "Service": WANTED.name}.items() if key != "Meta"}
ENTRIES = st.builds(lambda bare, meta: {**bare, "Meta": meta}, spoilt(BARE), spoilt(WANTED.meta) | ANYTHING) | ANYTHING
CHECKS = st.dictionaries(st.text(max_size=3), spoilt(CHECK) | ANYTHING, max_size=2) | ANYTHING


class _Talkative:
    """A transport that answers with the next of what it has for such a question."""

    settings = load({}, environ={})

    def __init__(self, entries: Sequence[Any], checks: Sequence[Any], other: Any) -> None:
        self._entries, self._checks, self._other = itertools.cycle(entries), itertools.cycle(checks), other

    async def get(self, callback: Callable[[Any], Any], path: str, *_more: Any, **_named: Any) -> Any:
        found = next(self._entries) if path.startswith("/v1/agent/service/") else self._other
        text = json.dumps(next(self._checks) if path == "/v1/agent/checks" else found)
        return callback(Response(200, {}, text, text.encode()))

    async def put(self, callback: Callable[[Any], Any], *_more: Any, **_named: Any) -> Any:
        return callback(Response(200, {}, "true", b"true"))


@given(
    entries=st.lists(ENTRIES, min_size=1, max_size=4), checks=st.lists(CHECKS, min_size=1, max_size=2), other=ANYTHING
)
def test_any_json(entries: list[Any], checks: list[Any], other: Any) -> None:
    """Whatever JSON comes in place of the agent's, a turn and a farewell are done, or fail as expected."""

    async def live() -> None:
        client = AgentClient(_Talkative.settings)
        talk: Any = _Talkative(entries, checks, other)
        client._transport, client._agent = talk, Consul2.Agent(_Groups(talk))
        registrar = Registrar(client, WANTED)
        for part in (registrar.sync, registrar.sync, registrar.deregister):
            with suppress(AgentError):
                await part()

    asyncio.run(live())
