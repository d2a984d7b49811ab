"""How soon a worker is registered again after each kind of fault, and what it logs: real Consul, a proxy before it.

    python -m tests.bench.faults [rounds]

Seconds from the end of the fault to the entry's return, and lines a round. The worker watches unless "polls" is said.
A fault lasts until the worker has noticed it, and at least a second.
"""

import logging
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.scene import LOGGER, READ, REGISTER, WATCH, Document, Scene, repair
from tests.services.consul import Consul
from tests.services.proxy import NONE, Fault, answer, bomb
from tests.services.waiting import wait_until

LONG = 70.0
"""Seconds of an outage that is longer than a minute."""


@dataclass(frozen=True, slots=True)
class Case:
    """A fault: its name, how it is made, how it begins and how it ends."""

    name: str
    how: str
    begin: Callable[[Scene], None]
    end: Callable[[Scene], None]
    dev: bool = True
    noticed: bool = True
    lasts: float = 1.0
    polls: bool = False


def proxied(name: str, how: str, fault: Fault, **more: Any) -> Case:
    """What the proxy does to a worker whose entry gets lost at the same time."""

    def end(scene: Scene) -> None:
        scene.proxy.fault = NONE

    return Case(name, f"proxy: {how}", lambda scene: scene.strike(fault), end, **more)


def edit(name: str, **changes: Any) -> Case:
    def begin(scene: Scene) -> None:
        entry = scene.entry
        assert entry
        kept = {key: entry[key] for key in ("Address", "Port", "Tags", "Meta")}
        put(scene, {"ID": entry["ID"], "Name": entry["Service"], **kept, **changes})

    return Case(name, "PUT register by somebody", begin, nothing, noticed=False, lasts=0)


def edit_check(scene: Scene) -> None:
    """After the worker's first look at its check, so that the time is that to the next one."""
    wait_until(lambda: scene.proxy.asked("^GET /v1/agent/checks"), within=40, what="a look at the check")
    rest(scene, polls=False)
    edit("", Check={"TCP": "127.0.0.1:1", "Interval": "1h", "Status": "passing"}).begin(scene)


def put(scene: Scene, body: Document) -> None:
    path = "/v1/agent/service/register?replace-existing-checks=true"
    assert scene.consul.call(path, method="PUT", body=body)[0] == 200


def nothing(_scene: Scene) -> None:
    pass


def kill(scene: Scene) -> None:
    scene.consul.kill()


def start(scene: Scene) -> None:
    scene.consul.start()


def pause(scene: Scene) -> None:
    scene.consul.pause()


def resume(scene: Scene) -> None:
    scene.consul.resume()


def absent(scene: Scene) -> None:
    """As at the worker's birth."""
    scene.worker.stop()
    scene.consul.kill()
    scene.worker.start()


def cases() -> list[Case]:
    """The table's rows; the long ones last."""
    lose = "PUT deregister by somebody"
    return [
        Case("agent absent at the start", "kill -9, then start of the worker", absent, start),
        Case("agent killed, all lost", "kill -9, -dev", kill, start),
        Case("agent killed, entries kept", "kill -9, data directory", kill, start, dev=False),
        Case("agent stands still", "SIGSTOP, SIGCONT", pause, resume),
        Case("entry deregistered", lose, Scene.lose, nothing, noticed=False, lasts=0),
        Case("entry deregistered, polls", lose, Scene.lose, nothing, noticed=False, lasts=0, polls=True),
        edit("other tags", Tags=["edited"]),
        edit("other port", Port=1),
        Case("other check", "PUT register by somebody", edit_check, nothing, noticed=False, lasts=0),
        proxied("refused", "listener closed, connections reset", Fault(refuse=True)),
        proxied("hangs", "requests are swallowed", Fault(hang=True)),
        proxied("half-open", "nothing passes on old connections, for ever", Fault(cut=True)),
        proxied("slow, 7 s", "answers come late", Fault(delay=7)),
        proxied("slow, 20 bytes/s", "answers drip", Fault(rate=20)),
        proxied("reset in the body", "RST after 400 bytes", Fault(reset_after=400)),
        proxied("HTML", "200 with a page", Fault(answer=answer(200, "<html>proxy</html>"))),
        proxied("redirect", "307", Fault(answer=answer(307, "", {"Location": "/ui/"}))),
        proxied("wrong JSON", "a list", Fault(answer=answer(200, "[{}]"))),
        proxied("10 MB", "10 MB of x", Fault(answer=answer(200, "x" * 10_000_000))),
        proxied("gzip bomb", "256 MiB in a gzip", Fault(answer=bomb(256))),
        *(
            proxied(f"{status} on {name}", f"status {status}", Fault(match=match, answer=answer(status)))
            for status in (400, 403, 404, 429, 500, 503)
            for name, match in (("read", READ), ("register", REGISTER))
        ),
        proxied("429 on the blocking read", "status 429", Fault(match=WATCH, answer=answer(429)), noticed=False),
        Case(f"agent killed for {LONG:.0f} s, all lost", "kill -9, -dev", kill, start, lasts=LONG),
        proxied(f"hangs for {LONG:.0f} s", "requests are swallowed", Fault(hang=True), lasts=LONG),
    ]


def measure(case: Case, rounds: int) -> tuple[list[float], list[int]]:
    """Times to repair and lines of each round, on a new agent and worker each."""
    times, lines = [], []
    for _ in range(rounds):
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            consul = stack.enter_context(Consul(dev=case.dev))
            scene = stack.enter_context(Scene(consul, directory))
            if case.polls:
                life = scene.worker._life
                assert life
                assert life.tenancy._registrar
                life.tenancy._registrar._watch = False
                scene.lose()
                repair([scene])
            rest(scene, polls=case.polls)
            before = len(scene.lines)
            case.begin(scene)
            if case.noticed:
                notice(scene)
            last(case.lasts)
            case.end(scene)
            times.append(repair([scene], within=100)[scene])
            lines.append(len(scene.lines) - before)
    return times, lines


def rest(scene: Scene, *, polls: bool) -> None:
    """Until the worker waits for a change, or for its next poll."""
    question = READ if polls else WATCH
    wait_until(lambda: re.search(question, scene.proxy.requests[-1].line), within=40, what="at rest")


def notice(scene: Scene) -> None:
    wait_until(lambda: not scene.worker.registered, within=60, what="noticed", every=0.01)


def last(seconds: float) -> None:
    begun = time.monotonic()
    wait_until(lambda: time.monotonic() - begun >= seconds, within=seconds + 5, what="the fault's time")


def main(rounds: int) -> None:
    """Print the table."""
    LOGGER.setLevel(logging.INFO)
    print(f"{'fault':34}{'how it is made':46}{'median':>8}{'worst':>8}{'n':>4}{'lines':>7}")
    for case in cases():
        n = rounds if case.lasts < LONG else min(rounds, 3)
        times, lines = measure(case, n)
        figures = f"{statistics.median(times):8.2f}{max(times):8.2f}{n:4}{max(lines):7}"
        print(f"{case.name:34}{case.how:46}{figures}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
