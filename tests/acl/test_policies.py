"""The policies that `consul-prom config acl` prints: each does on a real Consul what it is for."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from consul_prom.cli import main as cli_main
from consul_prom.consul.acl import write_rule
from consul_prom.consul.client import AgentClient
from consul_prom.consul.registrar import Registrar
from consul_prom.errors import SettingsError
from consul_prom.generate import scrape_config
from consul_prom.generate.acl import acl
from consul_prom.settings.settings import Settings, load
from tests.acl.access import Access, Make, replace
from tests.services.prometheus import Prometheus
from tests.services.waiting import eventually, wait_until
from tests.unit.consul.test_registrar import WANTED

AGENT_READ = 'agent_prefix "" { policy = "read" }'


def policies(service: str = "shop") -> dict[str, str]:
    """What the command prints, by the first words of each part's title; comments stay."""
    done = CliRunner().invoke(cli_main.commands, ["config", "acl", "--service", service])
    assert done.exit_code == 0, done.output
    _, *parts = done.output.split("# ==== ")
    return {re.split(r"[:\n]", part)[0]: f"# {part}" for part in parts}


def rules(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_text(settings: Callable[..., Settings]) -> None:
    """The name registered in Consul is in all rules about a service, and the printed text is the library's."""
    text = acl(settings(consul_service="shop-workers"))
    assert set(re.findall(r'^service "(.*?)"', text, re.MULTILINE)) == {"shop-workers"}
    assert list(policies()) == ["The workers", "The commands", "Prometheus", "Every agent"]
    assert rules(policies()["The workers"]) == [write_rule("shop-metrics")]


def test_no_service() -> None:
    """Without a service there are no rules for one."""
    with pytest.raises(SettingsError, match="no service name"):
        acl(load({}, environ={}))
    assert CliRunner().invoke(cli_main.commands, ["config", "acl"]).exit_code == 2


@pytest.mark.parametrize("optional", [False, True], ids=["least", "with agent:read"])
def test_workers(guarded: Access, make: Make, *, optional: bool) -> None:
    """A worker registers and leaves; with the optional rule it is at the address that the agent advertises."""
    policy = policies()["The workers"]
    if optional:
        policy = policy.replace(f"# {AGENT_READ}", AGENT_READ)
    worker = make(guarded, consul_http_token=guarded.token(policy))
    worker.start()
    wait_until(lambda: worker.registered, within=20, what="registered")
    assert worker.url
    assert worker.url.startswith(f"http://{guarded.consul.address}:") is optional
    worker.stop()
    assert (guarded.entries(), guarded.catalogue()) == ({}, {})


def test_commands(guarded: Access, make: Make) -> None:
    """The commands list a worker and remove its entry."""
    token = guarded.token(policies()["The commands"])
    env = {"CONSUL_HTTP_ADDR": guarded.consul.url, "CONSUL_HTTP_TOKEN": token, "CONSUL_PROM_HOST": "web-1"}
    worker = make(guarded, consul_http_token=guarded.token(policies()["The workers"]))
    worker.start()
    wait_until(lambda: worker.registered, within=20, what="registered")
    listed = CliRunner().invoke(cli_main.commands, ["list"], env=env)
    assert "web-1:0" in listed.output
    assert "passing" in listed.output
    removed = CliRunner().invoke(cli_main.commands, ["deregister", "--id", "shop.web-1.0"], env=env)
    assert removed.exit_code == 0, removed.output


@pytest.mark.parametrize(
    ("datacenter", "left_out", "finds"),
    [("", "", True), ("dc1", AGENT_READ, True), pytest.param("", AGENT_READ, False, marks=pytest.mark.full)],
    ids=["as printed", "with a datacenter, without agent:read", "with neither"],
)
def test_prometheus(
    guarded: Access, make: Make, token_file: Path, datacenter: str, left_out: str, *, finds: bool
) -> None:
    """Prometheus finds the worker, and without one of the rules where it is told the datacenter."""
    policy = policies()["Prometheus"]
    assert left_out in policy
    replace(token_file, guarded.token(policy.replace(left_out, "")))
    worker = make(guarded, consul_http_token=guarded.token(policies()["The workers"]))
    worker.start()
    settings = load(
        {"service": "shop", "consul_http_addr": guarded.consul.url, "consul_http_token_file": str(token_file)},
        environ={},
    )
    config = yaml.safe_load(scrape_config.prometheus(settings))
    if datacenter:
        config["scrape_configs"][0]["consul_sd_configs"][0]["datacenter"] = datacenter
    with Prometheus(yaml.safe_dump(config)) as prometheus:
        if finds:
            wait_until(lambda: prometheus.query_value("count(up == 1)") == 1, within=60, what="the worker scraped")
        else:
            refused = "Error retrieving datacenter name"
            wait_until(lambda: refused in prometheus.log.read_text(), within=60, what="a refusal")
            assert not prometheus.query("up")
        assert not any(each in prometheus.log.read_text() for each in guarded.secrets)


async def test_agents(helpless: Access) -> None:
    """An agent that is given its token removes what was deregistered, the ghosts from before included."""
    token = helpless.token(policies()["The workers"])
    client = AgentClient(load({"consul_http_addr": helpless.consul.url, "consul_http_token": token}, environ={}))
    await Registrar(client, WANTED).sync()
    await client.deregister(WANTED.id)
    assert helpless.catalogue() == {WANTED.id: "passing"}
    body = {"Token": helpless.token(policies()["Every agent"])}
    assert helpless.consul.call("/v1/agent/token/agent", method="PUT", body=body)[0] == 200
    await eventually(lambda: not helpless.catalogue(), within=60, what="the ghost gone")
    helpless.consul.call("/v1/agent/token/agent", method="PUT", body={"Token": ""})
    await client.aclose()
