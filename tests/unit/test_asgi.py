"""The one line around an ASGI application, message by message."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import fastapi
import pytest
import quart
from prometheus_client import CollectorRegistry, Counter
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Host, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

import consul_prom
from consul_prom.asgi import Instrumented, instrument
from consul_prom.devagent import DevAgent, running
from consul_prom.errors import SettingsError
from consul_prom.process import exit_hooks
from consul_prom.worker.worker import Worker
from tests.services.waiting import eventually

DEADLINE = 10.0
NOBODY = "127.0.0.1:1"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]
Arguments = dict[str, Any]
COMPLETE = {"type": "http.response.body", "body": b"x"}


@pytest.fixture
def arguments(registry: CollectorRegistry, slot_directory: Path) -> Arguments:
    """What an application gives to `instrument`: no Consul anywhere, and the loopback address."""
    return {
        "registry": registry,
        "service": "shop",
        "host": "web-1",
        "address": "127.0.0.1",
        "dir": slot_directory,
        "consul_http_addr": NOBODY,
        "stop_timeout": 1,
    }


@pytest.fixture(autouse=True)
def _end_of_python() -> Iterator[None]:
    """For a worker that started without lifespan, Python exits at the end of its test."""
    yield
    exit_hooks._say_all()


class Server:
    """The server's side of the protocol, for one application; each wait for it has a deadline."""

    def __init__(self, app: Application) -> None:
        self.app = app
        self.answers: list[Message] = []
        self.inbox: asyncio.Queue[Message] = asyncio.Queue()
        self.refusal: OSError | None = None

    async def receive(self) -> Message:
        return await self.inbox.get()

    async def send(self, message: Message) -> None:
        if self.refusal:
            raise self.refusal
        self.answers.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.inbox.put_nowait({"type": "http.disconnect"})  # some applications end at no sooner word

    def sent(self) -> list[str]:
        return [message["type"] for message in self.answers]

    async def until(self, kind: str) -> None:
        await eventually(lambda: kind in self.sent(), within=DEADLINE, what=kind, every=0.005)

    async def ask(self, path: str = "/", method: str = "GET", **scope: Any) -> int:
        """One request; the status of its answer, or 0."""
        self.answers.clear()
        self.inbox = asyncio.Queue()
        self.inbox.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        async with asyncio.timeout(DEADLINE):
            await self.app(http(path, method, **scope), self.receive, self.send)
        return next((int(message["status"]) for message in self.answers if "status" in message), 0)

    def begin(self, scope: Message) -> "asyncio.Task[None]":
        async def call() -> None:
            await self.app(scope, self.receive, self.send)

        return asyncio.ensure_future(call())


def http(path: str = "/", method: str = "GET", **more: Any) -> Message:
    """A request's scope, as uvicorn makes it."""
    ours: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "state": {},
    }
    ours |= {"method": method, "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b""}
    ours |= {"root_path": "", "headers": [(b"host", b"shop.test")], "client": ("127.0.0.1", 1), "server": ("s", 80)}
    return {**ours, **more}


def websocket(path: str = "/") -> Message:
    """A websocket's scope."""
    scope = http(path, type="websocket", scheme="ws", subprotocols=[])
    del scope["method"]
    return scope


@asynccontextmanager
async def living(app: Application) -> AsyncIterator[Server]:
    """The application between its lifespan's startup and shutdown."""
    lifespan = Server(app)
    lifespan.inbox.put_nowait({"type": "lifespan.startup"})
    task = lifespan.begin({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}})
    try:
        await lifespan.until("lifespan.startup.complete")
        yield Server(app)
    finally:
        lifespan.inbox.put_nowait({"type": "lifespan.shutdown"})
        async with asyncio.timeout(DEADLINE):
            await task
    assert lifespan.sent() == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


