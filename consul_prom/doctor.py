"""What may be wrong with a service's registration and scrapes, in the order in which one would look.

It only looks: nothing is registered, removed or locked for longer than the look takes.
"""

import os
import re
import shutil
import socket
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final

from consul_prom import caretaker, slots, targets
from consul_prom.address import is_local
from consul_prom.caretaker import Entry
from consul_prom.cells import check_library
from consul_prom.client import AgentClient
from consul_prom.errors import AgentDenied, AgentError, ConsulPromError
from consul_prom.finding import Finding, listed, number_of
from consul_prom.ledger import STEP, ledger_path
from consul_prom.registrar import WATCHING_SLOTS
from consul_prom.registration import is_of, is_on, is_worker, origin, parse_entry_id
from consul_prom.settings import Settings, check_named, check_worker
from consul_prom.snippets import write_rule
from consul_prom.webconfig import WebConfig

OLDEST: Final = (1, 7)
"""Of Consul: what selects entries by an expression came with 1.5, and the question for rights with 1.7."""
CROWDED: Final = 0.8


@dataclass
class _Seen:
    """What was asked for once; None where it could not be had."""

    settings: Settings
    agent: AgentClient
    about_agent: Mapping[str, Any] | None = None
    everyone: list[Entry] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    usable: bool = True
    """The directory."""
    catalogue: list[dict[str, Any]] | None = None

    @property
    def entries(self) -> list[Entry]:
        return [entry for entry in self.everyone if entry["Meta"].get("service") == self.settings.service]

    @property
    def places(self) -> dict[str, tuple[str, int]]:
        """Of the catalogue's entries and the agent's, by their IDs."""
        others = {it["ServiceID"]: (it["ServiceAddress"], it["ServicePort"]) for it in self.catalogue or []}
        return others | {it["ID"]: (it["Address"], it["Port"]) for it in self.entries}

    @property
    def here(self) -> list[Entry]:
        return [entry for entry in self.entries if is_on(entry, self.settings.host)]

    @property
    def workers(self) -> list[Entry]:
        """Those of `here` that are neither an adopted slot nor the page of Gunicorn's masters."""
        return [entry for entry in self.here if is_worker(entry["Meta"])]


async def examine(settings: Settings, agent: AgentClient, *, prometheus: str = "") -> AsyncGenerator[Finding]:
    """Each finding as soon as it is known; what cannot be known for an earlier one's sake says so."""
    seen = _Seen(settings, agent)
    yield (first := _settings(settings))
    if first.state == "wrong":
        return
    yield (reached := await _agent(seen))
    if reached.state != "wrong":
        for check in (_version, _token):
            yield await check(seen)
        try:
            seen.everyone = await caretaker.entries(agent)
        except AgentError as error:
            yield Finding("entries", "wrong", f"The entries cannot be read: {error}.", f"Add {_rule(settings)}.")
        for check in (_catalogue, _workers, _address, _ports, _directory, _ledgers, _claims, _limits):
            yield await check(seen)
    for finding in await targets.examine(settings, seen.places, url=prometheus):
        yield finding


def _settings(settings: Settings) -> Finding:
    try:
        check_named(settings)
        check_worker(settings)
        if settings.web_config:
            WebConfig(settings.web_config)
    except ConsulPromError as error:
        return Finding("settings", "wrong", _sentence(error), "Set it as for the workers, by an option or a variable.")
    return Finding("settings", "ok", f"The service {settings.service} is registered as {settings.consul_service}.")


async def _agent(seen: _Seen) -> Finding:
    where = f"The agent at {seen.settings.consul_http_addr}"
    try:
        seen.about_agent = await seen.agent.self_()
    except AgentDenied:
        return Finding("agent", "ok", f"{where} answers; what it tells of itself needs agent:read.")
    except AgentError as error:
        return Finding("agent", "wrong", _sentence(error), "Start it, or set CONSUL_HTTP_ADDR.")
    return Finding("agent", "ok", f"{where} answers.")


async def _version(seen: _Seen) -> Finding:
    if seen.about_agent is None:
        return Finding("version", "unknown", "Consul's version is not told.", "It needs agent:read.")
    text = str(seen.about_agent.get("Config", {}).get("Version", ""))
    numbers = tuple(int(number) for number in re.findall("[0-9]+", text)[:2])
    if numbers < OLDEST:
        return Finding("version", "wrong", f"Consul {text} is too old.", f"{OLDEST[0]}.{OLDEST[1]} is the least.")
    return Finding("version", "ok", f"Consul is {text}.")


async def _token(seen: _Seen) -> Finding:
    try:
        allowed = await seen.agent.may_write(seen.settings.consul_service)
    except AgentDenied as error:
        return Finding("token", "wrong", f"The token is not accepted: {error}.", "Set CONSUL_HTTP_TOKEN_FILE anew.")
    except AgentError as error:
        return Finding("token", "unknown", f"The token's rights cannot be asked for: {error}.")
    if not allowed:
        return Finding("token", "wrong", "The token may not register the workers.", f"Add {_rule(seen.settings)}.")
    return Finding("token", "ok", f"Whoever has this token may register {seen.settings.consul_service}.")


