"""What may be wrong with a service's registration and scrapes, in the order in which one would look.

It only looks: nothing is registered, removed or locked for longer than the look takes.
"""

import os
import re
import shutil
import socket
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from consul_prom.cli.doctor import targets
from consul_prom.cli.doctor.results import Finding, State, listed, number_of
from consul_prom.consul import stale
from consul_prom.consul.acl import write_rule
from consul_prom.consul.client import AgentClient
from consul_prom.consul.http import quoted, request_headers, words_of
from consul_prom.consul.registrar import WATCHING_SLOTS
from consul_prom.consul.registration import is_of, is_on, is_worker, parse_entry_id
from consul_prom.consul.stale import Entry
from consul_prom.errors import AgentBusy, AgentDenied, AgentError, AgentTimeout, AgentUnreachable, ConsulPromError
from consul_prom.ledger.compat import check_library
from consul_prom.ledger.file import STEP, ledger_path
from consul_prom.server.bind import is_local
from consul_prom.server.web_config import WebConfig
from consul_prom.settings.settings import Settings, check_named, check_worker
from consul_prom.slots import slots
from consul_prom.slots.directory import prepare

OLDEST: Final = (1, 7)
"""Of Consul: what selects entries by an expression came with 1.5, and the question for rights with 1.7."""
CROWDED: Final = 0.8
DEFAULT_LIMIT: Final = 200
_RAISE: Final = "Raise limits.http_max_conns_per_client in the agent's configuration."


@dataclass
class _Seen:
    """Everything that was asked for once; None is unknown."""

    settings: Settings
    agent: AgentClient
    about_agent: Mapping[str, Any] | None = None
    accepted: bool = True
    """The token."""
    everyone: list[Entry] | None = None
    dead: list[str] = field(default_factory=list)
    directory: State = "ok"
    catalogue: list[dict[str, Any]] | None = None

    @property
    def entries(self) -> list[Entry]:
        return [entry for entry in self.everyone or [] if entry["Meta"].get("service") == self.settings.service]

    @property
    def places(self) -> dict[str, tuple[str, int]] | None:
        """Of the catalogue's entries and the agent's, by their IDs."""
        if self.everyone is None:
            return None
        others = {it["ServiceID"]: (it["ServiceAddress"], it["ServicePort"]) for it in self.catalogue or []}
        return others | {it["ID"]: (it["Address"], it["Port"]) for it in self.entries}

    @property
    def here(self) -> list[Entry]:
        return [entry for entry in self.entries if is_on(entry, self.settings.host)]

    @property
    def workers(self) -> list[Entry]:
        """Those of `here` that are neither an adopted slot nor the page of Gunicorn's masters."""
        return [entry for entry in self.here if is_worker(entry["Meta"])]

    @property
    def directories(self) -> list[Path]:
        """Those that the entries of `here` name, but for dead workers."""
        named = {entry["Meta"].get("dir", "").partition(":")[2] for entry in self.here if entry["ID"] not in self.dead}
        return [Path(name) for name in sorted(named - {""})]


async def examine(settings: Settings, agent: AgentClient, *, prometheus: str = "") -> AsyncGenerator[Finding]:
    """Each finding as soon as it is known; what cannot be known for an earlier one's sake says so."""
    seen = _Seen(settings, agent)
    yield (first := _settings(settings))
    if first.state == "wrong":
        return
    async with aclosing(_at_agent(seen)) as found:
        async for finding in found:
            yield finding
    yield (finding := _directory(seen))
    seen.directory = finding.state
    yield _ledgers(seen)
    for finding in await targets.examine(settings, seen.places, dead=seen.dead, url=prometheus):
        yield finding


async def _at_agent(seen: _Seen) -> AsyncGenerator[Finding]:
    """Ask the agent until it gives no answer that more could be concluded from."""
    yield (reached := await _agent(seen))
    if reached.state == "wrong":
        return
    yield await _token(seen)
    if not seen.accepted:
        return
    yield await _version(seen)
    try:
        seen.everyone = await stale.entries(seen.agent)
    except AgentError as error:
        yield Finding("entries", "wrong", f"The entries cannot be read: {error}.", _cure(seen.settings, error))
        return
    for check in (_catalogue, _workers, _address, _ports, _claims, _limits):
        yield await check(seen)


def _settings(settings: Settings) -> Finding:
    cure = "Set it as for the workers, by an option or a variable."
    try:
        check_named(settings)
        cure = "Unset it for the workers too: deploy/migrate/README.md says what else goes."
        check_worker(settings)
        cure = "Correct the file: the workers do not start with it."
        if settings.web_config:
            WebConfig(settings.web_config)
        cure = "Let the workers' user read a token there, and run this as that user."
        request_headers(settings)
    except ConsulPromError as error:
        return Finding("settings", "wrong", _sentence(error), cure)
    return Finding("settings", "ok", f"The service {settings.service} is registered as {settings.consul_service}.")


