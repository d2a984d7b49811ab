"""ASGI: one line around the application, ``app = consul_prom.asgi.instrument(app, service="shop")``."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, ClassVar, Unpack
from weakref import WeakValueDictionary

from prometheus_client import REGISTRY, CollectorRegistry

from consul_prom.errors import ConsulPromError, SettingsError
from consul_prom.http_metrics.request_metrics import CANCELLED, OpenRequest, Requests
from consul_prom.http_metrics.routes import of_scope, tell_routes
from consul_prom.settings.settings import Arguments
from consul_prom.worker import Worker

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Any, Any, Any], Awaitable[None]]  # frameworks differ in how they type the three


def instrument(
    app: Application, *, registry: CollectorRegistry = REGISTRY, **arguments: Unpack[Arguments]
) -> "Instrumented":
    """Serve and register each process that runs the result, and count its requests.

    The worker lives from the lifespan's startup to its shutdown. Where the server has lifespan off, it starts at the
    first request and leaves when the process ends.

    Raises:
        SettingsError: an argument is wrong, or *app* has been instrumented already.
    """
    if isinstance(app, Instrumented) or id(app) in Instrumented.of_application:
        raise SettingsError("consul_prom.asgi.instrument was called before for this application", from_code=True)
    return Instrumented(app, Worker(registry=registry, **arguments), registry)


class Instrumented:
    """The application that `instrument` gives; `worker` is its process as a target."""

    of_application: ClassVar[WeakValueDictionary[int, "Instrumented"]] = WeakValueDictionary()

    def __init__(self, app: Application, worker: Worker, registry: CollectorRegistry) -> None:
        self.worker = worker
        self._app = app
        self._has_begun = False
        self._requests = Requests(registry)
        self.of_application[id(app)] = self  # which keeps `app`, so that no other object gets its id
        if worker.request_metrics:
            tell_routes(app, "scope")

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._has_begun = True
            await _Lifespan(self.worker, self._requests, receive, send).run(self._app, scope)
            return
        if not self._has_begun:
            self.worker.start(loop=asyncio.get_running_loop())
            self._has_begun = True
        request = None
        if self.worker.request_metrics and scope["type"] in {"http", "websocket"}:
            request = self._requests.begin(scope.get("method", "GET"), lambda: of_scope(scope))
        if request is None:
            await self._app(scope, receive, send)
        else:
            await _Exchange(request, receive, send).run(self._app, scope)


class _Lifespan:
    """The server's events, passed on to the application, with the worker's life around its own."""

    def __init__(self, worker: Worker, requests: Requests, receive: Receive, send: Send) -> None:
        self._worker = worker
        self._requests = requests
        self._receive = receive
        self._send = send
        self._startup: Message | None = None
        self._ends = False
        self._answer = ""

    async def run(self, app: Application, scope: Message) -> None:
        try:
            self._startup = await self._receive()
            try:
                self._worker.start(loop=asyncio.get_running_loop())
            except ConsulPromError as error:  # only where REQUIRED
                await self._send({"type": "lifespan.startup.failed", "message": str(error)})
            else:
                await self._run_app(app, scope)
        finally:
            self._stop()

    async def _run_app(self, app: Application, scope: Message) -> None:
        try:
            await app(scope, self.receive, self.send)
        except Exception:
            if self._ends or self._answer not in {"", "lifespan.startup.complete"}:
                raise
            # An application that knows no lifespan raises before it asks for an event.
            log.log(logging.DEBUG if self._startup else logging.WARNING, "going on without lifespan", exc_info=True)
        if not self._answer:
            await self.send({"type": "lifespan.startup.complete"})
        if self._answer == "lifespan.startup.complete":
            self._startup = None
            while not self._ends:
                await self.receive()
            await self.send({"type": "lifespan.shutdown.complete"})

    async def receive(self) -> Message:
        message, self._startup = self._startup or await self._receive(), None
        if message["type"] == "lifespan.shutdown":
            self._ends = True
            await self._worker.leave()
        return message

    async def send(self, message: Message) -> None:
        self._answer = message["type"]
        if self._answer != "lifespan.startup.complete":  # the server may end the process as soon as it has this
            await self._worker.leave()
            self._stop()
        await self._send(message)

    def _stop(self) -> None:
        self._worker.stop()
        self._requests.close(served=self._worker.served)


class _Exchange:
    """The messages of one request or websocket, which tell its status and its end."""

    def __init__(self, request: OpenRequest, receive: Receive, send: Send) -> None:
        self._request = request
        self._receive = receive
        self._send = send
        self._status = 0
        self._gone = self._has_trailers = False

    async def run(self, app: Application, scope: Message) -> None:
        try:
            await app(scope, self.receive, self.send)
        except asyncio.CancelledError:
            self._gone = True
            raise
        finally:
            status = CANCELLED if self._gone else 500
            if scope["type"] == "websocket":
                self._request.end(self._status or status, timed=False)
            else:
                self._request.end(status)  # of an answer without an end; others have been counted

    async def receive(self) -> Message:
        message = await self._receive()
        self._gone = self._gone or message["type"] in {"http.disconnect", "websocket.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        try:
            await self._send(message)
        except OSError:
            self._gone = True
            raise
        match message["type"]:
            case "http.response.start" | "websocket.http.response.start":
                self._status = message["status"]
                self._has_trailers = message.get("trailers", False)
            case "websocket.accept":
                self._status = 101
            case "websocket.close":
                self._status = self._status or 403
            case "http.response.body" | "http.response.zerocopysend" if not self._has_trailers:
                self._end_unless(message.get("more_body", False))
            case "http.response.trailers":
                self._end_unless(message.get("more_trailers", False))
            case "http.response.pathsend":
                self._end_unless(False)

    def _end_unless(self, more: bool) -> None:  # noqa: FBT001
        if not more:
            self._request.end(CANCELLED if self._gone else self._status)
