"""A page that is not this process' own, as a target of its own: own ID and instance, socket, and registrar."""

import asyncio
import socket
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from consul_prom.consul.registrar import AgentAPI, Registrar
from consul_prom.consul.registration import Registration
from consul_prom.consul.slot_registration import tell_left_over
from consul_prom.errors import AgentError
from consul_prom.server.endpoint import Endpoint

MOMENT: Final = 0.05


class Serving(Protocol):
    """Makes an endpoint whose page for people shows what *about* tells."""

    def __call__(self, *, about: Callable[[], Mapping[str, str]]) -> Endpoint: ...


class ServedTarget:
    """Lives in the metrics thread from `start` to `give_up` or `retire`, one of which must come.

    *intact* tells whether what gives us the right to the ID is still ours; *serving* makes its endpoint.
    """

    def __init__(
        self,
        agent: AgentAPI,
        wanted: Registration,
        listener: socket.socket,
        *,
        intact: Callable[[], bool],
        serving: Serving,
    ) -> None:
        self._wanted = wanted
        self._listener = listener
        # An idle connection of the agent's 200 is the workers' own; a guest polls.
        self._registrar = Registrar(agent, wanted, watch=False, intact=intact)
        self._endpoint = serving(about=self._about)
        self._registering: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._endpoint.serve(self._listener)
        self._registering = asyncio.create_task(self._registrar.run())

    async def give_up(self) -> None:
        """At once: the ID is another process' from now on, and the entry is left to it."""
        if self._registering:
            self._registering.cancel()
            await asyncio.gather(self._registering, return_exceptions=True)
        await self._endpoint.aclose(grace=MOMENT)
        self._listener.close()

    async def retire(self, timeout: float) -> bool:
        """The same, and the entry is removed before; False where an entry may be left after *timeout* seconds."""
        if self._registering:
            self._registering.cancel()
        try:
            async with asyncio.timeout(timeout):
                await self._registrar.deregister()
        except (TimeoutError, AgentError) as error:
            tell_left_over(self._wanted.id, error)
            return False
        except asyncio.CancelledError:
            tell_left_over(self._wanted.id, TimeoutError())
            raise
        finally:
            await self.give_up()
        return self._registrar.asked  # if it never asked, another's entry may be there

    def _about(self) -> dict[str, str]:
        return {
            "service": self._wanted.meta["service"],
            "instance": self._wanted.instance,
            "pid": self._wanted.meta["pid"],
            "registered": "yes" if self._registrar.registered else f"no: {self._registrar.trouble}",
        }
