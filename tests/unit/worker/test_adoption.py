"""Slots without a worker, whose last pages are served until they are wanted or old."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram

from consul_prom.consul.client import AgentClient
from consul_prom.devagent import DevAgent, Fault
from consul_prom.errors import EndpointError
from consul_prom.ledger.file import Ledger, ledger_path, peek
from consul_prom.ledger.registry import LedgerRegistry
from consul_prom.server.bind import listen
from consul_prom.slots import slots
from consul_prom.slots.slots import Slot
from consul_prom.worker import adoption
from consul_prom.worker.adoption import BOOTING, Adoption
from consul_prom.worker.target import ServedTarget
from consul_prom.worker.target_factory import TargetFactory
from tests.conftest import MakeSettings
from tests.services.waiting import eventually


@pytest.fixture
async def agent() -> AsyncIterator[DevAgent]:
    async with DevAgent() as agent:
        yield agent


def live(directory: Path, count: int = 0, *, port: int = 0, boot: str = "") -> tuple[Slot, Ledger]:
    """A worker that counted *count* hits of what its slot has counted."""
    slot, registry = slots.acquire(directory, "shop"), CollectorRegistry()
    hits = Counter("hits", "Hits.", ["route"], registry=registry)
    took = Histogram("took", "Time.", registry=registry, buckets=(1, 2))
    ledger = Ledger.take_over(
        ledger_path(directory, "shop", slot.number), boot=boot or slot.boot, instance=f"web-1:{slot.number}"
    )
    continued = LedgerRegistry(registry, ledger)
    hits.labels("/").inc(count)
    took.observe(1.5)
    ledger.port = port
    continued.close()
    return slot, ledger


def lived(directory: Path, count: int, **options: Any) -> int:
    """The slot of one that is gone."""
    slot, _ = live(directory, count, **options)
    slot.settle()
    slot.release()
    return slot.number


def note_of(directory: Path, number: int = 0) -> str:
    return slots.path_of(directory, "shop", number).read_text(encoding="ascii")


class Leader:
    """What a worker gives its caretaker's adoption; times in seconds from 1,000,000 on."""

    def __init__(self, client: AgentClient, settings: MakeSettings, directory: Path) -> None:
        self.client, self.settings, self.directory = client, settings(), directory
        self.now = 1_000_000.0
        self.complete = True
        self.slowest_start = 0.0
        self.inhabited: list[int] = []
        self.ports: list[int] = []
        self.site = TargetFactory(self.settings)
        self.site.settle("127.0.0.1")
        self.refusal: Exception | None = None
        self.adoption = self.another()

    def another(self) -> Adoption:
        return Adoption(
            self.directory,
            "shop",
            host="web-1",
            retain=120,
            patience=1,
            serve=self.serve,
            complete=self.is_complete,
            slowest_start=self.slowest_start,
            clock=lambda: self.now,
        )

    def is_complete(self, workers: int) -> bool:
        self.inhabited.append(workers)
        return self.complete

    async def serve(self, slot: Slot, page: CollectorRegistry, port: int) -> ServedTarget:
        if self.refusal:
            raise self.refusal
        guest = await self.site.receive(self.client, slot, page, port=port, adopted=True)
        self.ports.append(guest._wanted.port)
        return guest

    async def page(self) -> str:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.ports[-1]}/metrics") as answer,
        ):
            return await answer.text()


@pytest.fixture
async def caretaker(agent: DevAgent, settings: MakeSettings, slot_directory: Path) -> AsyncIterator[Leader]:
    client = AgentClient(settings(consul_http_addr=agent.url))
    caretaker = Leader(client, settings, slot_directory)
    yield caretaker
    await caretaker.adoption.end()
    await client.aclose()


def adopted(agent: DevAgent, number: int = 0) -> Callable[[], bool]:
    def registered() -> bool:
        entry = agent.state.services.get(f"shop.web-1.{number}")
        return bool(entry and entry.meta.get("adopted") == "1")

    return registered


