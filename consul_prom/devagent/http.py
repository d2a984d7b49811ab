"""Consul's HTTP API over a state: what registrars, Prometheus and the command line ask for, and nothing else.

Paths are read as Go's ServeMux reads them: matched as sent, so that an ID may hold an encoded slash.
Source: agent/agent_endpoint.go, agent/http.go of Consul 1.19.
"""

import asyncio
import contextlib
import json
import logging
import posixpath
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from consul_prom.devagent import definition, documents, filters, queries
from consul_prom.devagent.definition import ServiceDefinition
from consul_prom.devagent.documents import Node
from consul_prom.devagent.errors import Refused, Unsupported
from consul_prom.devagent.state import State

_SERVICE_SELECTORS = frozenset({"Address", "ID", "Meta", "Service", "Tags"})
_CHECK_SELECTORS = frozenset({"CheckID", "Name", "Node", "ServiceID", "ServiceName", "ServiceTags", "Status", "Type"})
_CATALOG_SELECTORS = frozenset({"Node", "ServiceID"})
_STATUS_CODES = {"passing": 200, "warning": 429, "critical": 503}

logger = logging.getLogger(__name__)

Handler = Callable[[web.BaseRequest, str], Awaitable[web.Response]]


class Api:
    """The handlers; `changed()` wakes those that block, `stop()` makes them answer what they have."""

    def __init__(self, state: State, node: Node) -> None:
        self._state = state
        self._node = node
        self._news = asyncio.Event()
        self._stopping = False
        self._exact: dict[str, tuple[str, Handler]] = {
            "/v1/agent/checks": ("GET", self._agent_checks),
            "/v1/agent/self": ("GET", self._agent_self),
            "/v1/agent/service/register": ("PUT", self._register),
            "/v1/agent/services": ("GET", self._agent_services),
            "/v1/catalog/services": ("GET", self._catalog_services),
            "/v1/internal/acl/authorize": ("POST", self._rights),
            "/v1/status/leader": ("GET", self._leader),
        }
        self._prefixed: dict[str, tuple[str, Handler]] = {
            "/v1/agent/health/service/id/": ("GET", self._agent_health),
            "/v1/agent/service/deregister/": ("PUT", self._deregister),
            "/v1/agent/service/": ("GET", self._agent_service),
            "/v1/catalog/service/": ("GET", self._catalog_service),
            "/v1/health/service/": ("GET", self._health_service),
        }

    def changed(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def stop(self) -> None:
        self._stopping = True
        self.changed()

    async def answer(self, request: web.BaseRequest) -> web.Response:
        try:
            return await self._route(request)
        except Refused as exc:
            return web.Response(status=exc.status, text=exc.text)
        except ConnectionError:
            logger.debug("The caller left while sending %s", request.path)
            return web.Response(status=400)

    async def _route(self, request: web.BaseRequest) -> web.Response:
        path = request.rel_url.raw_path
        if not unquote(path).isprintable():
            return web.Response(status=400)
        if (clean := self._clean(path)) != path:
            return web.Response(status=307, headers={"Location": str(request.rel_url.with_path(clean, encoded=True))})
        method, handler, rest = self._handler(path)
        if request.method != method:
            text = f"method {request.method} not allowed"
            return web.Response(status=405, text=text, headers={"Allow": f"OPTIONS,{method}"})
        return await handler(request, unquote(rest))

    def _clean(self, path: str) -> str:
        """The path that Go's mux would serve: without empty and dotted steps, and a folder with its slash."""
        clean = posixpath.normpath(f"/{path.lstrip('/')}")
        return f"{clean}/" if path.endswith("/") != clean.endswith("/") or f"{clean}/" in self._prefixed else clean

    def _handler(self, path: str) -> tuple[str, Handler, str]:
        if path in self._exact:
            return *self._exact[path], ""
        for prefix, route in self._prefixed.items():
            if path.startswith(prefix) and not path.startswith("/v1/agent/service/maintenance/"):
                return *route, path.removeprefix(prefix)
        raise Unsupported(f"the URL {path}")

    async def _register(self, request: web.BaseRequest, _rest: str) -> web.Response:
        service = definition.parse(await request.read())
        replace = request.query.get("replace-existing-checks") in {"", "true"}
        self._state.register(service, replace_existing_checks=replace)
        logger.info("Registered %s", service.service_id)
        return web.Response()

    async def _deregister(self, _request: web.BaseRequest, service_id: str) -> web.Response:
        self._state.deregister(service_id)
        logger.info("Deregistered %s", service_id)
        return web.Response()

    async def _agent_service(self, request: web.BaseRequest, service_id: str) -> web.Response:
        wait, _ = queries.blocking(request)
        given = request.query.get("hash", "")

        def differs() -> bool:
            service = self._state.services.get(service_id)
            return service is None or documents.content_hash(service) != given

        if given:
            await self._block(differs, wait)
        service = self._state.services.get(service_id)
        if service is None:
            raise Refused(404, f"unknown service ID: {service_id}")
        content_hash = documents.content_hash(service)
        document = documents.service(service) | {"ContentHash": content_hash}
        return _json(document, headers={"X-Consul-ContentHash": content_hash})

    async def _agent_services(self, request: web.BaseRequest, _rest: str) -> web.Response:
        services = {key: documents.service(service) for key, service in sorted(self._state.services.items())}
        return _json(_filtered(services, request, _SERVICE_SELECTORS))

    async def _agent_checks(self, request: web.BaseRequest, _rest: str) -> web.Response:
        checks = {key: documents.agent_check(self._node, check) for key, check in sorted(self._state.checks.items())}
        return _json(_filtered(checks, request, _CHECK_SELECTORS))

    async def _agent_health(self, request: web.BaseRequest, service_id: str) -> web.Response:
        if not service_id:
            raise Refused(500, "Missing serviceID")
        service = self._state.services.get(service_id)
        if service is None:
            code, reason = 404, f"ServiceId {service_id} not found"
            document: documents.Document = {"AggregatedStatus": "critical", "Service": None, "Checks": None}
        else:
            reason = self._state.status_of(service_id)
            code = _STATUS_CODES[reason]
            document = documents.agent_health(self._node, self._state, service)
        headers = {"X-Consul-Reason": reason}
        if request.headers.get("Accept", "").startswith("text/plain") or request.query.get("format") == "text":
            return web.Response(status=code, body=reason.encode(), content_type="text/plain", headers=headers)
        return _json(document, status=code, headers=headers)

    async def _agent_self(self, _request: web.BaseRequest, _rest: str) -> web.Response:
        return _json(documents.myself(self._node))

    async def _rights(self, _request: web.BaseRequest, _rest: str) -> web.Response:
        raise Refused(401, "ACL support disabled")

    async def _leader(self, _request: web.BaseRequest, _rest: str) -> web.Response:
        return _json(self._node.at(8300))

    async def _catalog_services(self, request: web.BaseRequest, _rest: str) -> web.Response:
        query = queries.catalog(request)
        index = await self._block_on_index(query, lambda: self._state.catalog_index)
        names: dict[str, set[str]] = {}
        for service in self._state.services.values() if query.matches_node else ():
            names.setdefault(service.name, set()).update(service.tags)
        return _json({name: sorted(tags) for name, tags in sorted(names.items())}, headers=query.headers(index))

    async def _catalog_service(self, request: web.BaseRequest, name: str) -> web.Response:
        query = queries.catalog(request, "filter")
        index = await self._index_of(name, query)
        entries = {
            service.service_id: documents.catalog_service(self._node, service)
            for service in self._selected(name, query)
        }
        return _json([*_filtered(entries, request, _CATALOG_SELECTORS).values()], headers=query.headers(index))

    async def _health_service(self, request: web.BaseRequest, name: str) -> web.Response:
        query = queries.catalog(request)
        index = await self._index_of(name, query)
        entries = [
            documents.catalog_entry(self._node, self._state, service)
            for service in self._selected(name, query)
            if not query.passing or self._state.status_of(service.service_id) == "passing"
        ]
        return _json(entries, headers=query.headers(index))

    async def _index_of(self, name: str, query: queries.CatalogQuery) -> int:
        if not name:
            raise Refused(400, "Missing service name")
        return await self._block_on_index(query, lambda: self._state.service_index(name))

    def _selected(self, name: str, query: queries.CatalogQuery) -> list[ServiceDefinition]:
        """The services of this name that the query's tags and its node's meta select."""
        named = self._state.named(name) if query.matches_node else ()
        return [service for service in named if query.tags <= {tag.lower() for tag in service.tags}]

    async def _block_on_index(self, query: queries.CatalogQuery, current: Callable[[], int]) -> int:
        await self._block(lambda: current() > query.index, query.wait)
        return current()

    async def _block(self, is_news: Callable[[], bool], wait: float) -> None:
        """Returns on news, after `wait` seconds and up to a sixteenth more, or when the agent stops."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait + random.uniform(0, wait / 16)):  # noqa: S311 - spreads load
                while not is_news() and not self._stopping:
                    await self._news.wait()


def _json(document: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    text = json.dumps(document, indent=4, ensure_ascii=False)
    return web.Response(status=status, body=text.encode(), content_type="application/json", headers=headers)


def _filtered(found: dict[str, documents.Document], request: web.BaseRequest, selectors: frozenset[str]) -> Any:
    matches = filters.compiled(request.query.get("filter", ""), selectors=selectors)
    return {key: document for key, document in found.items() if matches(document)}