async def _catalogue(seen: _Seen) -> Finding:
    """An agent without a token of its own leaves in the catalogue, which is what Prometheus reads, what it drops."""
    try:
        seen.catalogue = await seen.agent.catalogue(seen.settings.consul_service)
    except AgentDenied as error:
        cure = 'Add node_prefix "" { policy = "read" } for this look.'
        return Finding("catalogue", "unknown", f"The catalogue cannot be read: {error}.", cure)
    except AgentError as error:
        cure = "Its servers have to tell it: consul operator raft list-peers shows whether one leads."
        return Finding("catalogue", "wrong", f"The catalogue cannot be read, by Prometheus neither: {error}.", cure)
    node = str((seen.about_agent or {}).get("Config", {}).get("NodeName", ""))
    if not node:
        return Finding("catalogue", "unknown", "The agent does not tell its node's name.", "It needs agent:read.")
    held = {entry["ID"] for entry in seen.everyone}
    ghosts = sorted(entry["ServiceID"] for entry in seen.catalogue if entry["Node"] == node)
    ghosts = [entry_id for entry_id in ghosts if entry_id not in held]
    if ghosts:
        return Finding(
            "catalogue",
            "wrong",
            f"The catalogue has {listed(ghosts)}, which the agent has dropped: Prometheus scrapes it still.",
            f'Give the agent of {node} a token of its own, acl.tokens.agent: node_prefix "" {{ policy = "write" }}.',
        )
    return Finding("catalogue", "ok", "The catalogue has what the agent has.")


async def _address(seen: _Seen) -> Finding:
    settings = seen.settings
    for entry in (it for it in seen.here if it["ID"] not in seen.dead):
        for check in await seen.agent.checks(entry["ID"]):
            if check.get("Status") == "critical" and check.get("Output"):
                place = origin(entry["Address"], entry["Port"]).removeprefix("http://")
                said = " ".join(str(check["Output"]).split())[:200]
                cure = "Set CONSUL_PROM_ADDRESS to one that the agent reaches, and let CONSUL_PROM_ALLOW have it in."
                return Finding("address", "wrong", f"The agent cannot reach {entry['ID']} at {place}: {said}", cure)
    if settings.address and not settings.bind and not is_local(settings.address):
        cure = "Set another, or CONSUL_PROM_BIND where it is translated to one of ours."
        return Finding("address", "wrong", f"CONSUL_PROM_ADDRESS={settings.address} is none of this host's.", cure)
    reached = [entry for entry in seen.workers if entry["ID"] not in seen.dead]
    if not reached:
        return Finding("address", "unknown", "No live worker of this host is registered: nobody was checked.")
    return Finding("address", "ok", f"The agent reaches {number_of(len(reached), 'worker')} of this host.")


async def _ports(seen: _Seen) -> Finding:
    settings = seen.settings
    if not settings.port.first:
        return Finding("ports", "ok", "The system chooses free ports.")
    address = settings.bind or settings.address or "0.0.0.0"  # noqa: S104  # only tried, and let go at once
    ours = {entry["Port"]: entry["Meta"] for entry in seen.here}
    # An adopted slot's is given up to its next worker.
    free = {port for port, meta in ours.items() if "adopted" in meta}
    numbers = {entry["Meta"].get("slot") for entry in seen.workers}
    wanted = settings.port.candidates(next(number for number in count() if str(number) not in numbers))
    free |= {port for port in wanted if port not in ours and _is_free(address, port)}
    if not free.intersection(wanted):
        others = [str(port) for port in wanted if port not in ours]
        which = f"Somebody else has {listed(others)}" if others else f"All of {settings.port} is used"
        return Finding("ports", "wrong", f"{which}: no worker more can start.", "Set CONSUL_PROM_PORT to others, or 0.")
    (before, *_) = settings.port.candidates(slots.MASTER)
    if not settings.port.last and before not in ours and not _is_free(address, before):
        sentence = f"Somebody else has {before}, where the page of Gunicorn's master would be."
        return Finding("ports", "unknown", sentence, "With our hooks: set CONSUL_PROM_PORT to another base.")
    return Finding("ports", "ok", f"CONSUL_PROM_PORT={settings.port} has a free port for the next worker.")


async def _directory(seen: _Seen) -> Finding:
    directory = seen.settings.dir
    if not directory.exists():
        parent = next(folder for folder in directory.parents if folder.exists())
        if os.access(parent, os.W_OK):
            return Finding("directory", "ok", f"{directory} is made by the first worker.")
        seen.usable = False
        cure = "Make it, with mode 0700, for the workers' user, or set CONSUL_PROM_DIR."
        return Finding("directory", "wrong", f"{directory} is not there, and cannot be made in {parent}.", cure)
    try:
        slots.prepare(directory)
    except (ConsulPromError, OSError) as error:
        seen.usable = False
        return Finding("directory", "wrong", _sentence(error), "Run this as the workers' user, or set another.")
    return Finding("directory", "ok", f"{directory} is ours alone.")


