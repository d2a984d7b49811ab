"""The metrics HTTP server: ``/metrics``, ``/-/healthy`` and a page for people on one socket."""

import asyncio
import html
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web import BaseRequest, RequestHandler, Response, Server, StreamResponse

from consul_prom.errors import EndpointError
from consul_prom.server.listener import Connection, Connections, Listener
from consul_prom.server.metrics_handler import MetricsHandler, Render
from consul_prom.server.web_config import WebConfig
from consul_prom.settings.parsers import Network

log = logging.getLogger(__name__)

MOST_HEADERS: Final = 64  # of 8 KiB each
REFUSAL: Final = 1.0
"""Seconds until a request gets its 503, so that a client that tries at once again does not crowd out the others."""
_HEALTHY: Final = "/-/healthy"  # which asks for no password: the agent has none
_SERVER: Final = {"Server": "consul-prom"}  # aiohttp would name its version


class Endpoint:
    """One socket that is served; *render* and *on_scrape* as `Scrapes` has them.

    *about* tells the page for people what to show. *allow* are the networks that may come, *web* the TLS and the
    passwords. Endpoints of one process share their *connections*.
    """

    def __init__(
        self,
        *,
        render: Render,
        about: Callable[[], Mapping[str, str]],
        on_scrape: Callable[[float], None],
        allow: Sequence[Network] = (),
        web: WebConfig | None = None,
        connections: Connections | None = None,
    ) -> None:
        self.scrapes = MetricsHandler(render, on_scrape=on_scrape)
        self._about = about
        self._web = web
        self._server = Server(self._handle, handler_cancellation=True)
        tls = web.tls if web else lambda: None
        self._listener = Listener(self._connect, connections=connections, allow=allow, tls=tls)
        self._without_password = ""

    async def serve(self, server: socket.socket) -> None:
        self._listener.open(server)

    async def aclose(self, *, grace: float = 0.2) -> None:
        """Stop listening; requests that are being answered have *grace* seconds more."""
        self._listener.close()
        await self._server.shutdown(grace)
        self.scrapes.close()

    @property
    def turned_away(self) -> str:
        """Who did not come in since the last scrape, and why, as a sentence; or ""."""
        return self._without_password or self._listener.turned_away

    def _connect(self, connection: Connection) -> asyncio.Protocol:
        return _Protocol(self._server, connection)

    async def _handle(self, request: BaseRequest) -> StreamResponse:
        connection: Connection = request.protocol.connection  # type: ignore[attr-defined]  # it is a _Protocol
        connection.heard()
        headers = {**_SERVER, **self._web.headers} if self._web else _SERVER
        try:
            permitted = await self._permits(request)
        except EndpointError as error:
            await asyncio.sleep(REFUSAL)
            return Response(status=503, text=f"{error}\n", headers=headers)
        if not permitted:
            return self._unauthorized(request, headers)
        with connection.answering():
            return await self._answer(request, headers)

    async def _permits(self, request: BaseRequest) -> bool:
        if self._web is None or request.path == _HEALTHY:
            return True
        return await self._web.permits(request.headers.get("Authorization", ""), peer=request.remote or "")

    async def _answer(self, request: BaseRequest, headers: Mapping[str, str]) -> StreamResponse:
        if request.path not in {"/metrics", _HEALTHY, "/"}:
            return Response(status=404, text="not found\n", headers=headers)
        if request.method not in {"GET", "HEAD"}:
            return Response(status=405, text="method not allowed\n", headers={"Allow": "GET, HEAD", **headers})
        if request.path == "/metrics":
            self._without_password = self._listener.turned_away = ""
            return await self.scrapes.answer(request, headers)
        if request.path == _HEALTHY:
            return Response(text="healthy\n", headers=headers)
        return Response(text=self._home(), content_type="text/html", headers=headers)

    def _unauthorized(self, request: BaseRequest, headers: Mapping[str, str]) -> Response:
        self._without_password = (
            f"{request.remote} came without a password that CONSUL_PROM_WEB_CONFIG has (basic_auth in scrape_configs)"
        )
        return Response(status=401, text="unauthorized\n", headers={"WWW-Authenticate": "Basic", **headers})

    def _home(self) -> str:
        ago = f"{time.time() - self.scrapes.last:.0f} s ago" if self.scrapes.last else "never"
        rows = "".join(
            f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>"
            for key, value in {**self._about(), "last scrape": ago}.items()
        )
        return _HOME.format(rows=rows)


class _Protocol(RequestHandler):
    """aiohttp's side of a *connection*."""

    def __init__(self, server: Server, connection: Connection) -> None:
        options: dict[str, Any] = {
            "access_log": None,
            "logger": _ServerLog(log),
            "lingering_time": 0,  # a body that nobody asked for is not waited for
            "max_headers": MOST_HEADERS,
        }
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self.connection = connection

    def pause_writing(self) -> None:
        super().pause_writing()
        self.connection.stalled()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.connection.resumed()

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio takes it for "keep the connection"
        """Answer the requests of a client that will send no more; asyncio can do so without TLS only."""
        is_idle = self._waiter is not None and not self._waiter.done()
        self.close()
        return not is_idle and self.ssl_context is None

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002  # it repeats what was sent
    ) -> StreamResponse:
        """Answer with the status alone, and without aiohttp's name."""
        response = super().handle_error(request, status, exc, f"{HTTPStatus(status).phrase}\n")
        response.headers.update(_SERVER)
        return response


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
