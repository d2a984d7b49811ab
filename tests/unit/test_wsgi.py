"""The one line around a WSGI application, call by call."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BytesIO, StringIO
from typing import Any
from wsgiref.util import FileWrapper
from wsgiref.validate import validator

import flask
import pytest
from prometheus_client import CollectorRegistry, Counter
from werkzeug.middleware.proxy_fix import ProxyFix

import consul_prom
from consul_prom.errors import SettingsError
from consul_prom.http_metrics.request_metrics import RequestMetrics, install
from consul_prom.wsgi import instrument
from tests.e2e import django_app

Application = Callable[[Any, Any], Iterable[bytes]]
TEXT = [("Content-Type", "text/plain")]


def environ(path: str = "/", method: str = "GET") -> dict[str, Any]:
    """What a server gives to an application, as PEP 3333 has it."""
    ours: dict[str, Any] = {"REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": path, "QUERY_STRING": ""}
    ours |= {"SERVER_NAME": "shop.test", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1", "wsgi.version": (1, 0)}
    ours |= {"wsgi.url_scheme": "http", "wsgi.input": BytesIO(), "wsgi.errors": StringIO(), "wsgi.run_once": False}
    ours |= {"wsgi.multithread": True, "wsgi.multiprocess": True, "wsgi.file_wrapper": FileWrapper}
    return ours


class Server:
    """The server's side: what it was told by `start_response`, and what was written."""

    def __init__(self, app: Application) -> None:
        self.app = app
        self.status = ""
        self.written: list[bytes] = []

    def start_response(self, status: str, _headers: Any, exc_info: Any = None) -> Callable[[bytes], None]:
        if exc_info and self.written:
            raise exc_info[1]
        assert exc_info or not self.status, "called twice"
        self.status = status
        return self.written.append

    def call(self, path: str = "/", method: str = "GET", more: Mapping[str, Any] | None = None) -> Iterable[bytes]:
        return self.app({**environ(path, method), **(more or {})}, self.start_response)

    def ask(self, path: str = "/", method: str = "GET", more: Mapping[str, Any] | None = None) -> bytes:
        """One request, sent whole and closed."""
        body = self.call(path, method, more)
        try:
            for chunk in body:
                self.written.append(chunk)
        finally:
            close(body)
        return b"".join(self.written)


def close(body: Iterable[bytes]) -> None:
    """As every server must, where there is something to call."""
    getattr(body, "close", lambda: None)()


class Body:
    """An application's own body, which counts how often it was closed."""

    def __init__(self, *chunks: bytes, error: Exception | None = None) -> None:
        self.closed = 0
        self._chunks = iter(chunks)
        self._error = error

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        for chunk in self._chunks:
            return chunk
        if self._error:
            raise self._error
        raise StopIteration

    def close(self) -> None:
        self.closed += 1


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

    def seconds(self, *, route: str = "other", method: str = "GET") -> float | None:
        labels = {"method": method, "route": route}
        return self._registry.get_sample_value("http_request_duration_seconds_count", labels)

    def in_progress(self, route: str = "other") -> float | None:
        return self._registry.get_sample_value("http_requests_in_progress", {"method": "GET", "route": route})

    def only(self, status: int, *, route: str = "other", method: str = "GET") -> None:
        """One request was counted so, no other was, and none is in progress."""
        assert self.totals() == {(method, route, str(status)): 1}
        assert not self.in_progress(route)
        assert self.seconds(route=route, method=method) == 1


@pytest.fixture
def page(registry: CollectorRegistry) -> Page:
    return Page(registry)


Serve = Callable[[Application], Server]


@pytest.fixture
def serve(registry: CollectorRegistry) -> Serve:
    """A server of the application, instrumented."""
    return lambda app: Server(instrument(app, registry=registry))


