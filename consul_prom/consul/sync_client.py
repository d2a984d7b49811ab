"""A small synchronous client for the last steps of a stop and for Gunicorn's master.

It needs no event loop, no thread, no name server and none of a worker's libraries.
"""

import http.client
import io
import json
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlencode

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
)
from consul_prom.errors import AgentConfused, AgentNotFound, AgentTimeout, AgentUnreachable
from consul_prom.settings.settings import Settings

LARGEST_ENTRY: Final = 2**20


def deregister_sync(settings: Settings, entry_id: str, *, timeout: float, hosts: Sequence[str] = ()) -> bool:
    """`AgentClient.deregister` for the last moments of a process: no event loop, no thread, no name lookup.

    *hosts* are the agent's resolved addresses; False where there was no such entry. Takes *timeout* seconds at most.
    """
    path = f"/v1/agent/service/deregister/{quote(entry_id, safe='')}"
    try:
        _ask_now(settings, "PUT", path, timeout=timeout, hosts=hosts)
    except AgentNotFound:
        return False
    return True


def service_sync(
    settings: Settings, entry_id: str, *, timeout: float, hosts: Sequence[str] = ()
) -> dict[str, Any] | None:
    """`AgentClient.service` in the same way: the entry, or None."""
    path = f"/v1/agent/service/{quote(entry_id, safe='')}"
    try:
        return service_document(settings, _ask_now(settings, "GET", path, timeout=timeout, hosts=hosts).json())
    except AgentNotFound:
        return None


def remove_sync(settings: Settings, entry: Mapping[str, Any], *, timeout: float, hosts: Sequence[str] = ()) -> None:
    """Deregister an entry in the same way, and, where tokens matter, see to it that the catalogue follows."""
    ends_at, entry_id = time.monotonic() + timeout, entry["ID"]

    def ask(method: str, path: str, **more: Any) -> _Answer:
        return _ask_now(settings, method, path, timeout=max(ends_at - time.monotonic(), 0), hosts=hosts, **more)

    expression, node = f'ServiceID == "{entry_id}"', ""
    if "X-Consul-Token" in request_headers(settings):  # an agent without a token of its own may not tell the catalogue
        checks = ask("GET", "/v1/agent/checks", params={"filter": expression})
        node = next((check["Node"] for check in expect(settings, checks.json(), dict).values() if "Node" in check), "")
    with suppress(AgentNotFound):
        ask("PUT", f"/v1/agent/service/deregister/{quote(entry_id, safe='')}")
    if node:
        params = {"filter": f'{expression} and Node == "{node}"'}
        found = ask("GET", f"/v1/catalog/service/{quote(entry['Service'], safe='')}", params=params)
        if found.json() or ACL_FILTERED_HEADER in found.headers:
            with suppress(AgentNotFound):
                ask("PUT", "/v1/catalog/deregister", data=json.dumps({"Node": node, "ServiceID": entry_id}))


class _Answer(NamedTuple):
    settings: Settings
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            raise no_json(self.settings, self.text) from None

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")


def _ask_now(
    settings: Settings,
    method: str,
    path: str,
    *,
    timeout: float,
    hosts: Sequence[str],
    params: Mapping[str, str] | None = None,
    data: str | None = None,
) -> _Answer:
    """Raises AgentError where that is no 200."""
    target, ends_at = settings.consul_http_addr, time.monotonic() + timeout
    url = f"{target.prefix}{path}?{urlencode({**(params or {}), **scope(settings)})}"
    for host in hosts or (target.host,):
        try:
            with closing(_connection(settings, host, _left(ends_at))) as connection:
                connection.request(method, url, data, headers={**request_headers(settings), "Connection": "close"})
                answer = _read_now(settings, connection, method, ends_at)
            raise_for_status(settings, answer.status, answer.text, answer.headers.get("Location", ""))
        except ConnectionRefusedError as error:
            refused = error  # a name often has an address that the agent does not listen on
        except TimeoutError:
            raise AgentTimeout(f"{who(settings)} did not answer within {timeout:.2g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise AgentUnreachable(f"{who(settings)}: {text_of(settings, error)}") from None
        else:
            return answer
    raise AgentUnreachable(f"{who(settings)}: {text_of(settings, refused)}")


def _read_now(settings: Settings, connection: http.client.HTTPConnection, method: str, ends_at: float) -> _Answer:
    """To the end of the stream: a time-out of the socket's is for each read, and an agent may send byte by byte."""
    stream: Any = connection.sock
    received = bytearray()
    while True:
        stream.settimeout(_left(ends_at))
        chunk = stream.recv(2**16)
        received += chunk
        if len(received) > LARGEST_ENTRY:
            raise AgentConfused(f"{NOT_CONSUL} answered with more than {LARGEST_ENTRY >> 20} MiB")
        if not chunk:
            break
    response = http.client.HTTPResponse(_Received(bytes(received)), method=method)  # type: ignore[arg-type]
    response.begin()
    return _Answer(settings, response.status, response.headers, response.read())


def _left(ends_at: float) -> float:
    """Raises TimeoutError where there is none."""
    left = ends_at - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Received:
    """What http.client takes for a socket."""

    def __init__(self, received: bytes) -> None:
        self._received = received

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._received)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _connection(settings: Settings, host: str, timeout: float) -> http.client.HTTPConnection:
    target = settings.consul_http_addr
    if target.socket:
        return _UnixConnection(target.socket, timeout)
    if target.scheme == "http":
        return http.client.HTTPConnection(host, target.port, timeout=timeout)
    context, connection = tls_context(settings), http.client.HTTPSConnection(host, target.port, timeout=timeout)
    plain = socket.create_connection((host, target.port), timeout)
    name = settings.consul_tls_server_name or target.host  # the address dialled is not the name to verify
    connection.sock = context.wrap_socket(plain, server_hostname=name)
    return connection
