"""Texts to paste: Prometheus' scrape configuration, ACL policies, and the table of the settings. Pure."""

import json
import re
from collections.abc import Iterator

from consul_prom.settings.settings import TAG, Settings, check_named

_PLAIN = re.compile(r"[A-Za-z/][\w./-]*(:[0-9]+)?|([0-9]+\.){3}[0-9]+:[0-9]+", re.ASCII)
_NO_TEXT = re.compile(r"true|false|yes|no|on|off|y|n|null", re.IGNORECASE)


def prometheus(settings: Settings, *, all_services: bool = False, datacenter: str = "") -> str:
    """A ``scrape_configs`` section that finds every worker of the service, or of all services.

    *datacenter* is Consul's, where it is not to be the agent's own. No secret is in it. https://prometheus.io/docs/prometheus/latest/configuration/configuration/#consul_sd_config

    Raises:
        SettingsError: it is to be for one service, and none is set.
    """
    if not all_services:
        check_named(settings, how="pass --service, set CONSUL_PROM_SERVICE, or --all-services")
    name = TAG if all_services else settings.consul_service
    selection = f"tags: [{TAG}]" if all_services else f"services: [{_scalar(name)}]"
    discovery = _discovery(settings, selection, datacenter)
    return "\n".join((*_head(name), *_guard(settings), *discovery, *_RELABELLING, ""))


def _head(name: str) -> Iterator[str]:
    yield "scrape_configs:"
    yield f"  - job_name: {_scalar(name)}"


def _guard(settings: Settings) -> Iterator[str]:
    """What the workers' port asks of Prometheus; their web-config file names no file and no password of its."""
    if settings.web_config:
        yield "    # The workers' port is as their web-config file says. TLS needs their CA, and perhaps a certificate:"
        yield "    # tls_config:"
        yield "    #   ca_file: /etc/prometheus/workers-ca.pem"
        yield "    # basic_auth_users need one of them:"
        yield "    # basic_auth:"
        yield "    #   username: prometheus"
        yield "    #   password_file: /etc/prometheus/workers-password"


def _discovery(settings: Settings, selection: str, datacenter: str) -> Iterator[str]:
    address = settings.consul_http_addr
    yield "    consul_sd_configs:"
    if address.socket:
        yield "      # The workers' agent is at a unix socket, which Prometheus cannot use: name its HTTP address."
        yield "      - server: localhost:8500"
    else:
        yield "      # The workers' agent; any other of the datacenter will do, as long as Prometheus reaches it."
        yield f"      - server: {_scalar(_host_and_port(settings))}"
        if address.scheme == "https":
            yield "        scheme: https"
        if address.prefix:
            yield f"        path_prefix: {_scalar(address.prefix)}"
    if datacenter:
        yield "        # Set, it is not asked of the agent, and the token needs no agent:read."
        yield f"        datacenter: {_scalar(datacenter)}"
    yield f"        {selection}"
    yield "        # At most one question to Consul in so long; its default, 30s, is how long new workers would wait."
    yield "        refresh_interval: 5s"
    for key in ("namespace", "partition"):
        value = getattr(settings, f"consul_{key}")
        if value:
            yield f"        {key}: {_scalar(value)}"
    yield from _token(settings)
    if address.scheme == "https" and not address.socket:
        yield from _tls(settings)


def _token(settings: Settings) -> Iterator[str]:
    if settings.consul_http_token_file:
        yield "        # A token that may read services, nodes and agents: consul-prom config acl prints the policy."
        yield "        # The file is as Prometheus sees it, and read again when it changes."
        yield from _token_file(settings.consul_http_token_file)
    elif settings.consul_http_token:
        yield "        # Consul wants a token that may read services, nodes and agents; put it into a file:"
        yield from (line.replace("        ", "        # ", 1) for line in _token_file("/etc/prometheus/consul-token"))


def _token_file(path: str) -> Iterator[str]:
    yield "        http_headers:"
    yield "          X-Consul-Token:"
    yield f"            files: [{_scalar(path)}]"


def _tls(settings: Settings) -> Iterator[str]:
    files = {
        "ca_file": settings.consul_cacert,
        "cert_file": settings.consul_client_cert,
        "key_file": settings.consul_client_key,
        "server_name": settings.consul_tls_server_name,
    }
    lines = [f"          {key}: {_scalar(value)}" for key, value in files.items() if value]
    if not settings.consul_http_ssl_verify:
        lines.append("          insecure_skip_verify: true")
    if lines:
        yield "        # The files as Prometheus sees them."
        yield "        tls_config:"
        yield from lines


_RELABELLING = (
    "    # Critical targets stay: a worker that cannot answer is the one to see as up == 0.",
    "    relabel_configs:",
    "      # The application's name.",
    "      - source_labels: [__meta_consul_service_metadata_service]",
    "        regex: (.+)",
    "        target_label: job",
    "      # <host>:<slot>, which the worker's successor inherits; a port would be a new series each time.",
    "      - source_labels: [__meta_consul_service_metadata_instance]",
    "        regex: (.+)",
    "        target_label: instance",
    "      # http or https, as the worker serves it.",
    "      - source_labels: [__meta_consul_service_metadata_scheme]",
    "        regex: (.+)",
    "        target_label: __scheme__",
)


def _host_and_port(settings: Settings) -> str:
    address = settings.consul_http_addr
    return f"[{address.host}]:{address.port}" if ":" in address.host else f"{address.host}:{address.port}"


def _scalar(text: str) -> str:
    """Plain where YAML takes it for nothing but a text, else quoted; JSON's quoted texts are YAML's."""
    plain = _PLAIN.fullmatch(text) and not _NO_TEXT.fullmatch(text)
    return text if plain else json.dumps(text, ensure_ascii=False)
