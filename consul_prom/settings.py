"""What can be set: one row a setting, read once into a frozen object.

An explicit argument beats the environment, which beats the default. The argument's name is the environment
variable's, in lower case and without ``CONSUL_PROM_``. Consul's own variables keep Consul's meaning
(https://developer.hashicorp.com/consul/commands#environment-variables).
"""

import ipaddress
import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypedDict

from consul_prom.errors import SettingsError

TAG: Final = "consul-prom"  # of every entry of ours, before the tags that are set
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


def _name(value: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,54}", value):
        raise ValueError("must be lower-case letters, digits and '-', a letter first, at most 55 characters")
    return value


def _consul_service(value: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,62}", value):
        raise ValueError("must be lower-case letters, digits and '-', a letter first, at most 63 characters")
    return value


def _host(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.-]{1,253}", value):
        raise ValueError("must be letters, digits, '.' and '-', at most 253 characters")
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return value
    raise ValueError("must be a name, not an address (CONSUL_PROM_ADDRESS is for that)")


def _ip(value: str) -> str:
    try:
        address = ipaddress.ip_address(value.removeprefix("[").removesuffix("]"))
    except ValueError:
        raise ValueError("is no IP address") from None
    return str(getattr(address, "ipv4_mapped", None) or address)  # ::ffff:0.0.0.0 is a wildcard too


def _address(value: str) -> str:
    address = _ip(value)
    if ipaddress.ip_address(address).is_unspecified:
        raise ValueError("is a wildcard: nobody can scrape it (CONSUL_PROM_BIND may be one)")
    return address


def _ports(value: str | int) -> Ports:
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


def _tags(value: str | Iterable[str]) -> tuple[str, ...]:
    tags = parse_list(value)
    for tag in tags:
        if _size(tag) > 63:
            raise ValueError(f"has a tag of {_size(tag)} bytes: {tag[:20]!r}...; Consul wants 63 at most")
    return tags


def _meta(value: str | Mapping[str, str]) -> Mapping[str, str]:
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


def _directory(value: str | Path) -> Path:
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


def _at_least(minimum: float, note: str = "") -> Callable[[str | float], float]:
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


def _agent_address(value: str) -> AgentAddress:
    """Of no port, 0 stands for the scheme's. No error of a library's is passed on: it could hold a password."""
    if value.startswith("unix://"):
        path = value.removeprefix("unix://")
        if not path.startswith("/"):
            raise ValueError("must name an absolute path after unix://")
        return AgentAddress(socket=_text(path))
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


def _networks(value: str | Iterable[str]) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(item) for item in parse_list(value))
    except ValueError as error:
        raise ValueError(f"must be networks like 10.0.0.0/8, parted by commas: {error}") from None


def _secret(value: str) -> Secret:
    if not value.isascii() or not value.isprintable():
        raise ValueError("has characters that no HTTP header can carry")
    return Secret(value)


def _text(value: str) -> str:
    """A path or a name, which ends in system calls and in URLs."""
    if "\0" in value:
        raise ValueError("holds a NUL character")
    _size(value)
    return value


@dataclass(frozen=True, slots=True)
class Row:
    """One setting. `default` is a text to parse, `absent` what stands for no text, `shown` the default for people."""

    env: str
    kind: str
    default: str
    help: str
    parse: Callable[[Any], Any]
    absent: Any = None
    shown: str = ""

    @property
    def name(self) -> str:
        return self.env.removeprefix("CONSUL_PROM_").lower()

    @property
    def secret(self) -> bool:
        return self.parse is _secret


