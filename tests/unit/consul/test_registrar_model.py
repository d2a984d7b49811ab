"""Any order of register, loss, edit, fault, time and stop ends in the promised state: virtual time, the agent's state.

Two workers of one host name and of two directories want the same ID, which P3 allows to one of them at a time.
"""

import asyncio
import heapq
import itertools
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from consul_prom.consul.registrar import Registrar
from consul_prom.consul.registration import MARKER, Registration, check_difference, difference, is_ours
from consul_prom.devagent import definition, documents
from consul_prom.devagent.documents import Node
from consul_prom.devagent.state import State
from consul_prom.errors import AgentBusy, AgentDenied, AgentError, AgentFailed, AgentTimeout, AgentUnreachable

ID = "shop.web-1.0"
NODE = Node("node", "127.0.0.1")
CALL_TIMEOUT = 5.0
FAULTS: dict[str, Callable[[], AgentError]] = {
    "refused": lambda: AgentUnreachable("Connection refused"),
    "denied": lambda: AgentDenied("Permission denied"),
    "failed": lambda: AgentFailed("No cluster leader"),
    "busy": lambda: AgentBusy("too many concurrent connections"),
}


def registration(directory: str) -> Registration:
    meta = {**MARKER, "service": "shop", "instance": "web-1:0", "scheme": "http", "pid": "7", "dir": directory}
    port = 9100 + ord(directory)
    return Registration(ID, "shop-metrics", "127.0.0.1", port, ("consul-prom",), meta, 30, 5, 600, "/-/healthy")


def foreign() -> dict[str, Any]:
    return {"ID": ID, "Name": "somebody-else", "Address": "127.0.0.1", "Port": 1, "Meta": {"mine": "yes"}}


@dataclass(frozen=True)
class Entry:
    document: Mapping[str, Any]
    content_hash: str


class World:
    """Time that passes when it is told to, and an agent in it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.time = 1_000_000.0
        self.fault = ""
        self.takes_effect = False
        self.state = self.fresh()
        self._numbers = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._readers: set[asyncio.Future[None]] = set()

    def now(self) -> float:
        return self.time

    def fresh(self) -> State:
        return State(clock=self.now)

    async def sleep(self, seconds: float) -> None:
        future: asyncio.Future[None] = self.loop.create_future()
        heapq.heappush(self._sleepers, (self.time + max(seconds, 0), next(self._numbers), future))
        await future

    def settle(self) -> None:
        """Let everything run that does not wait for time."""

        async def spin() -> None:
            for _ in range(25):
                await asyncio.sleep(0)

        self.loop.run_until_complete(spin())

    def advance(self, seconds: float) -> None:
        end = self.time + seconds
        self.settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            self.time, _, future = heapq.heappop(self._sleepers)
            if not future.done():
                future.set_result(None)
            self.settle()
        self.time = end

    def changed(self) -> None:
        """Wake the blocking reads, as the agent does on any change."""
        for reader in self._readers:
            if not reader.done():
                reader.set_result(None)
        self.settle()

    def cut(self) -> None:
        """Break the connections of the blocking reads."""
        for reader in self._readers:
            if not reader.done():
                reader.set_exception(AgentUnreachable("Connection reset by peer"))
        self.settle()

    async def wait_for_change(self, seconds: float) -> None:
        reader: asyncio.Future[None] = self.loop.create_future()
        self._readers.add(reader)
        timer = asyncio.ensure_future(self.sleep(seconds))
        try:
            await asyncio.wait({reader, timer}, return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                reader.result()
        finally:
            timer.cancel()
            self._readers.discard(reader)


class Agent:
    """The registrar's AgentAPI over the state."""

    credentials = 0

    def __init__(self, world: World) -> None:
        self._world = world

    async def _call(self, effect: Callable[[], Any]) -> Any:
        world = self._world
        await asyncio.sleep(0)
        if world.fault == "hangs":
            if world.takes_effect:
                effect()
            await world.sleep(CALL_TIMEOUT)
            raise AgentTimeout("the agent did not answer")
        if world.fault:
            raise FAULTS[world.fault]()  # noqa: RSE102  # a function that makes one
        return effect()

    async def register(self, document: Mapping[str, Any]) -> None:
        def effect() -> None:
            existing = self._world.state.services.get(ID)
            assert existing is None or existing.meta.get("mine") != "yes", "an entry that is not ours was overwritten"
            parsed = definition.parse(json.dumps(document).encode())
            self._world.state.register(parsed, replace_existing_checks=True)
            for reader in self._world._readers:
                if not reader.done():
                    reader.set_result(None)

        await self._call(effect)

    async def deregister(self, entry_id: str) -> bool:
        def effect() -> bool:
            found = entry_id in self._world.state.services
            if found:
                assert self._world.state.services[entry_id].meta.get("mine") != "yes", "a foreign entry was removed"
                self._world.state.deregister(entry_id)
            return found

        return bool(await self._call(effect))

    async def service(self, entry_id: str, *, content_hash: str = "", wait: float = 0) -> Entry | None:
        def read() -> Entry | None:
            found = self._world.state.services.get(entry_id)
            return Entry(documents.service(found), documents.content_hash(found)) if found else None

        entry = await self._call(read)
        if content_hash and entry and entry.content_hash == content_hash:
            await self._world.wait_for_change(wait)
            entry = await self._call(read)
        return entry  # type: ignore[no-any-return]

    async def checks(self, entry_id: str) -> list[dict[str, Any]]:
        def read() -> list[dict[str, Any]]:
            return [documents.agent_check(NODE, check) for check in self._world.state.checks_of(entry_id)]

        return await self._call(read)  # type: ignore[no-any-return]

    async def catalogued(self, name: str, entry_id: str, node: str) -> bool:
        return bool(await self._call(lambda: False))

    async def deregister_from_catalogue(self, entry_id: str, node: str) -> None:
        raise AssertionError("nothing is left in the catalogue")


