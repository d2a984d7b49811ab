"""What the texts of settings mean: a parser a kind, and what it gives.

A parser raises ValueError with the end of a sentence that begins with the setting and its value.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MANAGED_META: Final = frozenset(
    {"external-source", "managed_by", "service", "host", "slot", "instance", "pid", "proc", "dir", "version", "scheme"}
    | {"adopted"}
)


class Secret:
    """A text that shows itself to nobody, whether by ``repr``, ``str`` or ``format``."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "***"

    def reveal(self) -> str:
        return self._text


@dataclass(frozen=True, slots=True)
class AgentAddress:
    """Where the Consul agent listens: TCP `host` and `port`, or a unix `socket`."""

    scheme: str = "http"
    host: str = "127.0.0.1"
    port: int = 8500
    prefix: str = ""
    socket: str | None = None

    def __str__(self) -> str:
        if self.socket:
            return f"unix://{self.socket}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.prefix}"


@dataclass(frozen=True, slots=True)
class Ports:
    """`0` is an ephemeral port, `9100` is 9100 + slot, `9100-9131` is 9100 + slot or another free one of the range."""

    first: int = 0
    last: int | None = None

    def __str__(self) -> str:
        return f"{self.first}-{self.last}" if self.last else str(self.first)

    def candidates(self, slot: int) -> list[int]:
        """Ports to try for *slot*, in order; empty where none is left for it.

        The master's slot, -1, has the range's last, or the port before the first.
        """
        if not self.first:
            return [0]
        if self.last is None:
            return [self.first + slot] if self.first + slot <= 65535 else []
        span = self.last - self.first + 1
        return [self.first + (slot + offset) % span for offset in range(span)]


def parse_name(value: str, *, longest: int = 55) -> str:
    if not _is_name(value, longest):
        other = re.sub("[_. ]", "-", value.lower())
        hint = f"; use {other!r}" if _is_name(other, longest) else ""
        raise ValueError(
            f"must be lower-case letters, digits and '-', a letter first, at most {longest} characters{hint}"
        )
    return value


def _is_name(value: str, longest: int) -> bool:
    """Consul's DNS takes no other signs, and two names must not become one by a change of ours."""
    return bool(re.fullmatch("[a-z][a-z0-9-]*", value)) and len(value) <= longest


def parse_host(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.-]{1,253}", value):
        raise ValueError("must be letters, digits, '.' and '-', at most 253 characters")
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return value.lower()  # two IDs that differ only in case are one in Consul's catalogue
    raise ValueError("must be a name, not an address (CONSUL_PROM_ADDRESS is for that)")


def parse_ip(value: str) -> str:
    try:
        address = ipaddress.ip_address(value.removeprefix("[").removesuffix("]"))
    except ValueError:
        raise ValueError("is no IP address") from None
    return str(getattr(address, "ipv4_mapped", None) or address)  # ::ffff:0.0.0.0 is a wildcard too


def parse_address(value: str) -> str:
    address = parse_ip(value)
    if ipaddress.ip_address(address).is_unspecified:
        raise ValueError("is a wildcard: nobody can scrape it (CONSUL_PROM_BIND may be one)")
    return address


def parse_ports(value: str | int) -> Ports:
    match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", str(value))
    if not match:
        raise ValueError("must be 0, a port, or a range like 9100-9131")
    first, last = int(match[1]), int(match[2]) if match[2] else None
    if max(first, last or 0) > 65535 or (last is not None and not 0 < first <= last):
        raise ValueError("must be 0, a port, or a range like 9100-9131, up to 65535")
    return Ports(first, last)


def parse_list(value: str | Iterable[str]) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    return tuple(item.strip() for item in items if item.strip())