ROWS: Final = (
    Row("CONSUL_PROM_SERVICE", "name", "", "The application's name; becomes Prometheus' job.", _name, ""),
    Row(
        "CONSUL_PROM_CONSUL_SERVICE",
        "name",
        "",
        "The name registered in Consul.",
        _consul_service,
        shown="<service>-metrics",
    ),
    Row("CONSUL_PROM_HOST", "name", "", "The host's part of instance, never an address.", _host, shown="the host name"),
    Row(
        "CONSUL_PROM_ADDRESS",
        "IP address",
        "",
        "Where Prometheus and the agent reach the worker.",
        _address,
        shown="the agent's own, else the default route's",
    ),
    Row("CONSUL_PROM_BIND", "IP address", "", "Where the endpoint listens.", _ip, shown="the address"),
    Row(
        "CONSUL_PROM_PORT",
        "port(s)",
        "0",
        "0 = ephemeral, 9100 = 9100 + slot, 9100-9131 = one of these; if set, the agent is not asked for the address.",
        _ports,
    ),
    Row("CONSUL_PROM_TAGS", "list", "", "Tags beside consul-prom, parted by commas.", _tags, ()),
    Row("CONSUL_PROM_META", "list", "", "Meta beside ours, key=value, parted by commas.", _meta, MappingProxyType({})),
    Row(
        "CONSUL_PROM_DIR",
        "path",
        "",
        "The directory of the slots and ledgers.",
        _directory,
        shown="/run/consul-prom for root, else /var/tmp/consul-prom-<uid>",
    ),
    Row("CONSUL_PROM_CHECK_INTERVAL", "duration", "30s", "How often the agent checks the worker.", _at_least(1)),
    Row("CONSUL_PROM_CHECK_TIMEOUT", "duration", "5s", "How long such a check may take.", _at_least(0.1)),
    Row(
        "CONSUL_PROM_DEREGISTER_AFTER",
        "duration",
        "10m",
        "The agent removes an entry that was critical for so long.",
        _at_least(60, ", the least that Consul knows"),
    ),
    Row("CONSUL_PROM_START_TIMEOUT", "duration", "10s", "How long start waits where REQUIRED.", _at_least(0.1)),
    Row("CONSUL_PROM_STOP_TIMEOUT", "duration", "2s", "How long stop may take.", _at_least(0.1)),
    Row("CONSUL_PROM_REQUIRED", "boolean", "false", "Start raises where it would log and go on.", parse_bool),
    Row(
        "CONSUL_PROM_WEB_CONFIG",
        "path",
        "",
        "TLS and passwords of the port: a web-config file, as Prometheus' exporters read it. Needs the extra web.",
        _text,
    ),
    Row(
        "CONSUL_PROM_ALLOW",
        "list",
        "",
        "Networks that may reach the port, parted by commas, besides this host: Prometheus', the agent's.",
        _networks,
        (),
        shown="all",
    ),
    Row("CONSUL_PROM_REQUEST_METRICS", "boolean", "true", "Count and time HTTP requests.", parse_bool),
    Row("CONSUL_PROM_LEDGER", "boolean", "true", "Counters outlive their process, in files in DIR.", parse_bool),
    Row(
        "CONSUL_PROM_RETAIN",
        "duration",
        "2m",
        "How long a sibling serves the last page of a worker that nobody replaces; 0 = not at all.",
        _at_least(0),
    ),
    Row(
        "CONSUL_PROM_LINGER",
        "duration",
        "",
        "How long a process that a signal ends may wait for one more scrape.",
        _at_least(0),
        shown="0, and 60s of running()",
    ),
    Row("CONSUL_PROM_DISABLED", "boolean", "false", "Switch everything off.", parse_bool),
    Row(
        "CONSUL_HTTP_ADDR",
        "address",
        "127.0.0.1:8500",
        "The agent: host:port, http://, https://, unix://.",
        _agent_address,
    ),
    Row("CONSUL_HTTP_TOKEN", "secret", "", "The ACL token.", _secret),
    Row("CONSUL_HTTP_TOKEN_FILE", "path", "", "A file that holds the ACL token.", _text),
    Row("CONSUL_HTTP_AUTH", "secret", "", "user:password, for a proxy before the agent.", _secret),
    Row("CONSUL_HTTP_SSL", "boolean", "false", "Speak https whatever the address says.", parse_bool),
    Row("CONSUL_HTTP_SSL_VERIFY", "boolean", "true", "Verify the agent's certificate.", parse_bool),
    Row("CONSUL_CACERT", "path", "", "A file with the agent's CA.", _text),
    Row("CONSUL_CAPATH", "path", "", "A directory of CAs.", _text),
    Row("CONSUL_CLIENT_CERT", "path", "", "Our certificate for the agent.", _text),
    Row("CONSUL_CLIENT_KEY", "path", "", "Its key.", _text),
    Row("CONSUL_TLS_SERVER_NAME", "name", "", "The name that the agent's certificate must bear.", _text),
    Row("CONSUL_NAMESPACE", "name", "", "The namespace (Consul Enterprise).", _text),
    Row("CONSUL_PARTITION", "name", "", "The partition (Consul Enterprise).", _text),
)


