"""What a Prometheus says of a service's targets: that it has them, reaches them, tells them apart, and often enough."""

import asyncio
import json
import re
import urllib.request
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from http.client import HTTPException
from typing import Any, Final
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode

from consul_prom.cli.doctor.results import Finding, listed, number_of
from consul_prom.consul.http import words_of
from consul_prom.consul.quoting import quote
from consul_prom.consul.registration import origin
from consul_prom.settings.parsers import parse_duration
from consul_prom.settings.settings import Settings

FEW_SCRAPES: Final = 4
PATIENCE: Final = 10.0
Target = Mapping[str, Any]
Places = Mapping[str, tuple[str, int]]


async def examine(
    settings: Settings, registered: Places | None, *, dead: Collection[str] = (), url: str
) -> list[Finding]:
    """*registered*: the IDs of the entries, with address and port, if they are known; *dead*: those of dead workers."""
    if not url:
        return [Finding("targets", "unknown", "Skipped.", "Pass --prometheus URL to check Prometheus' targets.")]
    try:
        active = await asyncio.to_thread(_ask, url, "targets", "activeTargets", state="active")
        ours = [it for it in active if it["discoveredLabels"].get("__meta_consul_service") == settings.consul_service]
        found = [_scraped(ours, registered, dead), *([_labels(ours)] if ours else [])]
        if ours and found[-1].state == "ok":  # with other labels nothing can be asked of a slot
            lives = await asyncio.to_thread(_ask, url, "query", "result", query=_LIVES.format(job=settings.service))
            found.append(lifetime(ours, lives))
    except _Unanswered as error:
        where = quote(url, {url.partition("://")[2].rpartition("@")[0]})
        sentence = f"Prometheus at {where} cannot be asked: {quote(str(error), ())}."
        return [Finding("targets", "wrong", sentence, "Pass its address: --prometheus http://host:port.")]
    return found


class _Unanswered(Exception):
    """Says why Prometheus gave no answer."""


def _scraped(targets: Sequence[Target], registered: Places | None, dead: Collection[str]) -> Finding:
    if missing := sorted((registered or {}).keys() - {_entry_id(target) for target in targets}):
        cure = "consul-prom config prometheus prints what finds them; a new target takes some seconds."
        return Finding("targets", "wrong", f"Prometheus does not scrape {listed(missing)}.", cure)
    down = [target for target in targets if target["lastError"] and not has_moved(target, registered or {})]
    if down := sorted(down, key=_instance):
        total = number_of(len(targets), "target")
        sentence = f"Prometheus cannot scrape {len(down)} of {total}: {listed(map(_instance, down))}."
        sentence += f" Of the first it says: {quote(down[0]['lastError'], ())}."
        alive = [target for target in down if _entry_id(target) not in dead]
        return Finding("targets", "wrong", sentence, _REACH if alive else "Remove the entries of the dead workers.")
    if waiting := sorted(_instance(target) for target in targets if target["health"] == "unknown"):
        return Finding("targets", "unknown", f"Prometheus has not scraped {listed(waiting)} yet.", "Ask again.")
    if not targets:
        nobody = "" if registered is None else ", and no worker is registered"
        return Finding("targets", "unknown", f"Prometheus has no target of the service{nobody}.")
    return Finding("targets", "ok", f"Prometheus scrapes {number_of(len(targets), 'target')}.")


def _instance(target: Target) -> str:
    return str(target["labels"].get("instance"))


def has_moved(target: Target, registered: Places) -> bool:
    """Whether it is registered elsewhere by now, as the master's page with its caretaker: Prometheus hears of it."""
    place = registered.get(_entry_id(target))
    return bool(place and origin(*place).removeprefix("http://") != target["discoveredLabels"].get("__address__"))


def _entry_id(target: Target) -> str:
    return str(target["discoveredLabels"].get("__meta_consul_service_id", ""))


def _labels(targets: Sequence[Target]) -> Finding:
    """Whether each target has its worker's job and instance, which dashboard, rules and queries go by."""
    having = defaultdict(list)
    for target in targets:
        having[json.dumps(target["labels"], sort_keys=True)].append(target["scrapeUrl"])
    if mixed := [urls for urls in having.values() if len(urls) > 1]:
        return Finding("labels", "wrong", f"{listed(mixed[0])} have the same labels: their series are mixed.", _RELABEL)
    for target in targets:
        found = target["discoveredLabels"]
        for label, key in (("job", "service"), ("instance", "instance")):
            have, want = target["labels"].get(label), found.get(f"__meta_consul_service_metadata_{key}")
            if want and have != want:
                sentence = f"{_entry_id(target)} has the {label} {have!r}, not {want!r}: no dashboard or rule finds it."
                return Finding("labels", "wrong", sentence, _RELABEL)
    return Finding("labels", "ok", "Each target has its worker's job and instance, and no two have the same labels.")


_RELABEL: Final = "Copy relabel_configs from what consul-prom config prometheus prints."
_REACH: Final = "Prometheus must reach the workers' address: see CONSUL_PROM_ADDRESS and CONSUL_PROM_ALLOW."

_LIVES: Final = """
min(
  count_over_time(process_start_time_seconds{{job="{job}"}}[1h])
  / (changes(process_start_time_seconds{{job="{job}"}}[1h]) > 2)
)
"""
"""Scrapes for each process that a slot has had; of a slot with less than three changes nothing can be concluded."""


def lifetime(targets: Sequence[Target], lives: Sequence[Target]) -> Finding:
    """*lives*: the answer to `_LIVES`."""
    if not lives:
        return Finding("interval", "ok", "No worker was replaced more than twice within the last hour.")
    interval = max(parse_duration(target["scrapeInterval"]) for target in targets)
    scrapes = float(lives[0]["value"][1])
    sentence = f"Workers live for {scrapes * interval:.0f} s, and are scraped each {interval:g} s."
    if scrapes < FEW_SCRAPES:
        return Finding("interval", "wrong", sentence, "Scrape more often, or recycle them less (max_requests).")
    return Finding("interval", "ok", sentence)


def _ask(url: str, what: str, key: str, **parameters: str) -> Sequence[Target]:
    """Return what the answer has as *key*; raise _Unanswered if there is none."""
    if not re.fullmatch(r"https?://[^/@\s]+(/[^@\s]*)?", url):
        raise _Unanswered("it is no http:// or https:// address without a user and a password")
    address = f"{url.rstrip('/')}/api/v1/{what}?{urlencode(parameters)}"
    try:
        with urllib.request.urlopen(address, timeout=PATIENCE) as answer:  # noqa: S310  # the scheme is looked at above
            found: Sequence[Target] = json.load(answer)["data"][key]
    except HTTPError as error:
        raise _Unanswered(f"it answered {error.code}") from error
    except (OSError, HTTPException) as error:
        cause = error.reason if isinstance(error, URLError) else error
        raise _Unanswered(words_of(cause) if isinstance(cause, Exception) else cause) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _Unanswered("what answers is no Prometheus") from error
    return found
