"""A real Consul agent."""

import http.client
import json
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.services.program import Program

Config = Mapping[str, Any]


class Consul(Program):
    """`consul agent`, HTTP at :8500 of an address of its own.

    *dev* keeps everything in memory; otherwise it is a single server with a data directory that a restart reads.
    *config* is merged over ours, key by key; None removes a key, as in a client agent's
    `{"server": False, "bootstrap_expect": None, "retry_join": [...]}`.
    *tls* is what `call` and the wait for readiness use if the configuration turns HTTP off in favour of HTTPS.
    """

    name = "consul"

    def __init__(
        self,
        *,
        dev: bool = True,
        config: Config | None = None,
        address: str | None = None,
        tls: ssl.SSLContext | None = None,
        binary: Path | None = None,
    ) -> None:
        super().__init__(address=address, binary=binary, env=None)
        self.dev = dev
        self.config = merged(self._defaults(), config or {})
        self.url = self._url()
        self._tls = tls

    @property
    def token(self) -> str | None:
        """The configured token that may do everything, if there is one; `call` sends it."""
        tokens = self.config.get("acl", {}).get("tokens", {})
        token: str | None = tokens.get("initial_management") or tokens.get("agent")
        return token

    def call(
        self,
        path: str,
        *,
        method: str = "GET",
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 10.0,
    ) -> tuple[int, Any]:
        """The same as `Program.call`, with our token unless *headers* has another."""
        own = {"X-Consul-Token": self.token} if self.token else {}
        return super().call(path, method=method, body=body, headers={**own, **(headers or {})}, timeout=timeout)

    def _defaults(self) -> dict[str, Any]:
        common = {
            "node_name": f"node-{self.address.replace('.', '-')}",
            "bind_addr": self.address,
            "client_addr": self.address,
            "advertise_addr": self.address,
            "ports": {"http": 8500, "dns": -1, "grpc": -1, "grpc_tls": -1},
            "disable_update_check": True,
            "log_level": "warn",
        }
        if self.dev:
            return common
        # The multiplier 1 is the shortest election that a server with a data directory can have.
        return {**common, "server": True, "bootstrap_expect": 1, "performance": {"raft_multiplier": 1}}

    def _url(self) -> str:
        http_address = self.config.get("addresses", {}).get("http", self.address)
        if http_address.startswith("unix://"):
            return str(http_address)
        ports = self.config["ports"]
        if ports["http"] != -1:
            return f"http://{http_address}:{ports['http']}"
        return f"https://{self.config.get('addresses', {}).get('https', self.address)}:{ports['https']}"

    def _arguments(self) -> Sequence[str]:
        file = self.directory / "agent.json"
        file.write_text(json.dumps(self.config))
        return ["agent", *(["-dev"] if self.dev else [f"-data-dir={self.directory / 'data'}"]), f"-config-file={file}"]

    def _ready(self) -> bool:
        try:
            leader = self.call("/v1/status/leader", timeout=2.0)
            agent, _ = self.call("/v1/agent/self", timeout=2.0)
        except (OSError, http.client.HTTPException):
            return False
        # Without a token that may read the agent, its refusal is its answer.
        answered = agent == 200 or (agent == 403 and self.token is None)
        return answered and leader[0] == 200 and bool(leader[1])


def merged(base: Config, over: Config) -> dict[str, Any]:
    """*base* with the keys of *over*; dictionaries are merged in turn, and None removes a key."""
    result = dict(base)
    for key, value in over.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            result[key] = merged(result.get(key, {}), value)
        else:
            result[key] = value
    return result
