"""The Consul agent's HTTP API, as far as we need it, over one aiohttp session of ours.

python-consul2 speaks for the groups that it has. Its constructor reads the environment, its transport opens a session
for each request, quotes no ID and knows no deadline, so both are ours; `consul` (which imports requests) is imported
when the first client is made, in the metrics thread. https://developer.hashicorp.com/consul/api-docs/agent/service
"""

import asyncio
import errno
import importlib
import json
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlencode

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from consul_prom.consul.http import (
    ACL_FILTERED_HEADER,
    NOT_CONSUL,
    expect,
    no_json,
    raise_for_status,
    request_headers,
    scope,
    service_document,
    text_of,
    tls_context,
    who,
    wrong_json,
)
from consul_prom.consul.sync_client import LARGEST_ENTRY
from consul_prom.errors import AgentBusy, AgentConfused, AgentDenied, AgentNotFound, AgentTimeout, AgentUnreachable
from consul_prom.settings.settings import Settings

CALL_TIMEOUT: Final = 5.0
LARGEST_ANSWER: Final = 32 * 2**20
IDLE: Final = 0.1
"""Seconds that a connection is kept for the next call of the same turn; all of a host share the agent's 200."""
_REGISTER: Final = "/v1/agent/service/register"


class Entry(NamedTuple):
    """A service as the agent has it, and the hash to wait on for a change."""

    document: dict[str, Any]
    content_hash: str


class AgentClient:
    """One agent. Every call has a deadline and raises an `AgentError` of the kind that fits.

    Needs ``service:write`` on the service; `self_` needs ``agent:read``.
    """

    def __init__(self, settings: Settings, *, timeout: float = CALL_TIMEOUT) -> None:
        from consul.base import CB, Consul

        self._json = CB.json
        self._transport = _Transport(settings, timeout)
        self._agent = Consul.Agent(_Groups(self._transport))

    async def register(self, document: Mapping[str, Any]) -> None:
        """Create or replace an entry; checks that are not in the *document* go."""
        await self._agent.service.register(
            document["Name"],
            service_id=document["ID"],
            address=document["Address"],
            port=document["Port"],
            tags=document["Tags"],
            meta=document["Meta"],
            check=document["Check"],
        )

    async def deregister(self, entry_id: str) -> bool:
        """Remove an entry; False where there was none."""
        try:
            await self._agent.service.deregister(quote(entry_id, safe=""))
        except AgentNotFound:
            return False
        return True

    async def service(self, entry_id: str, *, content_hash: str = "", wait: float = 0) -> Entry | None:
        """An entry, or None. With *content_hash*: not before it differs, or *wait* seconds (and 1/16 more) are over."""
        params, headers, patience = {}, {}, 0.0
        if content_hash:
            seconds = max(1, round(wait))  # 0s and less would block for five minutes
            params, patience = {"hash": content_hash, "wait": f"{seconds}s"}, seconds * 17 / 16
            # Whoever holds a connection for ever never learns that others get none.
            headers = {"Connection": "close"}
        path = f"/v1/agent/service/{quote(entry_id, safe='')}"
        try:
            document = await self._transport.get(self._json(), path, params, headers, patience=patience)
        except AgentNotFound:
            return None
        if service_document(self._settings, document).get("ID") != entry_id:
            raise wrong_json(self._settings, f"JSON that is not the entry {entry_id}", document)
        return Entry(document, str(document.get("ContentHash", "")))

    async def services(self, expression: str) -> dict[str, dict[str, Any]]:
        """The entries that *expression* selects, by ID. Without a right on them they are missing, without a word."""
        params = {"filter": expression}
        found = await self._transport.get(self._json(), "/v1/agent/services", params, most=LARGEST_ANSWER)
        entries = expect(self._settings, found, dict)
        return {key: service_document(self._settings, document) for key, document in entries.items()}

    async def checks(self, entry_id: str) -> list[dict[str, Any]]:
        """The checks of one entry, with their status."""
        params = {"filter": f'ServiceID == "{entry_id}"'}
        found = await self._transport.get(self._json(), "/v1/agent/checks", params)
        return [expect(self._settings, check, dict) for check in expect(self._settings, found, dict).values()]

    async def catalogued(self, name: str, entry_id: str, node: str) -> bool:
        """Whether the catalogue, which is what Prometheus reads, has the entry; without ``node:read``, may have it."""
        params = {"filter": f'ServiceID == "{entry_id}" and Node == "{node}"'}
        path = f"/v1/catalog/service/{quote(name, safe='')}"
        return bool(await self._transport.get(_found_or_withheld, path, params))

    async def catalogue(self, name: str) -> list[dict[str, Any]]:
        """The entries of a service on all nodes.

        Raises:
            AgentDenied: some are withheld; the token needs ``node:read``.
        """
        found = await self._transport.get(
            _found_and_told, f"/v1/catalog/service/{quote(name, safe='')}", most=LARGEST_ANSWER
        )
        return [expect(self._settings, entry, dict) for entry in found]

    async def may_write(self, name: str) -> bool:
        """Whether the token may register *name*; Consul's own UI asks this way. Without ACLs everybody may."""
        body = json.dumps([{"Resource": "service", "Access": "write", "Segment": name}])
        try:
            found = await self._transport.post(self._json(), "/v1/internal/acl/authorize", data=body)
        except AgentDenied as error:
            if "ACL support disabled" in str(error):
                return True
            raise
        return all(expect(self._settings, answer, dict).get("Allow") for answer in found)

    async def deregister_from_catalogue(self, entry_id: str, node: str) -> None:
        """Remove an entry that the agent no longer has, but lacked the right to remove from the catalogue."""
        body = json.dumps({"Node": node, "ServiceID": entry_id})
        with suppress(AgentNotFound):
            await self._transport.put(self._json(), "/v1/catalog/deregister", data=body)

    @property
    def _settings(self) -> Settings:
        return self._transport.settings

    @property
    def credentials(self) -> int:
        """Equal for as long as the token is the same; it says nothing of the token."""
        return hash(request_headers(self._settings).get("X-Consul-Token", ""))

    async def self_(self) -> dict[str, Any]:
        """The agent's configuration and member record."""
        return expect(self._settings, await self._agent.self(), dict)

    @property
    def resolved(self) -> tuple[str, ...]:
        """The agent's IP addresses once it was looked up: what `deregister_sync` needs when names no longer work."""
        return self._transport.resolver.last

    async def aclose(self) -> None:
        await self._transport.aclose()