async def test_is_served(agent: DevAgent, caretaker: Leader, slot_directory: Path) -> None:
    """A vacant slot's last page is a target under the slot's own ID and instance."""
    lived(slot_directory, 5)
    await caretaker.adoption.turn()
    await eventually(adopted(agent), within=10, what="adopted")
    entry = agent.state.services["shop.web-1.0"]
    assert (entry.meta["instance"], entry.port) == ("web-1:0", caretaker.ports[0])
    page = await caretaker.page()
    assert 'hits_total{route="/"} 5.0' in page
    assert 'took_bucket{le="1.0"} 0.0' in page
    assert 'took_bucket{le="2.0"} 1.0' in page
    assert "took_sum 1.5" in page


async def test_port(caretaker: Leader, slot_directory: Path) -> None:
    """It is served where its worker served it, so that a scraper finds it before it has heard of anything."""
    listener = listen("127.0.0.1", [0])
    port = listener.getsockname()[1]
    lived(slot_directory, 5, port=port)
    listener.close()
    await caretaker.adoption.turn()
    assert caretaker.ports == [port]


async def test_live_ones_stay(caretaker: Leader, slot_directory: Path) -> None:
    """A live worker's slot is let be, and counted."""
    slot, _ = live(slot_directory)
    caretaker.now += BOOTING
    await caretaker.adoption.turn()
    assert (caretaker.inhabited, caretaker.ports) == ([1], [])
    slot.release()


async def test_replacement_may_be_booting(caretaker: Leader, slot_directory: Path) -> None:
    """Where nobody says that all workers are there, a replacement has time to come."""
    lived(slot_directory, 5)
    caretaker.complete = False
    await caretaker.adoption.turn()
    caretaker.now += BOOTING - 0.1
    await caretaker.adoption.turn()
    assert not caretaker.ports
    caretaker.now += 0.1
    await caretaker.adoption.turn()
    assert len(caretaker.ports) == 1


async def test_slow_start(caretaker: Leader, slot_directory: Path) -> None:
    """A replacement has twice the time that a start takes."""
    lived(slot_directory, 5)
    caretaker.complete, caretaker.slowest_start = False, 30.0
    caretaker.adoption = caretaker.another()
    await caretaker.adoption.turn()
    caretaker.now += 59
    await caretaker.adoption.turn()
    assert not caretaker.ports
    caretaker.now += 1
    await caretaker.adoption.turn()
    assert len(caretaker.ports) == 1