class Page:
    """The request metrics of a registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def totals(self) -> dict[tuple[str, str, str], float]:
        """By method, route and status."""
        return {
            (sample.labels["method"], sample.labels["route"], sample.labels["status"]): sample.value
            for family in self._registry.collect()
            for sample in family.samples
            if sample.name == "http_requests_total"
        }

    def seconds(self, part: str = "count", *, route: str = "other", method: str = "GET") -> float | None:
        labels = {"method": method, "route": route}
        return self._registry.get_sample_value(f"http_request_duration_seconds_{part}", labels)

    def in_progress(self) -> dict[str, float]:
        """By route."""
        return {
            sample.labels["route"]: sample.value
            for family in self._registry.collect()
            for sample in family.samples
            if sample.name == "http_requests_in_progress"
        }

    def only(self, status: int, *, route: str = "other", method: str = "GET") -> None:
        """One request was counted so, no other was, and none is in progress."""
        assert self.totals() == {(method, route, str(status)): 1}
        assert set(self.in_progress().values()) <= {0}


@pytest.fixture
def page(registry: CollectorRegistry) -> Page:
    return Page(registry)


def _bare(*messages: Message, error: BaseException | None = None) -> Application:
    """An application without lifespan, which sends these messages whatever it is asked, and may raise."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        assert scope["type"] != "lifespan", "no lifespan here"
        for message in messages:
            await send(message)
        if error:
            raise error

    return app


def _start(status: int = 200, **more: Any) -> Message:
    return {"type": "http.response.start", "status": status, "headers": [], **more}


async def _hello(_request: Request) -> Response:
    return PlainTextResponse("hello")


class TestRequests:
    """Plain requests."""

    @pytest.mark.parametrize("status", [200, 204, 302, 404, 503])
    async def test_plain(self, arguments: Arguments, page: Page, status: int) -> None:
        """A request is counted with its method and status, and its duration."""
        async with living(instrument(_bare(_start(status), COMPLETE), **arguments)) as server:
            assert await server.ask(method="POST") == status
            page.only(status, method="POST")
            assert page.seconds(method="POST") == 1
            assert 0 < (page.seconds("sum", method="POST") or 0) < DEADLINE

    async def test_unknown_method(self, arguments: Arguments, page: Page) -> None:
        """A method that is not HTTP's own is OTHER."""
        async with living(instrument(_bare(_start(), COMPLETE), **arguments)) as server:
            await server.ask(method="BREW")
            page.only(200, method="OTHER")

    @pytest.mark.parametrize(
        "end",
        [
            [{"type": "http.response.body", "body": b"x", "more_body": True}, {"type": "http.response.body"}],
            [{"type": "http.response.zerocopysend", "file": 0, "more_body": True}, COMPLETE],
            [{"type": "http.response.zerocopysend", "file": 0}],
            [{"type": "http.response.pathsend", "path": "/x"}],
        ],
        ids=["chunks", "zero copy", "one zero copy", "path"],
    )
    async def test_last_byte(self, arguments: Arguments, page: Page, end: list[Message]) -> None:
        """A request is over with its last byte, in whichever way that is sent, and not with what comes after."""
        sent, go_on = asyncio.Event(), asyncio.Event()

        async def app(scope: Message, receive: Receive, send: Send) -> None:
            await send(_start())
            for message in end[:-1]:
                await send(message)
            assert page.totals() == {}
            await send(end[-1])
            sent.set()
            await go_on.wait()

        server = Server(instrument(app, **arguments))
        task = server.begin(http())
        async with asyncio.timeout(DEADLINE):
            await sent.wait()
            page.only(200)
            go_on.set()
            await task
        page.only(200)

    async def test_trailers(self, arguments: Arguments, page: Page) -> None:
        """An answer with trailers is over with the last of them."""
        seen: list[Any] = []

        async def app(scope: Message, receive: Receive, send: Send) -> None:
            await send(_start(trailers=True))
            await send(COMPLETE)
            await send({"type": "http.response.trailers", "headers": [], "more_trailers": True})
            seen.append(page.totals())
            await send({"type": "http.response.trailers", "headers": []})
            seen.append(page.totals())

        await Server(instrument(app, **arguments)).ask()
        assert seen == [{}, {("GET", "other", "200"): 1}]

    async def test_slow_client(self, arguments: Arguments, page: Page) -> None:
        """The time in which the server waits for its client to take the last byte belongs to the duration."""
        server = Server(instrument(_bare(_start(), COMPLETE), **arguments))

        async def slowly(message: Message) -> None:
            if message["type"] == "http.response.body":
                await asyncio.sleep(0.05)

        await server.app(http(), server.receive, slowly)
        assert (page.seconds("sum") or 0) >= 0.05

    async def test_background_task(self, arguments: Arguments, page: Page) -> None:
        """What fails after the last byte does not change what the client was told."""
        server = Server(instrument(_bare(_start(), COMPLETE, error=LookupError("mine")), **arguments))
        with pytest.raises(LookupError, match="mine"):
            await server.ask()
        page.only(200)


