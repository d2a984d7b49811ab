"""The application of the end-to-end tests: one counter, the one line, and handlers that misbehave on request."""

import asyncio
import os
import time

from aiohttp import web
from prometheus_client import Counter, generate_latest

import consul_prom

REQS = Counter("reqs", "Requests of the shop.", ["view"])


async def fire(_request: web.Request) -> web.Response:
    REQS.labels("fire").inc()
    time.sleep(0.01)  # noqa: ASYNC251  # some work, so that one worker cannot take all of a short burst
    return web.Response(text="fired")


async def naive(_request: web.Request) -> web.Response:
    """What an application without consul-prom would tell Prometheus."""
    return web.Response(text=generate_latest().decode())


async def pid(_request: web.Request) -> web.Response:
    return web.Response(text=str(os.getpid()))


async def block(request: web.Request) -> web.Response:
    time.sleep(float(request.query["seconds"]))  # noqa: ASYNC251  # the mistake that blocks a loop
    return web.Response(text="done")


async def nap(request: web.Request) -> web.Response:
    await asyncio.sleep(float(request.query["seconds"]))
    return web.Response(text="done")


async def fail(_request: web.Request) -> web.Response:
    raise web.HTTPInternalServerError


async def get_application() -> web.Application:
    app = web.Application()
    app.add_routes(
        [
            web.get("/fire", fire),
            web.get("/metrics", naive),
            web.get("/pid", pid),
            web.get("/block", block),
            web.get("/nap", nap),
            web.get("/fail", fail),
        ]
    )
    consul_prom.setup(app, service="shop")
    return app
