"""Scrapes: pages written in slices, shared by those who ask for the same at once, and sent as fast as they are read."""

import asyncio
import ipaddress
import logging
import re
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Final

from aiohttp.web import BaseRequest, StreamResponse

from consul_prom.logs import ThrottledLogger
from consul_prom.process.fork import FORK_LOCK

log = logging.getLogger(__name__)

SLICE: Final = 0.0003
REST: Final = 0.001
"""Seconds of work, and of rest after it: a request in the way of a slice waits so long, and no scrape is in a hurry."""
CHUNK: Final = 65_536
READING: Final = 30.0
PAGES_READ: Final = 8
_TEXT: Final = {"Content-Type": "text/plain; charset=utf-8"}
_TOO_MANY: Final = b"too many pages of different name[] are asked for at once\n"
_NOTHING_PLAIN: Final = re.compile(r"(identity|\*)\s*;\s*q=0(\.0*)?\s*(,|$)")

CHOSEN_AT_ONCE: Final = 8
"""Different pages of chosen names that are written or wait for it; a whole page waits for these at most."""

Render = Callable[[str, str, list[str]], tuple[Mapping[str, str], Hashable, Iterable[bytes]]]


class MetricsHandler:
    """Answers scrapes, and remembers when they were.

    *render* takes the request's Accept, its Accept-Encoding and the ``name[]`` parameters, and gives headers, the names
    that it chose (None: the page is whole) and the pieces of the page, which is written only as they are asked for.
    Equal headers and names mean equal pages.
    *on_scrape* is told the seconds that a page was waited for.
    """

    def __init__(self, render: Render, *, on_scrape: Callable[[float], None]) -> None:
        self._render = render
        self._on_scrape = on_scrape
        self._writing: dict[tuple[Hashable, Hashable], asyncio.Task[_Page]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._read: list[_Page] = []
        self._log = ThrottledLogger(log)
        self._scrapers: dict[asyncio.Transport, float] = {}  # when the last page that each got was begun
        self._sent = 0.0  # when the last page that anybody got was
        self.last: float | None = None
        """When the last one began, in seconds since 1970."""

    def since(self, when: float) -> bool:
        """Whether a page that was begun since then has been sent, to each that keeps a connection, as Prometheus does.

        Of a pair of servers behind one address a connection is all that tells them apart.
        """
        open_ones = [begun for connection, begun in self._scrapers.items() if not connection.is_closing()]
        return self._sent >= when and all(begun >= when for begun in open_ones)

    async def answer(self, request: BaseRequest, headers: Mapping[str, str]) -> StreamResponse:
        """The page that *request* asks for, with more *headers*."""
        self.last, begun = time.time(), time.perf_counter()
        self._note(request.transport, 0.0)
        page = await self._page(request)
        if page.status == HTTPStatus.OK:
            with FORK_LOCK:
                self._on_scrape(time.perf_counter() - begun)
        response, whole = await page.send(request, headers)
        if whole and page.status == HTTPStatus.OK:
            self._sent = page.begun
            self._note(request.transport, page.begun)
        return response

    def close(self) -> None:
        for task in self._writing.values():
            task.cancel()

    async def _page(self, request: BaseRequest) -> "_Page":
        """Who asks for a page that is being written waits for the same."""
        names = [name for name in request.query.getall("name[]", []) if name]
        headers, chosen, pieces = self._render(_listed(request, "Accept"), _accepted_encoding(request), names)
        wanted = frozenset(headers.items()), chosen
        if wanted not in self._writing:
            if chosen is not None and sum(names is not None for _, names in self._writing) >= CHOSEN_AT_ONCE:
                return _Page(HTTPStatus.SERVICE_UNAVAILABLE, {**_TEXT, "Retry-After": "1"}, _TOO_MANY)
            task = self._writing[wanted] = asyncio.create_task(self._write(headers, iter(pieces)))
            task.add_done_callback(lambda _: self._writing.pop(wanted))
        return await asyncio.shield(self._writing[wanted])  # who goes away takes it from nobody

    async def _write(self, headers: Mapping[str, str], pieces: Iterator[bytes]) -> "_Page":
        """In slices, between which the application's threads have the interpreter for themselves."""
        written = []
        async with self._one_at_a_time:
            begun_at, begun = time.time(), time.perf_counter()
            while True:
                try:
                    with FORK_LOCK:
                        piece = next(pieces, None)
                except BaseException as error:  # noqa: BLE001  # whatever an application's collector may raise
                    return self._failed(error)
                if piece is None:
                    break
                written.append(piece)
                if time.perf_counter() - begun > SLICE:
                    await asyncio.sleep(REST)
                    begun = time.perf_counter()
        self._log.over("the metrics can be rendered again")
        return self._keep(_Page(HTTPStatus.OK, headers, b"".join(written), begun=begun_at))

    def _keep(self, page: "_Page") -> "_Page":
        """So that readers which stall hold no more memory than a few pages: the oldest of these are cut off."""
        self._read = [*(kept for kept in self._read if kept.readers), page]
        while len(self._read) > PAGES_READ:
            for reader in self._read.pop(0).readers:
                reader.abort()
        return page

    def _failed(self, error: BaseException) -> "_Page":
        kind = type(error).__name__
        self._log.failed("the metrics cannot be rendered; a collector raised", reason=kind, exc_info=error)
        text = f"a collector raised {kind}\n"
        return _Page(HTTPStatus.INTERNAL_SERVER_ERROR, _TEXT, text.encode())

    def _note(self, connection: asyncio.Transport | None, begun: float) -> None:
        """In a new dictionary, since another thread may read the old one."""
        known = {one: when for one, when in self._scrapers.items() if not one.is_closing()}
        if connection:
            known[connection] = max(begun, known.get(connection, 0.0))
        self._scrapers = known


class _Page:
    """A page that was written, and who still reads it."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes, *, begun: float = 0.0) -> None:
        self.status = status
        self.begun = begun
        self.headers = headers
        self.body = body
        self.readers: set[asyncio.Transport] = set()

    async def send(self, request: BaseRequest, headers: Mapping[str, str]) -> tuple[StreamResponse, bool]:
        """The answer, and whether it was taken to its end.

        No faster than it is taken, so that a slow reader costs one buffer; in READING seconds, or not at all.
        """
        response = StreamResponse(status=self.status, headers={**self.headers, **headers})
        response.content_length = len(self.body)
        transport = request.transport
        if transport is None:  # it went away
            return response, False
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
        else:
            return response, request.method == "GET"
        finally:
            self.readers.discard(transport)
        return response, False


def _listed(request: BaseRequest, header: str) -> str:
    """The whole list that is a *header*, which may have come in several lines (RFC 9110, 5.3)."""
    return ",".join(request.headers.getall(header, []))


def _accepted_encoding(request: BaseRequest) -> str:
    """What the request accepts; over loopback bytes cost less than compressing them, unless plain ones are refused."""
    accepted = _listed(request, "Accept-Encoding")
    is_near = request.remote and ipaddress.ip_address(request.remote).is_loopback
    return "" if is_near and not _NOTHING_PLAIN.search(accepted.lower()) else accepted
