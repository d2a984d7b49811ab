"""What proves a death, and the sweep that removes the entries of the dead and of nobody else."""

import asyncio
import errno
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client import CollectorRegistry

from consul_prom import Worker
from consul_prom.consul import stale
from consul_prom.consul.client import AgentClient
from consul_prom.consul.stale import Entry, Liveness, ReapResult
from consul_prom.devagent import DevAgent, Fault
from consul_prom.errors import AgentTimeout, AgentUnreachable, EndpointError
from consul_prom.process.identity import process_identity
from consul_prom.settings.settings import load
from consul_prom.slots import slots
from consul_prom.slots.directory import prepare
from consul_prom.worker.leader import Leader
from tests.services.waiting import eventually, wait_until
from tests.services.workers import Workers, meta, put

ME = os.getpid()


def judge(entry: Entry, *, host: str = "web-1") -> Liveness:
    with stale.judged(entry, host=host) as verdict:
        return verdict


def entry(**changes: Any) -> dict[str, Any]:
    return {"ID": "shop.web-1.0", "Service": "shop-metrics", "Address": "127.0.0.1", "Port": 1, "Meta": meta(**changes)}


def identity_of(pid: int = ME) -> str:
    found = process_identity(pid)
    assert found
    return found


def proc(**changes: str) -> str:
    boot, namespace, ticks = identity_of().split(".")
    return ".".join({"boot": boot, "namespace": namespace, "ticks": ticks, **changes}.values())


def in_slot(directory: Path, **changes: Any) -> dict[str, Any]:
    """An entry of slot 0 of *directory*, whose lock is free."""
    slot = slots.acquire(directory, "shop")
    slot.release()
    assert slot.number == 0
    return entry(dir=f"{slot.directory_id}:{directory}", **changes)


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def swept(agent: DevAgent, *, forced: bool = False, dry_run: bool = False) -> dict[str, ReapResult]:
    async def sweep() -> dict[str, ReapResult]:
        client = AgentClient(load({"consul_http_addr": agent.url}, environ={}))
        try:
            found = await stale.entries(client)
            outcomes = stale.sweep(client, found, host="web-1", forced=forced, dry_run=dry_run)
            return {outcome.entry["ID"]: outcome async for outcome in outcomes}
        finally:
            await client.aclose()

    return asyncio.run(sweep())


def listed(agent: DevAgent, *, service: str = "") -> list[str]:
    async def entries() -> list[str]:
        client = AgentClient(load({"consul_http_addr": agent.url}, environ={}))
        try:
            return [entry["ID"] for entry in await stale.entries(client, service=service)]
        finally:
            await client.aclose()

    return asyncio.run(entries())


def known(agent: DevAgent) -> set[str]:
    return set(agent.state.services)


def test_live_worker_stays(agent: DevAgent, workers: Workers) -> None:
    """A live worker's entry is never removed, since the worker holds its slot's lock."""
    workers.start()
    outcome = swept(agent)["shop.web-1.0"]
    assert (outcome.action, outcome.verdict.state) == ("kept", "alive")
    assert "holds the lock" in outcome.verdict.proof
    assert known(agent) == {"shop.web-1.0"}


def test_stopped_worker_stays(agent: DevAgent, workers: Workers) -> None:
    """A worker that SIGSTOP holds up is alive."""
    workers.hold(workers.start())
    assert swept(agent)["shop.web-1.0"].verdict.state == "alive"


def test_killed_worker_goes(agent: DevAgent, workers: Workers) -> None:
    """After kill -9 the lock is free, which proves the death; the other workers stay."""
    first, second, third = (workers.start() for _ in range(3))
    workers.hold(first)
    workers.hold(third)  # or their caretaker would be at it too
    workers.kill(second)
    outcomes = swept(agent)
    assert {key: outcome.action for key, outcome in outcomes.items()} == {
        "shop.web-1.0": "kept",
        "shop.web-1.1": "removed",
        "shop.web-1.2": "kept",
    }
    assert outcomes["shop.web-1.1"].verdict == Liveness("dead", "the lock of its slot is free")
    assert known(agent) == {"shop.web-1.0", "shop.web-1.2"}


def test_unreaped_worker_goes(agent: DevAgent, workers: Workers) -> None:
    """A zombie holds no lock."""
    process = workers.start()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert swept(agent)["shop.web-1.0"].action == "removed"


