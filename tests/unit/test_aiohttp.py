"""The one line in an aiohttp application, over real connections."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.typedefs import Handler
from prometheus_client import CollectorRegistry, Counter, Gauge
from yarl import URL

import consul_prom
from consul_prom.aiohttp import WORKER, setup
from consul_prom.devagent import DevAgent, Fault, running
from consul_prom.errors import ConsulPromError, SettingsError
from consul_prom.worker.worker import Worker
from tests.services.waiting import eventually

DEADLINE = 10.0
NOBODY = "127.0.0.1:1"

Labels = dict[str, str]
Arguments = dict[str, Any]


@pytest.fixture
def arguments(registry: CollectorRegistry, slot_directory: Path) -> Arguments:
    """What an application gives to `setup`: no Consul anywhere, and the loopback address."""
    return {
        "registry": registry,
        "service": "shop",
        "host": "web-1",
        "address": "127.0.0.1",
        "dir": slot_directory,
        "consul_http_addr": NOBODY,
        "stop_timeout": 1,
    }


class Client:
    """Asks one running application, and reads the request metrics."""

    def __init__(self, session: aiohttp.ClientSession, url: URL, registry: CollectorRegistry) -> None:
        self.session = session
        self.url = url
        self._registry = registry

    async def ask(self, path: str = "/", method: str = "GET", **options: Any) -> tuple[int, str]:
        url = self.url.join(URL(path, encoded=True))
        async with self.session.request(method, url, allow_redirects=False, **options) as response:
            return response.status, await response.text()

    async def scrape(self, worker: Worker) -> str:
        async with self.session.get(worker.url or "") as page:
            assert page.status == 200
            return await page.text()

    def total(self, status: int, *, route: str = "/", method: str = "GET") -> float:
        labels = {"method": method, "route": route, "status": str(status)}
        return self._registry.get_sample_value("http_requests_total", labels) or 0

    def seconds(self, part: str = "count", *, route: str = "/", method: str = "GET") -> float | None:
        labels = {"method": method, "route": route}
        return self._registry.get_sample_value(f"http_request_duration_seconds_{part}", labels)

    def in_progress(self, *, route: str = "/", method: str = "GET") -> float | None:
        return self._registry.get_sample_value("http_requests_in_progress", {"method": method, "route": route})

    async def counted(self, status: int, *, route: str = "/", method: str = "GET", times: int = 1) -> None:
        """Exactly so, and nothing else was counted, and nothing is in progress."""
        await eventually(
            lambda: self.total(status, route=route, method=method) == times,
            within=DEADLINE,
            what=f"{method} {route} {status} was counted",
            every=0.005,
        )
        families = {family.name: family for family in self._registry.collect()}
        totals = [sample for sample in families["http_requests"].samples if sample.name.endswith("_total")]
        assert sum(sample.value for sample in totals) == times, totals
        assert all(sample.value == 0 for sample in families["http_requests_in_progress"].samples)


Serve = Callable[..., Any]


@pytest.fixture
def serve(registry: CollectorRegistry) -> Serve:
    """Runs an application on a free port, as a context manager that gives a client."""

    @asynccontextmanager
    async def run(app: web.Application, **options: Any) -> AsyncIterator[Client]:
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5, **options)
        try:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            url = URL.build(scheme="http", host="127.0.0.1", port=runner.addresses[0][1])
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(DEADLINE)) as session:
                yield Client(session, url, registry)
        finally:
            await runner.cleanup()

    return run


async def _hello(_request: web.Request) -> web.StreamResponse:
    return web.Response(text="hello")


def _app(*handlers: tuple[str, Callable[[web.Request], Awaitable[web.StreamResponse]]]) -> web.Application:
    app = web.Application()
    for path, handler in handlers or [("/", _hello)]:
        app.router.add_route("*", path, handler)
    return app


def _raising(error: BaseException) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def fail(_request: web.Request) -> web.StreamResponse:
        raise error

    return fail


class TestRequests:
    """Plain requests."""

    async def test_plain(self, serve: Serve, arguments: Arguments) -> None:
        """A request is counted with its method, route and status, and its duration."""
        app = _app()
        setup(app, **arguments)
        async with serve(app) as client:
            for _ in range(3):
                assert await client.ask() == (200, "hello")
            await client.counted(200, times=3)
            assert client.seconds() == 3
            assert 0 < (client.seconds("sum") or 0) < DEADLINE

    @pytest.mark.parametrize("method", ["HEAD", "POST", "DELETE", "OPTIONS"])
    async def test_methods(self, serve: Serve, arguments: Arguments, method: str) -> None:
        """Each method of HTTP has its own series."""
        app = _app()
        setup(app, **arguments)
        async with serve(app) as client:
            await client.ask(method=method)
            await client.counted(200, method=method)

    async def test_unknown_method(self, serve: Serve, arguments: Arguments) -> None:
        """A method that is not HTTP's own is OTHER."""
        app = _app()
        setup(app, **arguments)
        async with serve(app) as client:
            assert (await client.ask(method="PROPFIND"))[0] == 200
            await client.counted(200, method="OTHER")

    @pytest.mark.parametrize("path", ["/nothing", "/%ff%0a%22%5c", "/nothing?x=1"])
    async def test_unknown_route(self, serve: Serve, arguments: Arguments, path: str) -> None:
        """A path that leads nowhere is `other`, so that nobody can make series at will."""
        app = _app()
        setup(app, **arguments)
        async with serve(app) as client:
            assert (await client.ask(path))[0] == 404
            await client.counted(404, route="other")

    async def test_method_not_allowed(self, serve: Serve, arguments: Arguments) -> None:
        """A method that the route does not have is `other` too."""
        app = web.Application()
        app.router.add_get("/", _hello)
        setup(app, **arguments)
        async with serve(app) as client:
            assert (await client.ask(method="POST"))[0] == 405
            await client.counted(405, route="other", method="POST")

    @pytest.mark.parametrize(
        ("template", "path", "route"),
        [
            ("/shop/{item}", "/shop/7", "/shop/{item}"),
            ("/shop/{item}", "/shop/%ff%0a%22", "/shop/{item}"),
            (r"/shop/{item:\d+}/{rest:.*}", "/shop/7/a/b", "/shop/{item}/{rest}"),
            ("/smörgås", "/sm%C3%B6rg%C3%A5s", "/smörgås"),
            ('/a"b', "/a%22b", '/a"b'),
            ("/a\\b", "/a%5Cb", "/a\\b"),
            ("/a\nb", "/a%0Ab", "/a\nb"),
            ("/%FF", "/%FF", "/%FF"),
        ],
    )
    async def test_template(self, serve: Serve, arguments: Arguments, template: str, path: str, route: str) -> None:
        """The route is the template, whatever a client put into it, and the page stays whole."""
        app = _app((template, _hello))
        worker = setup(app, **arguments)
        async with serve(app) as client:
            assert await client.ask(path) == (200, "hello")
            await client.counted(200, route=route)
            escaped = route.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
            assert f'route="{escaped}"' in await client.scrape(worker)

    async def test_sub_application(self, serve: Serve, arguments: Arguments) -> None:
        """A route of a sub-application has its prefix, and its middlewares run inside of ours."""
        sub = _app(("/{item}", _hello))
        app = _app()
        app.add_subapp("/sub", sub)
        setup(app, **arguments)
        async with serve(app) as client:
            assert await client.ask("/sub/7") == (200, "hello")
            await client.counted(200, route="/sub/{item}")

    async def test_static_files(self, serve: Serve, arguments: Arguments, tmp_path: Path) -> None:
        """All files of a folder are one route."""
        (tmp_path / "style.css").write_text("p {}")
        app = web.Application()
        app.router.add_static("/static", tmp_path)
        setup(app, **arguments)
        async with serve(app) as client:
            assert (await client.ask("/static/style.css"))[1] == "p {}"
            await client.counted(200, route="/static")

    async def test_other_middlewares_are_inside(self, serve: Serve, arguments: Arguments) -> None:
        """What the application's own middlewares answer is counted as they answer it."""

        @web.middleware
        async def refuse(request: web.Request, handler: Handler) -> web.StreamResponse:
            raise web.HTTPForbidden

        app = web.Application(middlewares=[refuse])
        app.router.add_get("/", _hello)
        setup(app, **arguments)
        async with serve(app) as client:
            assert (await client.ask())[0] == 403
            await client.counted(403)


