"""Nobody removes a live worker's entry and no two live workers share a slot, whatever dies, stands still or sweeps."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from consul_prom.devagent import DevAgent
from consul_prom.process.identity import process_identity
from consul_prom.slots import slots
from tests.faults.test_stale_entries import swept
from tests.services.waiting import wait_until
from tests.services.workers import PACKAGE, Workers, meta, put

ROUNDS = 12
MOST_WORKERS = 6

NURSERY = """
import os, signal, sys
import consul_prom
from consul_prom.consul.client import preload

consul_prom.Worker
preload()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody is a zombie
for _ in sys.stdin:
    if not os.fork():
        worker = consul_prom.Worker()
        worker.start()
        print(os.getpid(), worker.slot, flush=True)
        while True:
            signal.pause()
"""
CLI = """
import sys
from consul_prom.cli.main import commands

while True:
    try:
        commands(["deregister"], standalone_mode=False)
    except Exception as error:
        print(error, file=sys.stderr, flush=True)
"""


class Fleet:
    """Workers that are forked from one process that has imported all, and so are born within milliseconds."""

    def __init__(self, agent: DevAgent, directory: Path) -> None:
        self.agent = agent
        self.directory = directory
        self.slot_of: dict[int, int] = {}
        self.stopped: set[int] = set()
        self.wronged: list[str] = []
        self._environment = Workers(agent, directory)._environment({"CONSUL_PROM_ADDRESS": "127.0.0.1"})
        self._nursery = self._run(NURSERY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._commands = [self._run(CLI, stdout=subprocess.DEVNULL) for _ in range(2)]
        self._deregister = agent.state.deregister
        setattr(agent.state, "deregister", self._removed)  # noqa: B010  # what the agent is told, we are too

    def _run(self, script: str, **options: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen([sys.executable, "-c", script], env=self._environment, cwd=PACKAGE, **options)

    def _removed(self, entry_id: str) -> None:
        """No worker of this fleet ever says farewell, so that whatever is removed was removed by another."""
        service = self.agent.state.services.get(entry_id)
        if service and int(service.meta["pid"]) in self.slot_of:
            self.wronged.append(entry_id)
        self._deregister(entry_id)

    def bear(self) -> None:
        assert self._nursery.stdin
        assert self._nursery.stdout
        self._nursery.stdin.write("\n")
        self._nursery.stdin.flush()
        pid, slot = (int(word) for word in self._nursery.stdout.readline().split())
        assert slot not in self.slot_of.values(), f"slot {slot} is held twice"
        self.slot_of[pid] = slot

    def kill(self, pid: int) -> None:
        del self.slot_of[pid]  # from here on its entry may be removed
        self.stopped.discard(pid)
        os.kill(pid, signal.SIGKILL)

    def stop(self, pid: int) -> None:
        self.stopped.add(pid)
        os.kill(pid, signal.SIGSTOP)

    def resume(self, pid: int) -> None:
        self.stopped.discard(pid)
        os.kill(pid, signal.SIGCONT)

    def entries(self) -> dict[int, str]:
        services = list(self.agent.state.services.values())
        return {int(service.meta["pid"]): service.service_id for service in services}

    def close(self) -> None:
        for process in (self._nursery, *self._commands):
            process.kill()
            process.wait()
        for pid in list(self.slot_of):
            self.kill(pid)
        assert self._nursery.stdin
        assert self._nursery.stdout
        self._nursery.stdin.close()
        self._nursery.stdout.close()


@pytest.fixture
def fleet(agent: DevAgent, slot_directory: Path) -> Iterator[Fleet]:
    fleet = Fleet(agent, slot_directory)
    yield fleet
    fleet.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("rounds", [ROUNDS, pytest.param(200, marks=pytest.mark.full)])
def test_rounds(fleet: Fleet, rounds: int) -> None:
    """Through rounds of births, kills and standstills, with two commands sweeping all the time, no live one is hurt."""
    chance = random.Random(rounds)
    for _ in range(rounds):
        for _ in range(chance.randint(1, 3)):
            if len(fleet.slot_of) < MOST_WORKERS:
                fleet.bear()
        alive = list(fleet.slot_of)
        for pid in chance.sample(alive, k=chance.randint(0, len(alive) - 1)):
            chance.choice([fleet.kill, fleet.kill, fleet.stop, fleet.resume])(pid)
        time.sleep(chance.random() / 2)  # what the sweepers do in it is theirs
        assert not fleet.wronged
    for pid in list(fleet.slot_of):
        fleet.resume(pid)
    wait_until(lambda: set(fleet.entries()) == set(fleet.slot_of), within=60, what="the entries of the living")
    assert not fleet.wronged


def test_caretaker_stands_still(fleet: Fleet) -> None:
    """While the caretaker stands still, its entry stays, and the commands remove what the dead leave."""
    for _ in range(3):
        fleet.bear()
    wait_until(lambda: set(fleet.entries()) == set(fleet.slot_of), within=20, what="the entries")
    lock = slots.path_of(fleet.directory, "shop", slots.MASTER)
    wait_until(lock.exists, within=20, what="a caretaker")
    for pid in fleet.slot_of:
        fleet.stop(pid)
    dead = next(iter(fleet.slot_of))
    fleet.kill(dead)
    wait_until(lambda: dead not in fleet.entries(), within=20, what="the dead one's entry gone")
    assert set(fleet.entries()) == set(fleet.slot_of)
    assert not fleet.wronged


def test_lock_files_are_wiped(agent: DevAgent, workers: Workers, slot_directory: Path) -> None:
    """A worker whose lock file was wiped away leaves its slot, and the entry of the newborn that has it by then."""
    first = workers.start()
    removed: list[str] = []
    setattr(agent.state, "deregister", removed.append)  # noqa: B010
    workers.hold(first)  # else it may notice before the newborn has the slot, and take it again
    for path in slot_directory.glob("*.lock"):
        path.unlink()
    second = workers.start()
    first.send_signal(signal.SIGCONT)
    wait_until(lambda: workers.entries(first.pid) == ["shop.web-1.1"], within=60, what="another slot")
    assert workers.entries(second.pid) == ["shop.web-1.0"]
    assert not removed


def test_clock_changes(agent: DevAgent, workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the clock says is no proof of anything."""
    workers.hold(workers.start())
    dead = workers.start()
    workers.kill(dead)
    for now in (0.0, 2e9, 1e10):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        found = swept(agent)
        assert found["shop.web-1.0"].verdict.state == "alive"
    assert not workers.entries(dead.pid)