class Registering(RuleBasedStateMachine):
    """Rules are what may happen; `quiet` is what must hold when nothing happens any more."""

    @initialize(watch=st.booleans(), luck=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=5))
    def begin(self, watch: bool, luck: list[float]) -> None:  # noqa: FBT001
        self.world = World()
        self.luck = itertools.cycle(luck)
        self.watch = watch
        self.workers: dict[str, tuple[Registrar, asyncio.Task[None]]] = {}
        self.start("a")

    @rule(directory=st.sampled_from("ab"))
    def start(self, directory: str) -> None:
        """A worker of a directory starts, if it does not run."""
        if directory not in self.workers:
            world = self.world
            registrar = Registrar(
                Agent(world),
                registration(directory),
                watch=self.watch,
                clock=world.now,
                sleep=world.sleep,
                random=lambda: next(self.luck),
            )
            self.workers[directory] = registrar, world.loop.create_task(registrar.run())
            world.settle()

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        """A worker stops; if the agent answers, its entry is gone and nobody else's is.

        A worker that the agent never answered leaves the entry of its slot's last worker to the sweep.
        """
        directory = data.draw(st.sampled_from(sorted(self.workers)))
        registrar, _ = self.workers[directory]
        before = self.holder()
        self.leave(directory)
        if not self.world.fault:
            assert self.holder() != directory or not registrar.asked
            assert before in {directory, self.holder()} or self.holder() is not None

    @rule(fault=st.sampled_from([*FAULTS, "hangs"]), takes_effect=st.booleans())
    def fail(self, fault: str, takes_effect: bool) -> None:  # noqa: FBT001
        """The agent begins to fail; a call that hangs may take effect all the same."""
        self.world.fault, self.world.takes_effect = fault, takes_effect
        if fault == "refused":
            self.world.cut()

    @rule()
    def heal(self) -> None:
        """The agent answers again."""
        self.world.fault = ""

    @rule()
    def wipe(self) -> None:
        """The agent restarts, empty."""
        self.world.state = self.world.fresh()
        self.world.cut()

    @rule()
    def lose(self) -> None:
        """Somebody deregisters the entry."""
        if ID in self.world.state.services:
            self.world.state.deregister(ID)
            self.world.changed()

    @precondition(lambda self: self.holder() in {"a", "b"})
    @rule(what=st.sampled_from(["Tags", "Port", "Check", "Checks"]))
    def edit(self, what: str) -> None:
        """Somebody edits the entry."""
        document = registration(str(self.holder())).document()
        if what == "Tags":
            document["Tags"] = ["edited"]
        elif what == "Port":
            document["Port"] = 7
        elif what == "Check":
            document["Check"]["Interval"] = "77s"
        else:
            del document["Check"]
        self.world.state.register(definition.parse(json.dumps(document).encode()), replace_existing_checks=True)
        self.world.changed()

    @rule()
    def intrude(self) -> None:
        """Somebody who knows nothing of us takes the ID."""
        parsed = definition.parse(json.dumps(foreign()).encode())
        self.world.state.register(parsed, replace_existing_checks=True)
        self.world.changed()

    @precondition(lambda self: self.holder() in {"a", "b"} - set(self.workers))
    @rule()
    def sicken(self) -> None:
        """The agent finds that the process of an entry is dead."""
        for check in self.world.state.checks_of(ID):
            self.world.state.update_check(check.check_id, "critical", "connection refused")

    @rule(seconds=st.sampled_from([0.01, 1, 9, 70]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.world.advance(seconds)

    @rule()
    def quiet(self) -> None:
        """The faults end: within the longest wait, one live worker holds the ID as it wants it, and knows it."""
        self.world.fault = ""
        self.world.advance(120)
        holder = self.holder()
        knows = {directory for directory, (registrar, _) in self.workers.items() if registrar.registered}
        if holder == "foreign" or (holder in {"a", "b"} and holder not in self.workers):
            assert not knows
            return
        assert bool(holder) == bool(self.workers)
        assert knows == ({holder} if holder else set())
        if holder:
            wanted, found = registration(holder), self.world.state.services[ID]
            checks = [documents.agent_check(NODE, check) for check in self.world.state.checks_of(ID)]
            assert difference(wanted, documents.service(found)) is None
            assert check_difference(wanted, checks) is None

    @invariant()
    def nobody_died(self) -> None:
        """A registrar runs until it is stopped."""
        assert not any(task.done() for _, task in self.workers.values())

    def leave(self, directory: str) -> None:
        registrar, task = self.workers.pop(directory)
        task.cancel()
        world = self.world
        leaving = world.loop.create_task(_quietly(registrar))
        for _ in range(20):
            world.advance(CALL_TIMEOUT)
            if leaving.done():
                break
        assert leaving.done()
        world.loop.run_until_complete(asyncio.gather(task, return_exceptions=True))

    def holder(self) -> str | None:
        """Whose the entry is: the directory of a worker, or foreign."""
        found = self.world.state.services.get(ID)
        if found is None:
            return None
        return found.meta["dir"] if is_ours(documents.service(found)) else "foreign"

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.quiet()
        for directory in list(self.workers):
            self.leave(directory)
            assert self.holder() != directory
        self.world.loop.close()


async def _quietly(registrar: Registrar) -> None:
    with suppress(AgentError):
        await registrar.deregister()


TestRegistering = Registering.TestCase
TestRegistering.settings = settings(stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