class TestFailures:
    """Handlers that do not return a response."""

    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (LookupError("mine"), 500),
            (web.HTTPNotFound(), 404),
            (web.HTTPFound("/elsewhere"), 302),
            (web.HTTPNoContent(), 204),
            (web.HTTPServiceUnavailable(), 503),
            (TimeoutError(), 504),
            (ConnectionResetError(), 500),
        ],
        ids=repr,
    )
    async def test_raised(self, serve: Serve, arguments: Arguments, error: Exception, status: int) -> None:
        """What a handler raises is counted with the status that aiohttp answers."""
        app = _app(("/", _raising(error)))
        setup(app, **arguments)
        async with serve(app) as client:
            assert (await client.ask())[0] == status
            await client.counted(status)
            assert client.seconds() == 1

    async def test_no_response(self, serve: Serve, arguments: Arguments, caplog: pytest.LogCaptureFixture) -> None:
        """A handler that forgets to return gets aiohttp's own words in the log, not an exception of ours."""

        async def forget(_request: web.Request) -> Any:
            return None

        app = _app(("/", forget))
        setup(app, **arguments)
        async with serve(app) as client:
            assert (await client.ask())[0] == 500
            await client.counted(500)
        assert "Missing return statement on request handler" in caplog.text

    async def test_cancelled(self, serve: Serve, arguments: Arguments) -> None:
        """A handler that is cancelled since its client left is a 499."""
        begun = asyncio.Event()

        async def wait(_request: web.Request) -> web.StreamResponse:
            begun.set()
            await asyncio.sleep(3600)
            return web.Response()

        app = _app(("/", wait))
        setup(app, **arguments)
        async with serve(app, handler_cancellation=True) as client:
            asking = asyncio.ensure_future(client.ask())
            await begun.wait()
            assert client.in_progress() == 1
            asking.cancel()
            await client.counted(499)
            assert client.seconds() == 1

    async def test_client_leaves(self, serve: Serve, arguments: Arguments) -> None:
        """Where handlers are not cancelled, one whose client left goes on, and is counted when it is done."""
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def wait(_request: web.Request) -> web.StreamResponse:
            begun.set()
            await go_on.wait()
            return web.Response(text="x")

        app = _app(("/", wait))
        setup(app, **arguments)
        async with serve(app) as client:
            asking = asyncio.ensure_future(client.ask())
            await begun.wait()
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            assert client.in_progress() == 1
            go_on.set()
            await client.counted(200)


