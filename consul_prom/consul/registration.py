"""The service document that we want as our entry, and how it differs from what the agent has."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from consul_prom.process.identity import process_identity
from consul_prom.settings.parsers import parse_duration
from consul_prom.settings.settings import TAG, Settings
from consul_prom.slots.directory import directory_id
from consul_prom.slots.slots import MASTER, Slot, place

HEALTH_PATH: Final = "/-/healthy"
MARKER: Final = {"external-source": "consul-prom", "managed_by": "consul-prom"}


@dataclass(frozen=True, slots=True)
class Registration:
    """An entry as we want it. `meta` is complete; `instance` is ``<host>:<slot>``; times are seconds."""

    id: str
    name: str
    address: str
    port: int
    tags: tuple[str, ...]
    meta: Mapping[str, str]
    check_interval: float
    check_timeout: float
    deregister_after: float
    health_path: str
    tcp_check: bool = False

    @property
    def instance(self) -> str:
        return self.meta["instance"]

    @property
    def check_url(self) -> str:
        return origin(self.address, self.port, scheme=self.meta["scheme"]) + self.health_path

    @property
    def check_name(self) -> str:
        return f"consul-prom {self.instance}"

    @property
    def check_notes(self) -> str:
        """Says what the agent does not show of a check, so that `check_difference` can see it."""
        what = f"connect to {self._place}" if self.tcp_check else f"GET {self.check_url}"
        return f"{what}; deregistered after {go_duration(self.deregister_after)} critical"

    @property
    def _place(self) -> str:
        return origin(self.address, self.port).removeprefix("http://")

    def document(self) -> dict[str, Any]:
        """The body of ``PUT /v1/agent/service/register``; the check is passing until the agent has tried it."""
        # The agent asks whether we live, not who we are.
        kind = {"TCP": self._place} if self.tcp_check else {"HTTP": self.check_url, "TLSSkipVerify": True}
        return {
            "ID": self.id,
            "Name": self.name,
            "Address": self.address,
            "Port": self.port,
            "Tags": list(self.tags),
            "Meta": dict(self.meta),
            "Check": {
                "Name": self.check_name,
                "Notes": self.check_notes,
                **kind,
                "Interval": go_duration(self.check_interval),
                "Timeout": go_duration(self.check_timeout),
                "DeregisterCriticalServiceAfter": go_duration(self.deregister_after),
                "Status": "passing",
            },
        }


class EntryID(NamedTuple):
    """The parts of an entry's ID; the host may hold dots of its own."""

    service: str
    host: str
    slot: int


def entry_id(service: str, host: str, slot: int) -> str:
    return f"{service}.{host}.{place(slot)}"


def parse_entry_id(text: str) -> EntryID | None:
    match = re.fullmatch(r"([a-z][a-z0-9-]*)\.([A-Za-z0-9.-]+)\.(0|[1-9][0-9]{0,3}|master)", text)
    return EntryID(match[1], match[2], int(match[3]) if match[3].isdecimal() else MASTER) if match else None


def build(
    settings: Settings,
    *,
    slot: Slot,
    address: str,
    port: int,
    version: str,
    pid: int,
    scheme: str = "http",
    health_path: str = HEALTH_PATH,
    tcp_check: bool = False,
    adopted: bool = False,
) -> Registration:
    """The registration of the process *pid*, which serves *scheme* at *address* and *port*.

    *tcp_check*: where clients need a certificate, the agent can do no more than connect. *adopted*: whether it serves
    the last page of a slot that has no worker.
    """
    instance = f"{settings.host}:{place(slot.number)}"
    ours = {
        **MARKER,
        "service": settings.service,
        "host": settings.host,
        "slot": place(slot.number),
        "instance": instance,
        "pid": str(pid),
        "proc": process_identity(pid) or "",
        "dir": f"{slot.directory_id}:{slot.directory}",
        "version": version,
        "scheme": scheme,
        **({"adopted": "1"} if adopted else {}),
    }
    return Registration(
        id=entry_id(settings.service, settings.host, slot.number),
        name=settings.consul_service,
        address=address,
        port=port,
        tags=tuple(dict.fromkeys((TAG, *settings.tags))),
        meta={**settings.meta, **ours},
        check_interval=settings.check_interval,
        check_timeout=settings.check_timeout,
        deregister_after=settings.deregister_after,
        health_path=health_path,
        tcp_check=tcp_check,
    )


