"""The ASGI applications of the end-to-end tests: one of FastAPI's and one of Starlette's, with the same routes."""

import asyncio
import os
from collections.abc import AsyncIterator

from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

import consul_prom


async def pid(_request: Request) -> Response:
    return PlainTextResponse(str(os.getpid()))


async def item(_request: Request) -> Response:
    await asyncio.sleep(0.01)  # some work, so that one worker cannot take all of a short burst
    return PlainTextResponse(str(os.getpid()))


async def stream(_request: Request) -> Response:
    async def endless() -> AsyncIterator[str]:
        while True:
            yield "x" * 1000
            await asyncio.sleep(0.01)

    return StreamingResponse(endless())


async def chat(talk: WebSocket) -> None:
    await talk.accept()
    await talk.send_text(await talk.receive_text())
    await talk.close()


async def fail(_request: Request) -> Response:
    raise LookupError("mine")


_starlette = Starlette(
    routes=[
        Route("/pid", pid),
        Mount("/shop", routes=[Route("/{item}", item)]),
        Route("/stream", stream),
        Route("/fail", fail),
        WebSocketRoute("/chat/{room}", chat),
    ]
)
star = consul_prom.asgi.instrument(_starlette, service="shop")

_router = APIRouter(prefix="/shop")


@_router.get("/{item}")
async def fast_item(item: str) -> str:
    await asyncio.sleep(0.01)
    return f"{item} by {os.getpid()}"


_fastapi = FastAPI()
_fastapi.include_router(_router)
_fastapi.add_route("/pid", pid)
_fastapi.add_route("/stream", stream)
_fastapi.add_route("/fail", fail)
_fastapi.add_api_websocket_route("/chat/{room}", chat)
fast = consul_prom.asgi.instrument(_fastapi, service="shop")
