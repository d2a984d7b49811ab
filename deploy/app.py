"""The application of the examples here: a shop, whose name is in gunicorn.conf.py."""

import asyncio
import random

from aiohttp import web

import consul_prom


async def front(_request: web.Request) -> web.Response:
    return web.Response(text="Welcome.\n")


async def product(request: web.Request) -> web.Response:
    await asyncio.sleep(random.expovariate(20))
    return web.Response(text=f"Product {request.match_info['number']}.\n")


async def get_application() -> web.Application:
    app = web.Application()
    app.router.add_get("/", front)
    app.router.add_get("/products/{number}", product)
    consul_prom.setup(app)  # the hooks serve the worker anyhow; this counts its requests and measures its loop
    return app
