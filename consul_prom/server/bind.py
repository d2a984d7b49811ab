"""Where the endpoint listens: which of this host's addresses, and a socket on it."""

import asyncio
import errno
import ipaddress
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Final

from consul_prom.errors import AgentDenied, AgentError, EndpointError
from consul_prom.logs import ThrottledLogger

log = logging.getLogger(__name__)

ASK_AGENT: Final = 2.0


def listen(address: str, ports: Iterable[int]) -> socket.socket:
    """A listening socket of one address family on the first of *ports* that is free.

    Raises:
        EndpointError: names the setting to change.
    """
    tried = []
    for port in ports:
        server = socket.socket(_family(address), socket.SOCK_STREAM)
        try:
            # The slot's next worker may have the port at once; two listeners it does not allow.
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if server.family == socket.AF_INET6:
                server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # or `::` would be IPv4's wildcard too
            server.bind((address, port))
            server.listen(128)
        except OSError as error:
            server.close()
            if error.errno != errno.EADDRINUSE:
                raise EndpointError(_bind_trouble(address, port, error)) from error
            tried.append(port)
        else:
            server.setblocking(False)
            return server
    if not tried:
        raise EndpointError("CONSUL_PROM_PORT has no port up to 65535 left for this slot")
    which = f"port {tried[0]} is" if len(tried) == 1 else f"ports {min(tried)} to {max(tried)} are"
    raise EndpointError(f"{which} taken on {address}: set CONSUL_PROM_PORT to others, or to 0")


def _bind_trouble(address: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"{address} is no address of this host: set CONSUL_PROM_ADDRESS to one that is, "
            "or, where it is translated to ours, CONSUL_PROM_BIND"
        )
    if error.errno == errno.EACCES:
        return f"port {port} needs a right that we lack: set CONSUL_PROM_PORT to one above 1023"
    return f"cannot listen on {address} port {port}: {error.strerror} (CONSUL_PROM_ADDRESS, CONSUL_PROM_PORT)"


def is_local(address: str) -> bool:
    """Whether *address* is one of this host's, and no wildcard. Looks no name up."""
    try:
        parsed = ipaddress.ip_address(address)
        with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except (OSError, ValueError):
        return False
    return not parsed.is_unspecified


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def route_address() -> str | None:
    """The source address that the default route would use; connecting a UDP socket sends nothing."""
    for family, beyond in ((socket.AF_INET, "203.0.113.1"), (socket.AF_INET6, "2001:db8::1")):
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((beyond, 9))
            return str(probe.getsockname()[0])
    return None


async def find_address(
    ask_agent: Callable[[], Awaitable[Mapping[str, Any]]],
    *,
    on_failure: Callable[[AgentError], None] = lambda _error: None,
) -> str:
    """What the agent advertises of itself, if that is ours; else, or after 2 s, the default route's source address.

    *ask_agent* gives ``/v1/agent/self`` or raises an AgentError, which *on_failure* gets.
    """
    ends_at, sparing = time.monotonic() + ASK_AGENT, ThrottledLogger(log)
    while True:
        try:
            async with asyncio.timeout(max(ends_at - time.monotonic(), 0.1)):
                member = (await ask_agent()).get("Member")
            advertised = str(member.get("Addr")) if isinstance(member, Mapping) else ""
            if is_local(advertised):
                sparing.over("the agent tells our address")
                return advertised
            ends_at = 0  # its answer will not change
        except AgentDenied:
            ends_at = 0
        except TimeoutError:
            pass
        except AgentError as error:
            on_failure(error)
            await asyncio.sleep(0.2)
        if time.monotonic() < ends_at:
            continue
        if address := route_address():
            sparing.over("a default route tells our address")
            return address
        sparing.failed("neither the agent nor a default route tells our address: set CONSUL_PROM_ADDRESS")
        await asyncio.sleep(ASK_AGENT)
