"""The template of the route that a framework found, read from what its requests leave behind; imports no framework."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, Final

_TOLD: Final = "consul_prom.route"


def tell_routes(app: object, mapping: str) -> None:
    """Let the requests of Quart, Flask and Django tell their route in *mapping*, their ``scope`` or ``environ``.

    These frameworks keep the rule that they found in the request alone. But an application may choose the class of its
    requests: we choose a subclass of it.
    """
    owner = getattr(app, "__self__", app)  # of `app.wsgi_app`, the application
    for name in ("request_class", "websocket_class"):
        base = getattr(owner, name, None)
        if isinstance(base, type):
            told = {attribute: _telling(attribute, mapping) for attribute in ("url_rule", "resolver_match")}
            setattr(owner, name, type(base.__name__, (base,), told))


def of_environ(environ: Mapping[str, Any]) -> str | None:
    """What was told, or what the request that werkzeug left here knows; None where nothing is known."""
    return environ.get(_TOLD) or _template(getattr(environ.get("werkzeug.request"), "url_rule", None))


def keep(environ: MutableMapping[str, Any]) -> None:
    """Note what is known by now: Flask takes its request out of *environ* before the body is sent."""
    if route := of_environ(environ):
        environ[_TOLD] = route


def of_scope(scope: Mapping[str, Any]) -> str | None:
    """What was told, or what the router of Starlette or FastAPI left here; None where nothing is known."""
    told: str | None = scope.get(_TOLD)
    route = _of_starlette(scope)
    path_format = getattr(route, "path_format", None)
    if told or not isinstance(path_format, str):
        return told
    root_path = scope.get("root_path", "")
    mounts = _mounts(root_path.removeprefix(scope.get("app_root_path", root_path)), _routes(scope.get("router")))
    if mounts is None:
        return None
    return mounts or "/" if hasattr(route, "routes") else mounts + path_format


def _telling(attribute: str, mapping: str) -> property:
    def read(request: Any) -> Any:
        return vars(request).get(attribute)

    def write(request: Any, found: Any) -> None:
        vars(request)[attribute] = found
        template = _template(found)
        if template:
            getattr(request, mapping)[_TOLD] = template

    return property(read, write)


def _template(found: Any) -> str | None:
    """Of werkzeug's rule, or of Django's match, which has no slash before."""
    if found is None:
        return None
    rule: str | None = getattr(found, "rule", None)
    return rule or f"/{getattr(found, 'route', '').removeprefix('/')}"


def _of_starlette(scope: Mapping[str, Any]) -> Any:
    """The route; of a router that was included into another, FastAPI has the whole path elsewhere."""
    included = scope.get("fastapi", {}).get("effective_route_context")
    if included and included.original_route is scope.get("route"):
        return included
    if "route" in scope:
        return scope["route"]
    return next(_by_endpoint(scope), None)


def _by_endpoint(scope: Mapping[str, Any]) -> Iterator[Any]:
    """Starlette before 1.1, and FastAPI for a route that is not its own, name the endpoint alone."""
    endpoint, path = scope.get("endpoint"), scope.get("path", "").removeprefix(scope.get("root_path", ""))
    for route in _flat(_routes(scope.get("router"))) if endpoint else ():
        is_mount = hasattr(route, "routes") and getattr(route, "app", None) is endpoint
        if is_mount or (getattr(route, "endpoint", None) is endpoint and route.path_regex.match(path)):
            yield route


def _mounts(prefix: str, routes: Iterable[Any]) -> str | None:
    """The templates of the mounts whose paths *prefix* is; None where they are not found."""
    if not prefix:
        return ""
    for route in routes:
        match = _regex(route)(f"{prefix}/") if hasattr(route, "routes") else None
        rest = _mounts(f"/{match['path']}".rstrip("/"), _routes(route)) if match else None
        if rest is not None:
            return str(route.path_format).removesuffix("/{path}") + rest
    return None


def _regex(route: Any) -> Callable[[str], Any]:
    return route.path_regex.match if hasattr(route, "path_regex") else lambda _path: None


def _routes(of: Any) -> Iterable[Any]:
    return getattr(of, "routes", None) or ()


def _flat(routes: Iterable[Any]) -> Iterator[Any]:
    for route in routes:
        yield route
        yield from _flat(_routes(route))
