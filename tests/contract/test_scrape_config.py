"""The texts to paste: what they say, and that the real tools read them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from consul_prom.devagent import running
from consul_prom.errors import SettingsError
from consul_prom.generate import scrape_config
from consul_prom.generate.settings_table import settings_table
from consul_prom.settings.settings import ROWS, Settings, load
from tests.services.prometheus import Prometheus, promtool_check_config
from tests.services.waiting import wait_until
from tests.services.workers import Workers

MakeSettings = Callable[..., Settings]


def parsed(settings: Settings, *, all_services: bool = False) -> dict[str, Any]:
    """The one scrape configuration, after promtool has read it."""
    text = scrape_config.prometheus(settings, all_services=all_services)
    promtool_check_config(text)
    (config,) = yaml.safe_load(text)["scrape_configs"]
    (config["consul"],) = config.pop("consul_sd_configs")
    return dict(config)


def test_one_service(settings: MakeSettings) -> None:
    """One service's workers are found by the name registered in Consul, and nothing filters the critical ones out."""
    assert parsed(settings()) == {
        "job_name": "shop-metrics",
        "consul": {"server": "127.0.0.1:8500", "services": ["shop-metrics"], "refresh_interval": "5s"},
        "relabel_configs": [
            {"source_labels": [f"__meta_consul_service_metadata_{key}"], "regex": "(.+)", "target_label": label}
            for key, label in (("service", "job"), ("instance", "instance"), ("scheme", "__scheme__"))
        ],
    }


def test_all_services(settings: MakeSettings) -> None:
    """All services' workers are found by the tag, whether or not a service is set."""
    config = parsed(settings(), all_services=True)
    assert config["job_name"] == "consul-prom"
    assert config["consul"] == {"server": "127.0.0.1:8500", "tags": ["consul-prom"], "refresh_interval": "5s"}
    assert parsed(load({}, environ={}), all_services=True) == config


def test_no_service() -> None:
    """Without a service there is no configuration for one."""
    with pytest.raises(SettingsError, match="no service name"):
        scrape_config.prometheus(load({}, environ={}))


def test_registered_name(settings: MakeSettings) -> None:
    """The name registered in Consul may be set."""
    assert parsed(settings(consul_service="shop-workers"))["consul"]["services"] == ["shop-workers"]


@pytest.mark.parametrize("name", ["true", "no", "y", "null", "on", "e5"])
def test_names_that_yaml_takes_for_something_else(settings: MakeSettings, name: str) -> None:
    """A name that YAML would take for a boolean or nothing stays a text."""
    config = parsed(settings(consul_service=name))
    assert (config["job_name"], config["consul"]["services"]) == (name, [name])


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("consul.example:8500", {"server": "consul.example:8500"}),
        ("https://consul.example", {"server": "consul.example:443", "scheme": "https"}),
        ("http://[::1]:8500/consul/", {"server": "[::1]:8500", "path_prefix": "/consul"}),
        ("10:30", {"server": "10:30"}),
        ("unix:///run/consul.sock", {"server": "localhost:8500"}),
    ],
)
def test_agent_address(settings: MakeSettings, address: str, expected: dict[str, str]) -> None:
    """The agent is named in Prometheus' words; a unix socket, which it cannot use, becomes the usual port."""
    config = parsed(settings(consul_http_addr=address))["consul"]
    config.pop("services")
    config.pop("refresh_interval")
    assert config == expected


def test_unix_socket_is_explained(settings: MakeSettings) -> None:
    """Who has a unix socket is told to name an address."""
    assert "unix socket" in scrape_config.prometheus(settings(consul_http_addr="unix:///run/consul.sock"))


def test_namespace_and_partition(settings: MakeSettings) -> None:
    """Namespace and partition are passed on."""
    config = parsed(settings(consul_namespace="team", consul_partition="part"))["consul"]
    assert (config["namespace"], config["partition"]) == ("team", "part")


def test_token_file(settings: MakeSettings, tmp_path: Path) -> None:
    """A token's file is named, whatever its path holds."""
    file = tmp_path / 'a "token": #1'
    file.write_text("hunter2")
    config = parsed(settings(consul_http_token_file=str(file)))["consul"]
    assert config["http_headers"] == {"X-Consul-Token": {"files": [str(file)]}}


