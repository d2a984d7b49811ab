"""Accept connections: check the allowed networks, limit the number of connections, and close idle ones.

A connection takes a descriptor, of which the application has perhaps 1,024. So all listeners of a process share one
small budget. If it is spent, a new connection takes the place of the one that has waited longest for its client: silent
connections cannot keep Prometheus out. A request that is being answered never loses its connection that way.
Unwelcome peers are disconnected before TLS or HTTP cost anything.
"""

import asyncio
import ipaddress
import logging
import math
import resource
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from consul_prom.logs import ThrottledLogger
from consul_prom.settings.parsers import Network

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 128
"""Connections of a process, or an eighth of its descriptors if those are fewer than 1,024."""
FIRST_REQUEST: Final = 10.0
"""Seconds from a connection to the end of its first request's head, a TLS handshake included."""
IDLE_TIMEOUT: Final = 90.0
"""Seconds from a request to the next, an answer that nobody takes included; scrapes a minute apart stay connected."""
STALL: Final = 2.0
"""Seconds without progress after which a client that does not take its answer may lose its place."""
TURNS: Final = 8
"""Turns of the loop that a new connection lives at least, however many others come; a request takes three to be read.
One turn accepts several connections, because it may wait long for an application that computes."""
LOOK: Final = 1.0


class Connection:
    """An accepted connection. It is closed at *until*, and may lose its place after *safe*."""

    def __init__(self, connection: socket.socket) -> None:
        self.safe = time.monotonic()
        self.until = self.safe + FIRST_REQUEST
        self._connection = connection
        self._answering = False

    @property
    def is_open(self) -> bool:
        return self._connection.fileno() >= 0

    def heard(self) -> None:
        """A whole request head came."""
        self.safe = time.monotonic()
        self.until = self.safe + IDLE_TIMEOUT

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Keep the place meanwhile, unless the client stalls."""
        self._answering, self.safe = True, math.inf
        try:
            yield
        finally:
            self._answering, self.safe = False, time.monotonic()

    def stalled(self) -> None:
        """The client takes no more for now."""
        self.safe = min(self.safe, time.monotonic() + STALL)

    def resumed(self) -> None:
        """The client takes more of its answer."""
        if self._answering:
            self.safe = math.inf

    def shut(self) -> None:
        """End it in any state, TLS handshakes included: its transport finds the connection ended, and closes it."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)


