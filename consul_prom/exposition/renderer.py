"""A registry as the page that a scraper asked for: text 0.0.4 and 1.0, OpenMetrics 1.0, plain or gzipped."""

import logging
import time
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, Final, NamedTuple

from prometheus_client import CollectorRegistry, Metric
from prometheus_client import exposition as text
from prometheus_client.registry import Collector

from consul_prom.exposition.family_renderer import Encode, Family, is_encodable
from consul_prom.exposition.metric_types import FAMILIES, is_known, known
from consul_prom.ledger.registry import LedgerRegistry
from consul_prom.ledger.source import Only, Plain, Source, names_in
from consul_prom.logs import ThrottledLogger

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


class Asked(NamedTuple):
    """What a request asks for: headers and *pieces* of the page, of which no two differ with equal headers and names.

    `names` are those that `name[]` chose and that make a difference; None where the page is whole.
    """

    headers: Mapping[str, str]
    names: frozenset[str] | None
    pieces: Iterator[bytes]


class Renderer:
    """The pages of a registry: byte for byte what the library writes, at a small part of its cost.

    Of each format asked for lately it keeps the families as they were last written. What it does not know (custom
    collectors, subclasses, another version of the library) it leaves to the library, metric by metric. One page at a
    time: it has no locks.
    """

    def __init__(self, registry: CollectorRegistry | LedgerRegistry) -> None:
        self._registry = registry
        self._source: Source = registry if isinstance(registry, LedgerRegistry) else Plain(registry)
        self._kept: dict[str, tuple[float, dict[Any, Family]]] = {}  # by content type; the oldest first
        self._is_plain = type(registry) in {CollectorRegistry, LedgerRegistry}
        self._log = ThrottledLogger(log)
        self._incomplete = False

    def render(self, accept: str, accept_encoding: str, names: Sequence[str] = ()) -> Asked:
        """The page that the two request headers ask for.

        *names* keeps only the samples of these names. A custom collector's exception passes through.
        """
        asked = negotiate(accept)
        headers = {"Content-Type": asked.content_type, "Vary": "Accept, Accept-Encoding"}
        chosen = self._known_of(names) if names else None
        pieces = self._pieces(asked, chosen)
        if accepts_gzip(accept_encoding):
            return Asked({**headers, "Content-Encoding": "gzip"}, chosen, _gzipped(pieces))
        return Asked(headers, chosen, pieces)

    def _known_of(self, names: Sequence[str]) -> frozenset[str]:
        """*names* without those that make no difference to the page; a custom collector may have unknown ones."""
        if not self._is_plain or self._source.shows_nameless:
            return frozenset(names)
        kinds = {name: kind for name in names if (kind := self._source.kind(name))}
        return frozenset(kinds if FAMILIES.keys() >= {*kinds.values()} else names)

    def _pieces(self, asked: Format, names: frozenset[str] | None) -> Iterator[bytes]:
        """Each the work of less than a millisecond; some are empty. No lock is held between two."""
        for kind in FAMILIES:
            is_known(kind)  # once in a process, it has to find out
            yield b""
        if known() and self._is_plain:
            yield from self._page(asked, names)
        else:
            source = self._registry if names is None else self._registry.restricted_registry(names)
            yield self._by_library(source.collect(), asked)
        yield asked.encode(Only())

    def _page(self, asked: Format, names: frozenset[str] | None) -> Iterator[bytes]:
        for _ in self._source.prepare():
            yield b""
        target_info, collectors, orphans = self._source.collectors()
        families = self._families(asked, [*collectors, *orphans])
        taken: set[str] = set()
        self._incomplete = False
        if target_info:
            yield self._by_library([target_info], asked, names)
        for collector, own in (*collectors.items(), *orphans.items()):
            is_asked = names is None or not names.isdisjoint(own) or (not own and self._source.shows_nameless)
            if is_asked and not (collector in orphans and taken.intersection(own)):
                found = yield from self._one(collector, families.get(collector), asked, names)
                taken |= names_in(found) if orphans and not own else set()
        if names is None and not self._incomplete:
            self._log.over("the page has all metrics again")

    def _one(
        self, collector: Collector, family: Family | None, asked: Format, names: frozenset[str] | None
    ) -> Generator[bytes, None, Sequence[Metric]]:
        """What the page has of one collector; the metrics of one that is left to the library."""
        if family:
            try:
                yield from family.pieces(names)
            except Exception:
                if family.callback_raised:  # the library would ask only once
                    raise
                log.debug("%r is left to prometheus_client", collector, exc_info=True)
            else:
                if family.incomplete:
                    self._leave_out(family.name)
                return ()
        found = list(self._source.families(collector))
        yield self._by_library(found, asked, names)
        return found

    def _by_library(self, found: Iterable[Metric], asked: Format, names: frozenset[str] | None = None) -> bytes:
        """In one go: a collector may hold a lock of its own until it has given its last metric."""
        some: Any = found if names is None else [metric._restricted_metric(names) for metric in found]  # type: ignore[no-untyped-call]
        end = asked.encode(Only())
        return b"".join([self._encoded(metric, asked).removesuffix(end) for metric in some if metric])

    def _encoded(self, metric: Metric, asked: Format) -> bytes:
        """A metric as the library writes it, without what UTF-8 cannot encode."""
        try:
            return asked.encode(Only(metric))
        except UnicodeEncodeError:
            self._leave_out(metric.name)
        rest = copy(metric)
        rest.samples = [
            sample._replace(exemplar=sample.exemplar if _can_carry(sample.exemplar) else None)
            for sample in metric.samples
            if is_encodable(sample.name) and _can_carry(sample)
        ]
        try:
            return asked.encode(Only(rest))
        except UnicodeEncodeError:  # its name or its help
            return b""

    def _leave_out(self, name: str) -> None:
        self._incomplete = True
        self._log.failed(
            "%s has a label value that is not valid UTF-8: such series are neither on the page nor in the ledger; "
            "the application should replace it",
            ascii(name)[1:-1],
            reason=name,
        )

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


def _can_carry(labelled: Any) -> bool:
    """Whether the labels of a sample, or of an exemplar if there is one, can be encoded."""
    return not labelled or is_encodable(*[str(text) for pair in labelled.labels.items() for text in pair])


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