def preload() -> None:
    """Import what the first client would, where that is better done early: before workers are forked."""
    importlib.import_module("consul.base")


class _Groups:
    """What python-consul2's groups want of their parent: a transport, and no token, since the transport sends it."""

    token = None

    def __init__(self, transport: "_Transport") -> None:
        self.http = transport


class _Transport:
    """python-consul2's HTTPClient: *callback* gets the response, IDs are quoted already."""

    def __init__(self, settings: Settings, timeout: float) -> None:
        self.settings = settings
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None
        self._tls: ssl.SSLContext | None = None
        self.resolver = _Resolver()

    async def get(
        self,
        callback: Callable[[Any], Any],
        path: str,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        patience: float = 0,
        most: int = LARGEST_ENTRY,
    ) -> Any:
        return await self._call(callback, "GET", path, params, headers, patience=patience, most=most)

    async def put(
        self,
        callback: Callable[[Any], Any],
        path: str,
        params: Mapping[str, str] | None = None,
        data: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        if path == _REGISTER:
            params = {"replace-existing-checks": "true"}  # which python-consul2 does not know
        return await self._call(callback, "PUT", path, params, headers, data=data)

    async def post(self, callback: Callable[[Any], Any], path: str, *, data: str) -> Any:
        return await self._call(callback, "POST", path, None, None, data=data)

    async def aclose(self) -> None:
        if self._session:
            await self._session.close()

    async def _call(
        self,
        callback: Callable[[Any], Any],
        method: str,
        path: str,
        params: Mapping[str, str] | None,
        headers: Mapping[str, str] | None,
        *,
        data: str = "",
        patience: float = 0,
        most: int = LARGEST_ENTRY,
    ) -> Any:
        from consul.base import Response

        with_scope = urlencode({**(params or {}), **scope(self.settings)})
        deadline = self._timeout + patience
        async with self._mapped(deadline), asyncio.timeout(deadline):
            url = URL(f"{self._base()}{path}?{with_scope}", encoded=True)
            response = await self._opened().request(
                method,
                url,
                data=data or None,
                headers={**(headers or {}), **request_headers(self.settings)},
                allow_redirects=False,
                ssl=self._context(),
                server_hostname=self.settings.consul_tls_server_name,
            )
            async with response:
                text = await _read(response, most)
        raise_for_status(self.settings, response.status, text, response.headers.get("Location", ""))
        try:
            return callback(Response(response.status, response.headers, text, text.encode()))
        except (ValueError, RecursionError):
            raise no_json(self.settings, text) from None

    @asynccontextmanager
    async def _mapped(self, deadline: float) -> AsyncIterator[None]:
        """No library's exception leaves this module."""
        agent = who(self.settings)
        try:
            yield
        except TimeoutError:
            raise AgentTimeout(f"{agent} did not answer within {round(deadline, 1):g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            if self.settings.consul_http_addr.socket and isinstance(error, OSError) and error.errno == errno.EPIPE:
                # How the 429 for one connection too many looks there: the agent does not wait for the request.
                raise AgentBusy(f"{agent} hung up: its users share limits.http_max_conns_per_client") from error
            self._tls = None  # certificates expire, and are replaced in their files
            raise AgentUnreachable(f"{agent}: {text_of(self.settings, error)}") from None

    def _context(self) -> ssl.SSLContext | bool:
        if self._tls is None and self.settings.consul_http_addr.scheme == "https":
            self._tls = tls_context(self.settings)
        return self._tls or True

    def _base(self) -> str:
        target = self.settings.consul_http_addr
        return "http://localhost" if target.socket else str(target)

    def _opened(self) -> aiohttp.ClientSession:
        """The session, made in the loop that uses it; idle connections are given back, since an agent has 200."""
        if self._session is None:
            target = self.settings.consul_http_addr
            connector: aiohttp.BaseConnector
            if target.socket:
                connector = aiohttp.UnixConnector(target.socket, keepalive_timeout=IDLE)
            else:
                connector = aiohttp.TCPConnector(resolver=self.resolver, keepalive_timeout=IDLE)
            self._session = aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(total=None),
                headers={"Accept-Encoding": "identity"},  # what is small on the wire stays small in memory
                auto_decompress=False,
            )
        if self._session.closed:  # a stop was given less time meanwhile
            raise AgentUnreachable(f"{who(self.settings)} is not asked any more")
        return self._session


class _Resolver(AbstractResolver):
    """Looks names up in a daemon thread: an executor's would be joined at exit, however long the name server hangs."""

    last: tuple[str, ...] = ()

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_UNSPEC) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Any]] = loop.create_future()

        def settle(found: list[Any], error: OSError | None) -> None:
            if answer.done():
                return
            if error:
                answer.set_exception(error)
            else:
                answer.set_result(found)

        def look_up() -> None:
            found: list[Any] = []
            failure = None
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
            except OSError as error:
                failure = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, found, failure)

        try:
            threading.Thread(target=look_up, name="consul-prom-resolver", daemon=True).start()
        except RuntimeError as error:  # the system gives no thread: it may in a moment
            raise OSError(errno.EAGAIN, str(error)) from error
        found = await answer
        self.last = tuple(str(address[0]) for _, _, _, _, address in found)
        return [
            ResolveResult(hostname=host, host=address[0], port=port, family=kind, proto=proto, flags=0)
            for kind, _, proto, _, address in found
        ]

    async def close(self) -> None:
        pass


async def _read(response: aiohttp.ClientResponse, most: int) -> str:
    chunks = bytearray()
    async for chunk in response.content.iter_chunked(2**16):
        chunks += chunk
        if len(chunks) > most:
            raise AgentConfused(f"{NOT_CONSUL} answered {response.url.path} with more than {most >> 20} MiB")
    return chunks.decode(errors="replace")


def _found_or_withheld(response: Any) -> bool:
    """Whether a list has items, or would have them for a token with more rights."""
    return bool(json.loads(response.body)) or ACL_FILTERED_HEADER in response.headers


def _found_and_told(response: Any) -> list[Any]:
    """A list, of which nothing is withheld."""
    if ACL_FILTERED_HEADER in response.headers:
        raise AgentDenied("the token may not read nodes, so the agent withholds entries")
    found = json.loads(response.body)
    return found if isinstance(found, list) else []
