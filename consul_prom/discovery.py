"""For applications that serve their metrics with prometheus_async: its ServiceDiscovery protocol, with our registrar.

https://prometheus-async.readthedocs.io/en/stable/asyncio.html#service-discovery
"""

import asyncio
import ipaddress
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Unpack

from prometheus_async.aio.web import MetricsHTTPServer
from prometheus_async.types import Deregisterer

from consul_prom import __version__
from consul_prom.consul.client import AgentClient
from consul_prom.consul.registration import Registration, build
from consul_prom.consul.slot_registration import SlotRegistration
from consul_prom.errors import AgentError, ConsulPromError, EndpointError, SettingsError
from consul_prom.process import exit_hooks
from consul_prom.server.bind import find_address
from consul_prom.settings.settings import Arguments, Settings, check_worker, load, switch
from consul_prom.slots.slots import Slot

log = logging.getLogger(__name__)

CHEAP_PAGE: Final = "/"
THREAD: Final = "PrometheusAsyncWebEndpoint"
"""The name of the thread of ``start_http_server_in_thread``, which never returns if we raise there."""


class ConsulDiscovery:
    """Pass it as *service_discovery* to prometheus_async's ``start_http_server`` or ``start_http_server_in_thread``.

    Each server has a slot, so an entry of its own. It is registered in the background and stays so; an agent that is
    absent holds nothing up. A server on all interfaces is registered with the address that a worker would take. Closing
    the server removes the entry, and so does the end of the process, except by a signal that Python does not handle.
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
        if not self._disabled:
            exit_hooks.hear()  # `register` may run in another thread

    async def register(self, metrics_server: MetricsHTTPServer) -> Deregisterer | None:
        """Begin to register the server; the result deregisters it, within STOP_TIMEOUT.

        None, and one ERROR line, where that cannot be. With REQUIRED the error is raised instead, also if the server
        is not registered within START_TIMEOUT; not so in prometheus_async's own thread.
        """
        required = self._required
        if required and threading.current_thread().name == THREAD:
            log.warning("CONSUL_PROM_REQUIRED has no effect with start_http_server_in_thread: use start_http_server")
            required = False
        try:
            return await self._register(metrics_server, required=required)
        except ConsulPromError as error:
            if required:
                raise
            log.error("the metrics server is not registered: %s", error)
            return None

    async def _register(self, metrics_server: MetricsHTTPServer, *, required: bool) -> Deregisterer | None:
        settings = self._settings
        if self._disabled:
            return None
        if isinstance(settings, SettingsError):
            raise settings
        check_worker(settings)
        registration = _Registration(settings, metrics_server)
        if required:
            try:
                await registration.wait(settings.start_timeout)
            except EndpointError:
                await registration.end()
                raise
        return registration.end


class _Registration:
    """A server that stays registered until `end`, or until the process ends. Made in the server's loop."""

    def __init__(self, settings: Settings, server: MetricsHTTPServer) -> None:
        self._settings = settings
        self._server = server
        self._tenancy = SlotRegistration(settings)
        self._client = AgentClient(settings)
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._task = asyncio.create_task(self._stay())
        exit_hooks.expect(self._end_now)

    async def wait(self, timeout: float) -> None:
        """Raises EndpointError if the server is not registered after *timeout* seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not self._tenancy.registered and not self._task.done():  # noqa: ASYNC110  # nobody tells it when
                    await asyncio.sleep(0.01)
        if not self._tenancy.registered:
            raise EndpointError(f"not registered within CONSUL_PROM_START_TIMEOUT: {self._tenancy.trouble}")

    async def end(self) -> None:
        with exit_hooks.said(self._end_now):
            self._task.cancel()
            await self._tenancy.leave(self._settings.stop_timeout)
            await self._client.aclose()
            if self._tenancy.slot:
                self._tenancy.slot.release()

    def _end_now(self) -> None:
        """Deregister before the process ends, in the server's loop if that still runs in another thread."""
        timeout = self._settings.stop_timeout
        with exit_hooks.said(self._end_now):
            if self._loop.is_running() and threading.get_ident() != self._thread:
                with suppress(TimeoutError):
                    asyncio.run_coroutine_threadsafe(self.end(), self._loop).result(timeout)
            else:
                self._tenancy.leave_now(timeout, hosts=self._client.resolved)

    async def _stay(self) -> None:
        try:
            address, port = await _place(
                self._settings, self._client, self._server, on_failure=self._tenancy.set_trouble
            )

            def describe(slot: Slot) -> Registration:
                return build(
                    self._settings,
                    slot=slot,
                    address=address,
                    port=port,
                    version=__version__,
                    pid=os.getpid(),
                    scheme="https" if self._server.https else "http",
                    health_path=CHEAP_PAGE,
                )

            await self._tenancy.run(self._client, describe)
        except ConsulPromError as error:
            log.error("the metrics server is not registered: %s", error)


async def _place(
    settings: Settings, client: AgentClient, server: MetricsHTTPServer, *, on_failure: Callable[[AgentError], None]
) -> tuple[str, int]:
    """Address and port to register.

    A server on all interfaces has a socket, and mostly a port, for each address family, and `socket` is any of them.
    """
    sockets = [(str(address), int(port)) for address, port, *_ in server._runner.addresses]  # noqa: SLF001
    bound = [place for place in sockets if not ipaddress.ip_address(place[0]).is_unspecified]
    address = settings.address or (bound[0][0] if bound else await find_address(client.self_, on_failure=on_failure))
    family = ipaddress.ip_address(address).version
    for candidate, port in bound or sockets:
        if ipaddress.ip_address(candidate).version == family:
            return address, port
    raise EndpointError(f"the metrics server has no socket of the family of {address}: set CONSUL_PROM_ADDRESS")
