"""The metrics HTTP server, and the daemon thread with an event loop of its own that everything of ours runs in.

A blocked application is still scraped from there, and neither its loop nor ours slows the other.
"""

import asyncio
import errno
import html
import ipaddress
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import Any, Final
from weakref import WeakSet

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from consul_prom.errors import AgentDenied, AgentError, EndpointError

log = logging.getLogger(__name__)

START_DEADLINE: Final = 5.0
FORK_PATIENCE: Final = 5.0
ASK_AGENT: Final = 2.0
REPEAT_LOG: Final = 600.0
SLICE: Final = 0.001
CHUNK: Final = 65_536
READING: Final = 30.0
PAGES_READ: Final = 8
_NOTHING_PLAIN: Final = re.compile(r"(identity|\*)\s*;\s*q=0(\.0*)?\s*(,|$)")

Render = Callable[[str, str, list[str]], tuple[Mapping[str, str], Iterable[bytes]]]


class MetricsThread:
    """A daemon thread with an event loop. Nothing that it runs can keep the process from ending."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: Future[None] = Future()
        _THREADS.add(self)

    def start(self) -> None:
        """Returns when the loop runs.

        Raises:
            EndpointError: the system gave no thread or no descriptors.
        """
        started: Future[asyncio.AbstractEventLoop] = Future()
        try:
            _start_thread(partial(_run_loop, started, self._ended))
            self._loop = started.result(timeout=START_DEADLINE)
        except (RuntimeError, OSError, TimeoutError) as error:
            raise EndpointError(f"the metrics thread cannot start: {str(error) or type(error).__name__}") from error

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run *coroutine* in the thread's loop."""
        if self._loop is None or self._loop.is_closed():
            coroutine.close()
            raise EndpointError("the metrics thread does not run")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        future.add_done_callback(_log_surprise)
        return future

    def descriptors(self) -> list[int]:
        """The sockets of the loop, and what it watches them with."""
        loop: Any = self._loop
        if loop is None or loop.is_closed():
            return []
        selector = loop._selector  # noqa: SLF001  # asyncio shows its descriptors in no other way
        return [*selector.get_map(), loop._csock.fileno(), selector.fileno()]  # noqa: SLF001

    def stop(self, timeout: float) -> bool:
        """Cancel all that runs, end the thread; False where that took longer than *timeout* seconds."""
        if self._loop is None:
            return True
        with suppress(RuntimeError):  # closed already
            self._loop.call_soon_threadsafe(self._loop.stop)
        return self._ended in wait([self._ended], timeout).done


# A thread does not follow into a child that the application forks, but its descriptors and the locks that it held do.
_THREADS: Final[WeakSet[MetricsThread]] = WeakSet()
FORKING: Final = threading.RLock()
"""Held while the metrics thread may hold a lock of prometheus_client's: a fork waits for it."""


def _before_fork() -> None:
    FORKING.acquire(timeout=FORK_PATIENCE)  # a collector that hangs must not hold the application's fork


def _after_fork_in_parent() -> None:
    with suppress(RuntimeError):  # it was not acquired
        FORKING.release()


def _after_fork_in_child() -> None:
    """Let go of the parent's sockets. A plain close would let their numbers be used again, under our objects' feet."""
    FORKING._at_fork_reinit()  # type: ignore[attr-defined]  # noqa: SLF001  # its owner may be a thread that is gone
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for thread in list(_THREADS):
        for descriptor in thread.descriptors():
            os.dup2(null, descriptor, inheritable=False)
    os.close(null)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def _log_surprise(future: Future[Any]) -> None:
    """What nobody expected must not vanish with a future that nobody asks."""
    if not future.cancelled() and (error := future.exception()):
        log.error("consul-prom did not expect this", exc_info=error)


def _start_thread(run: Callable[[], None]) -> None:
    """A daemon thread, and a true one: gevent makes threads greenlets, which stand still when the application does.

    In a process of gevent's, its hub and its resolver must be there before: made by two threads, they wait for each
    other.
    """
    monkey: Any = sys.modules.get("gevent.monkey")
    if monkey and monkey.is_module_patched("threading"):
        hub = sys.modules["gevent"].get_hub()
        _ = hub.resolver, hub.threadpool
        monkey.get_original("_thread", "start_new_thread")(run, ())
    else:
        threading.Thread(target=run, name="consul-prom", daemon=True).start()


