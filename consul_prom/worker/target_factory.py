"""How this process is reached: its address, what listens there, and what is registered of it."""

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

from prometheus_client import CollectorRegistry

from consul_prom import __version__
from consul_prom.consul.client import AgentClient
from consul_prom.consul.registration import Registration, build, origin
from consul_prom.errors import EndpointError
from consul_prom.exposition.renderer import Renderer
from consul_prom.ledger.registry import LedgerRegistry
from consul_prom.server.bind import listen
from consul_prom.server.endpoint import Endpoint
from consul_prom.server.listener import Connections
from consul_prom.server.web_config import WebConfig
from consul_prom.settings.settings import Settings
from consul_prom.slots.slots import Slot
from consul_prom.worker.target import ServedTarget


class TargetFactory:
    """One address, and a port for each slot that is served there: the worker's own, and those of guests."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError where the web-config file is wrong."""
        self._settings = settings
        self._web = WebConfig(settings.web_config) if settings.web_config else None
        self._connections = Connections()
        self._pid = os.getpid()
        self._address = ""

    def settle(self, address: str | None) -> None:
        """Be at *address* from now on."""
        if address is None:
            raise EndpointError("this host has no default route to tell its address by: set CONSUL_PROM_ADDRESS")
        self._address = address

    def listen(self, slot: int, *, before: int = 0) -> socket.socket:
        """On a port for *slot*: on the one *before* where any will do, since scrapers know it."""
        ports, address = self._settings.port.candidates(slot), self._settings.bind or self._address
        if before and ports == [0]:
            with suppress(EndpointError):  # taken, or below 1024 and set by one who had the right
                return listen(address, [before])
        return listen(address, ports)

    def url(self, listener: socket.socket) -> str:
        return f"{origin(self._address, _port(listener), scheme=self._scheme)}/metrics"

    def endpoint(
        self,
        registry: CollectorRegistry | LedgerRegistry,
        *,
        about: Callable[[], Mapping[str, str]],
        on_scrape: Callable[[float], None] = lambda _seconds: None,
    ) -> Endpoint:
        return Endpoint(
            render=Renderer(registry).render,
            about=about,
            on_scrape=on_scrape,
            allow=self._settings.allow,
            web=self._web,
            connections=self._connections,
        )

    def registration(self, slot: Slot, listener: socket.socket, *, adopted: bool = False) -> Registration:
        return build(
            self._settings,
            slot=slot,
            address=self._address,
            port=_port(listener),
            version=__version__,
            pid=self._pid,
            scheme=self._scheme,
            tcp_check=bool(self._web and self._web.requires_certificate),
            adopted=adopted,
        )

    async def receive(
        self, client: AgentClient, slot: Slot, registry: CollectorRegistry, *, port: int = 0, adopted: bool = False
    ) -> ServedTarget:
        """A guest in *slot*, on a socket of its own; *port* is where the slot was served before."""
        listener = self.listen(slot.number, before=port)
        guest = ServedTarget(
            client,
            self.registration(slot, listener, adopted=adopted),
            listener,
            intact=lambda: slot.intact,
            serving=partial(self.endpoint, registry),
        )
        await guest.start()
        return guest

    @property
    def _scheme(self) -> str:
        return self._web.scheme if self._web else "http"


def _port(listener: socket.socket) -> int:
    port: int = listener.getsockname()[1]
    return port