async def _ledgers(seen: _Seen) -> Finding:
    """Whether counters outlive their process. One of prometheus_async's own servers has none."""
    directory = seen.settings.dir
    off = "" if seen.settings.ledger else "CONSUL_PROM_LEDGER is off"
    if off := off or ("" if seen.usable else "Its directory cannot be used"):
        return Finding("ledger", "unknown", f"{off}: counters end with their process.")
    try:
        check_library()
        disk = next(folder for folder in (directory, *directory.parents) if folder.exists())
        if shutil.disk_usage(disk).free < STEP:
            sentence = f"No space is left at {disk}: new workers count in memory, and new series of the others."
            return Finding("ledger", "wrong", sentence, "Make room, or set CONSUL_PROM_DIR.")
        slot_of = {entry["ID"]: int(entry["Meta"]["slot"]) for entry in seen.workers if is_of(entry, directory)}
        without = [
            it for it, slot in slot_of.items() if not ledger_path(directory, seen.settings.service, slot).exists()
        ]
    except ConsulPromError as error:
        sentence = f"Counters end with their process: {error}."
        return Finding("ledger", "wrong", sentence, "Install a version of it that consul-prom knows.")
    except OSError as error:
        return Finding("ledger", "unknown", f"The ledgers cannot be looked at: {error}.")
    if without:
        cure = "Their log says why; a server of prometheus_async's has none."
        return Finding("ledger", "unknown", f"Counters end with the process of {listed(without)}.", cure)
    return Finding("ledger", "ok", "Counters outlive their process.")


async def _workers(seen: _Seen) -> Finding:
    unproven = []
    for entry in seen.here:
        with caretaker.judged(entry, host=seen.settings.host) as verdict:
            if verdict.state == "dead":
                seen.dead.append(entry["ID"])
            if verdict.state == "unknown":
                unproven.append(f"{entry['ID']} ({verdict.proof})")
    if seen.dead:
        left = f"Nobody is behind {listed(seen.dead)}."
        return Finding("workers", "wrong", left, "consul-prom deregister removes what dead workers left.")
    if unproven:
        return Finding("workers", "unknown", f"It cannot be told whether {listed(unproven)} lives.")
    if not seen.workers:
        cure = "The workers' log says why they do not register; CONSUL_PROM_HOST must be theirs."
        return Finding("workers", "unknown", f"No worker of {seen.settings.host} is registered.", cure)
    sentence = f"Alive and registered on this host: {number_of(len(seen.workers), 'worker')}"
    if adopted := sum("adopted" in entry["Meta"] for entry in seen.here):
        sentence += f"; adopted, without one: {number_of(adopted, 'slot')}"
    return Finding("workers", "ok", f"{sentence}.")


async def _claims(seen: _Seen) -> Finding:
    """Prometheus mixes the counters of two targets of one instance without a word."""
    if seen.catalogue is None:
        return Finding("instances", "unknown", "Other agents' entries are in the catalogue, which cannot be read.")
    nodes = defaultdict(set)
    for entry in seen.catalogue:
        nodes[str((entry.get("ServiceMeta") or {}).get("instance"))].add(f"{entry['Node']}/{entry['ServiceID']}")
    twice = [f"{instance} by {listed(sorted(claims))}" for instance, claims in nodes.items() if len(claims) > 1]
    if twice:
        return Finding("instances", "wrong", f"Claimed twice: {listed(twice)}.", "Set CONSUL_PROM_HOST on one of them.")
    return Finding("instances", "ok", "No instance is claimed twice.")


async def _limits(seen: _Seen) -> Finding:
    """Each worker of the first slots holds a connection; other users of the agent are not seen from here."""
    here = [entry for entry in seen.everyone if is_on(entry, seen.settings.host)]
    ids = [parse_entry_id(entry["ID"]) for entry in here if is_worker(entry["Meta"])]
    held = sum(1 for parts in ids if parts and parts.slot in range(WATCHING_SLOTS))
    limit = int((seen.about_agent or {}).get("DebugConfig", {}).get("HTTPMaxConnsPerClient") or 200)
    sentence = f"Connections that this host's workers hold: {held}; the agent allows {limit} an address."
    if held >= CROWDED * limit:
        return Finding(
            "limits", "wrong", sentence, "Raise limits.http_max_conns_per_client in the agent's configuration."
        )
    return Finding("limits", "ok", sentence)


def _is_free(address: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def _sentence(error: Exception) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."


def _rule(settings: Settings) -> str:
    return write_rule(settings.consul_service)
