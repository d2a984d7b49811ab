"""A page as a scraper gets it, from a renderer of its own or one that was asked before."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry

from consul_prom.exposition.renderer import Renderer
from consul_prom.ledger.registry import LedgerRegistry


class Page(NamedTuple):
    headers: Mapping[str, str]
    body: bytes


def render(
    source: CollectorRegistry | LedgerRegistry | Renderer,
    *,
    accept: str = "",
    accept_encoding: str = "",
    names: Sequence[str] = (),
) -> Page:
    """The whole page at once."""
    renderer = source if isinstance(source, Renderer) else Renderer(source)
    headers, _, pieces = renderer.render(accept, accept_encoding, names)
    return Page(headers, b"".join(pieces))