class Connections:
    """The connections of all listeners of a process: at most *most*."""

    def __init__(self, most: int | None = None) -> None:
        self.most = most or min(MAX_CONNECTIONS, _descriptors() // 8)
        self._open: list[Connection] = []
        self._ready: dict[Listener, None] = {}  # in the order in which they may accept
        self._timer: asyncio.TimerHandle | None = None

    def ready(self, listener: "Listener") -> None:
        """Let *listener* accept in its turn: a crowd at one port does not keep clients of another one out."""
        if not self._ready:
            asyncio.get_running_loop().call_soon(self._accept)
        self._ready.setdefault(listener)

    def add(self, connection: Connection) -> None:
        self._open.append(connection)
        self._timer = self._timer or asyncio.get_running_loop().call_later(LOOK, self._look)

    def _accept(self) -> None:
        """Accept what one turn of the loop may; listeners that are left come first in the next turn."""
        for _ in range(self._turn()):
            if not self._ready:
                return
            listener = next(iter(self._ready))
            del self._ready[listener]
            if listener.accept():
                self._ready[listener] = None
            self._make_room()
        if self._ready:
            asyncio.get_running_loop().call_soon(self._accept)

    def _turn(self) -> int:
        """How many connections may be accepted now; with hardly a place that may be taken, all listeners rest."""
        self._forget_closed()
        now = time.monotonic()
        room = self.most - sum(connection.safe > now for connection in self._open)
        if room < min(TURNS, self.most / 2):
            for listener in self._ready:
                listener.rest()
            self._ready.clear()
        return max(1, room // TURNS)

    def _make_room(self) -> None:
        """The one that has waited longest for its client makes room for a new one."""
        if len(self._open) > self.most:
            longest = min(self._open, key=lambda connection: connection.safe)
            longest.shut()
            self._open.remove(longest)

    def _look(self) -> None:
        """Close the connections that have had their time, and look again as long as there are any."""
        self._forget_closed()
        now = time.monotonic()
        for connection in self._open:
            if connection.until < now:
                connection.shut()
        self._timer = asyncio.get_running_loop().call_later(LOOK, self._look) if self._open else None

    def _forget_closed(self) -> None:
        self._open = [connection for connection in self._open if connection.is_open]


class Listener:
    """Accepts connections for *protocol*, with the TLS context that *tls* gives at that moment.

    *allow* are the networks that may connect, besides this host itself; none means that all may.
    """

    def __init__(
        self,
        protocol: Callable[[Connection], asyncio.Protocol],
        *,
        connections: Connections | None = None,
        allow: Sequence[Network] = (),
        tls: Callable[[], ssl.SSLContext | None] = lambda: None,
    ) -> None:
        self._protocol = protocol
        self._connections = connections or Connections()
        self._allow = allow
        self._tls = tls
        self._listener: socket.socket | None = None
        self._entering: dict[asyncio.Task[None], Connection] = {}
        self._log = ThrottledLogger(log)
        self.turned_away = ""
        """Who was, last, and why; as a sentence, which whoever needs it no more may clear."""

    def open(self, listener: socket.socket) -> None:
        """Accept from now on; the running loop keeps the *listener* in sight, as a fork needs it."""
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._connections.ready, self)

    def close(self) -> None:
        """Accept no more, and close the listener; those who are connected stay."""
        for connection in self._entering.values():
            connection.shut()
        if self._listener and self._listener.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()

    def accept(self) -> bool:
        """Accept one connection; False if there is none."""
        if self._listener is None or self._listener.fileno() < 0:
            return False
        try:
            connection, peer = self._listener.accept()
            ours = connection.getsockname()
        except (BlockingIOError, InterruptedError):
            return False
        except ConnectionError:
            return True
        except OSError as error:  # no descriptors or no memory
            log.debug("no connection can be accepted: %s", error)
            self.rest()
            return False
        if self._welcome(peer[0], ours[0]):
            self._let_in(connection)
        else:
            connection.close()
        return True

    def rest(self) -> None:
        """Accept nothing for a moment: to try again at once would keep the process busy."""
        if self._listener and self._listener.fileno() >= 0:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listener)
            loop.call_later(LOOK, self._resume, self._listener)

    def _resume(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            self.open(listener)

    def _let_in(self, accepted: socket.socket) -> None:
        accepted.setblocking(False)
        connection = Connection(accepted)
        self._connections.add(connection)
        task = asyncio.ensure_future(self._enter(connection, accepted))
        self._entering[task] = connection
        task.add_done_callback(self._entering.pop)

    async def _enter(self, connection: Connection, accepted: socket.socket) -> None:
        tls = self._tls()
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: self._protocol(connection),
                accepted,
                ssl=tls,
                ssl_handshake_timeout=FIRST_REQUEST if tls else None,
            )
        except OSError:  # ssl's errors are such, too
            log.debug("a connection came to nothing", exc_info=True)

    def _welcome(self, peer: str, ours: str) -> bool:
        """This host's own connections come from the address that they go to, or from loopback: its agent's, say."""
        address = ipaddress.ip_address(peer.partition("%")[0])
        if not self._allow or peer == ours or address.is_loopback or any(address in net for net in self._allow):
            return True
        self.turned_away = f"{peer} was turned away: it is in none of the networks of CONSUL_PROM_ALLOW"
        self._log.failed(self.turned_away)
        return False


def _descriptors() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS * 8 if soft == resource.RLIM_INFINITY else soft