class TestStreams:
    """Answers that take their time."""

    async def test_handler_that_streams(self, serve: Serve, arguments: Arguments) -> None:
        """A streamed answer is in progress, and not counted, until its last byte; its duration covers that."""
        go_on = asyncio.Event()

        async def stream(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b"first")
            await go_on.wait()
            await response.write(b"last")
            return response

        app = _app(("/", stream))
        setup(app, **arguments)
        async with serve(app) as client:
            async with client.session.get(client.url) as response:
                assert await response.content.readexactly(5) == b"first"
                assert client.in_progress() == 1
                assert client.total(200) == 0
                asyncio.get_running_loop().call_later(0.1, go_on.set)
                assert await response.content.read() == b"last"
            await client.counted(200)
            assert (client.seconds("sum") or 0) >= 0.099

    async def test_body_after_the_handler(self, serve: Serve, arguments: Arguments) -> None:
        """A body that aiohttp writes after the handler returned counts into the duration."""
        go_on = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield b"first"
            await go_on.wait()
            yield b"last"

        async def answer(_request: web.Request) -> web.StreamResponse:
            return web.Response(body=slow())

        app = _app(("/", answer))
        setup(app, **arguments)
        async with serve(app) as client:
            async with client.session.get(client.url) as response:
                assert await response.content.readexactly(5) == b"first"
                assert client.total(200) == 0
                asyncio.get_running_loop().call_later(0.1, go_on.set)
                assert await response.content.read() == b"last"
            await client.counted(200)
            assert (client.seconds("sum") or 0) >= 0.099

    async def test_stream_that_breaks(self, serve: Serve, arguments: Arguments) -> None:
        """A handler that raises in the middle of its answer is a 500, though the head said 200."""

        async def stream(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b"first")
            raise LookupError("mine")

        app = _app(("/", stream))
        setup(app, **arguments)
        async with serve(app) as client:
            with pytest.raises(aiohttp.ClientError):
                await client.ask()
            await client.counted(500)


