"""WSGI: one line around the application, ``app = consul_prom.wsgi.instrument(app)``; others start the worker."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from prometheus_client import REGISTRY, CollectorRegistry

from consul_prom.errors import SettingsError
from consul_prom.http_metrics.request_metrics import CANCELLED, OpenRequest, Requests
from consul_prom.http_metrics.routes import keep, of_environ, tell_routes
from consul_prom.settings.settings import switch

Environ = dict[str, Any]
StartResponse = Callable[..., Callable[[bytes], object]]
Application = Callable[[Any, Any], Iterable[bytes]]  # frameworks differ in how they type the two


def instrument(app: Application, *, registry: CollectorRegistry = REGISTRY) -> "Instrumented":
    """Count the requests of the result; the Gunicorn hooks, or `consul_prom.running`, serve and register the process.

    Raises:
        SettingsError: *app* has been instrumented already.
    """
    if isinstance(app, Instrumented) or id(app) in Instrumented.of_application:
        raise SettingsError("consul_prom.wsgi.instrument was called before for this application", from_code=True)
    return Instrumented(app, registry, counts=switch("request_metrics", {}) and not switch("disabled", {}))


class Instrumented:
    """The application that `instrument` gives."""

    of_application: ClassVar[WeakValueDictionary[int, "Instrumented"]] = WeakValueDictionary()

    def __init__(self, app: Application, registry: CollectorRegistry, *, counts: bool) -> None:
        self._app = app
        self._requests = Requests(registry) if counts else None
        self.of_application[id(app)] = self  # which keeps `app`, so that no other object gets its id
        if counts:
            tell_routes(app, "environ")

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        request = None
        if self._requests:
            request = self._requests.begin(environ.get("REQUEST_METHOD", ""), lambda: of_environ(environ))
        if request is None:
            return self._app(environ, start_response)
        answer = _Answer(request, environ, start_response)
        try:
            return answer.body(self._app(environ, answer.start))
        except BaseException:
            request.end(500)
            raise


class _Answer:
    """What becomes of one request: its status, and its end."""

    def __init__(self, request: OpenRequest, environ: Environ, start_response: StartResponse) -> None:
        self._request = request
        self._environ = environ
        self._start_response = start_response
        self._status = 500

    def start(self, status: str, *rest: Any, **named: Any) -> Callable[[bytes], object]:
        """As PEP 3333 has `start_response`, which raises where it is too late for another status."""
        write = self._start_response(status, *rest, **named)
        self._status = int(status[:3]) if status[:3].isdigit() else 500
        keep(self._environ)
        return write

    def body(self, body: Iterable[bytes]) -> Iterable[bytes]:
        """*body*, whose end is the request's. A file stays what it is: the server may have its own way to send it."""
        wrapper = self._environ.get("wsgi.file_wrapper")
        if isinstance(wrapper, type) and isinstance(body, wrapper):
            with suppress(AttributeError):  # a wrapper that is written in C
                set_close: Any = body
                set_close.close = partial(self.close, getattr(body, "close", None), whole=True)
                return body
        return _Sized(self, body) if hasattr(body, "__len__") else _Body(self, body)

    def end(self, *, whole: bool, failed: bool = False) -> None:
        is_head = self._environ.get("REQUEST_METHOD") == "HEAD"  # of which some servers send no body
        self._request.end(500 if failed else self._status if whole or is_head else CANCELLED)

    def close(self, inner: Callable[[], object] | None, *, whole: bool) -> None:
        self.end(whole=whole)
        if inner:
            inner()


class _Body:
    """The application's body, chunk by chunk; one that is closed before its last was left by its client."""

    def __init__(self, answer: _Answer, body: Iterable[bytes]) -> None:
        self._answer = answer
        self._chunks = iter(body)
        self._inner = body
        self._close: Callable[[], object] | None = getattr(body, "close", None)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            return next(self._chunks)
        except BaseException as error:
            self._answer.end(whole=True, failed=not isinstance(error, StopIteration))
            raise

    def close(self) -> None:
        inner, self._close = self._close, None
        self._answer.close(inner, whole=False)


class _Sized(_Body):
    """The body of a server that asks for its length, to know that of the answer."""

    def __len__(self) -> int:
        return len(self._inner)  # type: ignore[arg-type]
