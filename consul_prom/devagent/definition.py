"""A service definition as it stands in the body of a registration, read as strictly as Consul reads it.

Source: agent/structs/service_definition.go, check_type.go and agent/agent_endpoint.go of Consul 1.19.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from consul_prom.devagent import gojson
from consul_prom.devagent.errors import Refused

_CHECK_UNSUPPORTED = [
    "AliasNode",
    "AliasService",
    "Args",
    "DisableRedirects",
    "DockerContainerID",
    "FailuresBeforeCritical",
    "FailuresBeforeWarning",
    "GRPC",
    "GRPCUseTLS",
    "H2PING",
    "H2PingUseTLS",
    "OSService",
    "ProxyGRPC",
    "ProxyHTTP",
    "ScriptArgs",
    "Shell",
    "SuccessBeforePassing",
    "TCPUseTLS",
    "TLSServerName",
    "TTL",
    "UDP",
    "disable_redirects",
    "docker_container_id",
    "grpc_use_tls",
    "h2ping_use_tls",
    "script_args",
    "tcp_use_tls",
    "tls_server_name",
]
_CHECK: dict[str, gojson.Reader] = {
    "CheckID": gojson.text,
    "Name": gojson.text,
    "Status": gojson.text,
    "Notes": gojson.text,
    "HTTP": gojson.text,
    "TCP": gojson.text,
    "Method": gojson.text,
    "Body": gojson.text,
    "Header": gojson.mapping(gojson.texts, "[]string", zero=list),
    "TLSSkipVerify": gojson.boolean,
    "tls_skip_verify": gojson.boolean,
    "Interval": gojson.duration,
    "Timeout": gojson.duration,
    "DeregisterCriticalServiceAfter": gojson.duration,
    "deregister_critical_service_after": gojson.duration,
    "OutputMaxSize": gojson.integer,
    "ServiceID": gojson.ignored,
    "service_id": gojson.ignored,
} | dict.fromkeys(_CHECK_UNSUPPORTED, gojson.unsupported)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckDefinition:
    """One check of a service; durations are nanoseconds."""

    check_id: str
    name: str
    notes: str
    status: str
    http: str
    tcp: str
    method: str
    body: str
    header: Mapping[str, list[str]]
    tls_skip_verify: bool
    interval: int
    timeout: int
    deregister_after: int
    output_max_size: int

    @property
    def kind(self) -> str:
        return "http" if self.http else "tcp"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceDefinition:
    service_id: str
    name: str
    tags: list[str] = field(default_factory=list)
    address: str = ""
    port: int = 0
    meta: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, int] = field(default_factory=lambda: {"Passing": 1, "Warning": 1})
    enable_tag_override: bool = False
    checks: tuple[CheckDefinition, ...] = ()


def parse(body: bytes) -> ServiceDefinition:
    """The definition in the body; Refused has Consul's status and text."""
    try:
        values = gojson.struct(_SERVICE, gojson.decode(body))
    except ValueError as exc:
        raise Refused(400, f"Request decode failed: {exc}") from exc
    name = values.get("Name")
    if not name:
        raise Refused(400, "Missing service name")
    if values.get("Address") in {"0.0.0.0", "::", "[::]"}:  # noqa: S104 - refused here
        raise Refused(400, "Invalid service address")
    weights = {"Passing": 0, "Warning": 0} | values.get("Weights", {"Passing": 1, "Warning": 1})
    _vet_weights(weights)
    meta = values.get("Meta", {})
    _vet_meta(meta)
    return ServiceDefinition(
        service_id=values.get("ID") or name,
        name=name,
        tags=values.get("Tags", []),
        address=values.get("Address", ""),
        port=values.get("Port", 0),
        meta=meta,
        weights=weights,
        enable_tag_override=values.get("EnableTagOverride") or values.get("enable_tag_override", False),
        checks=_checks(values),
    )


def _vet_weights(weights: Mapping[str, int]) -> None:
    passing, warning = weights["Passing"], weights["Warning"]
    if passing < 1:
        raise Refused(400, "Invalid Weights: Passing must be greater than 0")
    if warning < 0:
        raise Refused(400, "Invalid Weights: Warning must be greater or equal than 0")
    if max(passing, warning) > 65535:
        raise Refused(400, "Invalid Weights: DNS Weight must be between 0 and 65535")