async def _agent(seen: _Seen) -> Finding:
    try:
        seen.about_agent = await seen.agent.self_()
    except AgentDenied:
        pass  # it needs agent:read, which no worker needs
    except AgentError as error:
        return Finding("agent", "wrong", _sentence(error), _cure(seen.settings, error))
    return Finding("agent", "ok", f"The agent at {seen.settings.consul_http_addr} answers.")


def _cure(settings: Settings, error: AgentError) -> str:
    if isinstance(error, AgentDenied):
        return f"Add {_rule(settings)}."
    if isinstance(error, AgentBusy):
        return _RAISE
    if isinstance(error, (AgentTimeout, AgentUnreachable)):
        tls = settings.consul_http_addr.scheme == "https"
        others = ", or CONSUL_CACERT or CONSUL_TLS_SERVER_NAME if it refuses the other's certificate" if tls else ""
        return f"Start it, or set CONSUL_HTTP_ADDR{others}."
    return "The agent's log says why; if another program listens there, set CONSUL_HTTP_ADDR."


async def _version(seen: _Seen) -> Finding:
    if seen.about_agent is None:
        return Finding("version", "unknown", "Consul's version is not told.", "It needs agent:read.")
    text = str(seen.about_agent.get("Config", {}).get("Version", ""))
    numbers = tuple(int(number) for number in re.findall("[0-9]+", text)[:2])
    if not numbers:
        return Finding("version", "unknown", "The agent tells no version.")
    if numbers < OLDEST:
        return Finding("version", "wrong", f"Consul {text} is too old.", f"{OLDEST[0]}.{OLDEST[1]} is the least.")
    return Finding("version", "ok", f"Consul is {text}.")


async def _token(seen: _Seen) -> Finding:
    try:
        allowed = await seen.agent.may_write(seen.settings.consul_service)
    except AgentDenied as error:
        seen.accepted = False
        cure = f"Set {_credentials(seen.settings)} to what the agent accepts."
        return Finding("token", "wrong", f"The token is not accepted: {error}.", cure)
    except AgentError as error:
        return Finding("token", "unknown", f"The token's rights cannot be asked for: {error}.")
    if not allowed:
        return Finding("token", "wrong", "The token may not register the workers.", f"Add {_rule(seen.settings)}.")
    return Finding("token", "ok", f"This token may register {seen.settings.consul_service}.")


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
    held = {entry["ID"] for entry in seen.everyone or []}
    ghosts = sorted(entry["ServiceID"] for entry in seen.catalogue if entry["Node"] == node)
    ghosts = [entry_id for entry_id in ghosts if entry_id not in held]
    if ghosts:
        return Finding(
            "catalogue",
            "wrong",
            f"The catalogue has {listed(ghosts)}, which the agent has dropped: Prometheus scrapes it still.",
            f'Give the agent of {node} a token of its own, acl.tokens.agent: node_prefix "" {{ policy = "write" }}.',
        )
    return Finding("catalogue", "ok", "The catalogue has no entry that the agent has dropped.")


async def _address(seen: _Seen) -> Finding:
    settings = seen.settings
    failing: dict[str, str] = {}
    try:
        for entry in (it for it in seen.here if it["ID"] not in seen.dead):
            for check in await seen.agent.checks(entry["ID"]):
                if check.get("Status") == "critical" and check.get("Output"):
                    failing[entry["ID"]] = quoted(seen.settings, str(check["Output"]))
    except AgentError as error:
        return Finding("address", "unknown", f"The agent's checks cannot be read: {error}.")
    if failing:
        cure = "Set CONSUL_PROM_ADDRESS to one that the agent reaches, and let CONSUL_PROM_ALLOW have it in."
        (_, said), *_ = failing.items()
        return Finding(
            "address", "wrong", f"The agent cannot reach {listed(failing)}. Of the first it says: {said}", cure
        )
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
    refused = {port: _refusal(address, port) for port in wanted if port not in ours}
    if not free.intersection(wanted) and all(refused.values()):
        others = [f"{port} ({why})" for port, why in refused.items()]
        which = (
            f"No worker can listen at {address} on {listed(others)}" if others else f"All of {settings.port} is used"
        )
        return Finding("ports", "wrong", f"{which}: no worker more can start.", "Set CONSUL_PROM_PORT to others, or 0.")
    (before, *_) = settings.port.candidates(slots.MASTER)
    if not settings.port.last and before not in ours and (why := _refusal(address, before)):
        sentence = f"Nobody can listen on {before} ({why}), where the page of Gunicorn's master would be."
        return Finding("ports", "unknown", sentence, "With our hooks: set CONSUL_PROM_PORT to another base.")
    return Finding("ports", "ok", f"CONSUL_PROM_PORT={settings.port} has a free port for the next worker.")