class TestWebsockets:
    """A connection that was upgraded is no request that takes hours."""

    @pytest.mark.parametrize("end", ["return", "raise", "http exception", "timeout"])
    async def test_upgraded(self, serve: Serve, arguments: Arguments, end: str) -> None:
        """A websocket is in progress while it is open, then a 101 without duration, however its handler ends."""
        errors = {"raise": LookupError("mine"), "http exception": web.HTTPNotFound(), "timeout": TimeoutError()}

        async def chat(request: web.Request) -> web.StreamResponse:
            talk = web.WebSocketResponse()
            await talk.prepare(request)
            await talk.send_str(f"you said {await talk.receive_str()}")
            if end in errors:
                raise errors[end]
            await talk.close()
            return talk

        app = _app(("/", chat))
        setup(app, **arguments)
        async with serve(app) as client:
            async with client.session.ws_connect(client.url) as talk:
                assert client.in_progress() == 1
                await talk.send_str("hello")
                assert await talk.receive_str() == "you said hello"
                assert client.total(101) == 0 or end in errors
                await talk.receive()
            await client.counted(101)
            assert client.seconds() is None

    async def test_client_disappears(self, serve: Serve, arguments: Arguments) -> None:
        """A websocket whose client is gone, and whose handler is cancelled, is a 101 too."""

        async def chat(request: web.Request) -> web.StreamResponse:
            talk = web.WebSocketResponse()
            await talk.prepare(request)
            await asyncio.sleep(3600)
            return talk

        app = _app(("/", chat))
        setup(app, **arguments)
        async with serve(app, handler_cancellation=True) as client:
            talk = await client.session.ws_connect(client.url)
            await eventually(lambda: client.in_progress() == 1, within=DEADLINE, what="it is open")
            transport = talk._response.connection.transport if talk._response.connection else None
            assert transport
            transport.abort()
            await client.counted(101)
            assert client.seconds() is None
            await talk.close()

    async def test_sub_application(self, serve: Serve, arguments: Arguments) -> None:
        """A websocket of a sub-application is known as one."""

        async def chat(request: web.Request) -> web.StreamResponse:
            talk = web.WebSocketResponse()
            await talk.prepare(request)
            await talk.close()
            return talk

        app = _app()
        app.add_subapp("/sub", _app(("/chat", chat)))
        setup(app, **arguments)
        async with serve(app) as client:
            async with client.session.ws_connect(client.url / "sub/chat") as talk:
                await talk.receive()
            await client.counted(101, route="/sub/chat")

    async def test_refused(self, serve: Serve, arguments: Arguments) -> None:
        """A plain request to a websocket's route is a 400 with a duration."""

        async def chat(request: web.Request) -> web.StreamResponse:
            await web.WebSocketResponse().prepare(request)
            raise AssertionError("it was no handshake")

        app = _app(("/", chat))
        setup(app, **arguments)
        async with serve(app) as client:
            assert (await client.ask())[0] == 400
            await client.counted(400)
            assert client.seconds() == 1