def _size(text: str) -> int:
    """Bytes of UTF-8; what was none in the environment, Consul would change and we would register for ever."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise ValueError("is not valid UTF-8") from None


def parse_tags(value: str | Iterable[str]) -> tuple[str, ...]:
    tags = parse_list(value)
    for tag in tags:
        if _size(tag) > 63:
            raise ValueError(f"has a tag of {_size(tag)} bytes: {tag[:20]!r}...; Consul wants 63 at most")
    return tags


def parse_meta(value: str | Mapping[str, str]) -> Mapping[str, str]:
    if isinstance(value, str):
        pairs = [item.partition("=") for item in parse_list(value)]
        if any(not equals for _, equals, _ in pairs):
            raise ValueError("must be key=value pairs, parted by commas")
        value = {key.strip(): text.strip() for key, _, text in pairs}
    for key, text in value.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", key) or key.startswith("consul-"):
            raise ValueError(f"has the key {key[:140]!r}; Consul wants [A-Za-z0-9_-], 128 at most, no 'consul-' before")
        if key in MANAGED_META:
            raise ValueError(f"has the key {key!r}, which is our own")
        if _size(text) > 512:
            raise ValueError(f"has a value of {_size(text)} bytes for {key!r}; Consul wants 512 at most")
    if len(value) + len(MANAGED_META) > 64:
        raise ValueError(f"has {len(value)} keys; Consul wants {64 - len(MANAGED_META)} at most beside our own")
    return dict(value)


def parse_directory(value: str | Path) -> Path:
    path = Path(value)
    if not path.is_absolute() or "\0" in str(path):
        raise ValueError("must be an absolute path")
    if _size(str(path)) > 400:
        raise ValueError("is longer than 400 bytes, too long for an entry's meta")
    return path


_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(value: str | float) -> float:
    """Seconds of ``10s``, ``1m30s``, ``500ms`` or a bare number of seconds."""
    text = str(value)
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return float(text)
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError("must be a duration like 10s, 10m or a number of seconds")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def at_least(minimum: float, note: str = "") -> Callable[[str | float], float]:
    def parse(value: str | float) -> float:
        seconds = parse_duration(value)
        if seconds < minimum:
            raise ValueError(f"must be at least {minimum:g} s{note}")
        if seconds > 10**8:
            raise ValueError("must be at most 100000000 s")
        return seconds

    return parse


def parse_bool(value: str | bool) -> bool:  # noqa: FBT001  # a value, not a switch
    """As Go's strconv.ParseBool, which Consul uses."""
    if isinstance(value, bool):
        return value
    if value in {"1", "t", "T", "true", "TRUE", "True"}:
        return True
    if value in {"0", "f", "F", "false", "FALSE", "False"}:
        return False
    raise ValueError("must be true or false")


_AGENT: Final = re.compile(
    r"(?:(?P<scheme>https?)://)?"
    r"(?:\[(?P<ip>[0-9A-Fa-f:.]+)\]|(?P<name>[\w-]{1,63}(?:\.[\w-]{1,63})*\.?))"
    r"(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<prefix>/[!$%&-;=\w~]*)?",
    re.ASCII,
)


def parse_agent_address(value: str) -> AgentAddress:
    """Of no port, 0 stands for the scheme's. No error of a library's is passed on: it could hold a password."""
    if value.startswith("unix://"):
        path = value.removeprefix("unix://")
        if not path.startswith("/"):
            raise ValueError("must name an absolute path after unix://")
        return AgentAddress(socket=parse_text(path))
    if "@" in value:
        raise ValueError("must not hold a password; use CONSUL_HTTP_AUTH")
    scheme, parted, _ = value.partition("://")
    if parted and scheme not in {"http", "https"}:
        raise ValueError(f"has the unknown scheme {scheme!r}; use http, https or unix")
    match = _AGENT.fullmatch(value)
    if not match or not 0 < int(match["port"] or 80) <= 65535 or (match["ip"] and not _is_ip6(match["ip"])):
        raise ValueError("must look like host:port, http://host:port, https://host:port or unix:///path")
    host, port, prefix = match["ip"] or match["name"], int(match["port"] or 0), match["prefix"] or ""
    return AgentAddress(match["scheme"] or "http", host, port, prefix.rstrip("/"))


def _is_ip6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def parse_networks(value: str | Iterable[str]) -> tuple[Network, ...]:
    try:
        return tuple(_unmapped(ipaddress.ip_network(item)) for item in parse_list(value))
    except ValueError as error:
        raise ValueError(f"must be networks like 10.0.0.0/8, parted by commas: {error}") from None


def _unmapped(network: Network) -> Network:
    """The IPv4 network that ::ffff:10.0.0.0/104 means: IPv4 peers connect with their IPv4 addresses."""
    first = getattr(network.network_address, "ipv4_mapped", None)
    return ipaddress.ip_network((first, network.prefixlen - 96)) if first and network.prefixlen >= 96 else network


def parse_secret(value: str) -> Secret:
    if not value.isascii() or not value.isprintable():
        raise ValueError("has characters that no HTTP header can carry")
    return Secret(value)


def parse_text(value: str) -> str:
    """A path or a name, which ends in system calls and in URLs."""
    if "\0" in value:
        raise ValueError("holds a NUL character")
    _size(value)
    return value
