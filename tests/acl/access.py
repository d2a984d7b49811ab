"""A real Consul that denies what no token allows, and its tokens."""

import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from consul_prom.worker.worker import Worker
from tests.services.consul import Consul

ANONYMOUS = "00000000-0000-0000-0000-000000000002"

Make = Callable[..., Worker]


def secret() -> str:
    return str(uuid.uuid4())


class Access:
    """`consul` with ACLs that deny by default, and every secret that its tokens have had.

    *agent_token*: whether the agent has a token of its own, without which it may tell the catalogue of nothing but
    what its services' tokens allow.
    """

    def __init__(self, *, agent_token: bool = True) -> None:
        root = secret()
        self.secrets = {root}
        tokens = {"initial_management": root, **({"agent": root} if agent_token else {})}
        self.consul = Consul(config={"acl": {"enabled": True, "default_policy": "deny", "tokens": tokens}})
        self._accessors: dict[str, str] = {}

    def token(self, *rules: str, text: str | None = None) -> str:
        """The secret of a new token with *rules*; *text* is what it is to be."""
        text = text or secret()
        accessor = self._accessors[text] = secret()
        self.secrets.add(text)
        body = {"AccessorID": accessor, "SecretID": text, "Policies": self._policies(rules)}
        self._put("/v1/acl/token", body)
        return text

    def unknown(self) -> str:
        """A secret that no token has."""
        text = secret()
        self.secrets.add(text)
        return text

    def grant(self, text: str, *rules: str) -> None:
        """Give a token *rules*, in place of those that it had; no *text* is what a request without a token may do."""
        accessor = self._accessors[text] if text else ANONYMOUS
        self._put(f"/v1/acl/token/{accessor}", {"Policies": self._policies(rules)})

    def delete(self, text: str) -> None:
        status, answer = self.consul.call(f"/v1/acl/token/{self._accessors[text]}", method="DELETE")
        assert status == 200, answer

    def entries(self, name: str = "shop-metrics") -> dict[str, dict[str, Any]]:
        """What the agent has, by ID."""
        found = self._get("/v1/agent/services")
        return {key: entry for key, entry in found.items() if entry["Service"] == name}

    def catalogue(self, name: str = "shop-metrics") -> dict[str, str]:
        """What the catalogue, and so Prometheus, has: the status by ID."""
        found = self._get(f"/v1/health/checks/{name}")
        return {check["ServiceID"]: check["Status"] for check in found}

    def deregister(self, entry_id: str) -> None:
        self._put(f"/v1/agent/service/deregister/{entry_id}", None)

    def close(self) -> None:
        self.consul.close()

    def _policies(self, rules: Iterable[str]) -> list[dict[str, str]]:
        names = []
        for text in rules:
            names.append({"Name": secret()})
            self._put("/v1/acl/policy", {**names[-1], "Rules": text})
        return names

    def _get(self, path: str) -> Any:
        status, answer = self.consul.call(path)
        assert status == 200, answer
        return answer

    def _put(self, path: str, body: Any) -> None:
        status, answer = self.consul.call(path, method="PUT", body=body)
        assert status == 200, answer


def replace(file: Path, token: str) -> None:
    """Put a token into its file, as one that rotates them does: at once."""
    beside = file.with_suffix(".new")
    beside.write_text(f"{token}\n")
    beside.replace(file)
