"""The port behind TLS, passwords and client certificates: a real Consul checks it, a real Prometheus scrapes it."""

import base64
import http.client
import itertools
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import bcrypt
import pytest
import trustme
import yaml

from consul_prom.generate import scrape_config
from consul_prom.settings.settings import load
from tests import ROOT
from tests.services.consul import Consul
from tests.services.gunicorn import HOOKS, Gunicorn
from tests.services.prometheus import HASTY, Prometheus
from tests.services.waiting import wait_until

PASSWORD = "hunter2"  # nobody's
SCRIPT = """
import signal
import sys
import prometheus_client
import consul_prom

signal.signal(signal.SIGTERM, lambda *_: sys.exit())
prometheus_client.Gauge("answer", "The answer.").set(42)
with consul_prom.running(linger=0) as worker:
    print(worker.url, flush=True)
    signal.pause()
"""
Start = Callable[..., subprocess.Popen[str]]


class Certificates:
    """A CA's server and client certificates, as files."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.ca = str(folder / "ca.pem")
        authority.cert_pem.write_to_path(self.ca)
        self.server = self._write(authority.issue_cert("127.0.0.1"), folder / "server")
        self.client = self._write(authority.issue_cert("prometheus"), folder / "client")

    @staticmethod
    def _write(issued: trustme.LeafCert, stem: Path) -> dict[str, str]:
        cert, key = stem.with_suffix(".pem"), stem.with_suffix(".key")
        issued.private_key_and_cert_chain_pem.write_to_path(cert)
        issued.private_key_pem.write_to_path(key)
        return {"cert_file": str(cert), "key_file": str(key)}


@pytest.fixture(scope="module")
def consul() -> Iterator[Consul]:
    with Consul() as agent:
        yield agent


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


@pytest.fixture
def start(consul: Consul, tmp_path: Path) -> Iterator[Start]:
    """Starts a worker whose port is as the web-config file says."""
    started: list[subprocess.Popen[str]] = []

    def start(web: Mapping[str, Any], **settings: str) -> subprocess.Popen[str]:
        file = tmp_path / "web.yml"
        file.write_text(yaml.safe_dump(dict(web)))
        environ = {"PYTHONPATH": str(ROOT), "CONSUL_HTTP_ADDR": consul.url, "CONSUL_PROM_DIR": str(tmp_path / "slots")}
        environ |= {"CONSUL_PROM_SERVICE": "shop", "CONSUL_PROM_HOST": "web-1", "CONSUL_PROM_ADDRESS": "127.0.0.1"}
        environ |= {"CONSUL_PROM_WEB_CONFIG": str(file), "CONSUL_PROM_CHECK_INTERVAL": "1s", **settings}
        command = (sys.executable, "-c", SCRIPT)
        process = subprocess.Popen(command, env={**os.environ, **environ}, stdout=subprocess.PIPE, text=True)
        started.append(process)
        wait_until(lambda: checks(consul), within=60, what="registered")
        return process

    yield start
    for process in started:
        process.terminate()
        process.wait(10)
        if process.stdout:
            process.stdout.close()
    assert not checks(consul)


def guess(address: tuple[str, int], source: str, number: int, ends: threading.Event) -> None:
    """Ask with one password after another, from the address *source*."""
    for turn in itertools.count():
        token = base64.b64encode(f"prometheus:{number}-{turn}".encode()).decode()
        with (
            closing(http.client.HTTPConnection(*address, timeout=10, source_address=(source, 0))) as client,
            suppress(OSError, http.client.HTTPException),
        ):
            client.request("GET", "/metrics", headers={"Authorization": f"Basic {token}"})
            assert client.getresponse().status in {401, 503}
        if ends.is_set():
            return


def checks(consul: Consul) -> list[dict[str, Any]]:
    _, found = consul.call("/v1/agent/checks")
    return [check for check in found.values() if check["ServiceName"] == "shop-metrics"]


def was_checked(consul: Consul) -> bool:
    """Whether the agent has tried the worker, and found it well."""
    (check,) = checks(consul)
    return bool(check["Output"]) and check["Status"] == "passing"


def scrape_config_of(consul: Consul, **options: Any) -> dict[str, Any]:
    text = scrape_config.prometheus(load({"service": "shop", "consul_http_addr": consul.url}, environ={}))
    config: dict[str, Any] = yaml.safe_load(text)
    config["scrape_configs"][0] |= options
    return config


def up(prometheus: Prometheus, value: int) -> bool:
    return prometheus.query_value('up{job="shop"}') == value


def test_tls_and_password(consul: Consul, start: Start, certificates: Certificates) -> None:
    """Prometheus scrapes by TLS and password, not without; the agent, which has no password, finds the worker well."""
    users = {"prometheus": bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(10)).decode()}
    worker = start({"tls_server_config": certificates.server, "basic_auth_users": users})
    assert worker.stdout
    wait_until(lambda: was_checked(consul), within=60, what="the agent's check")
    (check,) = checks(consul)
    assert check["Type"] == "http"
    assert "HTTP GET https://127.0.0.1:" in check["Output"]
    _, entry = consul.call("/v1/agent/service/shop.web-1.0")
    assert entry["Meta"]["scheme"] == "https"
    options = {"tls_config": {"ca_file": certificates.ca}}
    with Prometheus(scrape_config_of(consul, **options), flags=HASTY) as prometheus:
        wait_until(lambda: up(prometheus, 0), within=60, what="a scrape without a password")
        assert "401" in prometheus.targets()[0]["lastError"]
    options["basic_auth"] = {"username": "prometheus", "password": PASSWORD}
    with Prometheus(scrape_config_of(consul, **options), flags=HASTY) as prometheus:
        wait_until(lambda: prometheus.query_value("answer") == 42, within=60, what="a scrape with a password")
        assert up(prometheus, 1)
        before, replaced_at = served_certificate(entry), time.time()
        assert served_certificate(entry) == before
        replace_certificate(certificates)
        assert served_certificate(entry) != before
        wait_until(
            lambda: (prometheus.query_value('timestamp(up{job="shop"} == 1)') or 0) > replaced_at + 1,
            within=60,
            what="scrapes go on",
        )


@pytest.mark.parametrize("source", ["127.0.0.2", "127.0.0.1"], ids=["another address", "Prometheus' address"])
def test_guesses(consul: Consul, start: Start, source: str) -> None:
    """Forty connections that guess passwords, before the first scrape already, do not keep Prometheus out."""
    users = {"prometheus": bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(12)).decode()}
    start({"basic_auth_users": users})
    _, entry = consul.call("/v1/agent/service/shop.web-1.0")
    ends = threading.Event()
    guesses = [
        threading.Thread(target=guess, args=((entry["Address"], entry["Port"]), source, number, ends))
        for number in range(40)
    ]
    for thread in guesses:
        thread.start()
    try:
        options = {"basic_auth": {"username": "prometheus", "password": PASSWORD}, "scrape_interval": "5s"}
        with Prometheus(scrape_config_of(consul, **options, scrape_timeout="5s"), flags=HASTY) as prometheus:
            wait_until(lambda: up(prometheus, 1), within=60, what="a scrape")
            assert all(thread.is_alive() for thread in guesses)
    finally:
        ends.set()
        for thread in guesses:
            thread.join()


def test_hooks(consul: Consul, certificates: Certificates, tmp_path: Path) -> None:
    """Under Gunicorn's hooks the same file guards the master's page: it is https, checked, and asks for a password."""
    users = {"prometheus": bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(10)).decode()}
    (tmp_path / "web.yml").write_text(
        yaml.safe_dump({"tls_server_config": certificates.server, "basic_auth_users": users})
    )
    settings = {"CONSUL_HTTP_ADDR": consul.url, "CONSUL_PROM_SERVICE": "shop", "CONSUL_PROM_HOST": "web-1"}
    settings |= {"CONSUL_PROM_WEB_CONFIG": str(tmp_path / "web.yml"), "CONSUL_PROM_CHECK_INTERVAL": "1s"}
    settings |= {"CONSUL_PROM_ADDRESS": "127.0.0.1"}
    with Gunicorn("tests.e2e.plain:wsgi", workers=1, worker_class="sync", settings=settings, options=HOOKS):
        wait_until(lambda: len(checks(consul)) == 2, within=60, what="the worker's and the master's entry")
        for entry in consul.call("/v1/agent/services")[1].values():
            trusting = ssl.create_default_context(cafile=certificates.ca)
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"https://127.0.0.1:{entry['Port']}/metrics", timeout=10, context=trusting)
        options = {"tls_config": {"ca_file": certificates.ca}}
        options["basic_auth"] = {"username": "prometheus", "password": PASSWORD}
        with Prometheus(scrape_config_of(consul, **options), flags=HASTY) as prometheus:
            wait_until(
                lambda: prometheus.query_value("gunicorn_workers") == 1, within=60, what="a scrape of the master's"
            )
        wait_until(lambda: all(check["Output"] for check in checks(consul)), within=60, what="the agent's checks")
        for check in checks(consul):
            assert check["Status"] == "passing"
            assert "HTTP GET https://127.0.0.1:" in check["Output"]


def test_client_certificates(consul: Consul, start: Start, certificates: Certificates) -> None:
    """Where clients need a certificate the agent's check only connects, and a Prometheus that has one scrapes."""
    start(
        {
            "tls_server_config": {
                **certificates.server,
                "client_ca_file": certificates.ca,
                "client_auth_type": "RequireAndVerifyClientCert",
            }
        }
    )
    wait_until(lambda: was_checked(consul), within=60, what="the agent's check")
    (check,) = checks(consul)
    assert check["Type"] == "tcp"
    tls = {"ca_file": certificates.ca}
    with Prometheus(scrape_config_of(consul, tls_config=tls), flags=HASTY) as prometheus:
        wait_until(lambda: up(prometheus, 0), within=60, what="a scrape without a certificate")
    with Prometheus(scrape_config_of(consul, tls_config={**tls, **certificates.client}), flags=HASTY) as prometheus:
        wait_until(lambda: prometheus.query_value("answer") == 42, within=60, what="a scrape with a certificate")
    time.sleep(2.5)  # two checks more, which a check that asks for pages would have failed
    assert was_checked(consul)


