"""A stop at any moment of a worker's life: within its deadline, and what was registered is gone."""

import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults.conftest import MakeScene
from tests.faults.scene import GOAL, REGISTER, WATCH, Scene
from tests.services.consul import Consul
from tests.services.proxy import NONE, Fault, answer
from tests.services.waiting import wait_until

SELF = r"^GET /v1/agent/self"


@pytest.fixture(autouse=True)
def _nothing_left(bystanders: None) -> Iterator[None]:
    """No thread of ours outlives its worker."""
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "consul-prom"]


def stop(scene: Scene) -> None:
    """Within ten times STOP_TIMEOUT, which leaves no room for any other deadline of ours on top."""
    begun = time.monotonic()
    scene.worker.stop()
    assert time.monotonic() - begun < 10 * GOAL


def gone(scene: Scene) -> bool:
    return scene.entry is None and not scene.worker.registered


def test_at_once(scene: MakeScene) -> None:
    """A stop right after the start leaves nothing, whatever has been begun."""
    for _ in range(20):
        stage = scene(registered=False, proxy=None)
        stop(stage)
        assert gone(stage)
        assert not stage.warnings


@pytest.mark.parametrize("fault", [Fault(match=SELF, hang=True), Fault(match=SELF, answer=answer(500))])
def test_looking_for_the_address(scene: MakeScene, fault: Fault) -> None:
    """A stop before the endpoint is bound has nothing to take back."""
    stage = scene(registered=False, fault=fault)
    wait_until(lambda: stage.proxy.asked(SELF), within=20, what="the question for the address")
    stop(stage)
    assert gone(stage)
    assert not stage.warnings


def test_first_registration(scene: MakeScene) -> None:
    """A stop while the first registration is on its way takes that back when it has arrived."""
    stage = scene(registered=False, fault=Fault(match=REGISTER, delay=0.5))
    wait_until(lambda: stage.proxy.asked(REGISTER), within=20, what="the registration")
    stop(stage)
    assert gone(stage)
    assert not stage.warnings


def test_late_registration(scene: MakeScene) -> None:
    """A registration that takes effect after its worker has lost patience would stay: the stop waits for it."""
    stage = scene(registered=False, fault=Fault(match=REGISTER, late=0.5))
    wait_until(lambda: stage.proxy.asked(REGISTER), within=20, what="the registration")
    stop(stage)
    wait_until(lambda: not stage.proxy.open, within=20, what="all requests passed on")
    assert gone(stage)
    assert not stage.warnings


def test_hanging_registration(scene: MakeScene) -> None:
    """A stop while a registration hangs ends with one line, since it may still take effect."""
    stage = scene(registered=False, fault=Fault(match=REGISTER, hang=True), stop_timeout=0.5)
    wait_until(lambda: stage.proxy.asked(REGISTER), within=20, what="the registration")
    stop(stage)
    assert gone(stage)
    assert [line for line in stage.warnings if "may still be registered" in line] == stage.warnings
    assert len(stage.warnings) <= 1


def test_backoff_before_the_first(scene: MakeScene) -> None:
    """A stop while waiting for the next try of a first registration has nothing to take back."""
    stage = scene(registered=False, fault=Fault(refuse=True))
    wait_until(lambda: "unreachable" in stage.failures, within=20, what="a failure")
    stop(stage)
    assert gone(stage)
    assert len(stage.warnings) == 1


def test_backoff(scene: MakeScene) -> None:
    """A stop while the agent cannot be reached leaves one line, and the entry; one that comes back has none left."""
    stage, other = scene(stop_timeout=0.5), scene(host="web-2", stop_timeout=60)
    for each in (stage, other):
        each.proxy.fault = Fault(refuse=True)
    wait_until(lambda: not stage.worker.registered and not other.worker.registered, within=20, what="failures")
    stop(stage)
    assert stage.entry
    assert "may still be registered" in stage.warnings[-1]
    assert len(stage.warnings) == 2
    stopping = threading.Thread(target=other.worker.stop)
    stopping.start()
    other.proxy.fault = NONE
    stopping.join(30)
    assert not stopping.is_alive()
    assert gone(other)


def test_blocking_read(scene: MakeScene) -> None:
    """A stop does not wait for a blocking read to end."""
    stage = scene()
    wait_until(lambda: stage.proxy.asked(WATCH), within=20, what="the blocking read")
    stop(stage)
    assert gone(stage)
    assert not stage.warnings


def test_repair(scene: MakeScene) -> None:
    """A stop while a lost entry is being repaired leaves none."""
    stage = scene()
    stage.proxy.fault = Fault(match=REGISTER, delay=0.5)
    since = time.monotonic()
    stage.lose()
    wait_until(lambda: stage.proxy.asked(REGISTER, since=since), within=20, what="the repair")
    stop(stage)
    assert gone(stage)
    assert not stage.warnings


@pytest.mark.parametrize("fault", [Fault(hang=True), Fault(cut=True)], ids=["hang", "cut"])
def test_no_answer(scene: MakeScene, fault: Fault) -> None:
    """A stop against an agent that does not answer ends in time, with one line."""
    stage = scene(stop_timeout=0.5)
    stage.proxy.fault = fault
    stop(stage)
    assert [line for line in stage.warnings if "did not answer within CONSUL_PROM_STOP_TIMEOUT" in line]
    assert len(stage.warnings) == 1


def test_frozen_agent(consul: Consul, scene: MakeScene) -> None:
    """The agent that stands still does what it was asked when it goes on: the entry is gone then."""
    stage = scene()
    consul.pause()
    stop(stage)
    consul.resume()
    wait_until(lambda: stage.entry is None, within=20, what="the entry gone")
