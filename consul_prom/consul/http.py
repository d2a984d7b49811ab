"""The agent's HTTP, as both clients use it: TLS, headers, the meaning of a status, and quoted answers."""

import base64
import errno
import http.client
import json
import os
import ssl
from collections import deque
from pathlib import Path
from typing import Any, Final

from consul_prom.consul.quoting import quote as quote_without
from consul_prom.errors import (
    AgentBusy,
    AgentConfused,
    AgentDenied,
    AgentError,
    AgentFailed,
    AgentNotFound,
    AgentRejected,
    AgentUnreachable,
    TokenUnreadable,
)
from consul_prom.settings.settings import Settings

ACL_FILTERED_HEADER: Final = "X-Consul-Results-Filtered-By-ACLs"
"""A header: for another token the list might be longer."""
NOT_CONSUL: Final = "what listens at CONSUL_HTTP_ADDR"
"""Which is no agent, by its answers."""
_PLAIN: Final = frozenset(
    {errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ENOENT, errno.EACCES, errno.EHOSTUNREACH}
    | {errno.ENETUNREACH, errno.ETIMEDOUT}
)


def tls_context(settings: Settings) -> ssl.SSLContext:
    """Raises AgentUnreachable that names the file, which ssl's own errors do not."""
    name = "CONSUL_CACERT", settings.consul_cacert or settings.consul_capath
    try:
        context = ssl.create_default_context(cafile=settings.consul_cacert, capath=settings.consul_capath)
        if settings.consul_client_cert:
            name = "CONSUL_CLIENT_CERT", settings.consul_client_cert
            context.load_cert_chain(settings.consul_client_cert, settings.consul_client_key)
    except OSError as error:
        raise AgentUnreachable(f"{name[0]}={name[1]!r} cannot be used: {text_of(settings, error)}") from error
    if not settings.consul_http_ssl_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def request_headers(settings: Settings) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    token = settings.consul_http_token.reveal() if settings.consul_http_token else ""
    if settings.consul_http_token_file:
        token = _token_of(settings)
    if token:
        headers["X-Consul-Token"] = token
    if settings.consul_http_auth:
        user, _, password = settings.consul_http_auth.reveal().partition(":")
        headers["Authorization"] = f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"
    return headers


_TOKENS_READ: Final[dict[str, deque[str]]] = {}
"""The last tokens that each file has held: an answer may repeat one that was replaced meanwhile."""


def _token_of(settings: Settings) -> str:
    """Read for each call, so that a rotated token is taken up by itself."""
    path = settings.consul_http_token_file or ""
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise TokenUnreadable(f"CONSUL_HTTP_TOKEN_FILE={path!r} cannot be read: {text_of(settings, error)}") from error
    if not token:  # being replaced, perhaps; without a token, entries would look lost
        raise TokenUnreadable(f"CONSUL_HTTP_TOKEN_FILE={path!r} is empty")
    if not token.isascii() or not token.isprintable():
        raise TokenUnreadable(f"CONSUL_HTTP_TOKEN_FILE={path!r} holds characters that no HTTP header can carry")
    read = _TOKENS_READ.setdefault(path, deque(maxlen=8))
    if token not in read:
        read.append(token)
    return token


def quoted(settings: Settings, text: str, *, most: int = 200) -> str:
    """What another program said, fit for a message. No text from outside goes into one in another way.

    The program may echo our request: so do debugging proxies, and whatever a wrong CONSUL_HTTP_ADDR leads to.
    """
    secrets = {*_TOKENS_READ.get(settings.consul_http_token_file or "", ())}
    if settings.consul_http_token:
        secrets.add(settings.consul_http_token.reveal())
    if settings.consul_http_auth:
        auth = settings.consul_http_auth.reveal()
        user, _, password = auth.partition(":")
        secrets |= {auth, f"{user}:{password}", password}
    return quote_without(text, secrets, most=most)


def scope(settings: Settings) -> dict[str, str]:
    pairs = {"ns": settings.consul_namespace, "partition": settings.consul_partition}
    return {key: value for key, value in pairs.items() if value}


def raise_for_status(settings: Settings, status: int, body: str, location: str) -> None:
    if status == 200:
        return
    kinds: dict[int, type[AgentError]] = {
        400: AgentRejected,
        401: AgentDenied,
        403: AgentDenied,
        404: AgentNotFound,
        405: AgentRejected,
        429: AgentBusy,
    }
    kind = kinds.get(status, AgentFailed if status >= 500 else AgentConfused)
    if kind is AgentNotFound and "service ID" not in body:  # a proxy's, which knows nothing of the entry
        kind = AgentConfused
    if status == 500 and "Unknown service ID" in body:  # so says the catalogue
        kind = AgentNotFound
    raise kind(f"{who(settings)} answered {status}: {_meaning(settings, status, body, location)}")


def _meaning(settings: Settings, status: int, body: str, location: str) -> str:
    """What the body says or, if it is empty, what the status means; of a redirect, where it leads."""
    if location and 300 <= status < 400:
        return f"it redirects to {quoted(settings, location)}"
    return quoted(settings, body) or http.client.responses.get(status, "an empty answer")


def service_document(settings: Settings, found: Any) -> dict[str, Any]:
    document = expect(settings, found, dict)
    expect(settings, document.get("Meta") or {}, dict)
    return document


def expect(settings: Settings, found: Any, kind: type[dict[Any, Any]]) -> dict[Any, Any]:
    if not isinstance(found, kind):
        raise wrong_json(settings, "JSON of the wrong shape", found)
    return found


def wrong_json(settings: Settings, what: str, found: Any) -> AgentConfused:
    return AgentConfused(f"{NOT_CONSUL} sent {what}: {quoted(settings, json.dumps(found), most=100)}")


def no_json(settings: Settings, text: str) -> AgentConfused:
    return AgentConfused(f"{who(settings)} sent no JSON: {quoted(settings, text, most=100)!r}")


def who(settings: Settings) -> str:
    return f"the Consul agent (CONSUL_HTTP_ADDR={settings.consul_http_addr})"


def text_of(settings: Settings, error: BaseException) -> str:
    """`words_of` an error that may quote the answer."""
    return quoted(settings, words_of(error), most=300)


def words_of(error: BaseException) -> str:
    """The system's words for an error; aiohttp adds its own to them, with an SSLContext's place in memory."""
    if isinstance(error, OSError) and error.errno in _PLAIN:
        return os.strerror(error.errno)
    if inner := getattr(error, "os_error", None) or getattr(error, "certificate_error", None):
        return words_of(inner)
    said = error.strerror if isinstance(error, OSError) else ""
    return said or str(error) or type(error).__name__
