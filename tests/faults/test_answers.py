"""An agent, or what stands before it, that answers wrongly, late or not at all: deadlines, bounded memory, repair.

All faults are at work at the same time, each on a worker of its own, behind a proxy of its own; each is one test.
"""

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from consul_prom import Worker
from tests.faults.conftest import MakeScene, others, shortened
from tests.faults.fleet import Fleet
from tests.faults.scene import DEREGISTER, READ, REGISTER, WATCH, Scene, repair
from tests.services.consul import Consul
from tests.services.proxy import NONE, Fault, Proxy, answer, bomb
from tests.services.waiting import wait_until

BUSY = "Your IP is issuing too many concurrent connections, please rate limit your calls\n"
JSON = {"Content-Type": "application/json"}
STATUSES = {
    400: "Request decode failed",
    403: "Permission denied: token lacks permission 'service:write'",
    404: "404 page not found",
    405: "method GET not allowed",
    429: BUSY,
    500: "No cluster leader",
    503: "no server can answer",
}
WRONG_JSON: dict[str, Any] = {
    "null": None,
    "list": [{}],
    "text": "shop",
    "number": 1e9,
    "empty": {},
    "meta is a list": {"ID": "shop.web-1.0", "Service": "shop-metrics", "Meta": [1]},
    "meta is a text": {"ID": "shop.web-1.0", "Service": "shop-metrics", "Meta": "x"},
    "meta of numbers": {"Meta": {"managed_by": 1, "dir": {}}},
    "tags are a number": {"Service": "shop-metrics", "Tags": 1, "Port": "many", "Address": None},
    "services of texts": {"service:shop": "passing"},
    "services of nothing": {"service:shop": None},
}

