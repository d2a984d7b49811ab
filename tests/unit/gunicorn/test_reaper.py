"""What is done in Gunicorn's master for the dead: by the lock's proof, and within its budget."""

import logging
import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from consul_prom.devagent import DevAgent, Fault
from consul_prom.errors import AgentTimeout
from consul_prom.gunicorn.reaper import BUDGET, OFF, MasterReaper
from consul_prom.process.identity import process_identity
from consul_prom.settings.settings import Settings, load
from consul_prom.slots import slots
from tests.conftest import MakeSettings
from tests.services.waiting import wait_until
from tests.services.workers import Workers, meta, put


def settings_of(agent: DevAgent, directory: Path, **changes: str) -> Settings:
    return load({"consul_http_addr": agent.url, "host": "web-1", "dir": directory, **changes}, environ={})


@pytest.fixture
def undertaker(agent: DevAgent, slot_directory: Path) -> MasterReaper:
    return MasterReaper(settings_of(agent, slot_directory))


def leave_slot(directory: Path, agent: DevAgent, *, hosts: str = "", dir_: str = "") -> int:
    """A slot and an entry as a killed worker leaves them; its pid."""
    process = subprocess.Popen(["sleep", "60"])
    slot = slots.acquire(directory, "shop")
    note = f"{process.pid} {process_identity(process.pid)} {hosts}"
    process.kill()
    process.wait()
    slot.release()
    slots.path_of(directory, "shop", slot.number).write_text(note)
    put(agent, f"shop.web-1.{slot.number}", meta(slot=str(slot.number), dir=dir_ or f"{slot.directory_id}:{directory}"))
    return process.pid


def test_killed(agent: DevAgent, workers: Workers, undertaker: MasterReaper) -> None:
    """The dead worker's entry goes, the caretaker's page with it, and nobody else's."""
    first, second = workers.start(), workers.start()
    undertaker.bury(second.pid)
    assert workers.entries(second.pid), "it lives"
    workers.hold(second)
    workers.hold(first)  # no caretaker works
    workers.kill(second)
    undertaker.bury(first.pid)
    assert workers.entries(second.pid), "another's"
    undertaker.bury(second.pid)
    assert not workers.entries(second.pid)
    assert workers.entries(first.pid)


def test_once(agent: DevAgent, slot_directory: Path, undertaker: MasterReaper) -> None:
    """What is settled is not asked about again."""
    pid = leave_slot(slot_directory, agent)
    undertaker.bury(pid)
    assert not agent.state.services
    agent.requests.clear()
    undertaker.bury(pid)
    undertaker.bury_all()
    assert not agent.requests


@pytest.mark.parametrize("directory", ["0123456789abcdef:/other/slots"])
def test_other_directory(agent: DevAgent, slot_directory: Path, undertaker: MasterReaper, directory: str) -> None:
    """An entry of another directory stays: our lock says nothing of its worker."""
    undertaker.bury(leave_slot(slot_directory, agent, dir_=directory))
    assert list(agent.state.services) == ["shop.web-1.0"]


def test_foreign(agent: DevAgent, slot_directory: Path, undertaker: MasterReaper) -> None:
    """An entry without our marker stays."""
    pid = leave_slot(slot_directory, agent)
    put(agent, "shop.web-1.0", {})
    undertaker.bury(pid)
    assert list(agent.state.services) == ["shop.web-1.0"]


def test_lock_is_held(agent: DevAgent, slot_directory: Path, undertaker: MasterReaper) -> None:
    """Without the lock there is no proof, whatever the note says."""
    pid = leave_slot(slot_directory, agent)
    slot = slots.try_slot(slot_directory, "shop", 0)
    assert slot
    undertaker.bury(pid)
    assert agent.state.services
    slot.release()
    undertaker.bury(pid)
    assert not agent.state.services


def test_all(agent: DevAgent, slot_directory: Path, undertaker: MasterReaper) -> None:
    """At the end all of the dead go, once those who are dying are dead."""
    for _ in range(2):
        leave_slot(slot_directory, agent)
        (slot_directory / "shop.1.lock").touch()
    alive = iter([True, True, False])
    undertaker.bury_all(dying=lambda: next(alive))
    assert not agent.state.services
    assert next(alive, None) is None


def test_lock_comes_late(agent: DevAgent, slot_directory: Path, undertaker: MasterReaper) -> None:
    """At the end a lock that a dying process' last thread holds is waited for."""
    leave_slot(slot_directory, agent)
    slot = slots.try_slot(slot_directory, "shop", 0)
    assert slot
    release = threading.Timer(0.1, slot.release)
    release.start()
    undertaker.bury_all()
    release.join()
    assert not agent.state.services


class Clock:
    """Time that passes by being told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_budget(agent: DevAgent, slot_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In no second is more than the budget spent; after a time-out nothing is, for half a minute."""
    clock = Clock()
    undertaker = MasterReaper(settings_of(agent, slot_directory), clock=clock, sleep=clock.sleep)
    spent: list[tuple[float, float]] = []

    def ask(_settings: object, _entry_id: str, *, timeout: float, hosts: object) -> None:
        seconds = min(0.2, timeout)
        spent.append((clock.now, seconds))
        clock.now += seconds

    monkeypatch.setattr("consul_prom.gunicorn.reaper.service_sync", ask)
    for _ in range(100):
        pid = leave_slot(slot_directory, agent)
        undertaker.bury(pid)
        clock.now += 0.05
    assert len(spent) > 5
    for begun, _ in spent:
        assert sum(seconds for at, seconds in spent if begun <= at < begun + 1) <= BUDGET + 0.001


