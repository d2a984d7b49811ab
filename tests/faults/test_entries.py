"""Entries that others remove or change, and the one ID that two directories want."""

import asyncio
import random
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from consul_prom import Worker
from consul_prom.consul.client import AgentClient
from consul_prom.consul.registrar import Registrar
from consul_prom.consul.registration import MARKER, Registration
from consul_prom.devagent import DevAgent, running
from consul_prom.errors import EntryTaken
from consul_prom.settings.settings import TAG, load
from tests.faults.conftest import MakeScene
from tests.faults.fleet import Fleet
from tests.faults.scene import WATCH, Document, Scene, repair
from tests.services.consul import Consul
from tests.services.waiting import eventually, wait_until

ID = "shop.web-1.0"


def put(consul: Consul, document: Document) -> None:
    path = "/v1/agent/service/register?replace-existing-checks=true"
    assert consul.call(path, method="PUT", body=document)[0] == 200


def edited(entry: Document, **changes: Any) -> Document:
    """The body of a registration as *entry* is, but for the *changes*."""
    body = {
        "ID": entry["ID"],
        "Name": entry["Service"],
        **{key: entry[key] for key in ("Address", "Port", "Tags", "Meta")},
    }
    return {**body, **changes}


@pytest.mark.usefixtures("bystanders")
class TestForeignHands:
    """Somebody removes or edits the entry of a live worker."""

    def test_deregistered(self, scene: MakeScene) -> None:
        """A removed entry is there again, and the log says that it was lost."""
        stage = scene()
        stage.lose()
        repair([stage])
        assert stage.registrations == {"start": 1, "lost": 1}
        assert "which the agent had lost" in stage.messages[-1]

    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"Tags": ["edited"]}, "Tags"),
            ({"Port": 1}, "Port"),
            ({"Address": "127.0.0.99"}, "Address"),
            ({"Name": "other"}, "Service"),
            ({"Tags": []}, "Tags"),
        ],
        ids=["tags", "port", "address", "name", "no tags"],
    )
    def test_overwritten(self, consul: Consul, scene: MakeScene, changes: Document, field: str) -> None:
        """An edited entry is put right, by the blocking read, and the log names the field."""
        stage = scene()
        assert stage.entry
        wait_until(lambda: stage.proxy.asked(WATCH), within=20, what="the blocking read")
        put(consul, edited(stage.entry, **changes))
        repair([stage])
        assert stage.messages[-1].endswith(f"the entry differed in {field}")
        assert stage.entry["Service"] == "shop-metrics"

    @pytest.mark.parametrize("key", ["pid", "team", "dir"])
    def test_meta(self, consul: Consul, scene: MakeScene, key: str) -> None:
        """Edited meta are put right; but of another dir, it is another's entry."""
        stage = scene()
        before = stage.entry
        assert before
        put(consul, edited(before, Meta={**before["Meta"], key: "edited"}))
        if key == "dir":
            wait_until(lambda: "another directory (edited)" in stage.trouble, within=20, what="the trouble noticed")
            assert stage.entry
            assert stage.entry["Meta"]["dir"] == "edited"
        else:
            why = f"the entry differed in Meta.{key}"
            wait_until(lambda: stage.messages[-1].endswith(why), within=20, what="the repair in the log")
            assert stage.entry == before

    @pytest.mark.parametrize("check", [None, {"TCP": "127.0.0.1:1", "Interval": "1h"}], ids=["none", "other"])
    def test_check(self, consul: Consul, scene: MakeScene, short_turns: None, check: Document | None) -> None:
        """A check that is gone, or not ours, is put right by the next look, since no blocking read ends by it."""
        stage = scene()
        assert stage.entry
        put(consul, edited(stage.entry, **({"Check": check} if check else {})))
        wait_until(lambda: "changed" in stage.registrations, within=20, what="registered again")
        repair([stage])
        assert checked_urls(consul) == [f"GET {stage.worker.url}"]
        assert "the entry differed in Check" in stage.messages[-1]

    def test_maintenance(self, consul: Consul, scene: MakeScene, short_turns: None) -> None:
        """A check that an operator adds to ours, as maintenance mode is, stays."""
        stage = scene()
        path = f"/v1/agent/service/maintenance/{stage.entry_id}?enable=true"
        assert consul.call(path, method="PUT")[0] == 200
        since = time.monotonic()
        looks = "^GET /v1/agent/checks"
        wait_until(lambda: len(stage.proxy.asked(looks, since=since)) > 1, within=20, what="two looks at the checks")
        assert stage.registrations == {"start": 1}
        assert f"_service_maintenance:{stage.entry_id}" in consul.call("/v1/agent/checks")[1]