def test_what_cannot_be_used(consul: Consul, tmp_path: Path) -> None:
    """A file that cannot be used is one ERROR line: the application runs on, and nothing is served in the clear."""
    (tmp_path / "web.yml").write_text("basic_auth_users: {me: hunter2}")
    code = (
        "import logging; logging.basicConfig()\n"
        "import consul_prom\n"
        "worker = consul_prom.Worker(service='shop')\nworker.start()\nprint(worker.url)"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "CONSUL_HTTP_ADDR": consul.url}
    environ |= {"CONSUL_PROM_DIR": str(tmp_path / "slots"), "CONSUL_PROM_WEB_CONFIG": str(tmp_path / "web.yml")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "None\n"
    assert done.stderr.count("\n") == 1
    assert "ERROR" in done.stderr
    assert "has no bcrypt hash for the user 'me'" in done.stderr
    assert PASSWORD not in done.stderr
    assert not checks(consul)


def replace_certificate(certificates: Certificates) -> None:
    """Another key and certificate, of another CA that Prometheus trusts too."""
    authority = trustme.CA()
    Path(certificates.ca).write_bytes(Path(certificates.ca).read_bytes() + authority.cert_pem.bytes())
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(certificates.server["key_file"])
    issued.private_key_and_cert_chain_pem.write_to_path(certificates.server["cert_file"])


def served_certificate(entry: Mapping[str, Any]) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection((entry["Address"], entry["Port"]), 10) as plain:
        connection = context.wrap_socket(plain)
        with closing(connection):
            return connection.getpeercert(binary_form=True) or b""