def _directory(seen: _Seen) -> Finding:
    directory, theirs = seen.settings.dir, seen.directories
    try:
        if theirs and directory not in theirs:
            named = listed(map(str, theirs))
            cure = f"Run this as the workers' user, with CONSUL_PROM_DIR={named}."
            return Finding("directory", "unknown", f"The workers use {named}, and not {directory}.", cure)
        if theirs and directory.exists() and (owner := directory.stat().st_uid) != os.geteuid():
            cure = "Run this as the workers' user."
            return Finding("directory", "unknown", f"{directory} belongs to the workers' user, uid {owner}.", cure)
        return _own_directory(directory)
    except ConsulPromError as error:
        return Finding("directory", "wrong", _sentence(error), "Run this as the workers' user, or set another.")
    except OSError as error:
        cure = "Run this as the workers' user, or set CONSUL_PROM_DIR."
        return Finding("directory", "wrong", f"{directory} cannot be used: {words_of(error)}.", cure)


def _own_directory(directory: Path) -> Finding:
    """Raises OSError or SlotError."""
    there = directory.exists()
    if there:
        prepare(directory)
    folder = next(folder for folder in (directory, *directory.parents) if folder.exists())
    try:
        # Tried, since modes do not tell it all: a file system may be read-only, or like /proc have no room for files.
        with TemporaryDirectory(dir=folder, prefix="doctor-"):
            pass
    except OSError as error:
        sentence = f"{directory} cannot be {'written to' if there else f'made in {folder}'}: {words_of(error)}."
        return Finding("directory", "wrong", sentence, "Make room for the workers' user there, or set CONSUL_PROM_DIR.")
    return Finding("directory", "ok", f"{directory} is {'ours alone' if there else 'made by the first worker'}.")


def _ledgers(seen: _Seen) -> Finding:
    """Whether counters outlive their process. One of prometheus_async's own servers has none."""
    directory = seen.settings.dir
    off = ""
    if not seen.settings.ledger:
        off = "CONSUL_PROM_LEDGER is off: counters end with their process."
    elif seen.directory == "wrong":
        off = "Its directory cannot be used: counters end with their process."
    elif seen.directory == "unknown":
        off = "The workers' directory was not looked at."
    if off:
        return Finding("ledger", "unknown", off)
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
        return Finding("ledger", "wrong", sentence, "Install a version of prometheus_client that consul-prom knows.")
    except OSError as error:
        return Finding("ledger", "unknown", f"The ledgers cannot be looked at: {error}.")
    if without:
        cure = "Their log says why; a server of prometheus_async's has none."
        return Finding("ledger", "unknown", f"Counters end with the process of {listed(without)}.", cure)
    return Finding("ledger", "ok", "Counters outlive their process.")


async def _workers(seen: _Seen) -> Finding:
    unproven = []
    for entry in seen.here:
        with stale.judged(entry, host=seen.settings.host) as verdict:
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
    entries = (entry for entry in seen.everyone or [] if entry["ID"] not in seen.dead)
    here = [entry for entry in entries if is_on(entry, seen.settings.host)]
    ids = [parse_entry_id(entry["ID"]) for entry in here if is_worker(entry["Meta"])]
    held = sum(1 for parts in ids if parts and parts.slot in range(WATCHING_SLOTS))
    told = (seen.about_agent or {}).get("DebugConfig", {}).get("HTTPMaxConnsPerClient")
    limit = DEFAULT_LIMIT if told is None else int(told)
    whose = "the agent allows" if told is not None else "Consul's default is"
    sentence = f"Connections that this host's workers hold: {held}; {whose} {limit or 'any number'} an address."
    if limit and held >= CROWDED * limit:
        return Finding("limits", "wrong", sentence, _RAISE)
    return Finding("limits", "ok", sentence)


def _refusal(address: str, port: int) -> str:
    """Why nobody can listen there, or nothing."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return words_of(error)
    return ""


def _credentials(settings: Settings) -> str:
    """Name the settings by which the agent judges us; a file beats a token."""
    token = "CONSUL_HTTP_TOKEN_FILE" if settings.consul_http_token_file else "CONSUL_HTTP_TOKEN"
    return f"{token} or CONSUL_HTTP_AUTH" if settings.consul_http_auth else token


def _sentence(error: Exception) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."


def _rule(settings: Settings) -> str:
    return write_rule(settings.consul_service)
