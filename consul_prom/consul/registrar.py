"""Makes the agent hold the registration: compares what it has with what we want, repairs, and watches.

Level-triggered: the agent may lose or change the entry at any time (a restart, a reap, an operator), so every turn
looks at what is there. Where it can, the wait between turns is one blocking read, which ends within milliseconds of a
loss. https://developer.hashicorp.com/consul/api-docs/features/blocking#hash-based-blocking-queries
"""

import asyncio
import logging
import math
import random as randomness
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol, TypeVar

from consul_prom.consul.acl import write_rule
from consul_prom.consul.registration import Registration, check_difference, difference, is_ours
from consul_prom.errors import (
    AgentBusy,
    AgentConfused,
    AgentDenied,
    AgentError,
    AgentTimeout,
    EntryTaken,
    SlotError,
    TokenUnreadable,
)
from consul_prom.logs import ThrottledLogger

log = logging.getLogger(__name__)

Result = TypeVar("Result")
WATCHING_SLOTS: Final = 64
TURN: Final = 10.0
CHECKS: Final = 60.0
"""Seconds between looks at the check, which cost the agent a search through the checks of all its services."""
LOOK: Final = 0.5
RETRY: Final = 0.1
UNWATCHED: Final = 3600.0
UNASKED: Final = "has not asked the agent yet"
MOST_REPAIRS: Final = 5


class EntryLike(Protocol):
    """An entry: the agent's document, and the hash to wait on."""

    @property
    def document(self) -> Mapping[str, Any]: ...
    @property
    def content_hash(self) -> str: ...


class AgentAPI(Protocol):
    """What the registrar asks of an agent; every call raises AgentError and needs ``service:write`` at most."""

    async def register(self, document: Mapping[str, Any]) -> None: ...
    async def deregister(self, entry_id: str) -> bool: ...
    async def service(self, entry_id: str, *, content_hash: str = "", wait: float = 0) -> EntryLike | None: ...
    async def checks(self, entry_id: str) -> list[dict[str, Any]]: ...
    async def catalogued(self, name: str, entry_id: str, node: str) -> bool: ...
    async def deregister_from_catalogue(self, entry_id: str, node: str) -> None: ...
    @property
    def credentials(self) -> int: ...