def _vet_meta(meta: Mapping[str, str]) -> None:
    if len(meta) > 64:
        raise Refused(400, "Invalid Service Meta: Node metadata cannot contain more than 64 key/value pairs")
    for key, value in meta.items():
        if reason := _why_no_meta(key, value):
            raise Refused(400, f"Invalid Service Meta: Couldn't load metadata pair ('{key}', '{value}'): {reason}")


def _why_no_meta(key: str, value: str) -> str | None:
    if not key:
        return "Key cannot be blank"
    if not re.fullmatch("[a-zA-Z0-9_-]+", key):
        return "Key contains invalid characters"
    if len(key) > 128:
        return "Key is too long (limit: 128 characters)"
    if key.startswith("consul-"):
        return "Key prefix 'consul-' is reserved for internal use"
    if len(value.encode()) > 512:
        return "Value is too long (limit: 512 characters)"
    return None


def _checks(values: Mapping[str, Any]) -> tuple[CheckDefinition, ...]:
    # An empty Check is no check; an empty one in the list Checks is a wrong one.
    given = [values["Check"]] if any(values.get("Check", {}).values()) else []
    given += values.get("Checks", [])
    for check in given:
        if reason := _why_no_check(check):
            raise Refused(400, f"Invalid check: {reason}")
    checks = tuple(_check(check) for check in given)
    if any(check.status not in {"", "passing", "warning", "critical"} for check in checks):
        raise Refused(400, "Status for checks must 'passing', 'warning', 'critical'")
    return checks


def _why_no_check(values: Mapping[str, Any]) -> str | None:
    if not (values.get("HTTP") or values.get("TCP")):
        return "TTL must be > 0 for TTL checks"
    if values.get("Interval", 0) <= 0:
        return "Interval must be > 0 for Script, HTTP, H2PING, TCP, UDP or OSService checks"
    if values.get("OutputMaxSize", 0) < 0:
        return "MaxOutputMaxSize must be positive"
    return None


def _check(values: Mapping[str, Any]) -> CheckDefinition:
    return CheckDefinition(
        check_id=values.get("CheckID", ""),
        name=values.get("Name", ""),
        notes=values.get("Notes", ""),
        status=values.get("Status", ""),
        http=values.get("HTTP", ""),
        tcp=values.get("TCP", ""),
        method=values.get("Method", ""),
        body=values.get("Body", ""),
        header=values.get("Header", {}),
        tls_skip_verify=values.get("TLSSkipVerify") or values.get("tls_skip_verify", False),
        interval=values.get("Interval", 0),
        timeout=values.get("Timeout", 0),
        deregister_after=values.get("DeregisterCriticalServiceAfter")
        or values.get("deregister_critical_service_after", 0),
        output_max_size=values.get("OutputMaxSize", 0),
    )


def _read_check(value: Any, path: str) -> dict[str, Any]:
    return gojson.struct(_CHECK, value, path)


def _read_checks(value: Any, path: str) -> list[dict[str, Any]]:
    return [gojson.struct(_CHECK, item, path) for item in gojson.items(value, path, "structs.CheckTypes")]


def _read_weights(value: Any, path: str) -> dict[str, int]:
    return gojson.struct({"Passing": gojson.integer, "Warning": gojson.integer}, value, path)


_SERVICE: dict[str, gojson.Reader] = {
    "ID": gojson.text,
    "Name": gojson.text,
    "Tags": gojson.texts,
    "Address": gojson.text,
    "Port": gojson.integer,
    "Meta": gojson.mapping(gojson.text, "string", zero=str),
    "Weights": _read_weights,
    "EnableTagOverride": gojson.boolean,
    "enable_tag_override": gojson.boolean,
    "Check": _read_check,
    "Checks": _read_checks,
    "Token": gojson.text,
} | dict.fromkeys(
    ["Connect", "Kind", "Locality", "Proxy", "SocketPath", "TaggedAddresses", "tagged_addresses"], gojson.unsupported
)
