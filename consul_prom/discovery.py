"""For applications that serve their metrics with prometheus_async: its ServiceDiscovery protocol, with our registrar.

https://prometheus-async.readthedocs.io/en/stable/asyncio.html#service-discovery
"""

import asyncio
import ipaddress
import logging
import os
from contextlib import suppress
from typing import Final, Unpack

from prometheus_async.aio.web import MetricsHTTPServer
from prometheus_async.types import Deregisterer

from consul_prom import __version__
from consul_prom.address import find_address
from consul_prom.client import AgentClient
from consul_prom.errors import ConsulPromError, EndpointError, SettingsError
from consul_prom.registrar import Tenancy
from consul_prom.registration import Registration, build
from consul_prom.settings import Arguments, Settings, check_worker, load, switch
from consul_prom.slots import Slot, acquire

log = logging.getLogger(__name__)

CHEAP_PAGE: Final = "/"


class ConsulDiscovery:
    """Pass it as *service_discovery* to prometheus_async's ``start_http_server`` or ``start_http_server_in_thread``.

    Each server has a slot, so an entry of its own. It is registered in the background and stays so; an agent that is
    absent holds nothing up. A server on all interfaces is registered with the address that a worker would take.
    """

    def __init__(self, **arguments: Unpack[Arguments]) -> None:
        """Raises SettingsError where an argument is wrong. What is wrong in the environment is said by `register`."""
        self._required = switch("required", arguments)
        self._disabled = switch("disabled", arguments)
        self._settings: Settings | SettingsError
        try:
            self._settings = load(arguments)
        except SettingsError as error:
            if error.from_code:
                raise
            self._settings = error

    async def register(self, metrics_server: MetricsHTTPServer) -> Deregisterer | None:
        """Begin to register the server; the result deregisters it, within STOP_TIMEOUT.

        None, and one ERROR line, where that cannot be. With REQUIRED the error is raised instead, also if the server
        is not registered within START_TIMEOUT.
        """
        try:
            return await self._register(metrics_server)
        except ConsulPromError as error:
            if self._required:
                raise
            log.error("the metrics server is not registered: %s", error)
            return None

    async def _register(self, metrics_server: MetricsHTTPServer) -> Deregisterer | None:
        settings = self._settings
        if self._disabled:
            return None
        if isinstance(settings, SettingsError):
            raise settings
        check_worker(settings)
        slot = acquire(settings.dir, settings.service)
        tenancy, client = Tenancy(settings, slot), AgentClient(settings)
        task = asyncio.create_task(_stay(settings, tenancy, client, metrics_server))

        async def deregister() -> None:
            task.cancel()
            await tenancy.leave(settings.stop_timeout)
            await client.aclose()
            tenancy.slot.release()

        if settings.required:
            try:
                await _registered(tenancy, task, settings.start_timeout)
            except EndpointError:
                await deregister()
                raise
        return deregister


async def _stay(settings: Settings, tenancy: Tenancy, client: AgentClient, server: MetricsHTTPServer) -> None:
    try:
        address, port = await _place(settings, client, server)

        def describe(slot: Slot) -> Registration:
            return build(
                settings,
                slot=slot,
                address=address,
                port=port,
                version=__version__,
                pid=os.getpid(),
                scheme="https" if server.https else "http",
                health_path=CHEAP_PAGE,
            )

        await tenancy.run(client, describe)
    except ConsulPromError as error:
        log.error("the metrics server is not registered: %s", error)


async def _place(settings: Settings, client: AgentClient, server: MetricsHTTPServer) -> tuple[str, int]:
    """Address and port to register.

    A server on all interfaces has a socket, and mostly a port, for each address family, and `socket` is any of them.
    """
    sockets = [(str(address), int(port)) for address, port, *_ in server._runner.addresses]  # noqa: SLF001
    bound = [place for place in sockets if not ipaddress.ip_address(place[0]).is_unspecified]
    address = settings.address or (bound[0][0] if bound else await find_address(client.self_))
    family = ipaddress.ip_address(address).version
    for candidate, port in bound or sockets:
        if ipaddress.ip_address(candidate).version == family:
            return address, port
    raise EndpointError(f"the metrics server has no socket of the family of {address}: set CONSUL_PROM_ADDRESS")


async def _registered(tenancy: Tenancy, task: "asyncio.Task[None]", timeout: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            while not tenancy.registered and not task.done():  # noqa: ASYNC110  # nobody tells it when
                await asyncio.sleep(0.01)
    if not tenancy.registered:
        raise EndpointError(f"not registered within CONSUL_PROM_START_TIMEOUT: {tenancy.trouble}")
