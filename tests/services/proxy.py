"""A TCP proxy before an agent, for the faults that a real one cannot be made to have on demand."""

import asyncio
import http
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

from tests.services.program import own_address

DEADLINE = 10.0
BACKLOG = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What goes wrong, from when it is set until another is.

    `refuse` closes the listener and breaks all connections. `cut` makes every connection that is open or comes a
    half-open one: nothing passes any more, not even when the fault is over. The others happen to requests whose line,
    as in ``GET /v1/agent/service/shop.web-1.0?hash=1``, `match` is found in: `hang` swallows the request, `answer` is
    sent in the agent's stead. With `late` it is passed on so many seconds later, even if the client has gone by then.
    Or the agent's answer comes `delay` seconds late, at `rate` bytes per second, and is
    broken off by a reset after `reset_after` bytes.
    """

    match: str = ""
    refuse: bool = False
    cut: bool = False
    hang: bool = False
    answer: bytes = b""
    late: float = 0.0
    delay: float = 0.0
    rate: float = 0.0
    reset_after: int | None = None

    def concerns(self, line: str) -> bool:
        return re.search(self.match, line) is not None


NONE = Fault()


class Request(NamedTuple):
    """When a request arrived, in seconds of `time.monotonic`, and its line without the version."""

    at: float
    line: str


def answer(status: int, body: str | bytes = "", headers: Mapping[str, str] | None = None) -> bytes:
    """A whole HTTP answer, after which the connection stays."""
    content = body.encode() if isinstance(body, str) else body
    fields = {"Content-Type": "text/plain", "Content-Length": str(len(content)), **(headers or {})}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n{lines}\r\n".encode() + content


def bomb(mebibytes: int) -> bytes:
    """An answer that is small, and a JSON text of *mebibytes* once its gzip is unpacked."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    blanks = b" " * 2**20
    packed = b"".join(packer.compress(blanks) for _ in range(mebibytes)) + packer.compress(b"{}") + packer.flush()
    return answer(200, packed, {"Content-Type": "application/json", "Content-Encoding": "gzip"})


class Proxy:
    """A context manager: a proxy in a daemon thread before the agent at *upstream*, a URL of http or unix.

    *listen* is an IP address or the path of a unix socket; with *prefix*, that is taken off the requests' paths, and
    any other path is a 404 of the proxy's own.
    """

    def __init__(self, upstream: str, *, listen: str | Path | None = None, prefix: str = "") -> None:
        self.upstream = upstream
        self.requests: list[Request] = []
        self.connections = 0
        """How many were accepted since the start."""

        self._listen = listen or own_address()
        self._port = 0 if listen else 8500
        self._prefix = prefix
        self._fault = NONE
        self._open: dict[asyncio.Task[None], _Connection] = {}
        self._listener: socket.socket | None = None
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    @property
    def url(self) -> str:
        if isinstance(self._listen, Path):
            return f"unix://{self._listen}"
        host = f"[{self._listen}]" if ":" in self._listen else self._listen
        return f"http://{host}:{self._port}{self._prefix}"

    @property
    def open(self) -> int:
        """How many connections there are now."""
        return len(self._open)

    @property
    def fault(self) -> Fault:
        return self._fault

    @fault.setter
    def fault(self, fault: Fault) -> None:
        """In force when this returns, on connections that are open too."""
        self._call(self._change(fault))

    def drop(self) -> None:
        """Break all connections by a reset."""
        self._call(self._drop())

    def asked(self, pattern: str, *, since: float = 0.0) -> list[float]:
        """When requests came whose line *pattern* is found in."""
        return [
            request.at for request in list(self.requests) if request.at >= since and re.search(pattern, request.line)
        ]

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._start())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE)
        self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(DEADLINE)

    async def _start(self) -> None:
        if isinstance(self._listen, Path):
            self._listen.unlink(missing_ok=True)
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(self._listen))
            self._listener.listen(BACKLOG)
        else:
            family = socket.AF_INET6 if ":" in self._listen else socket.AF_INET
            self._listener = socket.create_server((self._listen, self._port), family=family, backlog=BACKLOG)
            self._port = self._listener.getsockname()[1]
        self._listener.setblocking(False)
        # asyncio's own server loses the sockets that it has accepted, but not yet served, when it is closed.
        self._loop.add_reader(self._listener, self._accept, self._listener)

    async def _stop(self) -> None:
        if self._listener:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
            if isinstance(self._listen, Path):
                self._listen.unlink(missing_ok=True)
        await self._drop()

    async def _end(self) -> None:
        await self._stop()
        if pumps := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(pumps)

    async def _change(self, fault: Fault) -> None:
        before, self._fault = self._fault, fault
        if fault.refuse:
            await self._stop()
        elif before.refuse:
            await self._start()
        if fault.cut:
            for connection in self._open.values():
                connection.dead = True

    async def _drop(self) -> None:
        tasks = list(self._open)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(BlockingIOError, ConnectionAbortedError):
            connection = _Connection(listener.accept()[0], dead=self._fault.cut)
            self.connections += 1
            task = self._loop.create_task(self._serve(connection))
            self._open[task] = connection
            task.add_done_callback(self._closed)

    def _closed(self, task: asyncio.Task[None]) -> None:
        self._open.pop(task).close()
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, OSError):
            raise error

    async def _serve(self, connection: "_Connection") -> None:
        await connection.open()
        while head := await connection.head():
            line = head.partition(b"\r\n")[0].decode().rpartition(" ")[0]
            self.requests.append(Request(time.monotonic(), line))
            fault = self._fault if self._fault.concerns(line) else NONE
            if fault.hang:
                await connection.swallow()
            if fault.answer:
                await connection.body(head)
                await connection.send(fault.answer)
                continue
            method, _, path = line.partition(" ")
            if not path.startswith(f"{self._prefix}/v1/"):
                await connection.body(head)
                await connection.send(answer(404, "<html>no such page</html>", {"Content-Type": "text/html"}))
                continue
            connection.fault, connection.sent = fault, 0
            content = await connection.body(head)
            await asyncio.sleep(fault.late)
            request = head.replace(
                f"{method} {path}".encode(), f"{method} {path.removeprefix(self._prefix)}".encode(), 1
            )
            await connection.forward(request + content, self.upstream)