class Arguments(TypedDict, total=False):
    """The settings as keyword arguments; durations in seconds or as text."""

    service: str
    consul_service: str
    host: str
    address: str
    bind: str
    port: int | str
    tags: str | Iterable[str]
    meta: str | Mapping[str, str]
    dir: str | Path
    check_interval: str | float
    check_timeout: str | float
    deregister_after: str | float
    start_timeout: str | float
    stop_timeout: str | float
    required: str | bool
    web_config: str
    allow: str | Iterable[str]
    request_metrics: str | bool
    ledger: str | bool
    retain: str | float
    linger: str | float
    disabled: str | bool
    consul_http_addr: str
    consul_http_token: str
    consul_http_token_file: str
    consul_http_auth: str
    consul_http_ssl: str | bool
    consul_http_ssl_verify: str | bool
    consul_cacert: str
    consul_capath: str
    consul_client_cert: str
    consul_client_key: str
    consul_tls_server_name: str
    consul_namespace: str
    consul_partition: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting, parsed; a field a row. Made by `load`. Times are seconds; what is unset is None or empty."""

    service: str
    consul_service: str
    host: str
    address: str | None
    bind: str | None
    port: Ports
    tags: tuple[str, ...]
    meta: Mapping[str, str]
    dir: Path
    check_interval: float
    check_timeout: float
    deregister_after: float
    start_timeout: float
    stop_timeout: float
    required: bool
    web_config: str | None
    allow: tuple[Network, ...]
    request_metrics: bool
    ledger: bool
    retain: float
    linger: float | None
    disabled: bool
    consul_http_addr: AgentAddress
    consul_http_token: Secret | None
    consul_http_token_file: str | None
    consul_http_auth: Secret | None
    consul_http_ssl: bool
    consul_http_ssl_verify: bool
    consul_cacert: str | None
    consul_capath: str | None
    consul_client_cert: str | None
    consul_client_key: str | None
    consul_tls_server_name: str | None
    consul_namespace: str | None
    consul_partition: str | None


def load(
    arguments: Mapping[str, object],
    *,
    environ: Mapping[str, str] = os.environ,
    hostname: Callable[[], str] = socket.gethostname,
    uid: Callable[[], int] = os.getuid,
) -> Settings:
    """Settings of *arguments*, *environ* and defaults, in this order.

    Raises:
        SettingsError: names the first setting that is wrong, and its value unless that is a secret.
    """
    unknown = set(arguments) - {row.name for row in ROWS}
    if unknown:
        raise SettingsError(f"there is no setting {min(unknown)!r}", from_code=True)
    values = {row.name: _value(row, arguments, environ) for row in ROWS}
    values["host"] = values["host"] or _own_host(hostname())
    if not values["consul_service"]:
        values["consul_service"] = f"{values['service']}-metrics" if values["service"] else ""
    if not values["dir"]:
        values["dir"] = Path("/run/consul-prom" if uid() == 0 else f"/var/tmp/consul-prom-{uid()}")  # noqa: S108
    values["consul_http_addr"] = _complete(values["consul_http_addr"], tls=values["consul_http_ssl"])
    given = {name for name, value in arguments.items() if value is not None}
    if "consul_http_token" in given and "consul_http_token_file" not in given:
        values["consul_http_token_file"] = None  # an explicit token beats a file from the environment
    if bool(values["consul_client_cert"]) != bool(values["consul_client_key"]):
        from_code = bool({"consul_client_cert", "consul_client_key"} & given)
        raise SettingsError("CONSUL_CLIENT_CERT and CONSUL_CLIENT_KEY need each other", from_code=from_code)
    return Settings(**values)


def switch(name: str, arguments: Mapping[str, object], *, environ: Mapping[str, str] = os.environ) -> bool:
    """One boolean setting by itself, where `load` found another one wrong; False where it is wrong itself."""
    row = next(row for row in ROWS if row.name == name)
    try:
        return bool(_value(row, arguments, environ))
    except SettingsError:
        return False


def check_named(settings: Settings, *, how: str = "pass --service or set CONSUL_PROM_SERVICE") -> None:
    """What is about one service needs its name; *how* to give it.

    Raises:
        SettingsError: there is none.
    """
    if not settings.service:
        raise SettingsError(f"no service name: {how}", from_code=False)


def check_worker(settings: Settings, *, environ: Mapping[str, str] = os.environ) -> None:
    """What a worker needs beyond what every command needs.

    Raises:
        SettingsError: says what is missing, or in the way.
    """
    check_named(settings, how="pass service=... or set CONSUL_PROM_SERVICE")
    multiprocess = environ.get("PROMETHEUS_MULTIPROC_DIR") or environ.get("prometheus_multiproc_dir")
    if multiprocess:
        raise SettingsError(
            f"PROMETHEUS_MULTIPROC_DIR={multiprocess!r} makes prometheus_client keep its values in files of all "
            "workers; unset it: each worker serves its own",
            from_code=False,
        )


def child_environment(ours: Mapping[str, str], *, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """*environ* for a child process that is to have the settings *ours* and no other."""
    strange = {row.env for row in ROWS} | {"PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir", "GUNICORN_CMD_ARGS"}
    return {**{name: value for name, value in environ.items() if name not in strange}, **ours}


def _own_host(hostname: str) -> str:
    """Fit for an ID; one that looks like an address is made a name."""
    host = re.sub(r"[^A-Za-z0-9.-]", "-", hostname)[:253]
    try:
        return _host(host)
    except ValueError:
        return host.replace(".", "-") or "localhost"


def _complete(address: AgentAddress, *, tls: bool) -> AgentAddress:
    if address.socket:
        return address
    scheme = "https" if tls else address.scheme
    return replace(address, scheme=scheme, port=address.port or (443 if scheme == "https" else 80))


def _value(row: Row, arguments: Mapping[str, object], environ: Mapping[str, str]) -> Any:
    """An argument of None and an empty variable mean unset."""
    from_code = arguments.get(row.name) is not None
    raw = arguments[row.name] if from_code else environ.get(row.env) or row.default
    if not from_code and raw == "":
        return row.absent
    try:
        return row.parse(raw)
    except (ValueError, TypeError, AttributeError) as error:
        label = row.name if from_code else row.env
        shown = "" if row.secret else f"={_shorten(raw)}"
        raise SettingsError(f"{label}{shown} {_sentence(error)}", from_code=from_code) from None


def _shorten(raw: object) -> str:
    text = re.sub(r"^(.(?:\w+://)?).*@", r"\1***@", repr(raw))  # an address may hold a password, and that anything
    text = re.sub(r"[?#].*", "?***'", text)  # or a token
    return text if len(text) <= 100 else f"{text[:100]}..."


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else "is of the wrong type"