FAULTS = {
    "refuse": (Fault(refuse=True), "Connection refused"),
    "cut": (Fault(cut=True), r"did not answer within [23](\.\d)? s"),
    "hang": (Fault(hang=True), r"did not answer within [23](\.\d)? s"),
    "late": (Fault(delay=4), r"did not answer within [23](\.\d)? s"),
    "by the drop": (Fault(rate=20), r"did not answer within [23](\.\d)? s"),
    "reset in the head": (Fault(reset_after=30), "Connection reset"),
    "reset in the body": (Fault(reset_after=400), "Connection ?reset|not completed"),
    "no HTTP": (Fault(answer=b"SSH-2.0-OpenSSH_9.2 " + bytes(range(1, 255)) * 20 + b"\r\n\r\n"), "Bad status line"),
    "half a head": (Fault(answer=b"HTTP/1.1 200 OK\r\nContent-Le"), r"did not answer within [23](\.\d)? s"),
    "half a body": (
        Fault(answer=b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"),
        r"did not answer within [23](\.\d)? s",
    ),
    "wrong length": (Fault(answer=b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{"), "Content-Length"),
    "no gzip": (Fault(answer=answer(200, "{}", {"Content-Encoding": "gzip"})), "not the entry"),
    "html": (Fault(answer=answer(200, "<html>proxy</html>", {"Content-Type": "text/html"})), "sent no JSON: '<html>"),
    "redirect": (Fault(answer=answer(307, "", {"Location": "http://127.0.0.1:1/"})), "answered 307"),
    "moved": (Fault(answer=answer(301, "", {"Location": "/ui/"})), "answered 301"),
    "yes to all": (Fault(match=REGISTER, answer=answer(200, "<html>proxy</html>")), "took it and has it not"),
    "no JSON": (Fault(answer=answer(200, "{", JSON)), "sent no JSON"),
    "deep JSON": (Fault(answer=answer(200, "[" * 100_000, JSON)), "sent no JSON"),
    "endless number": (Fault(answer=answer(200, "1" * 10_000, JSON)), "sent no JSON"),
    "10 MB": (Fault(answer=answer(200, "x" * 10_000_000)), "more than 1 MiB"),
    "bomb": (Fault(answer=bomb(100)), "sent no JSON"),
    **{f"status {status}": (Fault(answer=answer(status, body)), f"{status}: ") for status, body in STATUSES.items()},
    **{f"JSON: {name}": (Fault(answer=answer(200, json.dumps(body), JSON)), ".+") for name, body in WRONG_JSON.items()},
    **{
        f"{status} on {name}": (Fault(match=match, answer=answer(status, body)), f"{status}: ")
        for status, body in STATUSES.items()
        for name, match in {"read": READ, "register": REGISTER}.items()
    },
}


HICCUPS = {
    "reset": Fault(match=WATCH, reset_after=50),
    "no patience": Fault(match=WATCH, answer=answer(504, "Gateway Timeout")),
    **{f"status {status}": Fault(match=WATCH, answer=answer(status, body)) for status, body in STATUSES.items()},
    "hang": Fault(match=WATCH, hang=True),
}
PASSING = {429, 500, 503}


@dataclass(slots=True)
class ReapResult:
    """What a fault did."""

    troubles: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def agent() -> Iterator[Consul]:
    with Consul() as consul, others(consul):
        yield consul


@pytest.fixture(scope="module")
def short_module() -> Iterator[None]:
    with shortened():
        yield


@pytest.fixture(scope="module")
def outcomes(agent: Consul, short_module: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ReapResult]:
    """What each of the faults did, from when it began until its end was noticed."""
    directory, found = tmp_path_factory.mktemp("answers"), {name: ReapResult() for name in FAULTS}
    with ExitStack() as stack:
        scenes = {
            name: stack.enter_context(Scene(agent, directory / str(number), f"web-{number}", registered=False))
            for number, name in enumerate(FAULTS)
        }
        repair(scenes.values(), within=60)
        for name, scene in scenes.items():
            scene.strike(FAULTS[name][0])

        def noticed() -> bool:
            for name, scene in scenes.items():
                found[name].troubles |= set() if scene.worker.registered else {scene.trouble}
            return all(outcome.troubles - {""} for outcome in found.values())

        wait_until(noticed, within=60, what="every worker in trouble", every=0.2)
        for scene in scenes.values():
            scene.proxy.fault = NONE
        repair(scenes.values(), within=60)
        for name, scene in scenes.items():
            found[name].warnings, found[name].messages = scene.warnings, scene.messages
        stop([scene.worker for scene in scenes.values()])
    return found


@pytest.mark.parametrize("name", FAULTS)
def test_fault(outcomes: dict[str, ReapResult], name: str) -> None:
    """What goes wrong is one line that names it; when it is over, the lost entry is there again."""
    outcome = outcomes[name]
    assert any(re.search(FAULTS[name][1], trouble) for trouble in outcome.troubles), outcome
    assert 1 <= len(outcome.warnings) <= 2, outcome
    assert len(outcome.messages) <= 6, outcome
    assert all("CONSUL_HTTP_ADDR" in line for line in outcome.warnings), outcome
    assert all(len(line) < 600 and line.isprintable() for line in outcome.messages), outcome


@pytest.fixture(scope="module")
def hiccups(agent: Consul, short_module: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Scene]]:
    """Workers whose blocking read fails, while the agent answers all else."""
    directory = tmp_path_factory.mktemp("hiccups")
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(Scene(agent, directory / str(number), f"hiccup-{number}", fault=fault))
            for number, (name, fault) in enumerate(HICCUPS.items())
        }


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name in {"hang", "reset"} else ()) for name in HICCUPS]
)
def test_blocking_read_fails(hiccups: dict[str, Scene], name: str) -> None:
    """Where the blocking read alone fails, the worker polls instead, and seldom tries it again."""
    scene = hiccups[name]

    def polls() -> bool:
        watched, read = len(scene.proxy.asked(WATCH)), len(scene.proxy.asked(READ))
        return read > watched + 4

    wait_until(polls, within=60, what="more polls than blocking reads")
    scene.lose()
    repair([scene])
    assert not scene.warnings


