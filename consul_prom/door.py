"""Who may come to a listening socket, how many at once, and for how long.

A connection takes a descriptor, of which the application has perhaps 1,024, so there are few of ours. When all places
are taken, a newcomer gets that of the visitor who was silent for longest: so nobody who only sits there keeps
Prometheus out. Whoever is not welcome is turned away before TLS or HTTP cost anything.
"""

import asyncio
import ipaddress
import logging
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from consul_prom.sparing import SparingLog
from consul_prom.values import Network

log = logging.getLogger(__name__)

PLACES: Final = 128
FIRST_REQUEST: Final = 10.0
"""Seconds from a connection to the end of its first request's head, a TLS handshake included."""
SILENCE: Final = 90.0
"""Seconds from a request to the next, an answer that nobody takes included; scrapes a minute apart stay connected."""
AT_ONCE: Final = PLACES // 8
"""Connections that one turn of the loop takes: several, since a turn waits long for an application that computes, and
few, since in a crowd whoever has come stays for eight turns, and a request takes three to be read."""
LOOK: Final = 1.0


class _Visitor:
    """A connection; *until* when it may stay."""

    def __init__(self, connection: socket.socket, until: float) -> None:
        self.until = until
        self.protocol: asyncio.BaseProtocol | None = None
        self._connection = connection

    @property
    def here(self) -> bool:
        return self._connection.fileno() >= 0

    def send_away(self) -> None:
        """In whatever state it is, a handshake included: its transport finds the connection ended, and closes it."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)


class Door:
    """Accepts connections for *protocol*, with the TLS context that *tls* gives at that moment.

    *allow* are the networks that may come, besides this host itself; none means that all may.
    """

    def __init__(
        self,
        protocol: Callable[[], asyncio.Protocol],
        *,
        allow: Sequence[Network] = (),
        tls: Callable[[], ssl.SSLContext | None] = lambda: None,
    ) -> None:
        self._protocol = protocol
        self._allow = allow
        self._tls = tls
        self._listener: socket.socket | None = None
        self._visitors: list[_Visitor] = []  # who was heard last is the last
        self._entering: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._log = SparingLog(log)
        self.turned_away = ""
        """Who was, last, and why; as a sentence, which whoever needs it no more may clear."""

    def open(self, listener: socket.socket) -> None:
        """Accept from now on; the running loop keeps the *listener* in sight, as a fork needs it."""
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def close(self) -> None:
        """Accept no more, and close the listener; those who are connected stay."""
        for task in self._entering:
            task.cancel()
        if self._timer:
            self._timer.cancel()
        if self._listener and self._listener.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()

    def heard(self, protocol: object) -> None:
        """A whole request came on the connection of *protocol*."""
        for visitor in self._visitors:
            if visitor.protocol is protocol:
                visitor.until = time.monotonic() + SILENCE
                self._visitors.remove(visitor)
                self._visitors.append(visitor)
                return

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(AT_ONCE):
            try:
                connection, peer = listener.accept()
                ours = connection.getsockname()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:
                continue
            except OSError as error:
                self._rest(listener, error)
                return
            if self._welcome(peer[0], ours[0]):
                self._let_in(connection)
            else:
                connection.close()

    def _let_in(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._look()
        while len(self._visitors) >= PLACES:
            self._visitors.pop(0).send_away()
        visitor = _Visitor(connection, time.monotonic() + FIRST_REQUEST)
        self._visitors.append(visitor)
        task = asyncio.ensure_future(self._enter(visitor, connection))
        self._entering.add(task)
        task.add_done_callback(self._entering.discard)

    async def _enter(self, visitor: _Visitor, connection: socket.socket) -> None:
        def protocol() -> asyncio.Protocol:
            visitor.protocol = made = self._protocol()
            return made

        tls = self._tls()
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                protocol, connection, ssl=tls, ssl_handshake_timeout=FIRST_REQUEST if tls else None
            )
        except OSError:  # ssl's errors are such, too
            log.debug("a connection came to nothing", exc_info=True)

    def _look(self) -> None:
        """Forget who has gone, send away whose time is over, and look again for as long as anybody is there."""
        now = time.monotonic()
        self._visitors = [visitor for visitor in self._visitors if visitor.here]
        for visitor in self._visitors:
            if visitor.until < now:
                visitor.send_away()
        if self._timer is None or self._timer.when() <= asyncio.get_running_loop().time():
            self._timer = asyncio.get_running_loop().call_later(LOOK, self._look) if self._visitors else None

    def _rest(self, listener: socket.socket, error: OSError) -> None:
        """The process has no descriptors left, or the system no memory: asking at once again would keep us busy."""
        log.debug("no connection can be accepted: %s", error)
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)
        loop.call_later(LOOK, self._resume, listener)

    def _resume(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            self.open(listener)

    def _welcome(self, peer: str, ours: str) -> bool:
        """This host's own connections come from the address that they go to, or from loopback: its agent's, say."""
        address = ipaddress.ip_address(peer.partition("%")[0])
        if not self._allow or peer == ours or address.is_loopback or any(address in net for net in self._allow):
            return True
        self.turned_away = f"{peer} was turned away: it is in none of the networks of CONSUL_PROM_ALLOW"
        self._log.failed(self.turned_away)
        return False