async def test_newborn(
    agent: DevAgent, caretaker: Leader, slot_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newborn gets the smallest slot, adopted or not; its entry is left to it, and it continues the counters."""
    monkeypatch.setattr(slots, "PATIENCE", 5.0)
    lived(slot_directory, 5)
    await caretaker.adoption.turn()
    await eventually(adopted(agent), within=10, what="adopted")
    slot, ledger = await asyncio.to_thread(live, slot_directory, 2)
    assert slot.number == 0
    assert "shop.web-1.0" in agent.state.services
    with pytest.raises(aiohttp.ClientConnectionError):
        await caretaker.page()
    assert "adopted" not in note_of(slot_directory)
    await caretaker.adoption.turn()
    assert len(caretaker.ports) == 1
    slot.release()
    assert 7.0 in list(ledger.cells[:200])


async def test_glances_are_cheap(
    agent: DevAgent, caretaker: Leader, slot_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nothing happens no lock file is read, however many slots are adopted; who asks is noticed all the same."""
    monkeypatch.setattr(slots, "PATIENCE", 5.0)
    held = [live(slot_directory, 5)[0] for _ in range(5)]
    for slot in held:
        slot.settle()
        slot.release()
    await caretaker.adoption.turn()
    await eventually(lambda: all(adopted(agent, number)() for number in range(5)), within=10, what="adopted")
    reads, slept = list[Path](), itertools.count()
    read, sleep = slots._read, asyncio.sleep

    def noted_read(path: Path) -> object:
        reads.append(path)
        return read(path)

    async def noted_sleep(delay: float) -> None:
        if delay == adoption.GLANCE:
            next(slept)
        await sleep(delay)

    monkeypatch.setattr(asyncio, "sleep", noted_sleep)
    await eventually(lambda: next(slept) > 20, within=10, what="some glances")
    monkeypatch.setattr(slots, "_read", noted_read)
    await eventually(lambda: next(slept) > 60, within=10, what="some more")
    assert not reads
    slot, _ = await asyncio.to_thread(live, slot_directory, 2)
    assert slot.number == 0
    slot.release()


async def test_retained(agent: DevAgent, caretaker: Leader, slot_directory: Path) -> None:
    """After RETAIN the entry is removed, and the slot is let be until it has had another worker."""
    lived(slot_directory, 5)
    await caretaker.adoption.turn()
    await eventually(adopted(agent), within=10, what="adopted")
    caretaker.now += 119
    await caretaker.adoption.turn()
    assert adopted(agent)()
    caretaker.now += 1
    await eventually(lambda: "shop.web-1.0" not in agent.state.services, within=10, what="gone")
    await eventually(lambda: note_of(slot_directory) == "", within=10, what="settled")
    await caretaker.adoption.turn()
    assert len(caretaker.ports) == 1
    assert lived(slot_directory, 1) == 0
    await caretaker.adoption.turn()
    assert 'hits_total{route="/"} 6.0' in await caretaker.page()


async def test_seldom_scraped(caretaker: Leader, slot_directory: Path) -> None:
    """Who is scraped each 150 s is retained for 450 s."""
    slot, ledger = live(slot_directory, 5)
    ledger.scraped(1000.0)
    ledger.scraped(1150.0)
    slot.settle()
    slot.release()
    await caretaker.adoption.turn()
    caretaker.now += 449
    await asyncio.sleep(3 * adoption.GLANCE)
    await caretaker.adoption.turn()
    assert note_of(slot_directory)
    caretaker.now += 1
    await eventually(lambda: note_of(slot_directory) == "", within=10, what="settled")


async def test_caretaker_ends(agent: DevAgent, caretaker: Leader, slot_directory: Path) -> None:
    """The entries of one that leaves go with it; the next one adopts at once, for what is left of the time."""
    lived(slot_directory, 5)
    await caretaker.adoption.turn()
    await eventually(adopted(agent), within=10, what="adopted")
    await caretaker.adoption.end()
    assert "shop.web-1.0" not in agent.state.services
    caretaker.complete = False
    caretaker.now += 100
    caretaker.adoption = caretaker.another()
    await caretaker.adoption.turn()
    await eventually(adopted(agent), within=10, what="adopted")
    caretaker.now += 20
    await eventually(lambda: "shop.web-1.0" not in agent.state.services, within=10, what="gone")


async def test_end_in_the_middle(agent: DevAgent, caretaker: Leader, slot_directory: Path) -> None:
    """A guest that is retiring already when the caretaker ends is let do so."""
    lived(slot_directory, 5)
    await caretaker.adoption.turn()
    await eventually(adopted(agent), within=10, what="adopted")
    agent.fault = Fault(delay=0.1)
    asked = len(agent.requests)
    caretaker.now += 120
    await eventually(lambda: len(agent.requests) > asked, within=10, what="a question")
    await caretaker.adoption.end()
    assert "shop.web-1.0" not in agent.state.services
    assert note_of(slot_directory) == ""


async def test_killed_caretaker(caretaker: Leader, slot_directory: Path) -> None:
    """What a killed one had adopted is vacant."""
    number = lived(slot_directory, 5)
    slots.path_of(slot_directory, "shop", number).write_text("1 a.b.c adopted", encoding="ascii")
    await caretaker.adoption.turn()
    assert len(caretaker.ports) == 1


async def test_entry_left(agent: DevAgent, caretaker: Leader, slot_directory: Path) -> None:
    """Where the agent does not answer, the entry is left to the sweep."""
    lived(slot_directory, 5)
    await caretaker.adoption.turn()
    await eventually(adopted(agent), within=10, what="adopted")
    agent.fault = Fault(status=500)
    await caretaker.adoption.end()
    assert slots.abandoned(slot_directory, "shop") == [0]


async def test_not_ours(caretaker: Leader, slot_directory: Path) -> None:
    """What another boot counted is let be, and so is what is no ledger."""
    lived(slot_directory, 5, boot="another")
    (slot_directory / "shop.1.lock").write_text("", encoding="ascii")
    (slot_directory / "shop.1.ledger").write_text("no ledger", encoding="ascii")
    (slot_directory / "shop.2.lock").write_text("", encoding="ascii")
    await caretaker.adoption.turn()
    assert not caretaker.ports


async def test_refused(caretaker: Leader, slot_directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where it cannot be served, one line says so, and the slot is given back."""
    caplog.set_level(logging.WARNING)
    lived(slot_directory, 5)
    caretaker.refusal = EndpointError("port 9100 is taken")
    await caretaker.adoption.turn()
    await caretaker.adoption.turn()
    assert [record.message for record in caplog.records] == [
        "what slot 0 counted at last is not served (CONSUL_PROM_RETAIN): port 9100 is taken"
    ]
    slot, _ = live(slot_directory)
    assert slot.number == 0
    slot.release()


@pytest.mark.parametrize("note", ["", "0 a.b.c", "0 a.b.c 10.0.0.1"])
async def test_refused_beside_an_entry(caretaker: Leader, slot_directory: Path, note: str) -> None:
    """An entry that a dead worker left is the sweep's where it cannot be served; where there is none, nobody looks."""
    number = lived(slot_directory, 5)
    slots.path_of(slot_directory, "shop", number).write_text(note, encoding="ascii")
    caretaker.refusal = EndpointError("port 9100 is taken")
    await caretaker.adoption.turn()
    assert slots.abandoned(slot_directory, "shop") == ([number] if note else [])
    slot, _ = live(slot_directory)
    slot.release()


async def test_wiped(agent: DevAgent, caretaker: Leader, slot_directory: Path) -> None:
    """Where the lock file is replaced, the slot is another's: neither socket nor entry stays, the ledger is let be."""
    lived(slot_directory, 5)
    await caretaker.adoption.turn()
    await eventually(adopted(agent), within=10, what="adopted")
    path = ledger_path(slot_directory, "shop", 0)
    before = peek(path)
    assert before
    Ledger.take_over(path, **before.head)
    slots.path_of(slot_directory, "shop", 0).unlink()
    await eventually(lambda: not agent.state.services, within=10, what="gone")

    async def refused() -> bool:
        with pytest.raises(aiohttp.ClientConnectionError):
            await caretaker.page()
        return True

    await eventually(refused, within=10, what="closed")
    state = peek(path)
    assert state
    assert state.vacant == 0


def test_state_of_a_ledger(slot_directory: Path) -> None:
    """The longest gap between scrapes outlives its worker, as do the time of the last and the port."""
    slot, ledger = live(slot_directory, port=4711)
    for at in (100.0, 4000.0, 4015.0, 4045.0, 4060.0):  # after an hour without a server
        ledger.scraped(at)
    slot.release()
    slot, ledger = live(slot_directory, port=ledger.port)
    slot.release()
    path = ledger_path(slot_directory, "shop", 0)
    state = peek(path)
    assert state
    assert (state.port, state.vacant, state.scraped, state.gap) == (4711, 0, 4060, 30)
    lived(slot_directory, 0, port=4712)
    state = peek(path)
    assert state
    assert (state.port, state.scraped, state.gap) == (4712, 4060, 30)
