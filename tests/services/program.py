"""One real program as a child process, on an address, in a directory and with a log of its own."""

import contextlib
import http.client
import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from tests.services.binaries import require
from tests.services.waiting import wait_until


def own_address() -> str:
    """A random address of Linux's loopback network 127.0.0.0/8, on which every default port is free."""
    # Not from `random`: Hypothesis seeds that, and two programs would get the same address.
    return f"127.{2 + secrets.randbelow(253)}.{secrets.randbelow(256)}.{1 + secrets.randbelow(254)}"


class Program:
    """A child process that can be started, stopped, killed, paused and started again in the same directory.

    As a context manager it starts, and at the end it stops and removes its directory.
    """

    name: str
    start_within = 60.0
    url: str

    def __init__(self, *, address: str | None, binary: Path | None, env: Mapping[str, str] | None) -> None:
        self.address = address or own_address()
        self._binary = binary
        self._env = {**os.environ, **(env or {})}
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._tls: ssl.SSLContext | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url} pid={self._process.pid if self._process else None}>"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def directory(self) -> Path:
        """Made when first asked for, removed by `close`."""
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix=f"{self.name}-", ignore_cleanup_errors=True)
        return Path(self._temporary.name)

    @property
    def log(self) -> Path:
        """What the program wrote, over all its starts."""
        return self.directory / "log"

    @property
    def pid(self) -> int:
        """Process id; AssertionError if it does not run."""
        assert self._process is not None, f"{self!r} does not run"
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is there, paused or not."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Start and wait until it is ready; if that fails, nothing stays behind."""
        assert not self.running, f"{self!r} runs already"
        try:
            command = [str(self._binary or require(self.name)), *self._arguments()]
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    command,
                    cwd=self.directory,
                    env=self._env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def wait_ready(self, *, within: float | None = None) -> None:
        """Wait until the program does its work; AssertionError with the end of its log if it ended or is late."""
        try:
            wait_until(
                lambda: not self.running or self._ready(),
                within=within or self.start_within,
                what=f"{self.name} ready at {self.url}",
            )
            assert self.running, f"{self.name} ended with {self._process and self._process.returncode}"
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log.read_text(errors='replace')[-3000:]}") from None

    def stop(self, *, within: float = 15.0) -> int | None:
        """SIGTERM, and SIGKILL after *within* seconds; the exit code, or None if it did not run."""
        if (process := self._process) is None:
            return None
        process.send_signal(signal.SIGCONT)  # a paused process would not hear of it
        process.terminate()
        try:
            process.wait(within)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._process = None
        return process.returncode

    def kill(self) -> None:
        """SIGKILL; the directory stays for a restart."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> Self:
        """Stop, and start again with the same address and directory."""
        self.stop()
        return self.start()

    def pause(self) -> None:
        """SIGSTOP, and wait until it stands still: its sockets stay open and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)
        # WNOWAIT leaves the exit code to Popen, should the process have ended.
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """Stop, and remove the directory."""
        self.stop()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def call(
        self,
        path: str,
        *,
        method: str = "GET",
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 10.0,
    ) -> tuple[int, Any]:
        """One HTTP call: status and the body, decoded if it is JSON. *body* is sent as JSON."""
        with contextlib.closing(self._connection(timeout)) as connection:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, body=content, headers=dict(headers or {}))
            answer = connection.getresponse()
            text = answer.read().decode()
        is_json = "json" in (answer.getheader("Content-Type") or "")
        return answer.status, json.loads(text) if is_json else text

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        if parts.scheme == "unix":
            return _UnixConnection(parts.path, timeout=timeout)
        assert parts.hostname, self.url
        if parts.scheme == "https":
            return http.client.HTTPSConnection(parts.hostname, parts.port, timeout=timeout, context=self._tls)
        return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)

    def _arguments(self) -> Sequence[str]:
        raise NotImplementedError

    def _ready(self) -> bool:
        raise NotImplementedError


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, *, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
