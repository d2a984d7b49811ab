"""What a Prometheus says of a service's targets: that it has them, reaches them, tells them apart, and often enough."""

import asyncio
import json
import urllib.request
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlencode

from consul_prom.finding import Finding, listed, number_of
from consul_prom.quoting import quote
from consul_prom.registration import origin
from consul_prom.settings import Settings
from consul_prom.values import parse_duration

FEW_SCRAPES: Final = 4
PATIENCE: Final = 10.0
Target = Mapping[str, Any]
Places = Mapping[str, tuple[str, int]]


async def examine(settings: Settings, registered: Places, *, url: str) -> list[Finding]:
    """*registered*: the IDs of the entries, with address and port."""
    if not url:
        return [Finding("targets", "unknown", "Prometheus was not asked.", "--prometheus URL")]
    try:
        active = (await asyncio.to_thread(_ask, url, "targets", state="active"))["activeTargets"]
        changes = f'max(changes(process_start_time_seconds{{job="{settings.service}"}}[1h]))'
        starts = (await asyncio.to_thread(_ask, url, "query", query=changes))["result"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        where = quote(url, {url.partition("://")[2].rpartition("@")[0]})
        sentence = f"Prometheus at {where} cannot be asked: {quote(str(error), ())}."
        return [Finding("targets", "wrong", sentence, "--prometheus URL")]
    ours = [it for it in active if it["discoveredLabels"].get("__meta_consul_service") == settings.consul_service]
    return [_scraped(ours, registered), *([_labels(ours), lifetime(ours, starts)] if ours else [])]


def _scraped(targets: Sequence[Target], registered: Places) -> Finding:
    down = [
        f"{target['labels'].get('instance')} ({target['lastError']})"
        for target in targets
        if target["lastError"] and not has_moved(target, registered)
    ]
    if missing := sorted(registered.keys() - {_entry_id(target) for target in targets}):
        cure = "consul-prom config prometheus prints what finds them; a new target takes some seconds."
        return Finding("targets", "wrong", f"Prometheus does not scrape {listed(missing)}.", cure)
    if down:
        return Finding("targets", "wrong", f"Prometheus cannot scrape {listed(down)}.", "It has to reach the address.")
    if not targets:
        return Finding("targets", "unknown", "Prometheus has no target, and nobody is registered.")
    return Finding("targets", "ok", f"Prometheus scrapes {number_of(len(targets), 'target')}.")


def has_moved(target: Target, registered: Places) -> bool:
    """Whether it is registered elsewhere by now, as the master's page with its caretaker: Prometheus hears of it."""
    place = registered.get(_entry_id(target))
    return bool(place and origin(*place).removeprefix("http://") != target["discoveredLabels"].get("__address__"))


def _entry_id(target: Target) -> str:
    return str(target["discoveredLabels"].get("__meta_consul_service_id", ""))


def _labels(targets: Sequence[Target]) -> Finding:
    having = defaultdict(list)
    for target in targets:
        having[json.dumps(target["labels"], sort_keys=True)].append(target["scrapeUrl"])
    if mixed := [urls for urls in having.values() if len(urls) > 1]:
        cure = "Take instance from __meta_consul_service_metadata_instance, as consul-prom config prometheus does."
        return Finding("labels", "wrong", f"{listed(mixed[0])} have the same labels: their series are mixed.", cure)
    return Finding("labels", "ok", "No two targets have the same labels.")


def lifetime(targets: Sequence[Target], starts: Sequence[Target]) -> Finding:
    interval = max(parse_duration(target["scrapeInterval"]) for target in targets)
    changes = float(starts[0]["value"][1]) if starts else 0.0
    if not changes:
        return Finding("interval", "ok", "No worker was replaced within the last hour.")
    sentence = f"Workers live for {3600 / changes:.0f} s, and are scraped each {interval:g} s."
    if 3600 / changes < FEW_SCRAPES * interval:
        return Finding("interval", "wrong", sentence, "Scrape more often, or recycle them less (max_requests).")
    return Finding("interval", "ok", sentence)


def _ask(url: str, what: str, **parameters: str) -> Mapping[str, Any]:
    if not url.startswith(("http://", "https://")):
        raise ValueError("it is no http:// or https:// address")
    if "@" in url:
        raise ValueError("it must not hold a user or a password")
    address = f"{url.rstrip('/')}/api/v1/{what}?{urlencode(parameters)}"
    with urllib.request.urlopen(address, timeout=PATIENCE) as answer:  # noqa: S310  # the scheme is looked at above
        data: Mapping[str, Any] = json.load(answer)["data"]
    return data
