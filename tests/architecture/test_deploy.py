"""What lies in deploy/: generated files are fresh, the others are accepted by what reads them, and it works."""

import http.client
import re
import runpy
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from consul_prom.cli import main as cli_main
from consul_prom.settings.parsers import parse_duration
from tests import ROOT
from tests.services.binaries import require
from tests.services.building import CONSUL, PROMETHEUS
from tests.services.consul import Consul
from tests.services.gunicorn import Gunicorn
from tests.services.prometheus import HASTY, Prometheus
from tests.services.waiting import wait_until

DEPLOY = ROOT / "deploy"
SHOP = ("--service=shop", "--consul-http-addr=consul:8500")
OPTIONS = ("-c", str(DEPLOY / "gunicorn.conf.py"))
GENERATED = {
    "prometheus/workers.yml": ("config", "prometheus", *SHOP),
    "prometheus/rules.yml": ("config", "rules", *SHOP),
    "grafana/consul-prom.json": ("config", "grafana", *SHOP),
    "consul/acl.hcl": ("config", "acl", *SHOP),
}


def parsed(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / name).read_text()))


@pytest.mark.parametrize("name", GENERATED)
def test_generated_files_are_fresh(name: str) -> None:
    """A generated file is what its command prints today."""
    printed = CliRunner().invoke(cli_main.commands, GENERATED[name], env={}).stdout
    command = " ".join(("consul-prom", *GENERATED[name]))
    assert (DEPLOY / name).read_text() == printed, f"{command} > deploy/{name}"