def test_wiped_directory(agent: DevAgent, workers: Workers, slot_directory: Path) -> None:
    """Where the directory was wiped, the process proves who lives and who is dead."""
    workers.hold(workers.start())
    second = workers.start()
    workers.hold(second)
    shutil.rmtree(slot_directory)
    workers.kill(second)
    outcomes = swept(agent)
    assert outcomes["shop.web-1.0"].verdict.state == "alive"
    assert outcomes["shop.web-1.1"].action == "removed"
    assert outcomes["shop.web-1.1"].verdict.proof == f"the process {second.pid} is gone"
    assert known(agent) == {"shop.web-1.0"}


def test_wiped_lock_files(agent: DevAgent, workers: Workers, slot_directory: Path) -> None:
    """A lock file that is missing proves nothing, and none is made to try."""
    process = workers.start()
    workers.hold(process)
    (lock,) = slot_directory.glob("*.lock")
    lock.unlink()
    outcome = swept(agent)["shop.web-1.0"]
    assert outcome.verdict == Liveness("alive", f"the process {process.pid} lives")
    assert not lock.exists()


def test_replaced_lock_file(agent: DevAgent, workers: Workers, slot_directory: Path) -> None:
    """A free lock beside a live process is a doubt: the file may be another than the one that the worker holds."""
    workers.hold(workers.start())
    (lock,) = slot_directory.glob("*.lock")
    lock.unlink()
    lock.touch()
    outcome = swept(agent)["shop.web-1.0"]
    assert (outcome.action, outcome.verdict.state) == ("kept", "unknown")
    assert "free, but" in outcome.verdict.proof


def test_newborn_in_the_slot(agent: DevAgent, workers: Workers, slot_directory: Path) -> None:
    """A dead worker's entry stays while the slot's next worker, who will take it over, is being born."""
    workers.kill(workers.start())
    newborn = slots.acquire(slot_directory, "shop")
    try:
        outcome = swept(agent)["shop.web-1.0"]
        assert (outcome.action, outcome.verdict.state) == ("kept", "alive")
    finally:
        newborn.release()


def test_lock_is_held_while_judged(slot_directory: Path) -> None:
    """Nobody can be born into a slot while its dead worker's entry is dealt with, and anybody afterwards."""
    document = in_slot(slot_directory)
    with stale.judged(document, host="web-1") as verdict:
        assert verdict.state == "dead"
        assert slots.try_slot(slot_directory, "shop", 0) is None
    slot = slots.try_slot(slot_directory, "shop", 0)
    assert slot
    slot.release()


def test_lock_beats_what_the_process_cannot_tell(slot_directory: Path) -> None:
    """The lock proves the death of a worker of another boot or container, whose directory was kept."""
    assert judge(in_slot(slot_directory, proc=proc(boot="other"))).state == "dead"
    assert judge(in_slot(slot_directory, proc=proc(namespace="1"))).state == "dead"
    assert judge(in_slot(slot_directory, proc="")).state == "dead"


def test_directory_with_another_id(slot_directory: Path) -> None:
    """The lock of a directory with another id, as of another container at the same path, proves nothing."""
    document = in_slot(slot_directory)
    document["Meta"]["dir"] = f"fedcba9876543210:{slot_directory}"
    assert judge(document).state == "unknown"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"proc": proc(boot="other")}, "another boot"),
        ({"proc": proc(namespace="1")}, "another pid namespace"),
        ({"proc": proc(ticks="")}, "too little"),
        ({"proc": ""}, "too little"),
        ({"proc": proc(), "pid": "many"}, "no pid"),
        ({"proc": proc(), "pid": "0"}, "no pid"),
        ({"proc": proc(), "pid": "-1"}, "no pid"),
        ({"proc": proc(), "pid": str(2**70)}, "no pid"),
        ({"proc": proc(), "pid": str(dead_pid()), "host": "web-2"}, "does not fit"),
        ({"proc": proc(), "pid": str(dead_pid()), "slot": "1"}, "does not fit"),
        ({"proc": proc(), "pid": str(dead_pid()), "service": "../shop"}, "does not fit"),
    ],
)
def test_doubt(changes: dict[str, str], why: str) -> None:
    """What cannot be told for sure is unknown, and says why."""
    verdict = judge(entry(**changes))
    assert verdict.state == "unknown"
    assert why in verdict.proof