def checked_urls(consul: Consul) -> list[str]:
    """Whom the checks of our entry ask, by their notes."""
    _, checks = consul.call(f'/v1/agent/checks?filter=ServiceID=="{ID}"')
    return [check["Notes"].partition("/-/healthy")[0] + "/metrics" for check in checks.values()]


class TestReaped:
    """The agent takes a live worker for dead, and removes its entry."""

    def test_quickly(self, tmp_path: Path) -> None:
        """A worker that stood still and was reaped registers again when it goes on."""
        agent = DevAgent(reap_interval=0.1, check_interval_at_least=0.1)
        settings: dict[str, Any] = {
            "check_interval": 1,
            "check_timeout": 0.2,
            "deregister_after": 60,
            "address": "127.0.0.1",
        }
        with running(agent), Fleet({"shop": 1}, directory=tmp_path, consul_http_addr=agent.url, **settings) as fleet:
            wait_until(lambda: ID in agent.state.services, within=20, what="registered")
            fleet.pause()
            wait_until(lambda: agent.state.status_of(ID) == "critical", within=20, what="critical")
            clock = agent.state._clock
            agent.state._clock = lambda: clock() + 61
            wait_until(lambda: ID not in agent.state.services, within=20, what="reaped")
            agent.state._clock = clock
            fleet.resume()
            wait_until(lambda: ID in agent.state.services, within=20, what="registered again")
            assert fleet.end() == [0]
            assert not agent.state.services

    @pytest.mark.full
    def test_by_consul(self, consul: Consul, tmp_path: Path) -> None:
        """The same with real Consul, which takes a minute and a half."""
        settings: dict[str, Any] = {"check_interval": 1, "check_timeout": 0.5, "deregister_after": 60}
        with Fleet({"shop": 1}, directory=tmp_path, consul_http_addr=consul.url, **settings) as fleet:
            wait_until(lambda: fleet.settled(consul), within=20, what="registered")
            fleet.pause()
            wait_until(lambda: not fleet.settled(consul), within=200, what="reaped")
            fleet.resume()
            wait_until(lambda: fleet.settled(consul), within=20, what="registered again")