@dataclass(eq=False, slots=True)
class _Connection:
    """A client's connection, and the one to the agent that is made for it; `fault` is that of the request in hand."""

    accepted: socket.socket
    dead: bool
    reader: asyncio.StreamReader = field(init=False)
    writer: asyncio.StreamWriter = field(init=False)
    is_open: bool = False
    fault: Fault = NONE
    sent: int = 0
    upstream: asyncio.StreamWriter | None = None
    pump: "asyncio.Task[None] | None" = None

    async def open(self) -> None:
        self.reader, self.writer = await asyncio.open_connection(sock=self.accepted)
        self.is_open = True

    async def head(self) -> bytes:
        """Request line and headers; empty at the end of the connection."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return b""
        if self.dead:
            await self.swallow()
        return head

    async def body(self, head: bytes) -> bytes:
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        return await self.reader.readexactly(int(length[1])) if length else b""

    async def swallow(self) -> None:
        """Until the client gives up."""
        while await self.reader.read(2**16):
            pass
        raise ConnectionResetError

    async def forward(self, request: bytes, url: str) -> None:
        if self.upstream is None:
            parts = urlsplit(url)
            if parts.scheme == "unix":
                reader, self.upstream = await asyncio.open_unix_connection(parts.path)
            else:
                reader, self.upstream = await asyncio.open_connection(parts.hostname, parts.port)
            self.pump = asyncio.create_task(self._pump(reader))
        self.upstream.write(request)
        await self.upstream.drain()

    async def _pump(self, reader: asyncio.StreamReader) -> None:
        """The agent's answers, with what is wrong with them, and its end of the connection."""
        try:
            while chunk := await reader.read(2**16):
                if not self.dead and await self._pass_on(chunk):
                    break
            else:
                if not self.dead:
                    self.writer.close()
                return
        except OSError:
            pass
        if not self.dead:
            self.reset()

    async def _pass_on(self, chunk: bytes) -> bool:
        """Whether that was enough."""
        fault = self.fault
        await asyncio.sleep(fault.delay)
        left = len(chunk) if fault.reset_after is None else fault.reset_after - self.sent
        self.sent += len(chunk)
        await self.send(chunk[:left], rate=fault.rate)
        return left < len(chunk)

    async def send(self, content: bytes, *, rate: float = 0.0) -> None:
        step = max(int(rate / 10), 1) if rate else len(content)
        for begin in range(0, len(content), step or 1):
            self.writer.write(content[begin : begin + step])
            await self.writer.drain()
            await asyncio.sleep(step / rate if rate else 0)

    def close(self) -> None:
        if self.pump:
            self.pump.cancel()
        if self.upstream:
            self.upstream.close()
        self.reset()

    def reset(self) -> None:
        """By RST, not by FIN: the other side notices at once, and may lose what it has not read yet."""
        with suppress(OSError):  # closed already
            self.accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if self.is_open:
            self.writer.transport.abort()
        else:
            self.accepted.close()