class TestFailures:
    """Requests that do not end with an answer."""

    @pytest.mark.parametrize("before", [[], [_start()]], ids=["before", "amidst"])
    async def test_raised(self, arguments: Arguments, page: Page, before: list[Message]) -> None:
        """An unhandled exception is a 500, though the head may have said 200, and it passes."""
        server = Server(instrument(_bare(*before, error=LookupError("mine")), **arguments))
        with pytest.raises(LookupError, match="mine"):
            await server.ask()
        page.only(500)
        assert page.seconds() == 1

    @pytest.mark.parametrize("before", [[], [_start()]], ids=["nothing", "half"])
    async def test_unfinished(self, arguments: Arguments, page: Page, before: list[Message]) -> None:
        """An application that returns without an answer, or with half of one, is a 500."""
        await Server(instrument(_bare(*before), **arguments)).ask()
        page.only(500)

    async def test_cancelled(self, arguments: Arguments, page: Page) -> None:
        """A request that is cancelled is a 499."""

        async def app(scope: Message, receive: Receive, send: Send) -> None:
            await asyncio.sleep(3600)

        task = Server(instrument(app, **arguments)).begin(http())
        await eventually(lambda: page.in_progress() == {"other": 1}, within=DEADLINE, what="in progress")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        page.only(499)
        assert page.seconds() == 1

    @pytest.mark.parametrize("answers", [False, True])
    async def test_disconnected(self, arguments: Arguments, page: Page, *, answers: bool) -> None:
        """A request whose application heard that the client is gone is a 499, whatever is said into the void."""

        async def app(scope: Message, receive: Receive, send: Send) -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            if answers:
                await send(_start())
                await send(COMPLETE)

        server = Server(instrument(app, **arguments))
        task = server.begin(http())
        server.inbox.put_nowait({"type": "http.disconnect"})
        async with asyncio.timeout(DEADLINE):
            await task
        page.only(499)

    async def test_refused_by_the_server(self, arguments: Arguments, page: Page) -> None:
        """A server that raises OSError, since the client is gone, makes it a 499."""
        server = Server(instrument(_bare(_start(), COMPLETE), **arguments))
        server.refusal = ConnectionResetError()
        with pytest.raises(ConnectionResetError):
            await server.ask()
        page.only(499)

    async def test_streaming_client_leaves(self, arguments: Arguments, page: Page) -> None:
        """Starlette's stream that ends since its client left is a 499."""

        async def endless() -> AsyncIterator[str]:
            while True:
                yield "x"
                await asyncio.sleep(0.01)

        async def stream(_request: Request) -> Response:
            return StreamingResponse(endless())

        server = Server(instrument(Starlette(routes=[Route("/s/{item}", stream)]), **arguments))
        task = server.begin(http("/s/7"))
        await server.until("http.response.body")
        assert page.in_progress() == {"/s/{item}": 1}
        server.inbox.put_nowait({"type": "http.disconnect"})
        async with asyncio.timeout(DEADLINE):
            await task
        page.only(499, route="/s/{item}")


class TestWebsockets:
    """A connection that was upgraded is no request that takes hours."""

    @pytest.mark.parametrize("end", ["return", "raise", "cancel"])
    async def test_accepted(self, arguments: Arguments, page: Page, end: str) -> None:
        """A websocket is in progress while it is open, then a 101 without duration, however it ends."""

        async def chat(talk: WebSocket) -> None:
            await talk.accept()
            await talk.receive_text()
            if end == "raise":
                raise LookupError("mine")
            await talk.close()

        server = Server(instrument(Starlette(routes=[WebSocketRoute("/chat/{room}", chat)]), **arguments))
        server.inbox.put_nowait({"type": "websocket.connect"})
        task = server.begin(websocket("/chat/7"))
        await server.until("websocket.accept")
        assert page.in_progress() == {"/chat/{room}": 1}
        assert page.totals() == {}
        if end == "cancel":
            task.cancel()
        server.inbox.put_nowait({"type": "websocket.receive", "text": "hello"})
        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(task, return_exceptions=True)
        page.only(101, route="/chat/{room}")
        assert page.seconds(route="/chat/{room}") is None

    @pytest.mark.parametrize(
        ("answer", "status"),
        [
            ([{"type": "websocket.close", "code": 1008}], 403),
            ([{"type": "websocket.http.response.start", "status": 401}, {"type": "websocket.http.response.body"}], 401),
            ([], 500),
        ],
        ids=["closed", "denied", "forgotten"],
    )
    async def test_rejected(self, arguments: Arguments, page: Page, answer: list[Message], status: int) -> None:
        """A websocket that is refused has the status that its client sees, and no duration."""
        server = Server(instrument(_bare(*answer), **arguments))
        async with asyncio.timeout(DEADLINE):
            await server.begin(websocket())
        page.only(status)
        assert page.seconds() is None

    async def test_client_leaves_before(self, arguments: Arguments, page: Page) -> None:
        """A client that leaves before it was accepted is a 499."""

        async def app(scope: Message, receive: Receive, send: Send) -> None:
            while (await receive())["type"] != "websocket.disconnect":
                pass

        server = Server(instrument(app, **arguments))
        server.inbox.put_nowait({"type": "websocket.connect"})
        server.inbox.put_nowait({"type": "websocket.disconnect", "code": 1006})
        async with asyncio.timeout(DEADLINE):
            await server.begin(websocket())
        page.only(499)