def _run_loop(started: "Future[asyncio.AbstractEventLoop]", ended: "Future[None]") -> None:
    try:
        # Signals are the main thread's: one that is delivered here would not wake it from a system call.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        loop = asyncio.SelectorEventLoop()
    except OSError as error:
        started.set_exception(error)
        return
    asyncio.set_event_loop(loop)
    loop.call_soon(started.set_result, loop)
    try:
        loop.run_forever()
        loop.run_until_complete(_end(asyncio.all_tasks(loop)))
    finally:
        loop.close()
        ended.set_result(None)


async def _end(tasks: set[asyncio.Task[Any]]) -> None:
    """Cancel *tasks*, after a moment for those that were closing something."""
    for patience in (0.2, 1):
        tasks = (await asyncio.wait(tasks, timeout=patience))[1] if tasks else tasks
        for task in tasks:
            task.cancel()


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


async def find_address(ask_agent: Callable[[], Awaitable[Mapping[str, Any]]]) -> str:
    """What the agent advertises of itself, if that is ours; else, or after 2 s, the default route's source address.

    *ask_agent* gives ``/v1/agent/self`` or raises an AgentError.
    """
    ends_at, said = time.monotonic() + ASK_AGENT, False
    while True:
        try:
            async with asyncio.timeout(max(ends_at - time.monotonic(), 0.1)):
                member = (await ask_agent()).get("Member")
            advertised = str(member.get("Addr")) if isinstance(member, Mapping) else ""
            if is_local(advertised):
                return advertised
            ends_at = 0  # its answer will not change
        except AgentDenied:
            ends_at = 0
        except (AgentError, TimeoutError):
            await asyncio.sleep(0.2)
        if time.monotonic() < ends_at:
            continue
        if address := route_address():
            return address
        if not said:
            log.warning("neither the agent nor a default route tells our address: set CONSUL_PROM_ADDRESS")
        said = True
        await asyncio.sleep(ASK_AGENT)


