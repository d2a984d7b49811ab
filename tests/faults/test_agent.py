"""An agent that is not there yet, dies, comes back empty or with what it kept, or stands still."""

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import MakeScene
from tests.faults.fleet import Fleet
from tests.faults.scene import READ, Scene, repair
from tests.services.consul import Consul
from tests.services.program import own_address
from tests.services.proxy import NONE, Fault, Proxy
from tests.services.waiting import wait_until


@pytest.fixture
def durable() -> Iterator[Consul]:
    """An agent that keeps its entries over a restart."""
    with Consul(dev=False) as consul:
        yield consul


class TestAbsent:
    """No agent at the worker's start."""

    @pytest.mark.parametrize("seconds", [1, pytest.param(30, marks=pytest.mark.full)])
    def test_late(self, tmp_path: Path, seconds: float) -> None:
        """Once there is an agent, the worker registers; until then it has said so once."""
        late = Consul(address=own_address())
        with Scene(late, tmp_path, registered=False) as scene:
            begun = time.monotonic()
            wait_until(lambda: time.monotonic() - begun > seconds, within=seconds + 5, what="the agent's time")
            wait_until(lambda: "unreachable" in scene.failures, within=20, what="a failure")
            with late:
                repair([scene])
                assert len(scene.warnings) == 1
                scene.worker.stop()
                assert scene.entry is None

    def test_never(self, tmp_path: Path) -> None:
        """Without any, the worker serves, and its stop has nothing to wait for nor to say."""
        nobody = Consul(address=own_address())
        with Scene(nobody, tmp_path, registered=False, stop_timeout=60) as scene:
            wait_until(lambda: "unreachable" in scene.failures, within=20, what="a failure")
            assert scene.worker.url
            begun = time.monotonic()
            scene.worker.stop()
            assert time.monotonic() - begun < 30
            assert len(scene.messages) == 1


class TestKilled:
    """An agent that dies without a word, and is started again."""

    def test_loses_all(self, consul: Consul, scene: MakeScene) -> None:
        """An agent that comes back empty has the entry again; the log tells why."""
        stage = scene()
        for _ in range(2):
            consul.kill()
            wait_until(lambda: not stage.worker.registered, within=20, what="the loss noticed")
            consul.start()
            repair([stage])
        assert stage.registrations == {"start": 1, "lost": 2}
        assert sum("which the agent had lost" in line for line in stage.messages) == 2

    def test_keeps_all(self, durable: Consul, tmp_path: Path) -> None:
        """An agent that comes back with the entry gets no second one; its check is critical until it has run."""
        with Scene(durable, tmp_path, check_interval=1) as scene:
            before = scene.entry
            durable.kill()
            wait_until(lambda: not scene.worker.registered, within=20, what="the loss noticed")
            durable.start()
            repair([scene])
            assert scene.registrations == {"start": 1}
            assert scene.entry == before
            wait_until(lambda: health(durable, scene) == "passing", within=30, what="a check that has run")
            scene.worker.stop()
            assert scene.entry is None

    def test_terminated(self, consul: Consul, scene: MakeScene) -> None:
        """An agent that is stopped, and so ends the blocking read early, is not asked in a tight loop."""
        stage = scene()
        since = time.monotonic()
        consul.stop()
        consul.start()
        repair([stage])
        assert len(stage.proxy.asked("", since=since)) < 30

    @pytest.mark.parametrize(
        ("dev", "count"),
        [(True, 60), pytest.param(True, 100, marks=pytest.mark.full), pytest.param(False, 100, marks=pytest.mark.full)],
        ids=["empty", "empty, polls too", "kept"],
    )
    def test_herd(self, tmp_path: Path, dev: bool, count: int) -> None:  # noqa: FBT001
        """Many workers of an agent that comes back do not come all at once: they are spread over a second or two."""
        with Consul(dev=dev) as consul, Proxy(consul.url) as proxy:
            settings = {"consul_http_addr": proxy.url, "address": consul.address}
            with Fleet({"shop": count}, directory=tmp_path, processes=2, **settings) as fleet:
                wait_until(lambda: fleet.settled(consul), within=60, what="all registered")
                wait_until(lambda: all_talked(proxy, count), within=60, what="all at rest")
                proxy.fault = Fault(refuse=True)
                consul.kill()
                consul.start()
                since = time.monotonic()
                proxy.fault = NONE
                wait_until(lambda: len(first_reads(proxy, since)) == count, within=60, what="all have come")
                wait_until(lambda: fleet.settled(consul), within=60, what="all registered again")
                most, times = busiest(first_reads(proxy, since).values())
                print(f"arrived, in seconds after the first: {times}")  # for `pytest -rP`
                assert most <= count / 2, times
                assert fleet.end() == [0, 0]
                assert not consul.call("/v1/agent/services")[1]
            assert max(Counter(re.findall(r"shop\.web-1\.\d+ ", fleet.log.read_text())).values()) <= 10


class TestFrozen:
    """An agent that accepts and does nothing, as it does while it waits for servers that do not answer."""

    @pytest.mark.full
    def test_frozen(self, consul: Consul, scene: MakeScene, short_turns: None) -> None:
        """Deadlines hold against an agent that stands still, and nothing is lost when it goes on."""
        stage = scene()
        consul.pause()
        wait_until(lambda: not stage.worker.registered, within=60, what="the deadline")
        assert "did not answer within" in stage.trouble
        consul.resume()
        repair([stage])
        assert stage.registrations == {"start": 1}

    def test_born(self, consul: Consul, scene: MakeScene, short_turns: None) -> None:
        """A worker that is born while the agent stands still registers when it goes on, without a second entry."""
        consul.pause()
        stage = scene(registered=False, address=consul.address)
        wait_until(lambda: "timeout" in stage.failures, within=60, what="the deadline")
        consul.resume()
        repair([stage])
        assert list(consul.call("/v1/agent/services")[1]) == [stage.entry_id]


def health(consul: Consul, scene: Scene) -> str:
    _, answer = consul.call(f"/v1/agent/health/service/id/{scene.entry_id}")
    return str(answer["AggregatedStatus"])


def all_talked(proxy: Proxy, count: int) -> bool:
    """Whether every worker has looked at its entry after it was registered."""
    reads = Counter(re.findall(r"service/(shop\.web-1\.\d+)", "\n".join(request.line for request in proxy.requests)))
    return len(reads) == count and min(reads.values()) > 1


def first_reads(proxy: Proxy, since: float) -> dict[str, float]:
    """When each worker asked for its entry for the first time."""
    found: dict[str, float] = {}
    for request in list(proxy.requests):
        if request.at >= since and (match := re.search(READ + r"(shop\.web-1\.\d+)", request.line)):
            found.setdefault(match[1], request.at)
    return found


def busiest(times: Iterable[float]) -> tuple[int, list[float]]:
    """The most that any tenth of a second holds, and all of them from the first on, for the message."""
    ordered = sorted(times)
    most = max(sum(begin <= other < begin + 0.1 for other in ordered) for begin in ordered)
    return most, [round(each - ordered[0], 2) for each in ordered]
