"""A program at the agent's address that answers each request with the request, as debugging proxies do."""

import base64
import html
import json
import re
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self
from urllib.parse import quote, quote_plus

from tests.services.proxy import answer

Shape = Callable[[list[str]], bytes]
"""What is answered to the heads of all requests until now, the newest last."""


def _fields(head: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in head.splitlines()[1:] if ": " in line)


def _values(head: str) -> str:
    """The values of the fields that hold a secret, and the password as the program decodes it."""
    fields = _fields(head)
    kind, _, encoded = fields.get("Authorization", "").partition(" ")
    decoded = base64.b64decode(encoded).decode() if kind == "Basic" else ""
    return f"{fields.get('X-Consul-Token', '')} {decoded.partition(':')[2]} {encoded} {decoded}"


def _json(found: object, status: int = 200) -> bytes:
    return answer(status, json.dumps(found), {"Content-Type": "application/json"})


SHAPES: Final[dict[str, Shape]] = {
    "all heads": lambda heads: answer(403, "".join(heads)),
    "values": lambda heads: answer(403, _values(heads[-1])),
    "values, old": lambda heads: answer(403, _values(heads[0])),
    "behind 190 characters": lambda heads: answer(403, "-" * 190 + _values(heads[-1])),
    "behind 490 characters": lambda heads: answer(403, " " * 300 + "-" * 190 + _values(heads[-1])),
    "behind 65,520 characters": lambda heads: answer(403, " " * 65_520 + _values(heads[-1])),
    "JSON": lambda heads: _json(_fields(heads[-1]), 500),
    "JSON in JSON": lambda heads: _json(json.dumps(_values(heads[-1])), 500),
    "HTML": lambda heads: answer(502, html.escape(_values(heads[-1]))),
    "HTML in HTML": lambda heads: answer(502, html.escape(html.escape(_values(heads[-1])))),
    "URL": lambda heads: answer(400, quote(_values(heads[-1]), safe="")),
    "URL, lower case": lambda heads: answer(
        400, re.sub("%..", lambda it: it[0].lower(), quote_plus(_values(heads[-1])))
    ),
    "URL in URL": lambda heads: answer(400, quote(quote(_values(heads[-1]), safe=""), safe="")),
    "repr": lambda heads: answer(400, repr(_values(heads[-1]).encode())),
    **{
        f"base64, shifted by {shift}": lambda heads, shift=shift: answer(  # type: ignore[misc]
            405, base64.b64encode(("x" * shift + _values(heads[-1])).encode()).decode()
        )
        for shift in range(3)
    },
    "base64 for URLs": lambda heads: answer(405, base64.urlsafe_b64encode(_values(heads[-1]).encode()).decode()),
    "text as 200": lambda heads: answer(200, _values(heads[-1])),
    "JSON text as 200": lambda heads: _json(_values(heads[-1])),
    "JSON list as 200": lambda heads: _json([_values(heads[-1])]),
    "JSON of texts as 200": lambda heads: _json({"headers": _values(heads[-1])}),
    "JSON of fields as 200": lambda heads: _json({"headers": _fields(heads[-1])}),
    "redirect": lambda heads: answer(302, "", {"Location": f"/login?{quote(_values(heads[-1]))}"}),
    "redirect in the plain": lambda heads: answer(302, "", {"Location": f"/login?{_values(heads[-1])}"}),
    "status line": lambda heads: f"{_values(heads[-1])}\r\n\r\n".encode(),
    "status": lambda heads: f"HTTP/1.1 {_values(heads[-1])} OK\r\n\r\n".encode(),
    "head": lambda heads: f"HTTP/1.1 200 OK\r\n{_values(heads[-1])}\r\n\r\n".encode(),
    "length": lambda heads: f"HTTP/1.1 200 OK\r\nContent-Length: {_values(heads[-1])}\r\n\r\n".encode(),
}


class EchoingAgent:
    """A context manager; `shape` tells how it answers, `heads` what it was asked."""

    def __init__(self) -> None:
        self.shape: Shape = SHAPES["all heads"]
        self.heads: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                try:
                    self._answer(connection)
                except OSError:
                    continue

    def _answer(self, connection: socket.socket) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            chunk = connection.recv(2**16)
            if not chunk:
                return
            received += chunk
        head, _, body = received.decode().partition("\r\n\r\n")
        missing = int(_fields(head).get("Content-Length", 0)) - len(body)
        while missing > 0:
            missing -= len(connection.recv(2**16)) or missing
        self.heads.append(f"{head}\r\n")
        connection.sendall(self.shape(self.heads))
