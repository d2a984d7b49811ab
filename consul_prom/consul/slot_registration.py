"""A slot and its registration: a worker holds both, and gives them up together."""

import asyncio
import logging
import random as randomness
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from consul_prom.consul.registrar import RETRY, UNASKED, WATCHING_SLOTS, AgentAPI, Registrar, Result, backoff
from consul_prom.consul.registration import Registration, entry_id
from consul_prom.consul.sync_client import deregister_sync
from consul_prom.errors import (
    AgentBusy,
    AgentError,
    AgentFailed,
    AgentUnreachable,
    ConsulPromError,
    EndpointError,
    SlotError,
)
from consul_prom.logs import ThrottledLogger
from consul_prom.settings.settings import Settings
from consul_prom.slots.slots import Slot, acquire

log = logging.getLogger(__name__)


class SlotRegistration:
    """A process in its slot, registered. If the directory of the slots is wiped, the process moves to a new slot.

    `slot` is None until `enter` succeeds. `left` says whether the entry was deregistered, or that this was tried for as
    long as there was time.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        on_registration: Callable[[str], None] = lambda _reason: None,
        on_failure: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self.slot: Slot | None = None
        self.left = False
        self._leaving = threading.RLock()  # a signal handler may come in between
        self._settings = settings
        self._on_registration = on_registration
        self._on_failure = on_failure
        self._registrar: Registrar | None = None
        self._before = ""
        self._log = ThrottledLogger(log)

    @property
    def instance(self) -> str:
        return f"{self._settings.host}:{self.slot.number}" if self.slot else self._settings.host

    @property
    def entry_id(self) -> str:
        assert self.slot  # noqa: S101  # nothing is registered without
        return entry_id(self._settings.service, self._settings.host, self.slot.number)

    @property
    def registered(self) -> bool:
        return bool(self._registrar and self._registrar.registered)

    @property
    def unasked(self) -> bool:
        """Whether the agent has not said yet if we may be registered."""
        return not self.left and (self._registrar is None or self._registrar.trouble == UNASKED)

    @property
    def trouble(self) -> str:
        """Why it is not registered, as a sentence."""
        if self._before and self.unasked:
            return self._before
        return self._registrar.trouble if self._registrar else "the address is not known yet"

    def set_trouble(self, error: ConsulPromError) -> None:
        """Let `trouble` be *error* until the registrar has asked the agent."""
        self._before = str(error)

    def enter(self, *, prefer: int = 0) -> Slot:
        """Take a slot; raises SlotError."""
        self.slot = acquire(self._settings.dir, self._settings.service, prefer=prefer)
        return self.slot

    async def persist(self, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """Repeat *attempt*, as the agent is asked again, until it raises neither SlotError nor EndpointError."""
        delays = backoff(time.monotonic, randomness.random)
        while True:
            self._before = ""
            try:
                result = await attempt()
            except (SlotError, EndpointError) as error:
                self.set_trouble(error)
                self._log.failed("Cannot serve %s: %s. Retrying.", self._settings.service, error, reason=str(error))
                await asyncio.sleep(next(delays))
            else:
                self._log.over("%s can be served again", self._settings.service)
                return result

    async def run(self, agent: AgentAPI, describe: Callable[[Slot], Registration]) -> None:
        """Stay registered, until cancelled; *describe* makes the registration for a slot."""
        prefer = 0
        while True:
            slot = self.slot
            if slot is None:
                slot = await self.persist(partial(self._enter_again, prefer))
            wanted, prefer = describe(slot), slot.number
            self._registrar = Registrar(
                agent,
                wanted,
                watch=slot.number < WATCHING_SLOTS,
                intact=lambda: bool(self.slot and self.slot.intact),
                on_registration=self._on_registration,
                on_failure=self._on_failure,
            )
            try:
                await self._registrar.run()
            except SlotError as error:
                log.error("%s gives up its slot: %s; it starts again in a new one", wanted.id, error)
                slot.release()
                self.slot = self._registrar = None

    async def _enter_again(self, prefer: int) -> Slot:
        return self.enter(prefer=prefer)

    async def leave(self, timeout: float) -> None:
        """Deregister, after `run` was cancelled, or say in one line that the entry is left over."""
        trouble: Exception = TimeoutError()
        try:
            async with asyncio.timeout(timeout):
                while not self.left:
                    try:
                        if self._registrar and await self._registrar.deregister():
                            log.info("deregistered %s", self.entry_id)
                        # If it did not ask, the slot's last worker may have left an entry.
                        if self.slot and self._registrar and self._registrar.asked:
                            self.slot.settle()
                        self.left = True  # last: the caller then releases the slot
                    except (AgentBusy, AgentFailed, AgentUnreachable) as error:
                        trouble = error  # which may pass while there is time
                        await asyncio.sleep(RETRY)
        except TimeoutError:
            self.left_over(trouble)
        except asyncio.CancelledError:
            self.left_over(trouble)
            raise
        except AgentError as error:
            self.left_over(error)

    def leave_now(self, timeout: float, *, hosts: Sequence[str]) -> None:
        """`leave` without an event loop, because it does not answer or has ended; *hosts*: the agent's addresses."""
        try:
            if self._registrar and self._registrar.asked:
                deregister_sync(self._settings, self.entry_id, timeout=timeout, hosts=hosts)
                self.left = True  # or the loop, if it goes on, would remove the entry of the slot's next worker
        except AgentError as error:
            self.left_over(error)

    def left_over(self, error: Exception) -> None:
        """Say so, once, and leave the entry to the sweep, for which a process that lives on would be alive."""
        with self._leaving:  # the metrics thread's deadline and the caller's may end together
            if not self.left:
                if self.slot:
                    self.slot.abandon()
                    tell_left_over(self.entry_id, error)
                self.left = True  # last: the caller then releases the slot


def tell_left_over(entry_id: str, error: Exception) -> None:
    """What went wrong with its deregistration, and what to do."""
    why = str(error) or "the agent did not answer within CONSUL_PROM_STOP_TIMEOUT"
    log.warning("%s may still be registered: %s; `consul-prom deregister --id %s` removes it", entry_id, why, entry_id)