def test_pid_is_used_again(agent: DevAgent, workers: Workers) -> None:
    """A dead worker's pid that another process has by now proves nothing for it; the live one's entry stays."""
    living = workers.start()
    (own,) = workers.entries(living.pid)
    later = process_identity(living.pid)
    assert later
    boot, namespace, ticks = later.split(".")
    put(
        agent,
        "shop.web-1.7",
        meta(slot="7", instance="web-1:7", pid=str(living.pid), proc=f"{boot}.{namespace}.{int(ticks) - 1}"),
    )
    found = swept(agent)
    assert (found[own].action, found["shop.web-1.7"].action) == ("kept", "removed")
    assert found["shop.web-1.7"].verdict.proof == f"the process {living.pid} is a later one"


def test_other_pid_namespace(agent: DevAgent, workers: Workers, slot_directory: Path) -> None:
    """A command in another pid namespace, without the directory, takes nobody for dead, whatever pids are there."""
    living = workers.start()
    workers.hold(living)
    shutil.rmtree(slot_directory)
    command = [sys.executable, "-m", "consul_prom", "deregister", "--json"]
    inside = ["unshare", "--map-root-user", "--pid", "--fork", "--mount-proc", *command]
    done = subprocess.run(
        inside, env=workers._environment({}), cwd=PACKAGE, capture_output=True, text=True, timeout=60, check=False
    )
    (outcome,) = json.loads(done.stdout)
    assert (done.returncode, outcome["action"], outcome["state"]) == (1, "kept", "unknown"), done.stderr
    assert "another pid namespace" in outcome["proof"]
    assert workers.entries(living.pid)