def test_lets_an_agent_be(agent: DevAgent, slot_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that did not answer is let be for half a minute, and then asked again."""
    clock, asked = Clock(), []

    def ask(*_arguments: object, **_named: object) -> None:
        asked.append(clock.now)
        raise AgentTimeout("hangs")

    monkeypatch.setattr("consul_prom.gunicorn.reaper.service_sync", ask)
    undertaker = MasterReaper(settings_of(agent, slot_directory), clock=clock, sleep=clock.sleep)
    pid = leave_slot(slot_directory, agent)
    for _ in range(60):
        undertaker.bury(pid)
        clock.now += 1
    assert [moment - asked[0] for moment in asked] == [0, OFF]


def test_hanging_agent(
    agent: DevAgent, slot_directory: Path, undertaker: MasterReaper, caplog: pytest.LogCaptureFixture
) -> None:
    """An agent that hangs is asked once, for the budget; what is left is said, and left."""
    pids = [leave_slot(slot_directory, agent) for _ in range(1)]
    agent.fault = Fault(delay=20)
    begun = time.monotonic()
    for _ in range(50):
        undertaker.bury(pids[0])
    assert time.monotonic() - begun < 10 * BUDGET
    assert len(caplog.records) == 1
    assert "did not answer within" in caplog.text
    assert agent.state.services


def test_dripping_agent(agent: DevAgent, slot_directory: Path) -> None:
    """An agent that sends byte by byte is not waited for longer than one that sends nothing."""
    pid = leave_slot(slot_directory, agent)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            peer, _ = server.accept()
            with peer:
                try:
                    while True:
                        peer.sendall(b"H")
                        time.sleep(0.05)
                except OSError:
                    pass

        dripping = threading.Thread(target=drip)
        dripping.start()
        port = server.getsockname()[1]
        undertaker = MasterReaper(settings_of(agent, slot_directory, consul_http_addr=f"127.0.0.1:{port}"))
        begun = time.monotonic()
        undertaker.bury(pid)
        assert time.monotonic() - begun < 10 * BUDGET
        dripping.join()


def test_no_name_is_looked_up(agent: DevAgent, slot_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent's address is what the dead worker noted; where it noted none, a name is left alone."""
    real = socket.getaddrinfo

    def look_up(host: str, *rest: object, **named: object) -> object:
        assert host in {"127.0.0.1", "::1"}, f"{host} is looked up"
        return real(host, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    undertaker = MasterReaper(
        settings_of(agent, slot_directory, consul_http_addr=f"http://agent.example.org:{agent.port}")
    )
    pid = leave_slot(slot_directory, agent)
    undertaker.bury(pid)
    assert agent.state.services
    undertaker.bury(leave_slot(slot_directory, agent, hosts="127.0.0.1"))
    assert not agent.state.services
    local = MasterReaper(settings_of(agent, slot_directory, consul_http_addr=f"http://localhost:{agent.port}"))
    local.bury(leave_slot(slot_directory, agent))
    assert not agent.state.services


def test_worker_notes_the_address(agent: DevAgent, workers: Workers, slot_directory: Path) -> None:
    """A worker that looked the agent up notes where it is."""
    workers.start(CONSUL_HTTP_ADDR=f"http://localhost:{agent.port}")
    wait_until(lambda: "127.0.0.1" in (slot_directory / "shop.0.lock").read_text().split(), within=10, what="the note")


def test_denied(
    agent: DevAgent, slot_directory: Path, undertaker: MasterReaper, caplog: pytest.LogCaptureFixture
) -> None:
    """A refusal is a sentence, and the next that die are dealt with at once."""
    caplog.set_level(logging.INFO, logger="consul_prom.gunicorn.reaper")
    pid = leave_slot(slot_directory, agent)
    agent.fault = Fault(status=403)
    for _ in range(3):
        undertaker.bury(pid)
    agent.fault = None
    undertaker.bury(pid)
    said = [record.getMessage() for record in caplog.records if record.name == "consul_prom.gunicorn.reaper"]
    assert [line.partition(" ")[2].partition(":")[0] for line in said] == [
        "of a dead worker is left to its siblings",
        "shop.web-1.0",
        "of dead workers are removed again",
    ]
    assert not agent.state.services


def test_no_agent(agent: DevAgent, slot_directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An answer that no agent gives is a sentence too, and the entry is left as it is."""
    pid = leave_slot(slot_directory, agent)
    agent.fault = Fault(path="/v1/agent/checks", status=404, body="unknown service ID")
    MasterReaper(settings_of(agent, slot_directory, consul_http_token="t")).bury(pid)
    assert "shop.web-1.0 of a dead worker is left to its siblings" in caplog.text
    assert agent.state.services


def test_no_directory(settings: MakeSettings, tmp_path: Path) -> None:
    """Without a directory there are no dead."""
    undertaker = MasterReaper(settings(dir=tmp_path / "none"))
    undertaker.bury(os.getpid())
    undertaker.bury_all()
    assert not logging.getLogger("consul_prom.gunicorn.reaper").handlers