def test_no_secret(settings: MakeSettings) -> None:
    """A token is not shown, but where to put one is; taken at its word, that is right too."""
    text = scrape_config.prometheus(settings(consul_http_token="hunter2", consul_http_auth="user:hunter2"))
    assert "hunter2" not in text
    assert "http_headers" not in yaml.safe_load(text)["scrape_configs"][0]["consul_sd_configs"][0]
    uncommented = re.sub(r"^        # (http_headers:|  .*)$", r"        \1", text, flags=re.MULTILINE)
    promtool_check_config(uncommented)
    consul = yaml.safe_load(uncommented)["scrape_configs"][0]["consul_sd_configs"][0]
    assert consul["http_headers"] == {"X-Consul-Token": {"files": ["/etc/prometheus/consul-token"]}}


def test_datacenter(settings: MakeSettings) -> None:
    """Another datacenter than the agent's is named."""
    text = scrape_config.prometheus(settings(), datacenter="dc-2")
    promtool_check_config(text)
    assert yaml.safe_load(text)["scrape_configs"][0]["consul_sd_configs"][0]["datacenter"] == "dc-2"
    assert "datacenter" not in parsed(settings())["consul"]


def test_guarded_port(settings: MakeSettings) -> None:
    """What a worker's web-config file asks of Prometheus is told; taken at its word, that is right too."""
    text = scrape_config.prometheus(settings(web_config="/etc/shop/web.yml"))
    assert "tls_config" not in yaml.safe_load(text)["scrape_configs"][0]
    uncommented = re.sub(r"^    # (tls_config:|basic_auth:|  .*)$", r"    \1", text, flags=re.MULTILINE)
    config = yaml.safe_load(uncommented)["scrape_configs"][0]
    assert config["tls_config"] == {"ca_file": "/etc/prometheus/workers-ca.pem"}
    assert config["basic_auth"]["username"] == "prometheus"
    assert "basic_auth" not in scrape_config.prometheus(settings())


def test_tls(settings: MakeSettings, tmp_path: Path) -> None:
    """Certificates are named where https is spoken, and only there."""
    names = ("ca", "cert", "key")
    for name in names:
        (tmp_path / name).touch()
    ca, cert, key = (str(tmp_path / name) for name in names)
    tls = {"consul_cacert": ca, "consul_client_cert": cert, "consul_client_key": key, "consul_tls_server_name": "x.y"}
    text = scrape_config.prometheus(settings(consul_http_addr="https://c:8501", consul_http_ssl_verify="false", **tls))
    assert yaml.safe_load(text)["scrape_configs"][0]["consul_sd_configs"][0]["tls_config"] == {
        "ca_file": ca,
        "cert_file": cert,
        "key_file": key,
        "server_name": "x.y",
        "insecure_skip_verify": True,
    }
    assert "tls_config" not in scrape_config.prometheus(settings(consul_http_addr="http://c:8501", **tls))
    assert parsed(settings(consul_http_addr="c:8501", consul_http_ssl="true"))["consul"]["scheme"] == "https"


def test_every_service_is_its_own_job(slot_directory: Path) -> None:
    """A real Prometheus with nothing but the snippet sees each worker of each service, by the right names."""
    with running() as agent:
        text = scrape_config.prometheus(load({"consul_http_addr": agent.url}, environ={}), all_services=True)
        workers = Workers(agent, slot_directory)
        try:
            workers.start()
            workers.start()
            workers.start(CONSUL_PROM_SERVICE="tea")
            with Prometheus(text) as prometheus:
                expected = [("shop", "web-1:0"), ("shop", "web-1:1"), ("tea", "web-1:0")]
                wait_until(lambda: up(prometheus) == expected, within=60, what="all workers scraped")
        finally:
            workers.close()


def up(prometheus: Prometheus) -> list[tuple[str, str]]:
    found = (sample["metric"] for sample in prometheus.query("up == 1"))
    return sorted((metric["job"], metric["instance"]) for metric in found)


def test_settings_table() -> None:
    """The table has a line for each setting, in order, with a cell for each column."""
    head, rule, *lines = settings_table().splitlines()
    assert head == "| Variable | Type | Default | Meaning |"
    assert rule == "|---|---|---|---|"
    cells = [line.strip("|").split("|") for line in lines]
    assert [cell[0].strip(" `") for cell in cells] == [row.env for row in ROWS]
    assert {len(cell) for cell in cells} == {4}


def test_settings_table_shows_defaults() -> None:
    """A default is shown as one would write it, one that depends on the machine in words, and no HTML comes of it."""
    table = settings_table()
    assert "| `CONSUL_PROM_PORT` | port(s) | `0` |" in table
    assert "| `CONSUL_PROM_CONSUL_SERVICE` | name | `<service>-metrics` |" in table
    assert "| `CONSUL_PROM_HOST` | name | the host name |" in table
    assert not re.search(r"<[a-z]", re.sub(r"`[^`]*`", "", table))
