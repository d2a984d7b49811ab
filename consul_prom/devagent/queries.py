"""The query parameters of reads that block, and of the catalog.

Source: https://developer.hashicorp.com/consul/api-docs/features/blocking and parseWait in agent/http.go
"""

from dataclasses import dataclass

from aiohttp import web

from consul_prom.devagent import documents, durations
from consul_prom.devagent.errors import Refused, Unsupported

WAIT_DEFAULT = 300.0
WAIT_LIMIT = 600.0

_CATALOG_PARAMETERS = {"consistent", "dc", "index", "node-meta", "passing", "stale", "tag", "token", "wait"}
_TRUE = {"", "1", "t", "T", "TRUE", "true", "True"}
_FALSE = {"0", "f", "F", "FALSE", "false", "False"}


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogQuery:
    """`index` is 0, which every index exceeds, where the caller does not block; `wait` is in seconds."""

    index: int
    wait: float
    tags: frozenset[str]
    passing: bool
    stale: bool
    matches_node: bool

    def headers(self, index: int) -> dict[str, str]:
        return {
            "X-Consul-Index": str(index),
            "X-Consul-KnownLeader": "true",
            "X-Consul-LastContact": "0",
            "X-Consul-Effective-Consistency": "stale" if self.stale else "leader",
        }


def catalog(request: web.BaseRequest, *others: str) -> CatalogQuery:
    """The parameters that Prometheus sends; any but *others* that would change the answer is refused."""
    query = request.query
    if unknown := sorted(set(query) - _CATALOG_PARAMETERS - {*others}):
        raise Unsupported(f"the parameter {unknown[0]}")
    if query.get("dc", documents.DATACENTER) != documents.DATACENTER:
        raise Refused(500, "No path to datacenter")
    passing = query.get("passing", "false")
    if passing not in _TRUE | _FALSE:
        raise Refused(400, "Invalid value for ?passing")
    wait, index = blocking(request)
    wanted = dict(pair.partition(":")[::2] for pair in query.getall("node-meta", []))
    return CatalogQuery(
        index=index,
        wait=wait,
        tags=frozenset(tag.lower() for tag in query.getall("tag", [])),
        passing=passing in _TRUE,
        stale="stale" in query,
        matches_node=wanted.items() <= documents.NODE_META.items(),
    )


def blocking(request: web.BaseRequest) -> tuple[float, int]:
    """Seconds to block, at most ten minutes, and the index to pass.

    Zero and less mean the default of five minutes, not "do not wait".
    """
    text = request.query.get("wait", "")
    try:
        seconds = durations.parse(text) / durations.SECOND if text else 0
    except ValueError as exc:
        raise Refused(400, "Invalid wait time") from exc
    index = request.query.get("index") or "0"
    if not (index.isascii() and index.isdigit()):
        raise Refused(400, "Invalid index")
    return min(seconds, WAIT_LIMIT) if seconds > 0 else WAIT_DEFAULT, int(index)
