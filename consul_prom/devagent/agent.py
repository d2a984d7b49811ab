"""The agent as a whole: a listening server, its checks and its reaper, over one state."""

import asyncio
import contextlib
import logging
import socket
import struct
import threading
from collections import deque
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Self

from aiohttp import web

from consul_prom.devagent.checks import CheckRunner
from consul_prom.devagent.documents import Node
from consul_prom.devagent.faults import Fault
from consul_prom.devagent.http import Api
from consul_prom.devagent.state import State

START_TIMEOUT = 5.0
STOP_TIMEOUT = 5.0
GRACE = 1.0
TURNS = 3
"""Of the loop, in which a connection that was accepted gets its transport and its protocol."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Parts:
    """What lives from one start to the next stop."""

    api: Api
    checks: CheckRunner
    runner: web.ServerRunner
    listener: socket.socket
    stopped: asyncio.Event
    reaper: asyncio.Task[None]


class DevAgent:
    """An in-memory Consul agent, in the event loop that starts it.

    After a stop it may be started again: empty, and on the same port. `fault` may be changed at any time.
    `reap_interval` and `check_interval_at_least` are in seconds, for tests that cannot wait as long as Consul does.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        node: str | None = None,
        reap_interval: float = 30.0,
        check_interval_at_least: float = 1.0,
    ) -> None:
        self.host = host
        self.port = port
        self.node = Node(node or socket.gethostname(), host)
        self.reap_interval = reap_interval
        self.check_interval_at_least = check_interval_at_least
        self.state = State()
        self.fault: Fault | None = None
        self.requests: deque[tuple[str, str]] = deque(maxlen=10_000)
        """Method and path of what was asked, the newest last."""

        self._parts: _Parts | None = None

    @property
    def address(self) -> str:
        return self.node.at(self.port)

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    async def start(self) -> None:
        """Listens, with an empty state; OSError if the address cannot be had."""
        if self._parts is not None:
            raise RuntimeError(f"The dev agent on {self.url} is running already")
        state = State()
        api = Api(state, self.node)
        runner = web.ServerRunner(web.Server(self._answer, access_log=None), shutdown_timeout=GRACE)
        await runner.setup()
        try:
            listener = socket.create_server((self.host, self.port), family=_family(self.host))
        except OSError:
            await runner.cleanup()
            raise
        await web.SockSite(runner, listener).start()
        self.port = listener.getsockname()[1]
        checks = CheckRunner(state, interval_at_least=self.check_interval_at_least)
        loop = asyncio.get_running_loop()
        state.changed = lambda: loop.call_soon_threadsafe(self._follow)
        self.state = state
        self._parts = _Parts(api, checks, runner, listener, asyncio.Event(), asyncio.create_task(self._reap(state)))

    async def aclose(self) -> None:
        """Stops as Consul does: blocked reads are answered with what is, then the connections end."""
        if (parts := self._parts) is None:
            return
        self._parts = None
        self.state.changed = lambda: None
        parts.stopped.set()
        parts.api.stop()
        parts.reaper.cancel()
        await asyncio.gather(parts.reaper, return_exceptions=True)
        await parts.checks.aclose()
        await _accept_no_more(parts.listener)
        await parts.runner.cleanup()

    async def kill(self) -> None:
        """Stops as a killed process does: all connections are reset, nobody gets an answer."""
        if self._parts is None:
            return
        runner = self._parts.runner
        await _accept_no_more(self._parts.listener)
        for site in list(runner.sites):
            await site.stop()
        for connection in runner.server.connections if runner.server else ():
            _reset(connection.transport)
        await self.aclose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    def _follow(self) -> None:
        if self._parts is not None:
            self._parts.api.changed()
            self._parts.checks.follow()

    async def _reap(self, state: State) -> None:
        while True:
            await asyncio.sleep(self.reap_interval)
            for service_id in state.reap():
                logger.info("Deregistered %s, which was critical for too long", service_id)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if (parts := self._parts) is None:
            _reset(request.transport)
            return web.Response()
        self.requests.append((request.method, request.path))
        fault = self.fault
        if fault is None or not fault.concerns(request.method, request.path):
            return await parts.api.answer(request)
        return await _faulty(fault, request, parts)


async def _faulty(fault: Fault, request: web.BaseRequest, parts: _Parts) -> web.StreamResponse:
    # Read now: whoever gives up while we delay shall find his request carried out nevertheless.
    await request.read()
    response = await parts.api.answer(request) if fault.late else None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(None if fault.hang else fault.delay):
            await parts.stopped.wait()
    if fault.hang or fault.reset:
        _reset(request.transport)
        return web.Response()
    if fault.status:
        return web.Response(status=fault.status, body=fault.body, headers=fault.headers)
    return response or await parts.api.answer(request)


@contextlib.contextmanager
def running(agent: DevAgent | None = None) -> Iterator[DevAgent]:
    """Runs an agent in a daemon thread with an event loop of its own; what start() raises is raised here."""
    agent = agent or DevAgent()
    loop = asyncio.SelectorEventLoop()
    thread = threading.Thread(target=_run, args=(loop,), name="consul-prom-devagent", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        loop.close()
        raise
    try:
        _await(agent.start(), loop, within=START_TIMEOUT)
        try:
            yield agent
        finally:
            _await(agent.aclose(), loop, within=STOP_TIMEOUT)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(STOP_TIMEOUT)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


def _await(coroutine: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop, *, within: float) -> None:
    asyncio.run_coroutine_threadsafe(coroutine, loop).result(within)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


async def _accept_no_more(listener: socket.socket) -> None:
    """Let those in who have been accepted: asyncio's server, closed meanwhile, would drop them unclosed."""
    if listener.fileno() < 0:  # closed before
        return
    asyncio.get_running_loop().remove_reader(listener)
    for _ in range(TURNS):
        await asyncio.sleep(0)


def _reset(transport: asyncio.BaseTransport | None) -> None:
    """Breaks a connection in the way that the peer notices at once: by RST, not by FIN."""
    if not isinstance(transport, asyncio.WriteTransport):
        return
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