class Registrar:
    """One entry's registrar. `registered` and `trouble` (a sentence, or "") say how it stands.

    *watch*: whether it may hold a connection for the blocking read. *intact*: whether the slot is still ours.
    *on_registration* and *on_failure* are told the reason, a short stable word.
    """

    def __init__(
        self,
        agent: AgentAPI,
        wanted: Registration,
        *,
        watch: bool = True,
        intact: Callable[[], bool] = lambda: True,
        on_registration: Callable[[str], None] = lambda _reason: None,
        on_failure: Callable[[str], None] = lambda _reason: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        random: Callable[[], float] = randomness.random,
    ) -> None:
        self._agent = agent
        self._wanted = wanted
        self._watch = watch
        self._intact = intact
        self._clock = clock
        self._sleep = sleep
        self._random = random
        self._on_registration = on_registration
        self._on_failure = on_failure
        self._log = ThrottledLogger(log, clock=clock)
        self._repairs: deque[float] = deque(maxlen=MOST_REPAIRS)
        self._missed = 0
        self._cut_off = False
        """Whether the last blocking read failed, and the agent has not answered since."""
        self._watch_from = -math.inf
        self._writing: asyncio.Future[None] | None = None
        self.asked = False
        """Whether the agent may hold the entry through us, or had it when we looked."""
        self._ever = False
        self._node = ""
        self._checks_at = -math.inf
        self._credentials: set[int] = set()  # the agent may hold the entry with any of these
        self.registered = False
        self.trouble = UNASKED

    async def run(self) -> None:
        """Turns, for ever.

        Raises:
            SlotError: the slot's file is no longer ours; the entry is deregistered.
        """
        delays: Iterator[float] | None = None
        seen: EntryLike | None = None
        while True:
            try:
                if not self._intact():
                    await self.deregister()
                    raise SlotError("the directory of the slots was emptied or replaced (CONSUL_PROM_DIR)")
                seen = await self.sync(seen)
                delays = None
                seen = await self._wait(seen)
            except AgentError as error:
                # The agent is down: no proxy ended the blocking read, and nobody undid our repairs.
                self._missed, self._cut_off = 0, False
                self._repairs.clear()
                if isinstance(error, AgentBusy):
                    self._watch_from = self._clock() + UNWATCHED
                self._failed(error)
                seen, delays = None, delays or backoff(self._clock, self._random)
                await self._sleep(next(delays))

    async def sync(self, seen: EntryLike | None = None) -> EntryLike:
        """One turn: compare, and repair what differs. Returns the entry, whose hash can be waited on.

        *seen* is the entry where it was read just now.

        Raises:
            EntryTaken: the ID is another live worker's, or not consul-prom's; nothing was changed.
            AgentError: the agent did not answer, or refused.
        """
        existing = seen or await self._agent.service(self._wanted.id)
        reason, words = await self._reason(existing)
        if existing is None or reason:
            self.registered = False
            await self._register(existing)
            existing = await self._agent.service(self._wanted.id)
            if existing is None:
                raise AgentConfused(
                    "the agent took it and has it not: CONSUL_HTTP_ADDR is no agent, or it is removed at once"
                )
            if self._foreign(existing.document):
                await self._respect(existing.document)  # another directory's worker was a moment later
            self._on_registration(reason)
            self._repairs.append(self._clock())
            place = self._wanted.address, self._wanted.port
            self._log.tell("registered %s at %s:%d%s", self._wanted.id, *place, words)
        self._succeeded()
        return existing

    async def deregister(self) -> bool:
        """Remove the entry if it is still ours; True if it was there. Idempotent; bounded by the client's deadlines.

        An agent that hangs, as its servers may make it do, is asked without a look: it does so when it can again.
        """
        if self._writing:
            await asyncio.gather(self._writing, return_exceptions=True)
        self.registered = False
        if not self.asked:
            return False
        with suppress(TimeoutError, AgentTimeout):
            async with asyncio.timeout(LOOK):
                existing = await self._agent.service(self._wanted.id)
                if existing is None or self._left_to_others(existing.document):
                    return False
                if not self._node:
                    await self._checks()
        was_there = await self._agent.deregister(self._wanted.id)
        await self._finish_in_catalogue()
        return was_there

    async def _finish_in_catalogue(self) -> None:
        """An agent without a right of its own says yes to a deregistration, and leaves the catalogue as it is."""
        found = False
        try:
            found = bool(self._node) and await self._agent.catalogued(self._wanted.name, self._wanted.id, self._node)
            if found:
                await self._agent.deregister_from_catalogue(self._wanted.id, self._node)
        except AgentError as error:
            if not found and not isinstance(error, AgentDenied):
                log.debug("the catalogue cannot be read", exc_info=True)
                return
            log.warning(
                "the catalogue keeps %s, though the agent has dropped it: %s; give the agent of node %s a token of its "
                "own (acl.tokens.agent) with node:write",
                *(self._wanted.id, error, self._node),
            )

    async def _reason(self, existing: EntryLike | None) -> tuple[str, str]:
        """Why to register, as a label, and in words for the log; ("", "") where all is as wanted."""
        if existing is None:
            return ("lost", ", which the agent had lost") if self._ever else ("start", "")
        field = difference(self._wanted, existing.document)
        if field and self._foreign(existing.document):
            await self._respect(existing.document)
        self.asked = True
        if field is None and self._clock() >= self._checks_at:
            field = check_difference(self._wanted, await self._checks())
            self._checks_at = self._clock() + (0 if field else CHECKS * (0.8 + 0.4 * self._random()))
        if field:
            return "changed" if self._ever else "start", f"; the entry differed in {field}"
        if self._credentials - {self._agent.credentials}:
            # The agent keeps the token of a registration, to tell the catalogue of its checks.
            return "token", ", with a new token"
        return "", ""

    async def _register(self, existing: EntryLike | None) -> None:
        """A write that was begun is ended, even if we are cancelled: cut off half-way it might take effect later."""
        self.asked = True
        credentials = self._agent.credentials
        self._credentials.add(credentials)
        document = self._wanted.document()
        if existing and self._of_another(existing.document) and _fails(await self._checks()):
            # The agent keeps a check's status, by which we would be dead until it runs; a check that is gone has none.
            await self._write({**document, "Check": None})
        await self._write(document)
        self._credentials = {credentials}

    async def _write(self, document: Mapping[str, Any]) -> None:
        self._writing = asyncio.ensure_future(self._agent.register(document))
        await asyncio.shield(self._writing)

    async def _checks(self) -> list[dict[str, Any]]:
        checks = await self._agent.checks(self._wanted.id)
        self._node = next((check["Node"] for check in checks if "Node" in check), "")
        return checks

    def _foreign(self, document: Mapping[str, Any]) -> bool:
        """Not of our directory: then the slot's lock says nothing of whether its process lives."""
        return not is_ours(document) or document["Meta"].get("dir") != self._wanted.meta["dir"]

    def _left_to_others(self, document: Mapping[str, Any]) -> bool:
        """Foreign, or, where only the lock files were wiped, the next process': it has our slot by now."""
        return self._foreign(document) or (not self._intact() and self._of_another(document))

    def _of_another(self, document: Mapping[str, Any]) -> bool:
        meta = document.get("Meta") or {}
        return any(meta.get(key) != self._wanted.meta.get(key) for key in ("dir", "pid", "proc"))

    async def _respect(self, document: Mapping[str, Any]) -> None:
        self.asked = False  # what is there now is not ours to remove
        if not is_ours(document):
            raise EntryTaken(f"the ID {self._wanted.id} belongs to an entry that is not ours: set CONSUL_PROM_HOST")
        if not _fails(await self._agent.checks(self._wanted.id)):
            raise EntryTaken(f"the ID {self._wanted.id} belongs to {self._rival(document['Meta'])}")

    def _rival(self, meta: Mapping[str, str]) -> str:
        """Name the process that has our ID from another directory, and what ends that."""
        pid, directory, ours = meta.get("pid"), str(meta.get("dir")), self._wanted.meta
        place, system = directory.partition(":")[2], str(meta.get("proc")).rpartition(".")[0]  # boot and pid namespace
        if system and (place, system) == (ours["dir"].partition(":")[2], ours["proc"].rpartition(".")[0]):
            return (
                f"pid {pid}, which has it from before {place} was emptied or replaced (CONSUL_PROM_DIR): "
                "retrying until that process gives it up or fails its check"
            )
        return f"pid {pid} of another directory ({directory}): set CONSUL_PROM_HOST so that the two differ"

    async def _wait(self, entry: EntryLike) -> EntryLike | None:
        """Until it is time to look again: the entry has changed, or the time is over. The entry if that has read it."""
        turn, begun = TURN * (0.8 + 0.4 * self._random()), self._clock()
        if self._cut_off:
            self._count_missed(turn)
        if not self._watch or begun < self._watch_from or self._embattled(begun):
            await self._sleep(turn)
            return None
        try:
            seen = await self._agent.service(self._wanted.id, content_hash=entry.content_hash, wait=turn)
        except AgentBusy:
            self._watch_from = self._clock() + UNWATCHED
            await self._sleep(turn)
            return None
        except AgentError as error:
            self._on_failure(error.reason)
            self._cut_off = True
            return None  # without a pause, in which an agent could restart unseen
        self._missed = 0
        if seen and seen.content_hash == entry.content_hash and self._clock() - begun < turn / 2:
            await self._sleep(0.5 + self._random())  # an agent that shuts down ends the wait early
            return None
        return seen

    def _count_missed(self, turn: float) -> None:
        """Poll for a while if blocking reads fail again and again, and the agent answers right after each of them.

        Then a proxy has less patience, or spares us no connection that we could hold. An agent that restarts refuses
        connections for 0.1 s at least.
        """
        self._cut_off = False
        self._missed += 1
        if self._missed > 1:
            self._watch_from = self._clock() + min(turn * 2 ** min(self._missed, 10), UNWATCHED)

    def _embattled(self, now: float) -> bool:
        """Whether somebody undoes our repairs as fast as we make them: neither shall keep the agent busy with that."""
        return len(self._repairs) == MOST_REPAIRS and now - self._repairs[0] < TURN

    def _succeeded(self) -> None:
        self._log.over("%s is registered again", self._wanted.id)
        self._ever = self.registered = True
        self.trouble = ""

    def _failed(self, error: AgentError) -> None:
        self.registered = False
        self.trouble = str(error)
        self._on_failure(error.reason)
        denied = isinstance(error, AgentDenied) and not isinstance(error, TokenUnreadable)
        hint = f"; the token needs the rule: {write_rule(self._wanted.name)}" if denied else ""
        self._log.failed("%s is not registered: %s%s", self._wanted.id, error, hint, reason=error.reason)


def _fails(checks: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a check is critical because it ran: in an agent that has restarted all are so until then."""
    return any(check.get("Status") == "critical" and check.get("Output") for check in checks)


def backoff(clock: Callable[[], float], random: Callable[[], float]) -> Iterator[float]:
    """Seconds to wait before each next try: random at first, up to 2 s in the first minute, then up to 15 s."""
    begun, delay = clock(), 0.25
    yield random()
    while True:
        cap = 2.0 if clock() - begun < 60 else 15.0
        delay = min(delay * 2, cap)
        yield delay * (0.5 + random() / 2)