def test_other_host() -> None:
    """An entry of another host is unknown, even where pid and start seem to tell."""
    verdict = judge(entry(proc=proc(), pid=str(dead_pid())), host="web-2")
    assert (verdict.state, verdict.proof) == ("unknown", "it is of the host web-1, and this is web-2")


def test_host_in_upper_case() -> None:
    """An entry whose host has capitals, of a version that kept them, is of the same host."""
    old = entry(host="WEB-1", instance="WEB-1:0", proc=proc(), pid=str(dead_pid()))
    verdict = judge({**old, "ID": "shop.WEB-1.0"})
    assert verdict.state == "dead"


def test_process_proof() -> None:
    """Of the same boot and namespace, a process is alive, gone, or a later one of the same pid."""
    assert judge(entry(proc=proc(), pid=str(ME))) == Liveness("alive", f"the process {ME} lives")
    assert judge(entry(proc=proc(ticks="1"), pid=str(ME))) == Liveness("dead", f"the process {ME} is a later one")
    gone = dead_pid()
    assert judge(entry(proc=proc(), pid=str(gone))) == Liveness("dead", f"the process {gone} is gone")


def test_hidden_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that exists but that /proc does not show (hidepid) is not taken for gone."""
    real = process_identity
    monkeypatch.setattr(stale, "process_identity", lambda pid: real(pid) if pid == ME else None)
    assert judge(entry(proc=proc(), pid="1")) == Liveness(
        "unknown", _with_directory_gone("the process 1 cannot be seen")
    )


def _with_directory_gone(proof: str) -> str:
    return f"its directory or its lock file is gone, and {proof}"


def test_foreign_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /proc is another pid namespace's, it proves nothing."""
    monkeypatch.setattr(stale, "_proc_is_ours", lambda: False)
    assert judge(entry(proc=proc(), pid=str(dead_pid()))).state == "unknown"


@contextmanager
def nobody(directory: Path) -> Iterator[None]:
    """Someone who may not look into *directory*; for root that takes another effective user."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        directory.chmod(0)
        try:
            yield
        finally:
            directory.chmod(0o700)


def test_directory_of_another_user(slot_directory: Path) -> None:
    """A directory that we may not read is no proof and no error; the process may still be one."""
    alive, gone = (in_slot(slot_directory, proc=proc(), pid=str(pid)) for pid in (ME, dead_pid()))
    other_boot = in_slot(slot_directory, proc=proc(boot="other"))
    slot_directory.parent.chmod(0o700)
    with nobody(slot_directory):
        assert judge(alive).state == "alive"
        assert judge(gone).state == "dead"
        verdict = judge(other_boot)
    assert verdict.state == "unknown"
    assert "cannot be tried (Permission denied)" in verdict.proof


@pytest.mark.parametrize("name", ["id", "shop.0.lock"])
def test_hostile_directory(slot_directory: Path, name: str) -> None:
    """A pipe in the place of a file, which would hold up who opens it, is not opened."""
    document = in_slot(slot_directory)
    (slot_directory / name).unlink()
    os.mkfifo(slot_directory / name)
    assert judge(document).state == "unknown"
    assert stat.S_ISFIFO((slot_directory / name).lstat().st_mode)


@pytest.mark.parametrize("directory", ["", "0123", "0123:", "0123:relative", "0123:/\0", ":/"])
def test_hostile_meta(directory: str) -> None:
    """A `dir` of any shape is no proof."""
    assert judge(entry(dir=directory)).state == "unknown"


class Seen(NamedTuple):
    document: Mapping[str, Any]


class FakeAgent:
    """An agent that has *now* under every ID by the time that it is asked again."""

    def __init__(self, now: Entry) -> None:
        self.now = now
        self.deregistered: list[str] = []

    async def services(self, expression: str) -> Mapping[str, Entry]:
        return {}

    async def service(self, entry_id: str) -> Seen:
        return Seen(self.now)

    async def deregister(self, entry_id: str) -> bool:
        self.deregistered.append(entry_id)
        return True

    async def checks(self, entry_id: str) -> list[dict[str, Any]]:
        return [{"Node": "node"}]

    async def catalogued(self, name: str, entry_id: str, node: str) -> bool:
        return False

    async def deregister_from_catalogue(self, entry_id: str, node: str) -> None:
        raise AssertionError("nothing is left in the catalogue")


@pytest.mark.parametrize("change", [{"pid": "2"}, {"proc": "a.b.1"}, {"dir": "1:/else"}])
async def test_registered_anew_meanwhile(slot_directory: Path, change: dict[str, str]) -> None:
    """An entry that became another worker's since it was judged stays."""
    document = in_slot(slot_directory)
    agent = FakeAgent({**document, "Meta": {**document["Meta"], **change}})
    (outcome,) = [it async for it in stale.sweep(agent, [document], host="web-1")]
    assert (outcome.action, outcome.verdict.state, agent.deregistered) == ("kept", "alive", [])