class _Page:
    """A page that was written, and who still reads it."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.readers: set[asyncio.Transport] = set()

    async def send(self, request: web.BaseRequest) -> web.StreamResponse:
        """No faster than it is taken, so that a slow reader costs one buffer; in READING seconds, or not at all."""
        response = web.StreamResponse(status=self.status, headers=self.headers)
        response.content_length = len(self.body)
        transport = request.transport
        if transport is None:  # it went away
            return response
        self.readers.add(transport)
        try:
            async with asyncio.timeout(READING):
                await response.prepare(request)
                for start in range(0, len(self.body) if request.method == "GET" else 0, CHUNK):
                    await response.write(memoryview(self.body)[start : start + CHUNK])
                await response.write_eof()
        except TimeoutError:
            transport.abort()
        except ConnectionError:
            log.debug("a scraper went away before it had the page")
        finally:
            self.readers.discard(transport)
        return response


class Endpoint:
    """``/metrics``, ``/-/healthy`` and a page for people on one socket.

    *render* takes the request's Accept, its Accept-Encoding and the ``name[]`` parameters, and gives headers and the
    pieces of the page, which is written only as they are asked for. Equal headers and names mean equal pages.
    *about* tells the page for people what to show. *on_scrape* is told the seconds that a page was waited for.
    """

    def __init__(
        self,
        *,
        render: Render,
        about: Callable[[], Mapping[str, str]],
        on_scrape: Callable[[float], None],
    ) -> None:
        self._render = render
        self._about = about
        self._on_scrape = on_scrape
        self._server = web.Server(self._handle, access_log=None, logger=_ServerLog(log))
        self._listener: asyncio.Server | None = None
        self._writing: dict[tuple[object, ...], asyncio.Task[_Page]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._read: list[_Page] = []
        self._broken_at: float | None = None
        self.last_scrape: float | None = None

    async def serve(self, server: socket.socket) -> None:
        self._listener = await asyncio.get_running_loop().create_server(self._server, sock=server)

    async def aclose(self, *, grace: float = 0.2) -> None:
        """Stop listening; requests that are being answered have *grace* seconds more."""
        if self._listener:
            self._listener.close()
        await self._server.shutdown(grace)
        for task in self._writing.values():
            task.cancel()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        answers = {"/-/healthy": self._healthy, "/": self._home}
        if request.path not in {"/metrics", *answers}:
            return web.Response(status=404, text="not found\n")
        if request.method not in {"GET", "HEAD"}:
            return web.Response(status=405, text="method not allowed\n", headers={"Allow": "GET, HEAD"})
        return answers[request.path](request) if request.path in answers else await self._scrape(request)

    async def _scrape(self, request: web.BaseRequest) -> web.StreamResponse:
        self.last_scrape, begun = time.time(), time.perf_counter()
        page = await self._page(request)
        if page.status == HTTPStatus.OK:
            with FORKING:
                self._on_scrape(time.perf_counter() - begun)
        return await page.send(request)

    async def _page(self, request: web.BaseRequest) -> _Page:
        """The page that is asked for. Who asks for one that is being written waits for the same."""
        names = request.query.getall("name[]", [])
        headers, pieces = self._render(request.headers.get("Accept", ""), _accepted_encoding(request), names)
        wanted = *headers.items(), *names
        if wanted not in self._writing:
            task = self._writing[wanted] = asyncio.create_task(self._write(headers, iter(pieces)))
            task.add_done_callback(lambda _: self._writing.pop(wanted))
        return await asyncio.shield(self._writing[wanted])  # who goes away takes it from nobody

    async def _write(self, headers: Mapping[str, str], pieces: Iterator[bytes]) -> _Page:
        """In slices of a millisecond, between which the application's threads have the interpreter for themselves."""
        written = []
        async with self._one_at_a_time:
            begun = time.perf_counter()
            while True:
                try:
                    with FORKING:
                        piece = next(pieces, None)
                except BaseException as error:  # noqa: BLE001  # whatever an application's collector may raise
                    return self._failed(error)
                if piece is None:
                    break
                written.append(piece)
                if time.perf_counter() - begun > SLICE:
                    await asyncio.sleep(SLICE)
                    begun = time.perf_counter()
        if self._broken_at is not None:
            log.info("the metrics can be rendered again")
        self._broken_at = None
        return self._keep(_Page(HTTPStatus.OK, headers, b"".join(written)))

    def _keep(self, page: _Page) -> _Page:
        """So that readers which stall hold no more memory than a few pages: the oldest of these are cut off."""
        self._read = [*(kept for kept in self._read if kept.readers), page]
        while len(self._read) > PAGES_READ:
            for reader in self._read.pop(0).readers:
                reader.abort()
        return page

    def _failed(self, error: BaseException) -> _Page:
        now = time.monotonic()
        if self._broken_at is None or now - self._broken_at > REPEAT_LOG:
            log.warning("the metrics cannot be rendered; a collector raised", exc_info=error)
            self._broken_at = now
        text = f"a collector raised {type(error).__name__}\n"
        return _Page(HTTPStatus.INTERNAL_SERVER_ERROR, {"Content-Type": "text/plain; charset=utf-8"}, text.encode())

    def _healthy(self, _request: web.BaseRequest) -> web.Response:
        return web.Response(text="healthy\n")

    def _home(self, _request: web.BaseRequest) -> web.Response:
        ago = f"{time.time() - self.last_scrape:.0f} s ago" if self.last_scrape else "never"
        rows = "".join(
            f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>"
            for key, value in {**self._about(), "last scrape": ago}.items()
        )
        return web.Response(text=_HOME.format(rows=rows), content_type="text/html")


def _accepted_encoding(request: web.BaseRequest) -> str:
    """What the request accepts; over loopback bytes cost less than compressing them, unless plain ones are refused."""
    accepted = request.headers.get("Accept-Encoding", "")
    is_near = request.remote and ipaddress.ip_address(request.remote).is_loopback
    return "" if is_near and not _NOTHING_PLAIN.search(accepted.lower()) else accepted


class _ServerLog(logging.LoggerAdapter[logging.Logger]):
    """aiohttp's log, in which what is no HTTP is a stack trace: on this port it is a scanner, and nobody's trouble."""

    def exception(self, msg: object, *args: object, exc_info: Any = True, **options: Any) -> None:
        level = logging.DEBUG if isinstance(exc_info, HttpProcessingError) else logging.ERROR
        self.log(level, msg, *args, exc_info=exc_info, **options)


_HOME: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>consul-prom</title>
<style>body {{ font: 1rem/1.5 system-ui, sans-serif; margin: 2rem; }} th {{ text-align: left; padding-right: 2rem; }}
</style></head>
<body><h1>consul-prom</h1><table>{rows}</table>
<p><a href="/metrics">metrics</a> · <a href="/-/healthy">healthy</a></p></body></html>
"""
