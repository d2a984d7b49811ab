"""The same applications as in `plain`, set up in code."""

import sys

from aiohttp import web

import consul_prom
from tests.e2e import plain

asgi = consul_prom.asgi.instrument(plain.asgi, service="shop")


async def aiohttp_app() -> web.Application:
    app = await plain.aiohttp_app()
    consul_prom.setup(app, service="shop")
    return app


if __name__ == "__main__":
    web.run_app(aiohttp_app(), host=sys.argv[1], port=8000)
