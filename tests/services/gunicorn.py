"""A real Gunicorn with the applications of the tests."""

import http.client
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests import ROOT
from tests.services.program import Program

HOOKS = ("-c=python:consul_prom.gunicorn", "--no-control-socket")


class Gunicorn(Program):
    """`gunicorn`, at :8000 of an address of its own, importing from this repository.

    *settings* are consul-prom's, by environment variable; the slots are in its directory.
    """

    name = "gunicorn"

    def __init__(
        self,
        app: str = "tests.e2e.shop:get_application",
        *,
        workers: int = 4,
        worker_class: str = "aiohttp.GunicornWebWorker",
        settings: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        address: str | None = None,
    ) -> None:
        super().__init__(address=address, binary=Path(sys.executable), env=None)
        self._env |= {"PYTHONPATH": str(ROOT), "CONSUL_PROM_DIR": str(self.directory / "slots"), **(settings or {})}
        self.url = f"http://{self.address}:8000"
        self._app = app
        self._options = [f"--workers={workers}", f"--worker-class={worker_class}", *options]

    def workers(self) -> set[int]:
        """The process ids of the live workers."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text(encoding="ascii")
        return {int(pid) for pid in children.split()}

    def get(self, path: str, *, timeout: float = 10.0) -> str:
        """The body of a request on a connection of its own, which any worker may take; AssertionError unless 200."""
        status, body = self.call(path, timeout=timeout)
        assert status == 200, f"{path} answered {status}: {body}"
        return str(body)

    def _arguments(self) -> Sequence[str]:
        return ["-m", "gunicorn", self._app, f"--bind={self.address}:8000", "--graceful-timeout=10", *self._options]

    def _ready(self) -> bool:
        try:
            return self.call("/pid", timeout=2.0)[0] == 200
        except (OSError, http.client.HTTPException):
            return False
