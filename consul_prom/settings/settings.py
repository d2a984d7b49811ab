"""What can be set: one row a setting, read once into a frozen object.

An explicit argument beats the environment, which beats the default. The argument's name is the environment
variable's, in lower case and without ``CONSUL_PROM_``. Consul's own variables keep Consul's meaning
(https://developer.hashicorp.com/consul/commands#environment-variables).
"""

import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypedDict

from consul_prom.errors import SettingsError
from consul_prom.settings.parsers import (
    AgentAddress,
    Network,
    Ports,
    Secret,
    at_least,
    parse_address,
    parse_agent_address,
    parse_bool,
    parse_directory,
    parse_host,
    parse_ip,
    parse_meta,
    parse_name,
    parse_networks,
    parse_ports,
    parse_secret,
    parse_tags,
    parse_text,
)

TAG: Final = "consul-prom"  # of every entry of ours, before the tags that are set
NO_SERVICE: Final = "no service name"


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
        return self.parse is parse_secret


ROWS: Final = (
    Row("CONSUL_PROM_SERVICE", "name", "", "The application's name; becomes Prometheus' job.", parse_name, ""),
    Row(
        "CONSUL_PROM_CONSUL_SERVICE",
        "name",
        "",
        "The name registered in Consul.",
        partial(parse_name, longest=63),
        shown="<service>-metrics",
    ),
    Row(
        "CONSUL_PROM_HOST",
        "name",
        "",
        "The host's part of instance, in lower case; never an address.",
        parse_host,
        shown="the host name",
    ),
    Row(
        "CONSUL_PROM_ADDRESS",
        "IP address",
        "",
        "Where Prometheus and the agent reach the worker.",
        parse_address,
        shown="the agent's own, else the default route's",
    ),
    Row("CONSUL_PROM_BIND", "IP address", "", "Where the endpoint listens.", parse_ip, shown="the address"),
    Row(
        "CONSUL_PROM_PORT",
        "port(s)",
        "0",
        "0 = ephemeral, 9100 = 9100 + slot, 9100-9131 = one of these; if set, the agent is not asked for the address.",
        parse_ports,
    ),
    Row("CONSUL_PROM_TAGS", "list", "", "Tags beside consul-prom, parted by commas.", parse_tags, ()),
    Row(
        "CONSUL_PROM_META",
        "list",
        "",
        "Meta beside ours, key=value, parted by commas.",
        parse_meta,
        MappingProxyType({}),
    ),
    Row(
        "CONSUL_PROM_DIR",
        "path",
        "",
        "The directory of the slots and ledgers.",
        parse_directory,
        shown="/run/consul-prom for root, else /var/tmp/consul-prom-<uid>",
    ),
    Row("CONSUL_PROM_CHECK_INTERVAL", "duration", "30s", "How often the agent checks the worker.", at_least(1)),
    Row("CONSUL_PROM_CHECK_TIMEOUT", "duration", "5s", "How long such a check may take.", at_least(0.1)),
    Row(
        "CONSUL_PROM_DEREGISTER_AFTER",
        "duration",
        "10m",
        "The agent removes an entry that was critical for so long.",
        at_least(60, ", the least that Consul knows"),
    ),
    Row("CONSUL_PROM_START_TIMEOUT", "duration", "10s", "How long start waits where REQUIRED.", at_least(0.1)),
    Row("CONSUL_PROM_STOP_TIMEOUT", "duration", "2s", "How long stop may take.", at_least(0.1)),
    Row("CONSUL_PROM_REQUIRED", "boolean", "false", "Start raises where it would log and go on.", parse_bool),
    Row(
        "CONSUL_PROM_WEB_CONFIG",
        "path",
        "",
        "TLS and passwords of the port: a web-config file, as Prometheus' exporters read it. Needs the extra web.",
        parse_text,
    ),
    Row(
        "CONSUL_PROM_ALLOW",
        "list",
        "",
        "Networks that may reach the port, parted by commas, besides this host: Prometheus', the agent's.",
        parse_networks,
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
        at_least(0),
    ),
    Row(
        "CONSUL_PROM_LINGER",
        "duration",
        "",
        "How long a process that a signal ends may wait for one more scrape.",
        at_least(0),
        shown="0, and 60s of running()",
    ),
    Row("CONSUL_PROM_DISABLED", "boolean", "false", "Switch everything off.", parse_bool),
    Row(
        "CONSUL_HTTP_ADDR",
        "address",
        "127.0.0.1:8500",
        "The agent: host:port, http://, https://, unix://.",
        parse_agent_address,
    ),
    Row("CONSUL_HTTP_TOKEN", "secret", "", "The ACL token.", parse_secret),
    Row("CONSUL_HTTP_TOKEN_FILE", "path", "", "A file that holds the ACL token.", parse_text),
    Row("CONSUL_HTTP_AUTH", "secret", "", "user:password, for a proxy before the agent.", parse_secret),
    Row("CONSUL_HTTP_SSL", "boolean", "false", "Speak https whatever the address says.", parse_bool),
    Row("CONSUL_HTTP_SSL_VERIFY", "boolean", "true", "Verify the agent's certificate.", parse_bool),
    Row("CONSUL_CACERT", "path", "", "A file with the agent's CA.", parse_text),
    Row("CONSUL_CAPATH", "path", "", "A directory of CAs.", parse_text),
    Row("CONSUL_CLIENT_CERT", "path", "", "Our certificate for the agent.", parse_text),
    Row("CONSUL_CLIENT_KEY", "path", "", "Its key.", parse_text),
    Row("CONSUL_TLS_SERVER_NAME", "name", "", "The name that the agent's certificate must bear.", parse_text),
    Row("CONSUL_NAMESPACE", "name", "", "The namespace (Consul Enterprise).", parse_text),
    Row("CONSUL_PARTITION", "name", "", "The partition (Consul Enterprise).", parse_text),
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
        raise SettingsError(f"{NO_SERVICE}: {how}", from_code=False)


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
        return parse_host(host)
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
