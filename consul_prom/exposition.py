"""A registry as the page that a scraper asked for: text 0.0.4 and 1.0, OpenMetrics 1.0, plain or gzipped."""

import logging
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from prometheus_client import CollectorRegistry, Metric
from prometheus_client import exposition as text
from prometheus_client.registry import Collector

from consul_prom.continued import ContinuedRegistry
from consul_prom.family import Encode, Family
from consul_prom.kinds import FAMILIES, is_known, known
from consul_prom.source import Only, Plain, Source

try:  # the extra `isal`: a quarter of zlib's time
    from isal.isal_zlib import compress
except ImportError:
    from zlib import compress

log = logging.getLogger(__name__)

FORMATS_KEPT: Final = 2  # each costs the memory of a page or two
FORGET: Final = 300.0  # seconds after which a format that nobody asks for is no longer kept
LEVEL: Final = 1
_GZIP: Final = 16
_OPENMETRICS: Final = "application/openmetrics-text"


class Format(NamedTuple):
    """The library's function that writes it, and what the answer calls it."""

    encode: Encode
    content_type: str

    @property
    def shows_exemplars(self) -> bool:
        return self.content_type.startswith(_OPENMETRICS)


class Renderer:
    """The pages of a registry: byte for byte what the library writes, at a small part of its cost.

    Of each format asked for lately it keeps the families as they were last written. What it does not know (custom
    collectors, subclasses, another version of the library) it leaves to the library, metric by metric. One page at a
    time: it has no locks.
    """

    def __init__(self, registry: CollectorRegistry | ContinuedRegistry) -> None:
        self._registry = registry
        self._source: Source = registry if isinstance(registry, ContinuedRegistry) else Plain(registry)
        self._kept: dict[str, tuple[float, dict[Any, Family]]] = {}  # by content type; the oldest first

    def render(
        self, accept: str, accept_encoding: str, names: Sequence[str] = ()
    ) -> tuple[dict[str, str], Iterator[bytes]]:
        """Headers and the pieces of the page, as the two request headers ask for it.

        *names* keeps only the samples of these names. A custom collector's exception passes through.
        """
        asked = negotiate(accept)
        headers = {"Content-Type": asked.content_type, "Vary": "Accept, Accept-Encoding"}
        pieces = self._pieces(asked, names)
        if accepts_gzip(accept_encoding):
            return {**headers, "Content-Encoding": "gzip"}, _gzipped(pieces)
        return headers, pieces

    def _pieces(self, asked: Format, names: Sequence[str]) -> Iterator[bytes]:
        """Each the work of less than a millisecond; some are empty. No lock is held between two."""
        if names:
            yield asked.encode(self._registry.restricted_registry(names))
            return
        for kind in FAMILIES:
            is_known(kind)  # once in a process, it has to find out
            yield b""
        if not known() or type(self._registry) not in {CollectorRegistry, ContinuedRegistry}:
            yield asked.encode(self._registry)
        else:
            yield from self._page(asked)

    def _page(self, asked: Format) -> Iterator[bytes]:
        for _ in self._source.prepare():
            yield b""
        target_info, collectors = self._source.collectors()
        families = self._families(asked, collectors)
        if target_info:
            yield _by_library([target_info], asked)
        for collector in collectors:
            yield from self._one(collector, families.get(collector), asked)
        yield asked.encode(Only())

    def _one(self, collector: Collector, family: Family | None, asked: Format) -> Iterator[bytes]:
        if family:
            try:
                yield from family.pieces()
            except Exception:
                log.debug("%r is left to prometheus_client", collector, exc_info=True)
            else:
                return
        yield _by_library(self._source.families(collector), asked)

    def _families(self, asked: Format, collectors: Sequence[Any]) -> dict[Any, Family]:
        """The families of *collectors* that we can write. Those of other collectors, and of other formats, can go."""
        now, kinds = time.monotonic(), known()
        _, last = self._kept.pop(asked.content_type, (now, {}))
        families = {}
        for collector in collectors:
            kind = kinds.get(type(collector))
            if kind:
                kept = last.get(collector)
                families[collector] = kept or kind(
                    collector, asked.encode, source=self._source, shows_exemplars=asked.shows_exemplars
                )
        self._kept[asked.content_type] = now, families
        for content_type, (when, _) in list(self._kept.items()):
            if len(self._kept) > FORMATS_KEPT or now - when > FORGET:
                del self._kept[content_type]
        return families


def _by_library(found: Iterable[Metric], asked: Format) -> bytes:
    """In one go: a collector may hold a lock of its own until it has given its last metric."""
    end = asked.encode(Only())
    return b"".join([asked.encode(Only(metric)).removesuffix(end) for metric in found])


def _gzipped(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """In one call, as other threads run meanwhile, and it would have to wait for them after each."""
    written = []
    for piece in pieces:
        written.append(piece)
        yield b""
    yield compress(b"".join(written), LEVEL, wbits=zlib.MAX_WBITS | _GZIP)


def negotiate(accept: str) -> Format:
    """The best of what is asked for that we speak, as the library answers to it; text 0.0.4 where that is nothing."""
    for kind, parameters in _preferences(accept):
        version = parameters.get("version")
        if (kind, version) in {("text/plain", "1.0.0"), (_OPENMETRICS, "1.0.0"), (_OPENMETRICS, None)}:
            return Format(*text.choose_encoder(f"{kind};version=1.0.0;escaping={parameters.get('escaping', '')}"))
        if kind in {"text/plain", "text/*", "*/*"} and version in {None, "0.0.4"}:
            break
    return Format(*text.choose_encoder(""))


def accepts_gzip(accept_encoding: str) -> bool:
    return any(coding == "gzip" for coding, _ in _preferences(accept_encoding))


def _preferences(header: str) -> Iterator[tuple[str, dict[str, str]]]:
    """What an Accept header lists, best first, without what has a weight of 0 (RFC 9110, 12.4.2)."""
    weighed = []
    for item in header.lower().split(","):
        kind, *rest = (part.strip() for part in item.split(";"))
        parameters = {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in rest)}
        try:
            weight = float(parameters.get("q", "1"))
        except ValueError:
            continue
        if kind and weight > 0:
            weighed.append((weight, kind, parameters))
    return ((kind, parameters) for _, kind, parameters in sorted(weighed, key=lambda entry: -entry[0]))