class _Endpoint(HTTPEndpoint):
    async def get(self, _request: Request) -> Response:
        return PlainTextResponse("hello")


def _starlette(static: Path) -> Starlette:
    inner = [Route("/", _hello), Route("/{item:int}", _hello), Mount("/deep/{level}", routes=[Route("/{x}", _hello)])]
    return Starlette(
        routes=[
            Route("/", _hello),
            Route("/shop/{item}", _hello, methods=["GET"]),
            Route("/files/{path:path}", _hello),
            Route("/class/{item}", _Endpoint),
            Route("/same/{item}", _Endpoint),
            Mount("/static", StaticFiles(directory=static)),
            Mount("/tenants/{tenant}", routes=inner, name="tenants"),
            Mount("/same/{item}/in", routes=[Route("/{item}", _hello)]),
            Mount("/app", Starlette(routes=[Route("/{page}", _hello)])),
            Host("api.test", Starlette(routes=[Route("/host/{item}", _hello)])),
        ]
    )


def _fastapi(static: Path) -> fastapi.FastAPI:
    app = fastapi.FastAPI()
    router, inner, sub = fastapi.APIRouter(prefix="/orders"), fastapi.APIRouter(prefix="/lines"), fastapi.FastAPI()

    async def hello(item: int = 0) -> str:
        return "hello"

    app.get("/shop/{item}")(hello)
    router.get("/{item}")(hello)
    inner.get("/{item}")(hello)
    sub.get("/{item}")(hello)
    router.include_router(inner)
    app.include_router(router, prefix="/api")
    app.mount("/sub/{tenant}", sub)
    app.mount("/static", StaticFiles(directory=static))
    return app