def difference(wanted: Registration, existing: Mapping[str, Any]) -> str | None:
    """The first field in which *existing*, as ``GET /v1/agent/service/<id>`` tells it, is not as wanted."""
    pairs = {
        "Service": (wanted.name, existing.get("Service")),
        "Address": (wanted.address, existing.get("Address")),
        "Port": (wanted.port, existing.get("Port")),
        "Tags": (list(wanted.tags), existing.get("Tags")),
    }
    for field, (ours, theirs) in pairs.items():
        if ours != theirs:
            return field
    meta = existing.get("Meta") or {}
    return next((f"Meta.{key}" for key in sorted({*wanted.meta, *meta}) if wanted.meta.get(key) != meta.get(key)), None)


def check_difference(wanted: Registration, existing: Sequence[Mapping[str, Any]]) -> str | None:
    """The first field in which our check of the entry, as ``GET /v1/agent/checks`` tells them, are not as wanted."""
    ours = [check for check in existing if check.get("CheckID") == f"service:{wanted.id}"]
    if not ours:
        return "Checks"
    check = ours[0]  # others are an operator's, as maintenance mode is
    pairs = {
        "Name": (wanted.check_name, check.get("Name")),
        "Notes": (wanted.check_notes, check.get("Notes")),
        "Type": ("tcp" if wanted.tcp_check else "http", check.get("Type")),
        "Interval": (_milliseconds(wanted.check_interval), _told_milliseconds(check.get("Interval"))),
        "Timeout": (_milliseconds(wanted.check_timeout), _told_milliseconds(check.get("Timeout"))),
    }
    return next((f"Check.{field}" for field, (ours, theirs) in pairs.items() if ours != theirs), None)


def _told_milliseconds(duration: object) -> int | None:
    try:
        return _milliseconds(parse_duration(str(duration)))
    except ValueError:
        return None


def is_ours(entry: Mapping[str, Any]) -> bool:
    """Whether an entry bears our marker; what does not is never touched."""
    meta = entry.get("Meta") or {}
    return all(meta.get(key) == value for key, value in MARKER.items())


def is_worker(meta: Mapping[str, str]) -> bool:
    """Whether a worker of its own is behind an entry: no adopted slot is, and no page of Gunicorn's masters."""
    return "adopted" not in meta and meta.get("slot") != place(MASTER)


def is_on(entry: Mapping[str, Any], host: str) -> bool:
    """Whether an entry of ours belongs to *host*; older versions kept the capitals of the host's name."""
    return str(entry["Meta"].get("host")).lower() == host


def is_of(entry: Mapping[str, Any], directory: Path) -> bool:
    """Whether an entry of ours belongs to a slot of *directory*, whose lock then tells whether its worker lives."""
    return is_ours(entry) and entry["Meta"].get("dir") == f"{directory_id(directory)}:{directory}"


def origin(address: str, port: int, *, scheme: str = "http") -> str:
    return f"{scheme}://[{address}]:{port}" if ":" in address else f"{scheme}://{address}:{port}"


def go_duration(seconds: float) -> str:
    """Milliseconds where they are needed: Go knows no exponents."""
    return f"{seconds:.0f}s" if seconds == int(seconds) else f"{_milliseconds(seconds)}ms"


def _milliseconds(seconds: float) -> int:
    """What the agent is told of a time, at the finest."""
    return max(round(seconds * 1000), 1)