def _answering(body: Iterable[bytes], status: str = "200 OK") -> Application:
    def app(_environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response(status, TEXT)
        return body

    return app


class TestRequests:
    """Plain requests."""

    @pytest.mark.parametrize("status", ["200 OK", "204 No Content", "404 Not Found", "503 Service Unavailable"])
    def test_plain(self, serve: Serve, page: Page, status: str) -> None:
        """A request is counted with its method and status, and its duration."""
        server = serve(_answering([b"x"], status))
        assert server.ask(method="POST") == b"x"
        assert server.status == status
        page.only(int(status[:3]), method="POST")

    def test_unknown_method(self, serve: Serve, page: Page) -> None:
        """A method that is not HTTP's own is OTHER."""
        serve(_answering([])).ask(method="BREW")
        page.only(200, method="OTHER")

    def test_keeps_to_the_protocol(self, registry: CollectorRegistry, page: Page) -> None:
        """Neither side of it breaks PEP 3333, in the eyes of the standard library."""
        strict = validator(instrument(validator(_answering([b"x"])), registry=registry))
        assert Server(strict).ask(more={"wsgi.input": BytesIO(), "wsgi.file_wrapper": None}) == b"x"
        page.only(200)

    def test_length(self, serve: Serve) -> None:
        """The server may ask for the length of a body that has one, and of no other."""
        sized: Any = serve(_answering([b"x", b"y"])).call()
        assert len(sized) == 2
        assert not hasattr(serve(_answering(Body(b"x"))).call(), "__len__")


class TestStreams:
    """Bodies that take their time."""

    def test_last_byte(self, serve: Serve, page: Page) -> None:
        """A generator is passed on chunk by chunk, and over once the server has asked for more than there is."""
        made: list[bytes] = []

        def chunks() -> Iterator[bytes]:
            for chunk in (b"a", b"b"):
                made.append(chunk)
                yield chunk

        body = iter(serve(_answering(chunks())).call())
        assert made == []
        assert (next(body), next(body)) == (b"a", b"b")
        assert page.totals() == {}
        assert page.in_progress() == 1
        assert next(body, None) is None
        page.only(200)

    @pytest.mark.parametrize("chunks", [0, 1, 2])
    def test_closed_once(self, serve: Serve, page: Page, chunks: int) -> None:
        """A body is closed once, however much of it was sent; one that was cut short is a 499."""
        inner = Body(b"a", b"b")
        body = serve(_answering(inner)).call()
        for _number, _chunk in zip(range(chunks), body, strict=False):
            pass
        close(body)
        close(body)
        assert inner.closed == 1
        page.only(499)

    def test_closed_after_the_end(self, serve: Serve, page: Page) -> None:
        """A body that was sent whole is closed once too, and keeps its status."""
        inner = Body(b"a", b"b")
        assert serve(_answering(inner)).ask() == b"ab"
        assert inner.closed == 1
        page.only(200)

    def test_head(self, serve: Serve, page: Page) -> None:
        """A server may close the body of a HEAD without asking for it."""
        close(serve(_answering(Body(b"x"))).call(method="HEAD"))
        page.only(200, method="HEAD")

    def test_file(self, serve: Serve, page: Page) -> None:
        """A file stays what it is, so that the server may send it its own way, and is over when it is closed."""
        file = BytesIO(b"x")
        body = serve(_answering(FileWrapper(file))).call()
        assert isinstance(body, FileWrapper)
        assert page.totals() == {}
        body.close()
        assert file.closed
        page.only(200)

    def test_file_in_c(self, serve: Serve, page: Page) -> None:
        """A file whose wrapper cannot be told of its end is sent chunk by chunk."""

        class Wrapper:
            __slots__ = ()

            def __iter__(self) -> Iterator[bytes]:
                return iter([b"x"])

        assert serve(_answering(Wrapper())).ask(more={"wsgi.file_wrapper": Wrapper}) == b"x"
        page.only(200)


class TestStartResponse:
    """What an application may do with `start_response`."""

    def test_late(self, serve: Serve, page: Page) -> None:
        """A generator that calls it with its first chunk has that status."""

        def app(_environ: Any, start_response: Any) -> Iterator[bytes]:
            start_response("201 Created", TEXT)
            yield b"x"

        assert serve(app).ask() == b"x"
        page.only(201)

    def test_again(self, serve: Serve, page: Page) -> None:
        """A second call, with an exception, has the last word before anything was sent."""

        def app(_environ: Any, start_response: Any) -> Iterable[bytes]:
            start_response("200 OK", TEXT)
            start_response("503 Busy", TEXT, (LookupError, LookupError("mine"), None))
            return [b"x"]

        server = serve(app)
        assert server.ask() == b"x"
        assert server.status == "503 Busy"
        page.only(503)

    def test_too_late(self, serve: Serve, page: Page) -> None:
        """Once something was sent it raises the exception, and the request is a 500."""

        def app(_environ: Any, start_response: Any) -> Iterator[bytes]:
            start_response("200 OK", TEXT)
            yield b"x"
            start_response("503 Busy", TEXT, (LookupError, LookupError("mine"), None))

        with pytest.raises(LookupError, match="mine"):
            serve(app).ask()
        page.only(500)

    def test_never(self, serve: Serve, page: Page) -> None:
        """An application that never calls it is a 500."""
        serve(lambda _environ, _start: [b"x"]).ask()
        page.only(500)

    def test_write(self, serve: Serve, page: Page) -> None:
        """What is written by the callable that it gives is sent."""

        def app(_environ: Any, start_response: Any) -> Iterable[bytes]:
            start_response("200 OK", TEXT)(b"written")
            return [b" and returned"]

        assert serve(app).ask() == b"written and returned"
        page.only(200)

    def test_odd_status(self, serve: Serve, page: Page) -> None:
        """A status that is no number is the server's business, and counts as a 500."""
        serve(_answering([b"x"], "fine")).ask()
        page.only(500)


class TestFailures:
    """Applications that raise."""

    def test_raised(self, serve: Serve, page: Page) -> None:
        """An exception instead of a body is a 500, and passes."""

        def app(_environ: Any, start_response: Any) -> Iterable[bytes]:
            start_response("200 OK", TEXT)
            raise LookupError("mine")

        with pytest.raises(LookupError, match="mine"):
            serve(app).ask()
        page.only(500)

    def test_raised_amidst(self, serve: Serve, page: Page) -> None:
        """An exception in the middle of a body is a 500, though the head said 200, and the body is closed."""
        inner = Body(b"x", error=LookupError("mine"))
        with pytest.raises(LookupError, match="mine"):
            serve(_answering(inner)).ask()
        assert inner.closed == 1
        page.only(500)

    def test_no_body(self, serve: Serve, page: Page) -> None:
        """An application that returns nothing is a 500."""
        nothing: Any = None
        with pytest.raises(TypeError):
            serve(_answering(nothing)).ask()
        page.only(500)

    def test_close_raises(self, serve: Serve, page: Page) -> None:
        """What a body raises when it is closed passes, and the request keeps its status."""

        class Bad(Body):
            def close(self) -> None:
                raise LookupError("mine")

        with pytest.raises(LookupError, match="mine"):
            serve(_answering(Bad(b"x"))).ask()
        page.only(200)


def _flask() -> flask.Flask:
    app = flask.Flask("shop", static_folder=None)
    blue = flask.Blueprint("blue", "shop", url_prefix="/blue")

    def hello(item: object) -> str:
        return f"hello {flask.request.url_rule}"

    def fail() -> str:
        raise LookupError("mine")

    def stream() -> flask.Response:
        return flask.Response(iter(["a", "b"]))

    app.add_url_rule("/shop/<int:item>", "shop", hello)
    app.add_url_rule("/fail", "fail", fail)
    app.add_url_rule("/stream", "stream", stream)
    blue.add_url_rule("/<item>", "item", hello)
    app.register_blueprint(blue)
    return app


class TestRoutes:
    """The route is the template, whatever a client put into it."""

    @pytest.mark.parametrize(
        ("path", "status", "route"),
        [
            ("/shop/7", 200, "/shop/<int:item>"),
            ("/blue/7", 200, "/blue/<item>"),
            ("/stream", 200, "/stream"),
            ("/fail", 500, "/fail"),
            ("/nothing", 404, "other"),
        ],
    )
    @pytest.mark.parametrize("wrapped", ["app", "app.wsgi_app", "another's"])
    def test_flask(self, serve: Serve, page: Page, *, path: str, status: int, route: str, wrapped: str) -> None:
        """Flask's rule, whichever part of the application is instrumented."""
        app = _flask()
        parts: dict[str, Application] = {"app": app, "app.wsgi_app": app.wsgi_app, "another's": ProxyFix(app.wsgi_app)}
        serve(parts[wrapped]).ask(path)
        page.only(status, route=route)

    def test_flask_in_progress(self, serve: Serve, page: Page) -> None:
        """A request that Flask works on is in progress with its route."""
        app, inside, go_on = _flask(), threading.Event(), threading.Event()

        @app.get("/hold/<item>")
        def hold(item: str) -> str:
            inside.set()
            go_on.wait(10)
            return item

        server = serve(app)
        asking = threading.Thread(target=server.ask, args=("/hold/7",))
        asking.start()
        try:
            assert inside.wait(10)
            assert page.in_progress("/hold/<item>") == 1
        finally:
            go_on.set()
            asking.join(10)
        page.only(200, route="/hold/<item>")

    @pytest.mark.parametrize(
        ("path", "status", "route"),
        [
            ("/shop/7", 200, "/shop/<int:item>"),
            ("/blue/7/", 200, "/blue/<slug:item>/"),
            ("/fail", 500, "/fail"),
            ("/nothing", 404, "other"),
        ],
    )
    def test_django(self, serve: Serve, page: Page, *, path: str, status: int, route: str) -> None:
        """Django's route, with the slash that every other framework has before it."""
        serve(django_app.handler()).ask(path)
        page.only(status, route=route)

    def test_two_applications(self, registry: CollectorRegistry, page: Page) -> None:
        """Two applications of one class of requests do not disturb each other."""
        first, second = django_app.handler(), django_app.handler()
        for handler in (first, second):
            Server(instrument(handler, registry=registry)).ask("/shop/7")
        assert page.totals() == {("GET", "/shop/<int:item>", "200"): 2}
        assert type(first).request_class is not first.request_class is not second.request_class


class TestInstrument:
    """What `instrument` gives, and what switches it off."""

    def test_by_attribute(self) -> None:
        """The package has the module as an attribute."""
        assert consul_prom.wsgi.instrument is instrument

    @pytest.mark.parametrize("again", ["the application", "the result"])
    def test_twice(self, registry: CollectorRegistry, again: str) -> None:
        """A second call for one application is refused."""
        app = _answering([])
        coat = instrument(app, registry=registry)
        with pytest.raises(SettingsError, match="was called before for this application") as caught:
            instrument(app if again == "the application" else coat, registry=registry)
        assert caught.value.from_code

    @pytest.mark.parametrize(
        "variable", [("CONSUL_PROM_REQUEST_METRICS", "false"), ("CONSUL_PROM_DISABLED", "true")], ids=str
    )
    def test_off(self, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, variable: tuple[str, str]) -> None:
        """Where it is switched off, the application gets its requests, and its answers, as they are."""
        monkeypatch.setenv(*variable)
        body = [b"x"]
        assert Server(instrument(_answering(body), registry=registry)).call() is body
        assert list(registry.collect()) == []

    def test_name_of_the_applications_own(
        self, serve: Serve, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Where the application has such a metric, one WARNING says that ours are off, and it serves."""
        server = serve(_answering([b"x"]))
        Counter("http_requests", "Mine.", registry=registry).inc(7)
        for _ in range(3):
            list(server.app(environ(), Server(server.app).start_response))
        assert registry.get_sample_value("http_requests_total") == 7
        assert [record.levelname for record in caplog.records] == ["WARNING"]

    def test_many_threads_at_once(
        self, registry: CollectorRegistry, page: Page, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Threads that come first together make one set of metrics, and each request counts once."""
        app, together = instrument(_answering([b"x"]), registry=registry), threading.Barrier(8)
        installed: list[CollectorRegistry] = []

        def slowly(registry: CollectorRegistry) -> RequestMetrics | None:
            installed.append(registry)
            time.sleep(0.1)  # so that all the others come meanwhile
            return install(registry)

        monkeypatch.setattr("consul_prom.http_metrics.request_metrics.install", slowly)

        def ask() -> None:
            together.wait(10)
            for _ in range(50):
                Server(app).ask()

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert page.totals() == {("GET", "other", "200"): 400}
        assert page.in_progress() == 0
        assert installed == [registry]