async def test_port_changed_meanwhile(slot_directory: Path) -> None:
    """The same for one that became another worker's in nothing but the port."""
    document = in_slot(slot_directory)
    agent = FakeAgent({**document, "Port": 2})
    (outcome,) = [it async for it in stale.sweep(agent, [document], host="web-1")]
    assert (outcome.action, agent.deregistered) == ("kept", [])


async def test_foreign_meanwhile(slot_directory: Path) -> None:
    """An entry that lost our marker since it was listed is refused, however it was asked for."""
    document = in_slot(slot_directory)
    agent = FakeAgent({**document, "Meta": {}})
    for forced in (False, True):
        (outcome,) = [it async for it in stale.sweep(agent, [document], host="web-1", forced=forced)]
        assert (outcome.action, agent.deregistered) == ("refused", [])


def test_dry_run_and_forced(agent: DevAgent, workers: Workers) -> None:
    """A dry run removes nothing; a forced sweep removes the living too."""
    workers.start()
    workers.kill(workers.start())
    outcomes = swept(agent, dry_run=True)
    assert [outcome.action for outcome in outcomes.values()] == ["kept", "would remove"]
    outcomes = swept(agent, forced=True, dry_run=True)
    assert [outcome.action for outcome in outcomes.values()] == ["would remove", "would remove"]
    assert len(known(agent)) == 2
    outcomes = swept(agent, forced=True)
    assert [outcome.action for outcome in outcomes.values()] == ["removed", "removed"]
    wait_until(lambda: known(agent) == {"shop.web-1.0"}, within=30, what="the live worker registered again")


def test_denied(agent: DevAgent, workers: Workers) -> None:
    """An entry that the token may not remove is left undone, and the right that is missing is named."""
    workers.kill(workers.start())
    agent.fault = Fault(method="PUT", status=403, body="Permission denied")
    outcome = swept(agent)["shop.web-1.0"]
    assert outcome.action == "failed"
    assert 'the token needs the rule: service "shop-metrics" { policy = "write" }' in outcome.trouble
    agent.fault = Fault(method="PUT", status=500, body="No cluster leader")
    outcome = swept(agent)["shop.web-1.0"]
    assert outcome.action == "failed"
    assert "No cluster leader" in outcome.trouble


def test_agent_goes_away(agent: DevAgent, workers: Workers) -> None:
    """An agent that is not there any more ends the sweep."""
    workers.kill(workers.start())
    agent.fault = Fault(method="PUT", reset=True)
    with pytest.raises((AgentUnreachable, AgentTimeout)):
        swept(agent)


def test_entries_are_sorted(agent: DevAgent) -> None:
    """Entries come by service, host and slot, as a number; those of other services can be left out."""
    for service, slot in (("shop", "10"), ("shop", "9"), ("bar", "1")):
        put(agent, f"{service}.web-1.{slot}", meta(service=service, slot=slot))
    put(agent, "foreign", {})
    assert listed(agent) == ["bar.web-1.1", "shop.web-1.9", "shop.web-1.10"]
    assert listed(agent, service="bar") == ["bar.web-1.1"]


def _no_entry(workers: Workers, pid: int) -> bool:
    return not workers.entries(pid)


