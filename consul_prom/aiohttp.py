"""aiohttp: one line in the application, ``consul_prom.setup(app, service="shop")``."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Final, Unpack

from aiohttp import web
from aiohttp.typedefs import Handler
from prometheus_client import REGISTRY, CollectorRegistry

from consul_prom.errors import SettingsError
from consul_prom.http_metrics.request_metrics import CANCELLED, UNKNOWN_ROUTE, RequestMetrics, install
from consul_prom.settings.settings import Arguments
from consul_prom.worker import Worker

WORKER: Final = web.AppKey("consul_prom.worker", Worker)
_UPGRADED: Final = web.RequestKey("consul_prom.upgraded", bool)


def setup(app: web.Application, *, registry: CollectorRegistry = REGISTRY, **arguments: Unpack[Arguments]) -> Worker:
    """Serve and register each process that runs *app*, and count its requests.

    The worker starts with the application, so after any fork, and is deregistered on shutdown. Settings that are not
    given are read from the environment.

    Raises:
        SettingsError: an argument is wrong, or *app* has been set up or started already.
    """
    if WORKER in app:
        raise SettingsError("consul_prom.setup was called before for this application", from_code=True)
    if app.pre_frozen:
        raise SettingsError("consul_prom.setup comes before the application starts", from_code=True)
    worker = app[WORKER] = Worker(registry=registry, **arguments)
    if worker.request_metrics:
        counting = _Counting(worker, registry)
        app.middlewares.insert(0, counting.middleware)
        app.on_response_prepare.append(counting.note_upgrade)
        app.cleanup_ctx.append(counting.life)

    async def start(_app: web.Application) -> None:
        worker.start(loop=asyncio.get_running_loop())

    async def start_leaving(_app: web.Application) -> None:
        # Not awaited: a client that aiohttp has let in, but not served, hangs for as long as this handler takes.
        worker.start_leaving()

    async def stop(_app: web.Application) -> AsyncIterator[None]:
        try:
            yield
            await worker.leave()
        finally:  # on an abort the generator is thrown away
            worker.stop()  # has little left to do after `leave`, which an abort or a failed start skips

    app.on_startup.append(start)
    app.on_shutdown.append(start_leaving)
    app.cleanup_ctx.append(stop)
    return worker


class _Counting:
    """The middleware. It comes first, so that it sees what the other ones answer too."""

    def __init__(self, worker: Worker, registry: CollectorRegistry) -> None:
        self._worker = worker
        self._registry = registry
        self._installed = False
        self._metrics: RequestMetrics | None = None

    async def life(self, _app: web.Application) -> AsyncIterator[None]:
        yield
        if self._metrics:
            self._metrics.close(served=self._worker.served)

    def _install(self) -> RequestMetrics | None:
        """At the first request: by then the application has made its own metrics, whose names come first."""
        if not self._installed:
            self._installed, self._metrics = True, install(self._registry)
        return self._metrics

    async def note_upgrade(self, request: web.Request, response: web.StreamResponse) -> None:
        if isinstance(response, web.WebSocketResponse):
            request[_UPGRADED] = True

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        metrics = self._install()
        if metrics is None:
            return await handler(request)
        route, status, begun = _route(request), 500, time.perf_counter()
        try:
            response = await metrics.track(handler(request), method=request.method, route=route)
            status = getattr(response, "status", 500)  # aiohttp's answer to what is no response
        except web.HTTPException as error:
            status = error.status
            raise
        except TimeoutError:
            status = 504  # aiohttp's answer to it
            raise
        except asyncio.CancelledError:
            status = CANCELLED
            raise
        else:
            return response
        finally:
            upgraded = request.get(_UPGRADED, False)

            def over(_task: object) -> None:
                seconds = None if upgraded else time.perf_counter() - begun
                metrics.count(method=request.method, route=route, status=101 if upgraded else status, seconds=seconds)

            # aiohttp writes the answer after the handler, in the same task: the last byte is out when that is done.
            task = asyncio.current_task()
            if task:
                task.add_done_callback(over)


def _route(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return resource.canonical if resource else UNKNOWN_ROUTE