@pytest.mark.full
def test_blocking_read_again(scene: MakeScene, short_turns: None) -> None:
    """A blocking read that fails once is in use again at once, and one that failed often is tried again."""
    stage = scene(fault=Fault(match=WATCH, answer=answer(500)))
    wait_until(lambda: len(stage.proxy.asked(WATCH)) == 2, within=30, what="two blocking reads")
    stage.proxy.fault = NONE
    wait_until(lambda: len(stage.proxy.asked(WATCH)) > 3, within=60, what="blocking reads")
    stage.proxy.drop()
    since = time.monotonic()
    wait_until(lambda: len(stage.proxy.asked(WATCH, since=since)) > 1, within=20, what="one more at once")


def test_bearable(scene: MakeScene, bystanders: None) -> None:
    """An agent that is slow, but within the deadline, is as good as any."""
    stage = scene(fault=Fault(delay=0.2))
    stage.lose()
    repair([stage])
    assert not stage.warnings


def test_deregistration_refused(consul: Consul, tmp_path: Path) -> None:
    """A deregistration that the agent refuses to the end is one line that tells its status."""
    with ExitStack() as stack:
        scenes = {}
        for status, body in STATUSES.items():
            fault = Fault(match=DEREGISTER, answer=answer(status, body))
            scenes[status] = stack.enter_context(Scene(consul, tmp_path / str(status), f"web-{status}", fault=fault))
        stop([scene.worker for scene in scenes.values()])
        for status, scene in scenes.items():
            assert scene.entry
            assert len(scene.warnings) == 1
            assert re.search(rf"may still be registered: .* answered {status}: ", scene.warnings[0])
            tries = len(scene.proxy.asked(DEREGISTER))
            assert tries > 1 if status in PASSING else tries == 1


@pytest.mark.parametrize(
    "fault",
    [
        *(Fault(match=DEREGISTER, answer=answer(status)) for status in sorted(PASSING)),
        Fault(answer=answer(500)),
        Fault(match=DEREGISTER, reset_after=0),
        Fault(refuse=True),
    ],
    ids=["429", "500", "503", "500 on all", "reset", "refused"],
)
def test_deregistration_late(scene: MakeScene, fault: Fault) -> None:
    """A deregistration that cannot be just now is tried again while there is time."""
    stage = scene(stop_timeout=20)
    stage.proxy.fault = fault
    with ThreadPoolExecutor() as pool:
        stopping = pool.submit(stage.worker.stop)
        since = time.monotonic()
        if not fault.refuse:
            wait_until(lambda: len(stage.proxy.asked("", since=since)) > 3, within=20, what="some tries")
        stage.proxy.fault = NONE
        stopping.result(30)
    assert stage.entry is None
    assert not [line for line in stage.warnings if "may still be registered" in line]


def test_memory(consul: Consul, tmp_path: Path) -> None:
    """Neither 256 MiB in a gzip, nor 32 MB in the plain, make the worker grow by much."""
    with Proxy(consul.url) as proxy, Fleet({"shop": 1}, directory=tmp_path, consul_http_addr=proxy.url) as fleet:
        wait_until(lambda: fleet.settled(consul), within=20, what="registered")
        before = fleet.peak
        for fault in (Fault(answer=bomb(256)), Fault(answer=answer(200, b" " * 32_000_000 + b"{}", JSON))):
            since = time.monotonic()
            proxy.fault = fault
            proxy.drop()
            wait_until(lambda: len(proxy.asked(READ, since=since)) > 1, within=20, what="some tries")  # noqa: B023
        proxy.fault = NONE
        assert fleet.peak - before < 16
        assert consul.call("/v1/agent/service/deregister/shop.web-1.0", method="PUT")[0] == 200
        wait_until(lambda: fleet.settled(consul), within=20, what="registered again")
        assert fleet.end() == [0]


def stop(workers: list[Worker]) -> None:
    """All at once."""
    with ThreadPoolExecutor(len(workers)) as pool:
        list(pool.map(Worker.stop, workers))