class TestSetup:
    """What `setup` does to an application, and when it refuses."""

    @pytest.fixture
    def open_directory(self, tmp_path: Path) -> Path:
        directory = tmp_path / "open"
        directory.mkdir()
        directory.chmod(0o755)
        return directory

    async def test_worker(self, serve: Serve, arguments: Arguments) -> None:
        """It gives the worker, which is the application's too, and serves once the application has started."""
        app = _app()
        worker = setup(app, **arguments)
        assert isinstance(worker, Worker)
        assert app[WORKER] is worker
        assert worker.url is None
        async with serve(app) as client:
            assert await client.ask() == (200, "hello")
            await client.counted(200)
            assert worker.instance == "web-1:0"
            text = await client.scrape(worker)
            assert 'http_requests_total{method="GET",route="/",status="200"} 1.0' in text
            assert "consul_prom_registered 0.0" in text
        assert not worker.url

    def test_same_function_by_both_names(self) -> None:
        """The package's `setup` is this one."""
        assert consul_prom.setup is setup

    async def test_twice(self, arguments: Arguments) -> None:
        """A second call on one application is refused."""
        app = _app()
        setup(app, **arguments)
        with pytest.raises(SettingsError, match="was called before for this application") as caught:
            setup(app, **arguments)
        assert caught.value.from_code

    async def test_after_the_start(self, serve: Serve, arguments: Arguments) -> None:
        """A call after the start is refused, and the application goes on."""
        app = _app()
        async with serve(app) as client:
            with pytest.raises(SettingsError, match="comes before the application starts"):
                setup(app, **arguments)
            assert await client.ask() == (200, "hello")

    async def test_sub_application_that_was_added(self, arguments: Arguments) -> None:
        """A sub-application that belongs to another already is refused: it is the outer one that starts."""
        sub = _app()
        _app().add_subapp("/sub", sub)
        with pytest.raises(SettingsError, match="comes before the application starts"):
            setup(sub, **arguments)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"service": "Shop"},
            {"port": "x"},
            {"address": "0.0.0.0"},
            {"consul_http_addr": "ftp://agent"},
            {"meta": {"k": "v" * 513}},
            {"tags": ["t" * 64]},
            {"nonsense": 1},
        ],
        ids=lambda wrong: str(*wrong),
    )
    async def test_wrong_argument(self, serve: Serve, arguments: Arguments, wrong: Arguments) -> None:
        """A wrong argument is refused at once, and leaves the application as it was."""
        app = _app()
        with pytest.raises(SettingsError):
            setup(app, **{**arguments, **wrong})
        assert WORKER not in app
        assert not app.middlewares
        setup(app, **arguments)
        async with serve(app) as client:
            assert await client.ask() == (200, "hello")

    @pytest.mark.parametrize(
        "variable",
        [
            ("CONSUL_PROM_PORT", "x"),
            ("CONSUL_PROM_META", "k"),
            ("CONSUL_PROM_BIND", "somewhere"),
            ("CONSUL_HTTP_SSL_VERIFY", "maybe"),
            ("PROMETHEUS_MULTIPROC_DIR", "/m"),
        ],
        ids=str,
    )
    async def test_wrong_environment(
        self,
        serve: Serve,
        arguments: Arguments,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        *,
        variable: tuple[str, str],
    ) -> None:
        """What is wrong in the environment is one ERROR line that names it, and the application serves without us."""
        monkeypatch.setenv(*variable)
        app = _app()
        worker = setup(app, **arguments)
        async with serve(app) as client:
            assert await client.ask() == (200, "hello")
            assert worker.url is None
        (record,) = _ours(caplog)
        assert record.levelno == logging.ERROR
        assert record.message.startswith("consul-prom is off: ")
        assert variable[1] in record.message
        assert not record.exc_info

    async def test_no_service_name(self, serve: Serve, arguments: Arguments, caplog: pytest.LogCaptureFixture) -> None:
        """Without a service name the application serves, and one ERROR line says how to give one."""
        del arguments["service"]
        app = _app()
        setup(app, **arguments)
        async with serve(app) as client:
            assert await client.ask() == (200, "hello")
        (record,) = _ours(caplog)
        assert "no service name: pass service=... or set CONSUL_PROM_SERVICE" in record.message

    async def test_wrong_directory(
        self, serve: Serve, arguments: Arguments, open_directory: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A directory that cannot be used is one WARNING, and the application serves."""
        app = _app()
        worker = setup(app, **{**arguments, "dir": open_directory})
        async with serve(app) as client:
            assert await client.ask() == (200, "hello")
            assert worker.slot is None
        (record,) = _ours(caplog)
        assert record.levelno == logging.WARNING
        assert "chmod 0700" in record.message

    async def test_required(self, serve: Serve, arguments: Arguments) -> None:
        """Where it is required, an application that cannot be registered does not start."""
        app = _app()
        setup(app, **{**arguments, "required": True, "start_timeout": "300ms"})
        with pytest.raises(ConsulPromError, match="CONSUL_PROM_START_TIMEOUT"):
            async with serve(app):
                raise AssertionError("it started")


class TestSwitches:
    """What can be switched off."""

    async def test_disabled(
        self, serve: Serve, arguments: Arguments, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Disabled means no server, no metrics, no file and no line in the log."""
        app = _app()
        worker = setup(app, **{**arguments, "disabled": True})
        async with serve(app) as client:
            assert await client.ask() == (200, "hello")
            assert (worker.url, worker.slot) == (None, None)
            assert list(registry.collect()) == []
        assert not app.middlewares
        assert list(arguments["dir"].iterdir()) == []
        assert _ours(caplog) == []

    async def test_without_request_metrics(
        self, serve: Serve, arguments: Arguments, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without request metrics there is no middleware, and the application's own metrics are served."""
        monkeypatch.setenv("CONSUL_PROM_REQUEST_METRICS", "false")
        app = _app()
        worker = setup(app, **arguments)
        assert not app.middlewares
        Counter("reqs", "Mine.", registry=arguments["registry"]).inc()
        async with serve(app) as client:
            await client.ask()
            text = await client.scrape(worker)
        assert "reqs_total 1.0" in text
        assert "http_requests" not in text

    async def test_name_of_the_applications_own(
        self, serve: Serve, arguments: Arguments, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Where the application has such a metric, one WARNING says that ours are off, and all else works."""
        mine = Gauge("http_requests_in_progress", "Mine.", registry=registry)
        mine.set(7)
        app = _app()
        worker = setup(app, **arguments)
        async with serve(app) as client:
            for _ in range(3):
                assert await client.ask() == (200, "hello")
            text = await client.scrape(worker)
        assert "http_requests_in_progress 7.0" in text
        assert "http_requests_total" not in text
        assert [record.levelname for record in _ours(caplog) if "request metrics" in record.message] == ["WARNING"]

    async def test_names_that_come_late(
        self, serve: Serve, arguments: Arguments, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A metric that the application makes in its own start is the application's: its names come first."""

        async def make(_app: web.Application) -> None:
            Counter("http_requests", "Mine.", registry=registry).inc(3)

        app = _app()
        worker = setup(app, **arguments)
        app.on_startup.append(make)
        async with serve(app) as client:
            assert await client.ask() == (200, "hello")
            assert "http_requests_total 3.0" in await client.scrape(worker)
        assert "request metrics are off" in caplog.text


class TestLife:
    """The application's start and end are the worker's."""

    @pytest.fixture
    def agent(self) -> Any:
        with running() as agent:
            yield agent

    @staticmethod
    def _ids(agent: DevAgent) -> list[str]:
        return sorted(agent.state.services)

    async def test_registered_while_it_runs(self, serve: Serve, arguments: Arguments, agent: DevAgent) -> None:
        """The entry is there while the application runs and gone when it has ended; so are port, slot and metrics."""
        app = _app()
        worker = setup(app, **{**arguments, "consul_http_addr": agent.address})
        async with serve(app) as client:
            await eventually(lambda: worker.registered, within=DEADLINE, what="it is registered")
            assert self._ids(agent) == ["shop.web-1.0"]
            url = URL(worker.url or "")
            await client.ask()
        assert self._ids(agent) == []
        assert list(arguments["registry"].collect()) == []
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((url.host or "", url.port or 0), DEADLINE)

    async def test_gone_before_requests_are_drained(self, serve: Serve, arguments: Arguments, agent: DevAgent) -> None:
        """The entry goes on shutdown, before the application's own clean-up, while the endpoint still answers."""
        seen: list[tuple[list[str], int]] = []
        app = _app()
        worker = setup(app, **{**arguments, "consul_http_addr": agent.address})

        async def look(_app: web.Application) -> None:
            await eventually(lambda: not self._ids(agent), within=DEADLINE, what="the entry gone")
            async with aiohttp.ClientSession() as session, session.get(worker.url or "") as page:
                seen.append((self._ids(agent), page.status))

        app.on_shutdown.append(look)
        async with serve(app):
            await eventually(lambda: worker.registered, within=DEADLINE, what="it is registered")
        assert seen == [([], 200)]

    async def test_shutdown_is_not_held_up(
        self, serve: Serve, arguments: Arguments, agent: DevAgent, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The application's shutdown goes on while the worker is deregistered, and ends when it is."""
        app = _app()
        worker = setup(app, **{**arguments, "consul_http_addr": agent.address, "stop_timeout": 100})

        async def mend(_app: web.Application) -> None:
            agent.fault = None

        app.on_shutdown.append(mend)
        async with asyncio.timeout(DEADLINE):
            async with serve(app):
                await eventually(lambda: worker.registered, within=DEADLINE, what="it is registered")
                agent.fault = Fault(status=500)
        assert self._ids(agent) == []
        assert "may still be registered" not in caplog.text

    async def test_failed_start(self, serve: Serve, arguments: Arguments, agent: DevAgent) -> None:
        """An application whose own start fails leaves no entry and no slot, thanks to the clean-up context."""
        app = _app()
        worker = setup(app, **{**arguments, "consul_http_addr": agent.address})

        async def fail(_app: web.Application) -> None:
            await eventually(lambda: worker.registered, within=DEADLINE, what="it is registered")
            raise LookupError("no database")

        app.on_startup.append(fail)
        with pytest.raises(LookupError, match="no database"):
            async with serve(app):
                raise AssertionError("it started")
        assert self._ids(agent) == []
        assert worker.slot is None

    async def test_one_after_the_other(self, serve: Serve, arguments: Arguments, agent: DevAgent) -> None:
        """A second application in the same process, after the first, gets the slot and the names again."""
        for _ in range(2):
            app = _app()
            worker = setup(app, **{**arguments, "consul_http_addr": agent.address})
            async with serve(app) as client:
                await client.ask()
                await client.counted(200)
                assert worker.instance == "web-1:0"

    async def test_counts_outlive_it(self, serve: Serve, arguments: Arguments) -> None:
        """Where Gunicorn's hooks have started a worker, which outlives applications, the ledger keeps their counts."""
        hooks = Worker(**arguments)
        hooks.start(keeps=False)
        for times in (1, 2):
            app = _app()
            setup(app, **arguments)
            async with serve(app) as client:
                await client.ask()
                await client.counted(200, times=times)
        hooks.stop(last=True)
        app = _app()
        successor = setup(app, **{**arguments, "registry": CollectorRegistry()})
        async with serve(app) as client:
            text = await client.scrape(successor)
            assert 'http_requests_total{method="GET",route="/",status="200"} 2.0' in text

    async def test_two_at_once_on_one_registry(self, serve: Serve, arguments: Arguments, agent: DevAgent) -> None:
        """Two applications of one process and registry are one target, until the last of them ends."""
        first, second = _app(), _app()
        one = setup(first, **{**arguments, "consul_http_addr": agent.address})
        other = setup(second, **{**arguments, "consul_http_addr": agent.address})
        async with serve(first) as client:
            async with serve(second) as other_client:
                assert await client.ask() == await other_client.ask() == (200, "hello")
                await client.counted(200, times=2)
                assert one.url == other.url
                await eventually(lambda: other.registered, within=DEADLINE, what="it is registered")
                assert self._ids(agent) == ["shop.web-1.0"]
            assert not other.url
            assert self._ids(agent) == ["shop.web-1.0"]
            assert "consul_prom_registered 1.0" in await client.scrape(one)
        assert self._ids(agent) == []

    @pytest.mark.parametrize(
        "fault",
        [Fault(hang=True), Fault(reset=True), Fault(status=500), Fault(status=403)],
        ids=["hangs", "resets", "500", "403"],
    )
    async def test_agent_that_fails(
        self, serve: Serve, arguments: Arguments, agent: DevAgent, caplog: pytest.LogCaptureFixture, *, fault: Fault
    ) -> None:
        """An agent that hangs, breaks off or refuses neither stops the application nor delays its start and end."""
        agent.fault = fault
        app = _app()
        setup(app, **{**arguments, "consul_http_addr": agent.address})
        loop = asyncio.get_running_loop()
        begun = loop.time()
        async with serve(app) as client:
            assert loop.time() - begun < DEADLINE / 2
            assert await client.ask() == (200, "hello")
            await client.counted(200)
            begun = loop.time()
        assert loop.time() - begun < DEADLINE / 2
        assert not [record for record in _ours(caplog) if record.exc_info]


def _ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name.startswith("consul_prom")]