def test_prometheus_reads_its_files() -> None:
    """Prometheus' own tool takes the configuration, with the rules and the scrape configuration that it names."""
    command = [str(require("promtool")), "check", "config", "--lint=all", "--lint-fatal", "prometheus.yml"]
    done = subprocess.run(command, cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rules found" in done.stdout


class Shop(Gunicorn):
    """The application and the configuration of deploy/."""

    def _ready(self) -> bool:
        try:
            return self.call("/", timeout=2.0)[0] == 200
        except (OSError, http.client.HTTPException):
            return False


def test_shop_works() -> None:
    """The application, as its gunicorn.conf.py starts it, is found and scraped with what is generated."""
    with (
        Consul() as consul,
        Shop("deploy.app:get_application", settings={"CONSUL_HTTP_ADDR": consul.url}, options=OPTIONS) as shop,
    ):
        config = parsed("prometheus/workers.yml")
        config["scrape_configs"][0]["consul_sd_configs"][0]["server"] = consul.url.removeprefix("http://")
        with Prometheus(config | {"rule_files": [str(DEPLOY / "prometheus" / "rules.yml")]}, flags=HASTY) as prometheus:
            for number in range(5):
                assert shop.get(f"/products/{number}") == f"Product {number}.\n"
            wait_until(
                lambda: prometheus.query_value("job:workers:count") == 4,
                within=90,
                what="four workers, recorded",
            )
            routes = "sum by (route) (http_requests_total{route=~'/products/.*'})"
            (sample,) = wait_until(lambda: prometheus.query(routes), within=60, what="requests by route")
            assert sample["metric"] == {"route": "/products/{number}"}


def test_shop_goes_on(tmp_path: Path) -> None:
    """A stop and a start, as of systemd's `restart`, lose no request that the workers counted."""
    with Consul() as consul:
        settings = {"CONSUL_HTTP_ADDR": consul.url, "CONSUL_PROM_DIR": str(tmp_path / "slots")}

        def counted() -> float:
            total, entries = 0.0, consul.call("/v1/agent/services")[1].values()
            assert len(entries) == 5, "four workers and a master"
            for entry in entries:
                with urllib.request.urlopen(f"http://{entry['Address']}:{entry['Port']}/metrics", timeout=5) as page:
                    found = re.findall(
                        r'^http_requests_total{.*"/products/.* (\S+)$', page.read().decode(), re.MULTILINE
                    )
                total += sum(map(float, found))
            return total

        for before in (0, 5):
            with Shop("deploy.app:get_application", settings=settings, options=OPTIONS) as shop:
                assert wait_until(lambda: [counted()], within=30, what="all entries") == [before]
                for number in range(5):
                    shop.get(f"/products/{number}")


class TestCompose:
    """compose.yml and the Dockerfile."""

    def test_is_accepted(self) -> None:
        """docker-compose, where there is one, takes it."""
        program = shutil.which("docker-compose")
        if program is None:
            pytest.skip("no docker-compose here")
        done = subprocess.run(
            [program, "-f", "compose.yml", "config", "-q"],
            cwd=DEPLOY,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr

    def test_versions(self) -> None:
        """Every image has a version, and those of the programs that the tests run are the tested ones."""
        images = {name: found["image"] for name, found in parsed("compose.yml")["services"].items() if "image" in found}
        assert images["consul"] == f"hashicorp/consul:{CONSUL.version}"
        assert images["prometheus"] == f"prom/prometheus:v{PROMETHEUS.version}"
        assert all(re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", image) for image in images.values())

    def test_files_are_there(self) -> None:
        """What is mounted or copied is there, and named volumes are declared."""
        compose = parsed("compose.yml")
        for name, found in compose["services"].items():
            for volume in found.get("volumes", []):
                source = volume.split(":")[0]
                assert (DEPLOY / source).exists() if source[0] == "." else source in compose["volumes"], (name, source)
        for line in (DEPLOY / "Dockerfile").read_text().splitlines():
            if line.startswith("COPY ") and "--from" not in line:
                for source in line.split()[1:-1]:
                    assert (ROOT / source).exists(), source

    def test_names_meet(self) -> None:
        """The services are reached by the names that the generated files and Grafana's source have."""
        services = parsed("compose.yml")["services"]
        (discovery,) = parsed("prometheus/workers.yml")["scrape_configs"][0]["consul_sd_configs"]
        assert discovery["server"].split(":")[0] in services
        assert services["shop"]["environment"]["CONSUL_HTTP_ADDR"] == f"http://{discovery['server']}"
        (source,) = parsed("grafana/provisioning/datasources/prometheus.yml")["datasources"]
        assert source["url"] == "http://prometheus:9090"
        (provider,) = parsed("grafana/provisioning/dashboards/consul-prom.yml")["providers"]
        assert any(provider["options"]["path"] in volume for volume in services["grafana"]["volumes"])

    def test_image(self) -> None:
        """The image runs as a user, is asked for its health, gets signals itself, and keeps its slots where told."""
        text = (DEPLOY / "Dockerfile").read_text()
        assert len(re.findall(r"^FROM ", text, re.MULTILINE)) == 2
        assert re.search(r"^USER shop$", text, re.MULTILINE)
        assert "HEALTHCHECK" in text
        assert re.search(r'^CMD \["gunicorn"', text, re.MULTILINE)
        (directory,) = re.findall(r"CONSUL_PROM_DIR=(\S+)", text)
        assert f"slots:{directory}" in parsed("compose.yml")["services"]["shop"]["volumes"]


def test_systemd(tmp_path: Path) -> None:
    """Systemd finds nothing to complain of, and the unit cleans up after itself in the directory that it keeps."""
    unit = (DEPLOY / "systemd" / "shop.service").read_text()
    assert re.search(r"^ExecStopPost=-\S+consul-prom deregister --service shop --all$", unit, re.MULTILINE)
    assert "RuntimeDirectoryPreserve=yes" in unit
    (runtime,) = re.findall(r"^RuntimeDirectory=(\S+)$", unit, re.MULTILINE)
    assert f"CONSUL_PROM_DIR=/run/{runtime}" in unit
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze here")
    # It wants the programs to be there, and the user.
    installed = re.sub(r"/opt/shop/venv/bin/[\w-]+", sys.executable, unit).replace("User=shop", "User=root")
    (tmp_path / "shop.service").write_text(installed)
    done = subprocess.run(
        [analyze, "verify", "--man=no", tmp_path / "shop.service"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    about_us = [line for line in done.stderr.splitlines() if "shop.service" in line]
    assert (done.returncode, about_us) == (0, []), done.stderr


def test_kubernetes() -> None:
    """Address and name come by the downward API, the node's agent is asked, the slots are ours, and an end waits."""
    pod = parsed("kubernetes/shop.yml")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environ = {item["name"]: item for item in container["env"]}
    fields = {name: item["valueFrom"]["fieldRef"]["fieldPath"] for name, item in environ.items() if "valueFrom" in item}
    assert fields["CONSUL_PROM_ADDRESS"] == "status.podIP"
    assert fields["CONSUL_PROM_HOST"] == "metadata.name"
    assert environ["CONSUL_HTTP_ADDR"]["value"] == "http://$(NODE_ADDRESS):8500"
    assert fields["NODE_ADDRESS"] == "status.hostIP"
    configuration = runpy.run_path(str(DEPLOY / "gunicorn.conf.py"))
    linger = parse_duration(environ["CONSUL_PROM_LINGER"]["value"])
    interval = parse_duration(parsed("prometheus/prometheus.yml")["global"]["scrape_interval"])
    assert interval < linger < configuration["graceful_timeout"] < pod["terminationGracePeriodSeconds"]
    (mount,) = container["volumeMounts"]
    assert Path(environ["CONSUL_PROM_DIR"]["value"]).parent == Path(mount["mountPath"])
    assert mount["name"] in {volume["name"] for volume in pod["volumes"]}
    assert pod["securityContext"]["runAsNonRoot"]


def test_workflow() -> None:
    """The workflow runs what everybody runs, with no right to write, actions pinned, and every job with an end."""
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {}
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())
    steps = workflow["jobs"]["tests"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps]
    assert all(re.search(r"@[0-9a-f]{40}$", step["uses"]) for step in steps if "uses" in step)
    for pattern in re.findall(r"'(tests/[^']+)'", text):
        assert list(ROOT.glob(pattern)), pattern
