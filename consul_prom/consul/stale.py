"""Removes the entries of dead workers, and of no live one: what proves a death, and the sweep that acts on it.

Two things prove it. The lock: the kernel frees a slot's lock with its process, so who can have it, in the directory
that the entry names, knows that no worker is behind the entry. The process: of the same boot and pid namespace, and
gone, or another one under the same pid. Any doubt is no proof. https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
"""

import logging
import os
import stat
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from consul_prom.consul.acl import write_rule
from consul_prom.consul.registration import MARKER, is_on, is_ours, parse_entry_id
from consul_prom.errors import AgentDenied, AgentError, AgentTimeout, AgentUnreachable
from consul_prom.process.identity import process_identity
from consul_prom.slots import slots
from consul_prom.slots.directory import directory_id

log = logging.getLogger(__name__)

Entry = Mapping[str, Any]
State = Literal["dead", "alive", "unknown"]
Action = Literal["removed", "would remove", "gone", "kept", "refused", "failed"]
_OURS: Final = f'Meta.managed_by == "{MARKER["managed_by"]}"'


class EntryLike(Protocol):
    @property
    def document(self) -> Entry: ...


class AgentAPI(Protocol):
    """What a sweep asks of an agent; every call raises AgentError and needs ``service:write`` at most."""

    async def services(self, expression: str) -> Mapping[str, Entry]: ...
    async def service(self, entry_id: str) -> EntryLike | None: ...
    async def deregister(self, entry_id: str) -> bool: ...
    async def checks(self, entry_id: str) -> list[dict[str, Any]]: ...
    async def catalogued(self, name: str, entry_id: str, node: str) -> bool: ...
    async def deregister_from_catalogue(self, entry_id: str, node: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Liveness:
    """Whether a live worker is behind an entry, and the proof of it in words."""

    state: State
    proof: str


@dataclass(frozen=True, slots=True)
class ReapResult:
    """What a sweep did with an entry, and why it could not do more."""

    entry: Entry
    verdict: Liveness
    action: Action
    trouble: str = ""


async def entries(agent: AgentAPI, *, service: str = "") -> list[Entry]:
    """All entries that bear our marker, or those of one service; what the token has no right on is missing."""
    found = (entry for entry in (await agent.services(_OURS)).values() if is_ours(entry))
    return sorted((entry for entry in found if service in {"", entry["Meta"].get("service")}), key=_order)


async def sweep(
    agent: AgentAPI, found: Iterable[Entry], *, host: str, forced: bool = False, dry_run: bool = False
) -> AsyncGenerator[ReapResult]:
    """Deregister those of *found* that are provably dead, or, where *forced*, all that bear our marker.

    *host* is this host's name, as workers have it.

    Raises:
        AgentError: the agent cannot be reached; any other is an outcome.
    """
    for entry in found:
        with judged(entry, host=host) as verdict:
            outcome = await _settle(agent, entry, verdict, forced=forced, dry_run=dry_run)
        yield outcome


@contextmanager
def judged(entry: Entry, *, host: str) -> Iterator[Liveness]:
    """The verdict on an entry; while the context lasts nobody can be born into a slot whose free lock was the proof."""
    with ExitStack() as locks:
        yield _judge(entry, host, locks)


async def _settle(agent: AgentAPI, entry: Entry, verdict: Liveness, *, forced: bool, dry_run: bool) -> ReapResult:
    if verdict.state != "dead" and not forced:
        return ReapResult(entry, verdict, "kept")
    try:
        now = await agent.service(entry["ID"])  # the verdict was on what may be gone, or another worker's, by now
        if now is None:
            return ReapResult(entry, verdict, "gone", "it is not registered")
        if not is_ours(now.document):
            return ReapResult(entry, verdict, "refused", "it is not consul-prom's")
        if not forced and _worker(now.document) != _worker(entry):
            return ReapResult(now.document, Liveness("alive", "it was registered anew meanwhile"), "kept")
        if not dry_run:
            await remove(agent, now.document)
    except (AgentUnreachable, AgentTimeout):
        raise
    except AgentError as error:
        right = f"; the token needs the rule: {write_rule(entry['Service'])}" if isinstance(error, AgentDenied) else ""
        return ReapResult(entry, verdict, "failed", f"{error}{right}")
    return ReapResult(entry, verdict, "would remove" if dry_run else "removed")


async def remove(agent: AgentAPI, entry: Entry) -> None:
    """Deregister, and see to it that the catalogue follows: an agent without a token of its own leaves it there."""
    name, gone = entry["Service"], entry["ID"]
    node = next((check["Node"] for check in await agent.checks(gone) if "Node" in check), "")
    await agent.deregister(gone)
    try:
        ghost = bool(node) and await agent.catalogued(name, gone, node)
    except AgentError:
        log.debug("the catalogue cannot be read", exc_info=True)
    else:
        if ghost:
            await agent.deregister_from_catalogue(gone, node)


def _judge(entry: Entry, host: str, locks: ExitStack) -> Liveness:
    meta, parts = entry.get("Meta") or {}, parse_entry_id(entry["ID"])
    if parts is None or (parts.service, parts.host, slots.place(parts.slot)) != tuple(
        meta.get(key) for key in ("service", "host", "slot")
    ):
        return Liveness("unknown", "its ID does not fit its meta")
    if not is_on(entry, host):
        return Liveness("unknown", f"it is of the host {parts.host}, and this is {host}")
    process = _by_process(meta)
    lock = _by_lock(meta, parts.service, parts.slot, locks)
    if lock.state == "unknown":
        return process if process.state != "unknown" else Liveness("unknown", f"{lock.proof}, and {process.proof}")
    if lock.state == "dead" and process.state == "alive":
        # Its lock file was replaced under it, or it stopped its worker without the agent: no case for a machine.
        return Liveness("unknown", f"the lock of its slot is free, but {process.proof}")
    return lock


def _by_lock(meta: Mapping[str, str], service: str, slot: int, locks: ExitStack) -> Liveness:
    """The lock's proof. It is made of what is there: a lock file that was wiped away may still be held."""
    identity, _, path = meta.get("dir", "").partition(":")
    directory = Path(path)
    try:
        # The path is someone's word: opening a pipe, say, would hang.
        files = (directory / "id", slots.path_of(directory, service, slot))
        if not directory.is_absolute() or not all(stat.S_ISREG(file.lstat().st_mode) for file in files):
            return Liveness("unknown", "its directory is none of slots")
        if directory_id(directory) != identity:
            return Liveness("unknown", "its directory was replaced, or may not be read")
        held = slots.try_slot(directory, service, slot)
    except FileNotFoundError:
        return Liveness("unknown", "its directory or its lock file is gone")
    except (OSError, ValueError, NotImplementedError) as error:
        return Liveness("unknown", f"its lock cannot be tried ({getattr(error, 'strerror', None) or error})")
    if held is None:
        return Liveness("alive", "a live process holds the lock of its slot")
    locks.callback(held.release)
    return Liveness("dead", "the lock of its slot is free")


def _by_process(meta: Mapping[str, str]) -> Liveness:
    """The process' proof, which holds where the directory is gone."""
    boot, _, rest = meta.get("proc", "").partition(".")
    namespace, _, ticks = rest.partition(".")
    ours = (process_identity(os.getpid()) or "").split(".")
    if not ticks.isdecimal() or len(ours) != 3 or not _proc_is_ours():
        return Liveness("unknown", "this system tells too little of processes")
    if boot != ours[0]:
        return Liveness("unknown", "it is of another boot, or of another machine with this host's name")
    if namespace != ours[1]:
        return Liveness("unknown", "its process is of another pid namespace (another container)")
    return _by_pid(meta.get("pid", ""), meta["proc"])


def _by_pid(pid: str, identity: str) -> Liveness:
    if not pid.isdecimal() or not 0 < int(pid) < 2**31:
        return Liveness("unknown", "its meta has no pid")
    found = process_identity(int(pid))
    if found == identity:
        return Liveness("alive", f"the process {pid} lives")
    if found:
        return Liveness("dead", f"the process {pid} is a later one")
    if _exists(int(pid)):  # a zombie, or hidden: mounted with hidepid, /proc shows no process of another user
        return Liveness("unknown", f"the process {pid} cannot be seen")
    return Liveness("dead", f"the process {pid} is gone")


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _proc_is_ours() -> bool:
    """A container may see its host's /proc, where every pid is somebody else."""
    try:
        return Path("/proc/self").readlink().name == str(os.getpid())
    except OSError:
        return False


def _worker(entry: Entry) -> tuple[object, ...]:
    meta = entry.get("Meta") or {}
    return (*(meta.get(key) for key in ("pid", "proc", "dir")), entry.get("Address"), entry.get("Port"))


def _order(entry: Entry) -> tuple[str, str, int]:
    parts = parse_entry_id(entry["ID"])
    return (parts.service, parts.host, parts.slot) if parts else ("", entry["ID"], 0)
