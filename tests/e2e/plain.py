"""Applications that know nothing of consul-prom, which Gunicorn's hooks serve; each can be told to misbehave."""

import asyncio
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from aiohttp import web
from prometheus_client import Counter

Counter("imports", "How often this was imported.").inc()


def fail_if_told() -> None:
    """A file in the server's directory: the next worker does not come up."""
    if Path("boom").exists():
        raise RuntimeError("boom")


fail_if_told()
Send = Any


async def pid(_request: web.Request) -> web.Response:
    return web.Response(text=str(os.getpid()))


async def block(request: web.Request) -> web.Response:
    time.sleep(float(request.query["seconds"]))  # noqa: ASYNC251  # the mistake that blocks a loop
    return web.Response(text=str(os.getpid()))


async def nap(request: web.Request) -> web.Response:
    await asyncio.sleep(float(request.query["seconds"]))
    return web.Response(text=str(os.getpid()))


async def aiohttp_app() -> web.Application:
    fail_if_told()  # what was preloaded is not imported again
    app = web.Application()
    app.add_routes([web.get("/pid", pid), web.get("/block", block), web.get("/nap", nap)])
    return app


def wsgi(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    if environ["PATH_INFO"] == "/fork":
        child = os.fork()
        if not child:
            sys.exit(0)  # Gunicorn answers 500, and ends the child as if it were a worker
        os.waitpid(child, 0)
        print("the forked child has ended", file=sys.stderr, flush=True)
    seconds = parse_qs(environ.get("QUERY_STRING", "")).get("seconds")
    if seconds:
        time.sleep(float(seconds[0]))
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]


async def asgi(scope: dict[str, Any], receive: Any, send: Send) -> None:
    if scope["type"] == "lifespan":
        while (await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    seconds = float(parse_qs(scope["query_string"].decode()).get("seconds", ["0"])[0])
    if scope["path"] == "/block":
        time.sleep(seconds)  # noqa: ASYNC251  # the mistake that blocks a loop
    await asyncio.sleep(seconds)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": str(os.getpid()).encode()})