class TestCaretaker:
    """The one live worker that looks after the dead ones of its service and directory."""

    def test_kill(self, agent: DevAgent, workers: Workers) -> None:
        """The entry of a killed worker goes though none takes its slot, and those of the living stay."""
        first, second, third = (workers.start() for _ in range(3))
        workers.kill(second)
        wait_until(lambda: not workers.entries(second.pid), within=50, what="the dead worker's entry gone")
        assert workers.entries(first.pid) == ["shop.web-1.0"]
        assert workers.entries(third.pid) == ["shop.web-1.2"]

    def test_caretaker_is_killed(self, agent: DevAgent, workers: Workers) -> None:
        """Another worker is the caretaker when the caretaker is dead, whichever that was."""
        processes = [workers.start() for _ in range(3)]
        for process in processes[:2]:
            workers.kill(process)
            wait_until(partial(_no_entry, workers, process.pid), within=50, what="the entry gone")
        assert workers.entries(processes[2].pid)

    def test_stopped_worker(self, agent: DevAgent, workers: Workers) -> None:
        """A worker that stands still lives: its lock is held, and its entry stays."""
        caretaking, standing, dying = (workers.start() for _ in range(3))
        workers.hold(standing)
        workers.kill(dying)
        wait_until(lambda: not workers.entries(dying.pid), within=50, what="the dead worker's entry gone")
        assert workers.entries(standing.pid)
        assert workers.entries(caretaking.pid)

    async def test_sweep(self, agent: DevAgent, workers: Workers, slot_directory: Path) -> None:
        """A sweep asks the agent of the abandoned slot alone, once, and again only where the agent failed."""
        living, dead = workers.start(), workers.start()
        workers.kill(living)  # both: no caretaker is at work
        workers.kill(dead)
        again = workers.start()
        workers.hold(again)
        client = AgentClient(load({"consul_http_addr": agent.url}, environ={}))
        caring = Leader(client, directory=slot_directory, service="shop", host="web-1")
        agent.fault = Fault(status=500)
        await caring.sweep()
        assert workers.entries(dead.pid)
        agent.fault = None
        agent.requests.clear()
        await caring.sweep()
        await caring.sweep()
        assert [path for _, path in agent.requests] == [
            "/v1/agent/service/shop.web-1.1",
            "/v1/agent/checks",
            "/v1/agent/service/deregister/shop.web-1.1",
            "/v1/catalog/service/shop-metrics",
        ]
        assert workers.entries(again.pid) == ["shop.web-1.0"]
        await client.aclose()

    async def test_no_descriptors(self, slot_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A directory that cannot be read costs a round, and not the caretaker."""
        inn = Inn(FakeAgent({}), slot_directory)
        await inn.round()
        looks: list[str] = []

        def refuse(*_arguments: object) -> list[int]:
            looks.append("")
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        monkeypatch.setattr(slots, "abandoned", refuse)
        await inn.round()
        await inn.round()
        assert len(looks) == 2
        await inn.end()

    async def test_other_directory(self, agent: DevAgent, workers: Workers, slot_directory: Path) -> None:
        """An entry that names another directory is not touched, however free our lock is; nor is a foreign one."""
        dead = workers.start()
        workers.kill(dead)
        client = AgentClient(load({"consul_http_addr": agent.url}, environ={}))
        caring = Leader(client, directory=slot_directory, service="shop", host="web-1")
        put(agent, "shop.web-1.0", meta(dir="0123456789abcdef:/gone/slots"))
        await caring.sweep()
        assert list(agent.state.services) == ["shop.web-1.0"]
        await client.aclose()

    def test_nothing_to_look_for(self, agent: DevAgent, workers: Workers, slot_directory: Path) -> None:
        """A clean stop leaves nothing to sweep; the end of one that was killed does."""
        workers.kill(workers.start())
        assert slots.abandoned(slot_directory, "shop") == [0]
        registry = CollectorRegistry()
        worker = Worker(registry=registry, service="shop", host="web-1", consul_http_addr=agent.url, dir=slot_directory)
        worker.start()
        wait_until(lambda: worker.registered, within=10, what="registered")
        worker.stop()
        assert (slot_directory / "shop.0.lock").read_text() == ""

    async def test_successor_that_never_asked(self, agent: DevAgent, workers: Workers, slot_directory: Path) -> None:
        """What a killed worker left is removed, though its successor went before any answer of the agent."""
        dead = workers.start()
        workers.kill(dead)
        agent.fault = Fault(status=500)
        workers.run("import consul_prom\nwith consul_prom.running() as worker:\n    assert worker.slot == 0")
        agent.fault = None
        assert workers.entries(dead.pid)
        client = AgentClient(load({"consul_http_addr": agent.url}, environ={}))
        await Leader(client, directory=slot_directory, service="shop", host="web-1").sweep()
        assert not workers.entries(dead.pid)
        await client.aclose()

    def test_newborn(self, slot_directory: Path) -> None:
        """A newborn has the smallest slot though a sweeper holds its lock for a moment."""
        dead = slots.acquire(slot_directory, "shop")
        dead.release()
        (slot_directory / "shop.0.lock").write_text(f"1 {proc(ticks='1')}")
        slot = slots.try_slot(slot_directory, "shop", 0)
        assert slot
        release = threading.Timer(0.03, slot.release)
        release.start()
        newborn = slots.acquire(slot_directory, "shop")
        release.join()
        assert newborn.number == 0
        assert slots.acquire(slot_directory, "shop").number == 1
        newborn.release()

    def test_wiped_directory(self, slot_directory: Path) -> None:
        """Where there is no directory, none is made."""
        shutil.rmtree(slot_directory)
        assert slots.abandoned(slot_directory, "shop") == []
        with pytest.raises(FileNotFoundError):
            slots.try_slot(slot_directory, "shop", slots.MASTER)
        assert not slot_directory.exists()


class FakeGuest:
    """A guest that notes what becomes of it."""

    def __init__(self, *, clean: bool = True) -> None:
        self.clean = clean
        self.retired = 0
        self.may_retire = asyncio.Event()
        self.may_retire.set()

    async def retire(self, timeout: float) -> bool:
        self.retired += 1
        await self.may_retire.wait()
        return self.clean


class Inn:
    """A caretaker whose masters and rounds a test makes."""

    def __init__(self, agent: stale.AgentAPI, directory: Path, *, clean: bool = True) -> None:
        self.alive = True
        self.full = False
        self.guests: list[FakeGuest] = []
        self.received = 0
        self._clean = clean
        self._rounds = asyncio.Semaphore(0)
        self._arrived = asyncio.Event()
        prepare(directory)
        self.caretaker = Leader(
            agent,
            directory=directory,
            service="shop",
            host="web-1",
            masters=lambda: self.alive,
            receive=self._receive,
            sleep=self._sleep,
        )
        self.working = asyncio.create_task(self.caretaker.run())

    async def _receive(self, slot: slots.Slot) -> FakeGuest:
        self.received += 1
        assert slot.note, "noted before there can be an entry"
        if self.full:
            raise EndpointError("no port is left")
        self.guests.append(FakeGuest(clean=self._clean))
        return self.guests[-1]

    async def _sleep(self, _seconds: float) -> None:
        self._arrived.set()
        await self._rounds.acquire()

    async def begin_round(self) -> None:
        await self._arrived.wait()
        self._arrived.clear()
        self._rounds.release()

    async def round(self) -> None:
        """One more, to its end."""
        await self.begin_round()
        async with asyncio.timeout(10):
            await self._arrived.wait()

    async def end(self) -> None:
        self.working.cancel()
        await asyncio.gather(self.working, return_exceptions=True)


def note_of(directory: Path) -> str:
    return slots.path_of(directory, "shop", slots.MASTER).read_text()


class TestMasters:
    """The caretaker serves the page of Gunicorn's masters for as long as there are any."""

    async def test_end_in_the_middle(self, slot_directory: Path) -> None:
        """Where the caretaker ends while the guest retires, as when all are killed, that is done to its end."""
        inn = Inn(FakeAgent({}), slot_directory)
        await inn.round()
        (guest,) = inn.guests
        guest.may_retire.clear()
        inn.alive = False
        await inn.begin_round()
        await eventually(lambda: guest.retired, within=10, what="the guest retires")
        asyncio.get_running_loop().call_later(0.05, guest.may_retire.set)
        await inn.end()
        assert guest.retired == 2
        assert note_of(slot_directory) == ""

    async def test_comes_and_goes(self, slot_directory: Path) -> None:
        """One guest is received while masters live, and retires with them; then nothing is left to look for."""
        inn = Inn(FakeAgent({}), slot_directory)
        for _ in range(3):
            await inn.round()
        assert (inn.received, inn.guests[0].retired) == (1, 0)
        inn.alive = False
        await inn.round()
        assert inn.guests[0].retired == 1
        assert note_of(slot_directory) == ""
        inn.alive = True
        await inn.round()
        assert inn.received == 2
        await inn.end()
        assert inn.guests[1].retired == 1

    async def test_is_cancelled(self, slot_directory: Path) -> None:
        """A worker that leaves takes its guest along, before anyone else can be the caretaker."""
        inn = Inn(FakeAgent({}), slot_directory)
        await inn.round()
        assert slots.try_slot(slot_directory, "shop", slots.MASTER) is None
        await inn.end()
        assert inn.guests[0].retired == 1
        assert slots.try_slot(slot_directory, "shop", slots.MASTER)

    async def test_entry_is_left(self, slot_directory: Path) -> None:
        """A guest whose entry may be left leaves the note by which others find it."""
        inn = Inn(FakeAgent({}), slot_directory, clean=False)
        await inn.round()
        await inn.end()
        assert note_of(slot_directory)

    async def test_cannot_be_received(self, slot_directory: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Where there is no port, say, it is tried again, and said once."""
        inn = Inn(FakeAgent({}), slot_directory)
        inn.full = True
        for _ in range(3):
            await inn.round()
        assert caplog.text.count("no port is left") == 1
        inn.full = False
        await inn.round()
        assert inn.guests
        await inn.end()

    @pytest.mark.parametrize("same", [True, False])
    async def test_dead_caretakers_guest(self, agent: DevAgent, slot_directory: Path, *, same: bool) -> None:
        """Where there is no master any more, the next caretaker removes the entry, unless it is another directory's."""
        identity_of_directory = prepare(slot_directory) if same else "0123456789abcdef"
        left = meta(slot="master", instance="web-1:master", dir=f"{identity_of_directory}:{slot_directory}")
        await asyncio.to_thread(put, agent, "shop.web-1.master", left)
        slots.path_of(slot_directory, "shop", slots.MASTER).write_text(f"{dead_pid()} {proc(ticks='1')}")
        client = AgentClient(load({"consul_http_addr": agent.url}, environ={}))
        inn = Inn(client, slot_directory)
        inn.alive = False
        agent.fault = Fault(status=500)
        await inn.round()
        assert note_of(slot_directory), "it is tried again"
        agent.fault = None
        await inn.round()
        assert known(agent) == (set() if same else {"shop.web-1.master"})
        assert note_of(slot_directory) == ""
        await inn.end()
        await client.aclose()

    async def test_directory_is_wiped(self, slot_directory: Path) -> None:
        """Who holds a lock that is none any more lets the guest go, and begins anew."""
        inn = Inn(FakeAgent({}), slot_directory)
        await inn.round()
        shutil.rmtree(slot_directory)
        await inn.round()
        assert inn.guests[0].retired == 1
        prepare(slot_directory)
        await inn.round()
        assert len(inn.guests) == 2
        await inn.end()

    def test_command(self, agent: DevAgent, slot_directory: Path) -> None:
        """The command proves by the caretaker's lock that nobody serves the page."""
        directory_id = prepare(slot_directory)
        left = meta(slot="master", instance="web-1:master", dir=f"{directory_id}:{slot_directory}")
        put(agent, "shop.web-1.master", left)
        slot = slots.try_slot(slot_directory, "shop", slots.MASTER)
        assert slot
        assert swept(agent)["shop.web-1.master"].verdict.state == "alive"
        slot.release()
        assert swept(agent)["shop.web-1.master"].action == "removed"


class FakeAdoption:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.turns = 0
        self.ended = False

    async def turn(self) -> None:
        self.turns += 1

    async def end(self) -> None:
        self.ended = True


async def test_adoption(slot_directory: Path) -> None:
    """Slots are looked at each round, and as soon as somebody has come or gone; it ends with the caretaker."""
    slept: list[float] = []
    adoption, newborns = FakeAdoption(), []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            newborns.append(slots.acquire(slot_directory, "shop"))
        if sum(slept) > 4:
            await asyncio.Event().wait()
        await asyncio.sleep(0.01)  # a file system's clock ticks each 4 ms

    prepare(slot_directory)
    working = asyncio.create_task(
        Leader(
            FakeAgent({}), directory=slot_directory, service="shop", host="web-1", adoption=adoption, sleep=sleep
        ).run()
    )
    await eventually(lambda: sum(slept) > 4, within=10, what="rounds")
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    rounds = 1 + 1 + 2  # the first, that of the newborn, and two of a second each
    assert (adoption.turns, adoption.ended) == (rounds, True)