class TestRoutes:
    """The route is the template, whatever a client put into it."""

    @pytest.fixture
    def static(self, tmp_path: Path) -> Path:
        folder = tmp_path / "static"
        folder.mkdir()
        (folder / "style.css").write_text("p {}")
        return folder

    @pytest.mark.parametrize(
        ("path", "status", "route"),
        [
            ("/", 200, "/"),
            ("/shop/7", 200, "/shop/{item}"),
            ("/shop/{item}", 200, "/shop/{item}"),
            ("/files/a/b", 200, "/files/{path}"),
            ("/class/7", 200, "/class/{item}"),
            ("/same/7", 200, "/same/{item}"),
            ("/shop/7/", 307, "other"),
            ("/nothing", 404, "other"),
            ("/static/style.css", 200, "/static"),
            ("/static/nothing", 404, "/static"),
            ("/tenants/acme/", 200, "/tenants/{tenant}/"),
            ("/tenants/7/007", 200, "/tenants/{tenant}/{item}"),
            ("/tenants/a/deep/a/a", 200, "/tenants/{tenant}/deep/{level}/{x}"),
            ("/tenants/a/nothing/x", 404, "/tenants/{tenant}"),
            ("/same/a/in/b", 200, "/same/{item}/in/{item}"),
            ("/app/7", 200, "/app/{page}"),
        ],
    )
    async def test_starlette(
        self, arguments: Arguments, page: Page, static: Path, *, path: str, status: int, route: str
    ) -> None:
        """Starlette's route, with the templates of the mounts that it is in."""
        assert await Server(instrument(_starlette(static), **arguments)).ask(path) == status
        page.only(status, route=route)

    @pytest.mark.parametrize("path", ["/", "/shop/7", "/class/7", "/same/7", "/tenants/acme/7", "/static/style.css"])
    async def test_endpoint_alone(
        self, arguments: Arguments, page: Page, static: Path, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A Starlette that leaves only the endpoint in the scope, as before 1.1, gives the same routes."""

        class Old(dict[str, Any]):
            def __setitem__(self, key: str, value: Any) -> None:
                if key != "route":
                    super().__setitem__(key, value)

        app = _starlette(static)
        await Server(instrument(app, **arguments)).ask(path)
        ((_, route, status),) = page.totals()
        coat = instrument(_starlette(static), **arguments)
        server = Server(coat)
        server.inbox.put_nowait({"type": "http.request", "body": b""})
        await coat(Old(http(path)), server.receive, server.send)
        assert page.totals() == {("GET", route, status): 2}

    async def test_host(self, arguments: Arguments, page: Page, static: Path) -> None:
        """A route below a host is known by its path."""
        server = Server(instrument(_starlette(static), **arguments))
        assert await server.ask("/host/7", headers=[(b"host", b"api.test")]) == 200
        page.only(200, route="/host/{item}")

    async def test_method_not_allowed(self, arguments: Arguments, page: Page, static: Path) -> None:
        """A method that the route does not have is counted with the route."""
        assert await Server(instrument(_starlette(static), **arguments)).ask("/shop/7", "DELETE") == 405
        page.only(405, route="/shop/{item}", method="DELETE")

    async def test_root_path(self, arguments: Arguments, page: Page, static: Path) -> None:
        """What a proxy cut off is no part of the route."""
        server = Server(instrument(_starlette(static), **arguments))
        assert await server.ask("/v1/tenants/a/7", root_path="/v1") == 200
        page.only(200, route="/tenants/{tenant}/{item}")

    @pytest.mark.parametrize(
        ("path", "status", "route"),
        [
            ("/shop/7", 200, "/shop/{item}"),
            ("/shop/x", 422, "/shop/{item}"),
            ("/api/orders/7", 200, "/api/orders/{item}"),
            ("/api/orders/lines/7", 200, "/api/orders/lines/{item}"),
            ("/sub/acme/7", 200, "/sub/{tenant}/{item}"),
            ("/static/style.css", 200, "/static"),
            ("/docs", 200, "/docs"),
            ("/openapi.json", 200, "/openapi.json"),
            ("/nothing", 404, "other"),
        ],
    )
    async def test_fastapi(
        self, arguments: Arguments, page: Page, static: Path, *, path: str, status: int, route: str
    ) -> None:
        """FastAPI's route, with the prefixes of the routers and mounts that it is in."""
        assert await Server(instrument(_fastapi(static), **arguments)).ask(path) == status
        page.only(status, route=route)

    @pytest.mark.parametrize(
        ("path", "status", "route"),
        [
            ("/shop/7", 200, "/shop/<int:item>"),
            ("/blue/7", 200, "/blue/<item>"),
            ("/fail", 500, "/fail"),
            ("/nothing", 404, "other"),
        ],
    )
    @pytest.mark.parametrize("inner", [False, True], ids=["app", "app.asgi_app"])
    async def test_quart(
        self, arguments: Arguments, page: Page, *, path: str, status: int, route: str, inner: bool
    ) -> None:
        """Quart's rule, whether the application or its `asgi_app` is instrumented."""
        app = quart.Quart("shop", static_folder=None)
        blue = quart.Blueprint("blue", "shop", url_prefix="/blue")

        async def hello(item: object) -> str:
            return f"hello {quart.request.url_rule}"

        async def fail() -> str:
            raise LookupError("mine")

        app.add_url_rule("/shop/<int:item>", "shop", hello)
        app.add_url_rule("/fail", "fail", fail)
        blue.add_url_rule("/<item>", "item", hello)
        app.register_blueprint(blue)
        assert await Server(instrument(app.asgi_app if inner else app, **arguments)).ask(path) == status
        page.only(status, route=route)

    async def test_copied_scope(self, arguments: Arguments, page: Page) -> None:
        """Where a middleware hands a copy of the scope on, the route is `other` and nothing else is wrong."""
        app = Starlette(routes=[Route("/{item}", _hello)])

        async def copying(scope: Message, receive: Receive, send: Send) -> None:
            await app(dict(scope), receive, send)

        assert await Server(instrument(copying, **arguments)).ask("/7") == 200
        page.only(200)

    @pytest.mark.parametrize("odd", [{"fastapi": 7}, {"route": object()}, {"endpoint": 7, "router": 7}], ids=" ".join)
    async def test_odd_scope(self, arguments: Arguments, page: Page, odd: Message) -> None:
        """A scope in which something else stands than is expected is `other`, and fails no request."""
        assert await Server(instrument(_bare(_start(), COMPLETE), **arguments)).ask(**odd) == 200
        page.only(200)

    async def test_in_progress(self, arguments: Arguments, page: Page) -> None:
        """A request in progress is `other` until its route is known, and has its route from then on."""
        at_the_door, inside, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def hold(_request: Request) -> Response:
            inside.set()
            await go_on.wait()
            return PlainTextResponse("hello")

        app = Starlette(routes=[Route("/{item}", hold)])

        async def guarded(scope: Message, receive: Receive, send: Send) -> None:
            await at_the_door.wait()
            await app(scope, receive, send)

        server = Server(instrument(guarded, **arguments))
        tasks = [server.begin(http(f"/{number}")) for number in range(3)]
        await eventually(lambda: page.in_progress() == {"other": 3}, within=DEADLINE, what="at the door")
        at_the_door.set()
        async with asyncio.timeout(DEADLINE):
            await inside.wait()
        await eventually(
            lambda: page.in_progress() == {"other": 0, "/{item}": 3}, within=DEADLINE, what="behind the router"
        )
        go_on.set()
        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(*tasks)
        assert page.in_progress() == {"other": 0, "/{item}": 0}
        assert page.totals() == {("GET", "/{item}", "200"): 3}


class TestLifespan:
    """The application's start and end are the worker's."""

    @pytest.fixture
    def agent(self) -> Any:
        with running() as agent:
            yield agent

    @staticmethod
    def _ids(agent: DevAgent) -> list[str]:
        return sorted(agent.state.services)

    async def test_around_the_applications_own(self, arguments: Arguments, agent: DevAgent) -> None:
        """The worker is there before the application starts; its entry goes before the application ends, it after."""
        seen: list[tuple[str, bool, list[str]]] = []

        @asynccontextmanager
        async def lifespan(_app: Starlette) -> AsyncIterator[None]:
            seen.append(("start", bool(app.worker.url), []))
            yield
            seen.append(("end", bool(app.worker.url), self._ids(agent)))

        inner = Starlette(lifespan=lifespan)
        app = instrument(inner, **{**arguments, "consul_http_addr": agent.address})
        async with living(app):
            await eventually(lambda: app.worker.registered, within=DEADLINE, what="it is registered")
            assert self._ids(agent) == ["shop.web-1.0"]
        assert seen == [("start", True, []), ("end", True, [])]
        assert not app.worker.url
        assert list(arguments["registry"].collect()) == []

    async def test_counts_outlive_it(self, arguments: Arguments, page: Page) -> None:
        """Where Gunicorn's hooks have started a worker, which outlives it, its counts stay on the page."""
        hooks = Worker(**arguments)
        hooks.start(keeps=False)
        async with living(instrument(_bare(_start(), {"type": "http.response.body"}), **arguments)) as server:
            assert await server.ask() == 200
        page.only(200)
        hooks.stop(last=True)

    async def test_state(self, arguments: Arguments) -> None:
        """What the application's lifespan puts into the state reaches its requests."""

        @asynccontextmanager
        async def lifespan(_app: Starlette) -> AsyncIterator[dict[str, Any]]:
            yield {"database": "here"}

        async def tell(request: Request) -> Response:
            return PlainTextResponse(request.state.database)

        app = instrument(Starlette(routes=[Route("/", tell)], lifespan=lifespan), **arguments)
        state: dict[str, Any] = {}
        server = Server(app)
        server.inbox.put_nowait({"type": "lifespan.startup"})
        task = server.begin({"type": "lifespan", "state": state})
        await server.until("lifespan.startup.complete")
        assert state == {"database": "here"}
        server.inbox.put_nowait({"type": "lifespan.shutdown"})
        await task

    async def test_again(self, arguments: Arguments, agent: DevAgent, page: Page) -> None:
        """An application that lives twice, as in tests, is registered, and counts, twice."""
        app = instrument(_starlette(Path()), **{**arguments, "consul_http_addr": agent.address})
        for _ in range(2):
            async with living(app) as server:
                await eventually(lambda: app.worker.registered, within=DEADLINE, what="it is registered")
                await server.ask()
                page.only(200, route="/")
            assert self._ids(agent) == []

    @pytest.mark.parametrize("how", ["raises", "returns", "raises late", "returns late"])
    async def test_no_lifespan(
        self, arguments: Arguments, agent: DevAgent, how: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An application that knows no lifespan, or drops out of it, has one of ours; what is odd is one WARNING."""

        async def app(scope: Message, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan":
                if "late" in how:
                    await receive()
                if "raises" in how:
                    raise LookupError("what is this")
                return
            await send(_start())
            await send(COMPLETE)

        caplog.set_level(logging.INFO)
        coat = instrument(app, **{**arguments, "consul_http_addr": agent.address})
        async with living(coat) as server:
            await eventually(lambda: coat.worker.registered, within=DEADLINE, what="it is registered")
            assert await server.ask() == 200
        assert self._ids(agent) == []
        warnings = [record for record in caplog.records if record.name == "consul_prom.asgi"]
        assert len(warnings) == (how == "raises late")

    async def test_failed_start(self, arguments: Arguments, agent: DevAgent) -> None:
        """An application whose own start fails leaves no entry and no slot, and the server hears of it last."""
        left: list[tuple[list[str], int | None]] = []

        @asynccontextmanager
        async def lifespan(_app: Starlette) -> AsyncIterator[None]:
            await eventually(lambda: app.worker.registered, within=DEADLINE, what="it is registered")
            if app.worker.registered:
                raise LookupError("no database")
            yield

        app = instrument(Starlette(lifespan=lifespan), **{**arguments, "consul_http_addr": agent.address})
        inbox: asyncio.Queue[Message] = asyncio.Queue()
        inbox.put_nowait({"type": "lifespan.startup"})

        async def hear(message: Message) -> None:
            assert message["type"] == "lifespan.startup.failed"
            left.append((self._ids(agent), app.worker.slot))

        with pytest.raises(LookupError, match="no database"):
            await app({"type": "lifespan", "state": {}}, inbox.get, hear)
        assert left == [([], None)]

    async def test_failed_end(self, arguments: Arguments, agent: DevAgent) -> None:
        """An application whose own end fails passes that on, and leaves no entry."""

        async def app(scope: Message, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            raise LookupError("mine")

        coat = instrument(app, **{**arguments, "consul_http_addr": agent.address})
        with pytest.raises(LookupError, match="mine"):
            async with living(coat):
                await eventually(lambda: coat.worker.registered, within=DEADLINE, what="it is registered")
        assert self._ids(agent) == []
        assert coat.worker.slot is None

    async def test_cancelled(self, arguments: Arguments, agent: DevAgent) -> None:
        """A server that cancels the lifespan, instead of ending it, leaves no entry either."""

        async def wait(scope: Message, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()

        app = instrument(wait, **{**arguments, "consul_http_addr": agent.address})
        server = Server(app)
        server.inbox.put_nowait({"type": "lifespan.startup"})
        task = server.begin({"type": "lifespan", "state": {}})
        await eventually(lambda: app.worker.registered, within=DEADLINE, what="it is registered")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert self._ids(agent) == []

    async def test_off(self, arguments: Arguments, agent: DevAgent) -> None:
        """Where the server has lifespan off, the worker starts at the first request, once."""
        app = instrument(_starlette(Path()), **{**arguments, "consul_http_addr": agent.address})
        server = Server(app)
        assert app.worker.slot is None
        assert await server.ask() == 200
        url = app.worker.url
        assert url
        assert await server.ask() == 200
        assert app.worker.url == url
        await eventually(lambda: app.worker.registered, within=DEADLINE, what="it is registered")
        app.worker.stop()
        assert self._ids(agent) == []
        assert await server.ask() == 200
        assert repr(app.worker) == "<Worker None url=None registered=False>"

    async def test_required(self, arguments: Arguments) -> None:
        """Where it is required, the startup of an application that cannot be registered fails, in a sentence."""
        app = instrument(Starlette(), **{**arguments, "required": True, "start_timeout": "300ms"})
        server = Server(app)
        server.inbox.put_nowait({"type": "lifespan.startup"})
        async with asyncio.timeout(DEADLINE):
            await server.begin({"type": "lifespan", "state": {}})
        (answer,) = server.answers
        assert answer["type"] == "lifespan.startup.failed"
        assert "CONSUL_PROM_START_TIMEOUT" in answer["message"]
        assert app.worker.slot is None


class TestInstrument:
    """What `instrument` gives, and when it refuses."""

    def test_by_attribute(self) -> None:
        """The package has the module as an attribute."""
        assert consul_prom.asgi.instrument is instrument

    @pytest.mark.parametrize("again", ["the application", "the result"])
    def test_twice(self, arguments: Arguments, again: str) -> None:
        """A second call for one application is refused."""
        app = Starlette()
        coat = instrument(app, **arguments)
        with pytest.raises(SettingsError, match="was called before for this application") as caught:
            instrument(app if again == "the application" else coat, **arguments)
        assert caught.value.from_code

    def test_after_the_first_is_gone(self, arguments: Arguments) -> None:
        """An application whose first coat nobody has any more gets another."""
        app = Starlette()
        assert isinstance(instrument(app, **arguments), Instrumented)
        assert isinstance(instrument(app, **arguments), Instrumented)

    @pytest.mark.parametrize("wrong", [{"service": "Shop"}, {"port": "x"}, {"nonsense": 1}], ids=lambda w: str(*w))
    def test_wrong_argument(self, arguments: Arguments, wrong: Arguments) -> None:
        """A wrong argument is refused at once, and the application may be instrumented again."""
        app = Starlette()
        with pytest.raises(SettingsError):
            instrument(app, **{**arguments, **wrong})
        instrument(app, **arguments)

    @pytest.mark.parametrize(
        "variable", [("CONSUL_PROM_PORT", "x"), ("CONSUL_HTTP_SSL_VERIFY", "maybe"), ("PROMETHEUS_MULTIPROC_DIR", "/m")]
    )
    async def test_wrong_environment(
        self,
        arguments: Arguments,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        variable: tuple[str, str],
    ) -> None:
        """What is wrong in the environment is one ERROR line that names it, and the application serves without us."""
        monkeypatch.setenv(*variable)
        async with living(instrument(_starlette(Path()), **arguments)) as server:
            assert await server.ask() == 200
        (record,) = [record for record in caplog.records if record.name.startswith("consul_prom")]
        assert record.levelno == logging.ERROR
        assert variable[1] in record.message

    async def test_as_a_middleware(self, arguments: Arguments, page: Page) -> None:
        """It may be added as a middleware of Starlette's or FastAPI's, which then stays what it is."""
        app = fastapi.FastAPI()
        app.add_middleware(instrument, **arguments)

        @app.get("/shop/{item}")
        async def shop(item: int) -> str:
            return "hello"

        async with living(app) as server:
            assert await server.ask("/shop/7") == 200
            page.only(200, route="/shop/{item}")


class TestSwitches:
    """What can be switched off."""

    async def test_disabled(self, arguments: Arguments, registry: CollectorRegistry) -> None:
        """Disabled means no server, no metrics and no file."""
        app = instrument(_starlette(Path()), **{**arguments, "disabled": True})
        async with living(app) as server:
            assert await server.ask() == 200
            assert (app.worker.url, app.worker.slot) == (None, None)
            assert list(registry.collect()) == []
        assert list(arguments["dir"].iterdir()) == []

    async def test_without_request_metrics(self, arguments: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without request metrics the worker serves the application's own."""
        monkeypatch.setenv("CONSUL_PROM_REQUEST_METRICS", "false")
        app = instrument(_starlette(Path()), **arguments)
        async with living(app) as server:
            assert await server.ask() == 200
            names = {family.name for family in arguments["registry"].collect()}
        assert "consul_prom_registered" in names
        assert "http_requests" not in names

    async def test_name_of_the_applications_own(
        self, arguments: Arguments, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A metric that the application makes in its own start comes first: one WARNING, and ours are off."""

        @asynccontextmanager
        async def lifespan(_app: Starlette) -> AsyncIterator[None]:
            Counter("http_requests", "Mine.", registry=registry).inc(7)
            yield

        async with living(instrument(Starlette(routes=[Route("/", _hello)], lifespan=lifespan), **arguments)) as server:
            for _ in range(3):
                assert await server.ask() == 200
            assert registry.get_sample_value("http_requests_total") == 7
        assert [r.levelname for r in caplog.records if "request metrics" in r.message] == ["WARNING"]