class TestOtherDirectory:
    """Two containers, or users, of one host name and one agent: P3."""

    @pytest.fixture
    def folders(self, tmp_path: Path) -> tuple[Path, Path]:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
        return tmp_path / "one", tmp_path / "two"

    def test_one_after_the_other(self, scene: MakeScene, folders: tuple[Path, Path]) -> None:
        """The later one is not registered and says why; it takes the ID when the earlier one has left."""
        first = scene(directory=folders[0])
        entry = first.entry
        later = scene(directory=folders[1], registered=False)
        wait_until(lambda: later.failures.get("taken", 0) > 2, within=30, what="some tries")
        assert first.entry == entry
        assert "set CONSUL_PROM_HOST" in later.trouble
        assert len([line for line in later.warnings if "another directory" in line]) <= 2  # both scenes hear both
        later.worker.stop()
        assert first.entry == entry
        again = scene(directory=folders[1], registered=False)
        wait_until(lambda: "taken" in again.failures, within=20, what="a try")
        first.worker.stop()
        repair([again])

    def test_restart(self, folders: tuple[Path, Path]) -> None:
        """An agent that has just restarted takes everybody for dead, and still nobody loses his entry by that."""
        with Consul(dev=False) as consul, Scene(consul, folders[0], check_interval=3600) as first:
            entry = first.entry
            with Scene(consul, folders[1], registered=False) as later:
                wait_until(lambda: "taken" in later.failures, within=20, what="a try")
                consul.kill()
                wait_until(lambda: "unreachable" in later.failures, within=20, what="the loss noticed")
                consul.start()
                before = later.failures["taken"]
                wait_until(lambda: later.failures["taken"] > before, within=30, what="a try")
                assert first.entry == entry
                repair([first])

    def test_frozen(self, consul: Consul, scene: MakeScene, folders: tuple[Path, Path]) -> None:
        """One that stands still is dead to the other, who takes the ID; when it goes on, it respects that."""
        settings: dict[str, Any] = {"check_interval": 1, "check_timeout": 0.5, "consul_http_addr": consul.url}
        with Fleet({"shop": 1}, directory=folders[0], **settings) as fleet:
            wait_until(lambda: fleet.settled(consul), within=20, what="registered")
            fleet.pause()
            other = scene(directory=folders[1])
            entry = other.entry
            fleet.resume()
            wait_until(lambda: any("another directory" in line for line in fleet.lines), within=30, what="it said so")
            assert other.entry == entry
            other.worker.stop()
            wait_until(lambda: fleet.settled(consul), within=30, what="registered again")
            assert fleet.end() == [0]
            assert not consul.call("/v1/agent/services")[1]

    async def test_replaced(self, consul: Consul) -> None:
        """A worker that replaces a dead one does not inherit its failing check, so nobody takes it for dead too."""
        clients = [AgentClient(load({"consul_http_addr": consul.url}, environ={})) for _ in range(2)]
        dead, other = replace(wanted(0), check_interval=1), wanted(1)
        await Registrar(clients[0], dead).sync()
        await eventually(lambda: failing(clients[0]), within=20, what="a check that found nobody")
        successor = replace(wanted(0), port=9999, meta={**dead.meta, "pid": "8"})
        await Registrar(clients[0], successor).sync()
        assert not await failing(clients[0])
        assert len(await clients[0].checks(ID)) == 1
        with pytest.raises(EntryTaken, match="pid 8 of another directory"):
            await Registrar(clients[1], other).sync()
        for client in clients:
            await client.aclose()

    def test_at_the_same_time(self, consul: Consul, tmp_path: Path) -> None:
        """Of workers that start at the same moment, one has the ID, and the others say why they have not."""
        count, gate = 4, threading.Barrier(4)
        workers = [
            Worker(
                registry=CollectorRegistry(),
                service="shop",
                host="web-1",
                dir=tmp_path / str(number),
                consul_http_addr=consul.url,
                address=consul.address,
            )
            for number in range(count)
        ]

        def start(worker: Worker) -> None:
            gate.wait(20)
            worker.start()

        threads = [threading.Thread(target=start, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        try:
            wait_until(lambda: sum(map(claims, workers)) == count, within=30, what="one has it, and the others know")
            (owner,) = [worker for worker in workers if worker.registered]
            _, entry = consul.call(f"/v1/agent/service/{ID}")
            assert f":{entry['Port']}/" in str(owner.url)
        finally:
            for worker in workers:
                worker.stop()
        assert not consul.call("/v1/agent/services")[1]

    @pytest.mark.parametrize("rounds", [60, pytest.param(1000, marks=pytest.mark.full)])
    async def test_rounds(self, consul: Consul, rounds: int) -> None:
        """However their calls interleave, the entry ends as one's who knows it, and no other's turn changes it."""
        clients = [AgentClient(load({"consul_http_addr": consul.url}, environ={})) for _ in range(3)]
        for _ in range(rounds):
            registrars = [Registrar(client, wanted(number)) for number, client in enumerate(clients)]
            await asyncio.gather(*(turn(registrar) for registrar in registrars))
            owner = await owner_of(clients[0])
            for registrar in random.sample(registrars, 3):
                await turn(registrar)
            assert await owner_of(clients[0]) == owner
            assert [registrar.registered for registrar in registrars] == [number == owner for number in range(3)]
            gone = await asyncio.gather(*(registrar.deregister() for registrar in registrars))
            assert [number for number in range(3) if gone[number]] == [owner]
            assert await clients[0].service(ID) is None
        for client in clients:
            await client.aclose()


def claims(worker: Worker) -> bool:
    """Whether the worker is one that has the ID, or knows that it has not."""
    assert worker._life
    return worker.registered or "another directory" in worker._life.tenancy.trouble


def wanted(number: int) -> Registration:
    meta = {**MARKER, "service": "shop", "instance": "web-1:0", "scheme": "http", "pid": "7", "dir": f"{number}:/slots"}
    an_hour = 3600.0  # nobody answers there, and who fails a check has lost his claim
    return Registration(ID, "shop-metrics", "127.0.0.1", 9100 + number, (TAG,), meta, an_hour, 5, 600, "/-/healthy")


async def failing(client: AgentClient) -> bool:
    return any(check["Status"] == "critical" for check in await client.checks(ID))


async def turn(registrar: Registrar) -> None:
    try:
        await registrar.sync()
    except EntryTaken:
        registrar.registered = False


async def owner_of(client: AgentClient) -> int:
    entry = await client.service(ID)
    assert entry
    return int(entry.document["Port"]) - 9100
