"""A registry as the page that a scraper asked for: text 0.0.4 and 1.0, OpenMetrics 1.0, plain or gzipped."""

import gzip
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client import exposition as text
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

_ESCAPINGS: Final = {openmetrics.ALLOWUTF8, openmetrics.UNDERSCORES, openmetrics.DOTS, openmetrics.VALUES}


class Page(NamedTuple):
    headers: dict[str, str]
    body: bytes


def render(registry: CollectorRegistry, *, accept: str, accept_encoding: str, names: Sequence[str] = ()) -> Page:
    """The page, as the two request headers ask for it; *names* keeps only the samples of these names.

    A custom collector's exception passes through.
    """
    encode, content_type = _format(accept)
    source: Collector = registry.restricted_registry(names) if names else registry
    body = encode(source)
    headers = {"Content-Type": content_type, "Vary": "Accept, Accept-Encoding"}
    if any(coding == "gzip" for coding, _ in _preferences(accept_encoding)):
        body = gzip.compress(body, compresslevel=1)
        headers["Content-Encoding"] = "gzip"
    return Page(headers, body)


def _format(accept: str) -> tuple[Callable[[Collector], bytes], str]:
    """The best of what is asked for that we speak; text 0.0.4 where that is nothing."""
    for kind, parameters in _preferences(accept):
        version = parameters.get("version")
        asked = parameters.get("escaping", "")
        escaping = asked if asked in _ESCAPINGS else openmetrics.UNDERSCORES
        if kind == "application/openmetrics-text" and version in {None, "1.0.0"}:
            encode = partial(openmetrics.generate_latest, escaping=escaping, version="1.0.0")
            return encode, f"application/openmetrics-text; version=1.0.0; charset=utf-8; escaping={escaping}"
        if kind == "text/plain" and version == "1.0.0":
            return partial(text.generate_latest, escaping=escaping), f"{text.CONTENT_TYPE_LATEST}; escaping={escaping}"
        if kind in {"text/plain", "text/*", "*/*"} and version in {None, "0.0.4"}:
            break
    return text.generate_latest, text.CONTENT_TYPE_PLAIN_0_0_4


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
