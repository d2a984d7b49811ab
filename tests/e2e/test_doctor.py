"""The doctor: every failure that it can report is made on purpose, on a real Consul and a real Prometheus."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from click.testing import CliRunner, Result

from consul_prom.cli import main as cli_main
from consul_prom.cli.doctor import checks, targets
from consul_prom.cli.doctor.results import Finding
from consul_prom.consul.acl import write_rule
from consul_prom.devagent import DevAgent, Fault
from consul_prom.errors import AgentBusy, AgentConfused, AgentFailed, AgentUnreachable
from consul_prom.generate import rules, scrape_config
from consul_prom.settings.settings import load
from tests.acl.access import Access
from tests.services.consul import Consul
from tests.services.gunicorn import HOOKS, Gunicorn
from tests.services.program import own_address
from tests.services.prometheus import HASTY, Prometheus
from tests.services.waiting import wait_until
from tests.services.workers import PACKAGE, SCRIPT, meta
from tests.services.workers import put as put_at

Examine = Callable[..., dict[str, Finding]]
Start = Callable[..., subprocess.Popen[bytes]]
READ_NODES = 'node_prefix "" { policy = "read" }'
READ_AGENT = 'agent_prefix "" { policy = "read" }'


@pytest.fixture(scope="module")
def consul() -> Iterator[Consul]:
    with Consul() as agent:
        yield agent


@pytest.fixture(scope="module")
def access() -> Iterator[Access]:
    access = Access(agent_token=False)
    with access.consul:
        yield access


@pytest.fixture(autouse=True)
def _clean(consul: Consul) -> Iterator[None]:
    """Nothing is left of a test's entries."""
    yield
    for entry_id in consul.call("/v1/agent/services")[1]:
        consul.call(f"/v1/agent/service/deregister/{entry_id}", method="PUT")


@pytest.fixture
def run(consul: Consul, slot_directory: Path) -> Callable[..., Result]:
    """Runs `consul-prom doctor` as on web-1; keyword arguments are environment variables."""

    def run(*arguments: str, **environ: str | None) -> Result:
        env = {"CONSUL_HTTP_ADDR": consul.url, "CONSUL_PROM_HOST": "web-1", "CONSUL_PROM_SERVICE": "shop"}
        env |= {"CONSUL_PROM_DIR": str(slot_directory)}
        result = CliRunner().invoke(cli_main.commands, ("doctor", *arguments), env={**env, **environ})
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return result

    return run


@pytest.fixture
def examine(run: Callable[..., Result]) -> Examine:
    """The findings by their checks, after a look at the exit code."""

    def examine(*arguments: str, **environ: str | None) -> dict[str, Finding]:
        result = run("--json", *arguments, **environ)
        found = {finding.check: finding for finding in (Finding(**item) for item in json.loads(result.stdout))}
        wrong = {finding.check for finding in found.values() if finding.state == "wrong"}
        assert result.exit_code == (3 if "agent" in wrong else 1 if wrong else 0)
        assert all(found[check].cure for check in wrong)
        return found

    return examine


@pytest.fixture
def start(consul: Consul, slot_directory: Path) -> Iterator[Start]:
    """Starts real workers that are registered; the settings are environment variables."""
    started = []

    def start(**settings: str) -> subprocess.Popen[bytes]:
        environ = {"PYTHONPATH": str(PACKAGE), "CONSUL_HTTP_ADDR": consul.url, "CONSUL_PROM_DIR": str(slot_directory)}
        environ |= {"CONSUL_PROM_SERVICE": "shop", "CONSUL_PROM_HOST": "web-1", "CONSUL_PROM_CHECK_INTERVAL": "1s"}
        process = subprocess.Popen([sys.executable, "-c", SCRIPT], env={**os.environ, **environ, **settings})
        started.append(process)
        wait_until(lambda: str(process.pid) in pids(consul), within=60, what="registered")
        return process

    yield start
    for process in started:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


def pids(consul: Consul) -> set[str]:
    return {entry["Meta"].get("pid", "") for entry in consul.call("/v1/agent/services")[1].values()}


def put(consul: Consul, entry_id: str, entry_meta: Mapping[str, Any], **more: Any) -> None:
    """An entry that no worker made."""
    body = {"ID": entry_id, "Name": "shop-metrics", "Address": "127.0.0.1", "Port": 1, "Meta": entry_meta, **more}
    status, said = consul.call("/v1/agent/service/register", method="PUT", body=body)
    assert status == 200, said


def wrong(findings: Mapping[str, Finding]) -> set[str]:
    return {finding.check for finding in findings.values() if finding.state == "wrong"}


def test_all_is_well(run: Callable[..., Result], examine: Examine, consul: Consul, start: Start) -> None:
    """With live workers and a Prometheus that scrapes them nothing is wrong, and nothing was changed by the look."""
    start()
    start()
    before = consul.call("/v1/agent/services")[1]
    with Prometheus(scrape(consul), flags=HASTY) as prometheus:
        wait_until(lambda: prometheus.query_value("count(up == 1)") == 2, within=60, what="both scraped")
        found = examine("--prometheus", prometheus.url)
        assert {finding.state for finding in found.values()} == {"ok"}
        assert list(found) == [
            *("settings", "agent", "token", "version", "catalogue", "workers", "address", "ports"),
            *("instances", "limits", "directory", "ledger", "targets", "labels", "interval"),
        ]
        text = run("--prometheus", prometheus.url).stdout
    assert text.count("\u2713") == len(found)
    assert "Prometheus scrapes 2 targets." in text
    assert consul.call("/v1/agent/services")[1] == before


def test_hooks(run: Callable[..., Result], consul: Consul, slot_directory: Path) -> None:
    """Neither the page of Gunicorn's master nor an adopted slot is a worker, and both are targets; nobody is alarmed.

    When all are dead, they are named together.
    """
    settings = {"CONSUL_HTTP_ADDR": consul.url, "CONSUL_PROM_SERVICE": "shop", "CONSUL_PROM_HOST": "web-1"}
    settings |= {"CONSUL_PROM_DIR": str(slot_directory)}
    with (
        Gunicorn(workers=2, settings=settings, options=HOOKS) as shop,
        Prometheus(scrape(consul), flags=HASTY) as prometheus,
    ):
        up, workers = "count(up == 1)", "count(consul_prom_worker_info)"
        wait_until(lambda: prometheus.query_value(up) == 3, within=60, what="all scraped")
        result = run("--prometheus", prometheus.url)
        assert result.exit_code == 0, result.stdout
        assert "Alive and registered on this host: 2 workers." in result.stdout
        assert "The agent reaches 2 workers of this host." in result.stdout

        def settled() -> Result:
            assert prometheus.query_value(up) == 3
            found = run("--prometheus", prometheus.url)
            assert found.exit_code == 0, found.stdout
            for alert in rules.ALERTS:
                assert prometheus.query(rules._filled(alert.expression, load({"service": "shop"}, environ={}))) == []
            return found

        os.kill(shop.pid, signal.SIGTTOU)
        wait_until(lambda: prometheus.query_value(workers) == 1, within=60, what="one worker less")
        result = wait_until(settled, within=60, what="its slot adopted, and all found by Prometheus where they are now")
        assert "on this host: 1 worker; adopted, without one: 1 slot." in result.stdout
        listed = CliRunner().invoke(cli_main.commands, "list", env=settings).stdout
        assert sorted(re.findall(" (adopted|alive) ", listed)) == ["adopted", "alive", "alive"]
        found = json.loads(CliRunner().invoke(cli_main.commands, ("top", "--json"), env=settings).stdout)
        assert sorted(row["state"] for row in found) == ["adopted", "up"]
        assert "Connections that this host's workers hold: 1;" in result.stdout, (
            "a page that is served for another polls"
        )
        assert "Prometheus scrapes 3 targets." in result.stdout
        for pid in (shop.pid, *shop.workers()):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: "✗ workers" in run().stdout, within=60, what="dead entries")
    assert re.search("Nobody is behind .*shop.web-1.master", run().stdout)


def scrape(consul: Consul) -> str:
    return scrape_config.prometheus(load({"service": "shop", "consul_http_addr": consul.url}, environ={}))


class TestSettings:
    """What is wrong before anybody is asked."""

    def test_no_service(self, examine: Examine) -> None:
        """Without a service the rest is not looked at."""
        found = examine(CONSUL_PROM_SERVICE=None)
        assert set(found) == wrong(found) == {"settings"}
        assert "No service name" in found["settings"].sentence

    def test_multiprocess_mode(self, examine: Examine, tmp_path: Path) -> None:
        """What would keep a worker from starting is found."""
        finding = examine(PROMETHEUS_MULTIPROC_DIR=str(tmp_path))["settings"]
        assert "PROMETHEUS_MULTIPROC_DIR" in finding.sentence
        assert finding.cure.startswith("Unset it")

    def test_web_config(self, examine: Examine, tmp_path: Path) -> None:
        """A web-config file that cannot be used is found."""
        found = examine(CONSUL_PROM_WEB_CONFIG=str(tmp_path / "none"))
        assert wrong(found) == {"settings"}
        assert "CONSUL_PROM_WEB_CONFIG=" in found["settings"].sentence
        assert "file" in found["settings"].cure

    def test_token_file(self, examine: Examine, tmp_path: Path) -> None:
        """A token's file that cannot be read is found, and the agent, which would not be asked, is not blamed."""
        found = examine(CONSUL_HTTP_TOKEN_FILE=str(tmp_path / "none"))
        assert set(found) == wrong(found) == {"settings"}
        assert "CONSUL_HTTP_TOKEN_FILE=" in found["settings"].sentence

    def test_usage(self, run: Callable[..., Result]) -> None:
        """A setting that is none is a usage error, in one sentence."""
        result = run(CONSUL_PROM_PORT="x")
        assert result.exit_code == 2
        assert "CONSUL_PROM_PORT='x'" in result.stderr


class TestAgent:
    """The agent, and what the token may."""

    def test_unreachable(self, examine: Examine) -> None:
        """An agent that is not there ends the look at it, with an exit code of its own; Prometheus is asked still."""
        found = examine(CONSUL_HTTP_ADDR="127.0.0.1:1")
        assert wrong(found) == {"agent"}
        assert "Connection refused" in found["agent"].sentence
        assert "targets" in found
        assert "token" not in found

    def test_certificate(self, examine: Examine, tmp_path: Path) -> None:
        """A certificate that is not trusted is told in plain words, with the settings that decide about it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(30)  # for a test that fails before it connects

            def shake_hands() -> None:
                with suppress(OSError), server.accept()[0] as peer:
                    context.wrap_socket(peer, server_side=True).close()

            thread = threading.Thread(target=shake_hands)
            thread.start()
            found = examine(CONSUL_HTTP_ADDR=f"https://127.0.0.1:{server.getsockname()[1]}")
            thread.join()
        assert wrong(found) == {"agent"}
        assert "certificate verify failed" in found["agent"].sentence
        assert not re.search(r"0x|ssl:|\[Errno", found["agent"].sentence)
        assert "CONSUL_CACERT" in found["agent"].cure

    def test_each_failure_has_its_cure(self) -> None:
        """Nobody is told to start an agent that answers, or to set TLS up where there is none."""
        http, https = (load({"consul_http_addr": f"{scheme}://h"}, environ={}) for scheme in ("http", "https"))
        assert "CACERT" not in checks._cure(http, AgentUnreachable())
        assert "CACERT" in checks._cure(https, AgentUnreachable())
        assert "limits.http_max_conns_per_client" in checks._cure(http, AgentBusy())
        assert all("Start" not in checks._cure(http, error) for error in (AgentBusy(), AgentFailed(), AgentConfused()))

    def test_fails_in_between(self, examine: Examine, agent: DevAgent) -> None:
        """An agent that stops to answer ends nothing but the checks that need it."""
        put_at(agent, "shop.web-1.0", meta())
        for path, check in (("/v1/agent/checks", "address"), ("/v1/agent/services", "entries")):
            agent.fault = Fault(path=path, status=500)
            found = examine(CONSUL_HTTP_ADDR=agent.url)
            assert "cannot be read" in found[check].sentence
            assert {"directory", "ledger", "targets"} <= set(found)
            assert "rule" not in found[check].cure

    def test_no_leader(self, examine: Examine, agent: DevAgent) -> None:
        """Where the agent's servers do not answer, as without a leader, that is found: Prometheus hears nothing."""
        agent.fault = Fault(path="/v1/catalog/service", status=500)
        found = examine(CONSUL_HTTP_ADDR=agent.url)
        assert "catalogue" in wrong(found)
        assert "raft" in found["catalogue"].cure

    async def test_old(self, consul: Consul, monkeypatch: pytest.MonkeyPatch) -> None:
        """A Consul that is too old is named; the newest text with a suffix is not."""
        seen = checks._Seen(load({}, environ={}), None)  # type: ignore[arg-type]
        texts = (("1.6.10", "wrong"), ("1.7.0", "ok"), ("1.22.1+ent", "ok"), ("2.0.0-rc1", "ok"), ("", "unknown"))
        for text, state in texts:
            seen.about_agent = {"Config": {"Version": text}}
            assert (await checks._version(seen)).state == state

    def test_token_without_rights(self, examine: Examine, access: Access) -> None:
        """A token that may not register is found, with the rule that it needs."""
        found = examine(CONSUL_HTTP_ADDR=access.consul.url, CONSUL_HTTP_TOKEN=access.token(READ_AGENT))
        assert "token" in wrong(found)
        assert write_rule("shop-metrics") in found["token"].cure

    @pytest.mark.parametrize("variable", ["CONSUL_HTTP_TOKEN", "CONSUL_HTTP_TOKEN_FILE"])
    def test_unknown_token(self, examine: Examine, access: Access, tmp_path: Path, variable: str) -> None:
        """A token that Consul does not know is found, with the setting it came by; no right is asked for it."""
        text = access.unknown()
        (tmp_path / "token").write_text(text)
        value = text if variable == "CONSUL_HTTP_TOKEN" else str(tmp_path / "token")
        found = examine(CONSUL_HTTP_ADDR=access.consul.url, **{variable: value})
        assert wrong(found) == {"token"}
        assert "ACL not found" in found["token"].sentence
        assert f"{variable} " in found["token"].cure
        assert not any("policy" in finding.cure or "agent:read" in finding.cure for finding in found.values())
        assert not {"workers", "catalogue", "limits"} & set(found), "nothing is concluded from what was not told"
        assert all(text not in str(finding) for finding in found.values())

    def test_least_token(self, examine: Examine, access: Access) -> None:
        """With the least that a worker needs nothing is wrong, and what cannot be seen says what it would need."""
        token = access.token(write_rule("shop-metrics"))
        put_with(access, token, "shop.web-9.0")
        found = examine(CONSUL_HTTP_ADDR=access.consul.url, CONSUL_HTTP_TOKEN=token)
        access.deregister("shop.web-9.0")
        assert wrong(found) == set()
        assert found["version"].state == found["catalogue"].state == found["instances"].state == "unknown"
        assert "agent:read" in found["version"].cure

    def test_ghost(self, examine: Examine, access: Access) -> None:
        """What an agent without a token of its own leaves in the catalogue is found."""
        token = access.token(write_rule("shop-metrics"), READ_NODES, READ_AGENT)
        put_with(access, token, "shop.web-1.5")
        access.deregister("shop.web-1.5")
        found = examine(CONSUL_HTTP_ADDR=access.consul.url, CONSUL_HTTP_TOKEN=token)
        assert wrong(found) == {"catalogue"}
        assert "shop.web-1.5" in found["catalogue"].sentence
        assert "acl.tokens.agent" in found["catalogue"].cure


def put_with(access: Access, token: str, entry_id: str) -> None:
    body = {"ID": entry_id, "Name": "shop-metrics", "Address": "127.0.0.1", "Port": 1}
    body["Meta"] = meta(host="web-9", instance=entry_id)
    status, said = access.consul.call(
        "/v1/agent/service/register", method="PUT", body=body, headers={"X-Consul-Token": token}
    )
    assert status == 200, said


class TestHost:
    """This host's workers."""

    def test_nobody(self, examine: Examine) -> None:
        """Where nobody is registered, nothing is wrong, and the doctor says what it could not see."""
        found = examine()
        assert wrong(found) == set()
        assert found["workers"].state == found["address"].state == "unknown"

    def test_dead(self, examine: Examine, start: Start) -> None:
        """An entry whose worker was killed, with nobody left to remove it, is found."""
        worker = start()
        worker.kill()
        worker.wait()
        found = examine()
        assert wrong(found) == {"workers"}
        assert "shop.web-1.0" in found["workers"].sentence
        assert "No live worker" in found["address"].sentence
        assert "consul-prom deregister" in found["workers"].cure

    def test_unproven(self, examine: Examine, consul: Consul) -> None:
        """An entry of which nothing can be proven is no failure, and is named."""
        put(consul, "shop.web-1.3", meta(slot="3", instance="web-1:3"))
        finding = examine()["workers"]
        assert finding.state == "unknown"
        assert "shop.web-1.3" in finding.sentence

    def test_unreachable_from_the_agent(self, examine: Examine, consul: Consul, start: Start) -> None:
        """A worker that hangs, or that the agent cannot reach, is found by the agent's own check."""
        worker = start(CONSUL_PROM_CHECK_TIMEOUT="200ms")
        worker.send_signal(signal.SIGSTOP)
        wait_until(lambda: "address" in wrong(examine()), within=60, what="the agent's check fails")
        assert "shop.web-1.0" in examine()["address"].sentence

    def test_foreign_address(self, examine: Examine) -> None:
        """An address that is none of this host's is found, unless another is listened on."""
        found = examine(CONSUL_PROM_ADDRESS="203.0.113.7")
        assert "CONSUL_PROM_ADDRESS=203.0.113.7" in found["address"].sentence
        assert wrong(examine(CONSUL_PROM_ADDRESS="203.0.113.7", CONSUL_PROM_BIND="127.0.0.1")) == set()

    def test_ports(self, examine: Examine) -> None:
        """A port, or a range, that somebody else has is found; one with room is not."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            found = examine(CONSUL_PROM_PORT=str(port), CONSUL_PROM_ADDRESS="127.0.0.1")
            assert wrong(found) == {"ports"}
            assert str(port) in found["ports"].sentence
        assert wrong(examine(CONSUL_PROM_PORT=f"{port}-{port + 3}", CONSUL_PROM_ADDRESS="127.0.0.1")) == set()

    def test_adopted_port(self, examine: Examine, consul: Consul) -> None:
        """The port of an adopted slot is the next worker's; that of a live one is not, nor what somebody else has."""
        address = own_address()
        setting = {"CONSUL_PROM_PORT": "9100", "CONSUL_PROM_ADDRESS": address}
        with socket.create_server((address, 9100)):
            put(consul, "shop.web-1.0", meta(adopted="1"), Port=9100)
            assert wrong(examine(**setting)) == set()
            put(consul, "shop.web-1.0", meta(), Port=9100)
            with socket.create_server((address, 9101)):
                assert "9101 (Address already in use)" in examine(**setting)["ports"].sentence
            assert wrong(examine(**setting)) == set()

    def test_port_of_the_master(self, examine: Examine) -> None:
        """The port before the base is named where somebody else has it; who has no master need not care."""
        address = own_address()
        with socket.create_server((address, 9099)):
            finding = examine(CONSUL_PROM_PORT="9100", CONSUL_PROM_ADDRESS=address)["ports"]
        assert finding.state == "unknown"
        assert "9099 (Address already in use), where the page of Gunicorn's master" in finding.sentence

    def test_port_of_another_host(self, examine: Examine) -> None:
        """Where the address is none of this host's, nobody is said to have the port."""
        found = examine(CONSUL_PROM_PORT="9100", CONSUL_PROM_ADDRESS="203.0.113.7")
        assert wrong(found) == {"address", "ports"}
        assert "203.0.113.7 on 9100 (Cannot assign requested address)" in found["ports"].sentence

    def test_range_is_used_up(self, examine: Examine, start: Start) -> None:
        """A range whose ports are all our own workers' has none for the next."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        setting = {"CONSUL_PROM_PORT": f"{port}-{port}", "CONSUL_PROM_ADDRESS": "127.0.0.1"}
        start(**setting)
        assert "is used" in examine(**setting)["ports"].sentence

    def test_directory(self, examine: Examine, slot_directory: Path, tmp_path: Path) -> None:
        """A directory that others can get at is found; one that is not there yet is no failure."""
        slot_directory.chmod(0o755)
        found = examine()
        assert wrong(found) == {"directory"}
        assert "chmod 0700" in found["directory"].sentence
        assert examine(CONSUL_PROM_DIR=str(tmp_path / "a" / "b"))["directory"].state == "ok"
        assert not (tmp_path / "a").exists()

    def test_directory_that_cannot_be_made(self, examine: Examine) -> None:
        """One that is not there and cannot be made is found, also where the modes would let us."""
        found = examine(CONSUL_PROM_DIR="/proc/slots")
        assert wrong(found) == {"directory"}
        assert "cannot be made in /proc" in found["directory"].sentence
        assert "cannot be used" in found["ledger"].sentence

    def test_directory_without_room(
        self, examine: Examine, slot_directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One that nothing can be written to is found."""

        def fail(*_: object, **__: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(checks, "TemporaryDirectory", fail)
        found = examine()
        assert wrong(found) == {"directory"}
        assert found["directory"].sentence == f"{slot_directory} cannot be written to: Read-only file system."

    def test_directory_of_others(self, examine: Examine, start: Start, tmp_path: Path, slot_directory: Path) -> None:
        """A directory that the entries do not name says nothing of the workers, which is said."""
        start()
        found = examine(CONSUL_PROM_DIR=str(tmp_path / "other"))
        assert wrong(found) == set()
        assert found["directory"].state == found["ledger"].state == "unknown"
        assert str(slot_directory) in found["directory"].sentence
        assert f"CONSUL_PROM_DIR={slot_directory}" in found["directory"].cure
        assert not (tmp_path / "other").exists()

    def test_directory_of_another_user(self, examine: Examine, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        """Run by another user than the workers', the look concludes nothing from their directory."""
        start()
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        found = examine()
        assert wrong(found) == set()
        assert "belongs to the workers' user" in found["directory"].sentence

    def test_ledger(self, examine: Examine, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        """Counters that end with their process are named: as it was set, for want of space, or as a worker's own."""
        assert examine()["ledger"].state == "ok"
        finding = examine(CONSUL_PROM_LEDGER="0")["ledger"]
        assert (finding.state, "CONSUL_PROM_LEDGER is off" in finding.sentence) == ("unknown", True)
        start()
        start(CONSUL_PROM_LEDGER="0")
        finding = examine()["ledger"]
        assert (finding.state, "the process of shop.web-1.1." in finding.sentence) == ("unknown", True)
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 10, 0))
        assert wrong(found := examine()) == {"ledger"}
        assert "No space is left" in found["ledger"].sentence

    def test_unknown_library(self, examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
        """So is a prometheus_client that the ledger does not know."""
        monkeypatch.setattr("consul_prom.ledger.compat.plain", lambda _child: [])
        assert wrong(found := examine()) == {"ledger"}
        assert "prometheus_client" in found["ledger"].sentence

    async def test_limits(self) -> None:
        """The agent's limit is told where it is known, Consul's default where it is not, and 0 is no limit."""
        seen = checks._Seen(load({}, environ={}), None)  # type: ignore[arg-type]
        for told, said in ((None, "Consul's default is 200"), (7, "the agent allows 7 "), (0, "allows any number")):
            seen.about_agent = None if told is None else {"DebugConfig": {"HTTPMaxConnsPerClient": told}}
            finding = await checks._limits(seen)
            assert (finding.state, said in finding.sentence) == ("ok", True), finding

    def test_crowd(self, examine: Examine, consul: Consul) -> None:
        """So many workers that the agent's connections come to an end are found, before they do."""
        for number in range(160):
            service = f"shop{number // 60}"
            put(
                consul,
                f"{service}.web-1.{number % 60}",
                meta(service=service, slot=str(number % 60), instance=str(number)),
            )
        found = examine()
        assert wrong(found) == {"limits"}
        assert "workers hold: 160; the agent allows 200" in found["limits"].sentence
        put(consul, "shop0.web-1.7", meta(service="shop0", slot="7", adopted="1"))
        assert "workers hold: 159;" in examine()["limits"].sentence, "a page that is served for another holds none"


def test_claimed_twice(examine: Examine, consul: Consul) -> None:
    """An instance that two agents' entries claim is found."""
    put(consul, "shop.web-1.0", meta())
    body = {"Node": "other", "Address": "127.0.0.9", "SkipNodeUpdate": False}
    service = {"ID": "shop.web-1.0", "Service": "shop-metrics", "Address": "127.0.0.9", "Port": 2, "Meta": meta()}
    assert consul.call("/v1/catalog/register", method="PUT", body={**body, "Service": service})[0] == 200
    try:
        found = examine()
    finally:
        consul.call("/v1/catalog/deregister", method="PUT", body={"Node": "other"})
    assert wrong(found) == {"instances"}
    assert "web-1:0 by" in found["instances"].sentence
    assert "other/shop.web-1.0" in found["instances"].sentence


class TestPrometheus:
    """Its side."""

    def test_not_there(self, examine: Examine) -> None:
        """A Prometheus that cannot be asked, or an address that is none, is found."""
        for url in ("http://127.0.0.1:1", "file:///etc/passwd", "nonsense"):
            found = examine("--prometheus", url)
            assert wrong(found) == {"targets"}
            assert url in found["targets"].sentence
            assert "Errno" not in found["targets"].sentence
        found = examine("--prometheus", "http://user:hunter2@127.0.0.1:1")
        assert wrong(found) == {"targets"}
        assert "hunter2" not in str(found)

    def test_another_program(self, examine: Examine, consul: Consul) -> None:
        """What answers and is no Prometheus is found."""
        assert "it answered 404" in examine("--prometheus", consul.url)["targets"].sentence
        finding = examine("--prometheus", f"{consul.url}/v1/agent/self?x=")["targets"]
        assert "what answers is no Prometheus" in finding.sentence

    def test_not_scraped_yet(self, examine: Examine, start: Start, consul: Consul) -> None:
        """A target that was not scraped yet is neither scraped nor down."""
        start()
        with Prometheus(scrape(consul), interval="1h", flags=HASTY) as prometheus:
            wait_until(prometheus.targets, within=60, what="a target")
            finding = examine("--prometheus", prometheus.url)["targets"]
        assert (finding.state, finding.sentence) == ("unknown", "Prometheus has not scraped web-1:0 yet.")

    def test_many_are_down(self, examine: Examine, consul: Consul) -> None:
        """Of many targets that are down five are named, all are counted, and one of them says why."""
        for slot in range(7):
            put(consul, f"shop.web-1.{slot}", meta(slot=str(slot), instance=f"web-1:{slot}"), Port=1 + slot)
        with Prometheus(scrape(consul), flags=HASTY) as prometheus:
            wait_until(lambda: prometheus.query_value("count(up == 0)") == 7, within=60, what="failed scrapes")
            sentence = examine("--prometheus", prometheus.url)["targets"].sentence
        assert "7 of 7 targets: web-1:0, web-1:1, web-1:2, web-1:3, web-1:4 and 2 more. Of the first it " in sentence
        assert sentence.count("connection refused") == 1

    def test_dead(self, examine: Examine, start: Start, consul: Consul) -> None:
        """A target that is down since its worker is dead is no matter of addresses."""
        worker = start()
        with Prometheus(scrape(consul), flags=HASTY) as prometheus:
            wait_until(lambda: prometheus.query_value("count(up == 1)") == 1, within=60, what="a scrape")
            worker.kill()
            worker.wait()
            wait_until(lambda: prometheus.query_value("count(up == 0)") == 1, within=60, what="a failed scrape")
            found = examine("--prometheus", prometheus.url)
        assert wrong(found) == {"workers", "targets"}
        assert "dead" in found["targets"].cure

    @pytest.mark.parametrize("password", ["passhead-tail", "passhead/tail", "pass:head@tail"])
    def test_password(self, examine: Examine, password: str) -> None:
        """A password in Prometheus' address is refused, and not shown."""
        found = examine("--prometheus", f"http://user:{password}@127.0.0.1:1")
        assert wrong(found) == {"targets"}
        assert "http://***@127.0.0.1:1" in found["targets"].sentence
        assert "head" not in found["targets"].sentence

    def test_not_scraped(self, examine: Examine, start: Start, consul: Consul) -> None:
        """Workers that Prometheus does not look for are found."""
        start()
        with Prometheus(scrape(consul).replace("[shop-metrics]", "[other]"), flags=HASTY) as prometheus:
            found = examine("--prometheus", prometheus.url)
            assert wrong(found) == {"targets"}
            assert "does not scrape shop.web-1.0" in found["targets"].sentence

    def test_down(self, examine: Examine, start: Start, consul: Consul) -> None:
        """Workers that it looks for and cannot scrape are found, with its own words."""
        start()
        config = yaml.safe_load(scrape(consul))
        config["scrape_configs"][0]["metrics_path"] = "/nonsense"
        with Prometheus(config, flags=HASTY) as prometheus:
            wait_until(lambda: prometheus.query_value("count(up == 0)") == 1, within=60, what="a failed scrape")
            found = examine("--prometheus", prometheus.url)
            assert wrong(found) == {"targets"}
            assert "404" in found["targets"].sentence

    def test_moved(self, examine: Examine, consul: Consul) -> None:
        """One that is registered at another port than the scraped one is found when Prometheus has heard of that."""
        put(consul, "shop.web-1.0", meta())
        with Prometheus(scrape(consul), flags=HASTY) as prometheus:
            wait_until(lambda: prometheus.query_value("count(up == 0)") == 1, within=60, what="a failed scrape")
            assert wrong(examine("--prometheus", prometheus.url)) == {"targets"}
            (target,) = prometheus.targets()
        assert not targets.has_moved(target, {"shop.web-1.0": ("127.0.0.1", 1)})
        assert targets.has_moved(target, {"shop.web-1.0": ("127.0.0.1", 2)})
        assert not targets.has_moved(target, {})

    def test_equal_labels(self, examine: Examine, start: Start, consul: Consul) -> None:
        """Targets that a relabelling of one's own made equal are found."""
        start()
        start()
        config = yaml.safe_load(scrape(consul))
        config["scrape_configs"][0]["relabel_configs"].append({"target_label": "instance", "replacement": "shop"})
        with Prometheus(config, flags=HASTY) as prometheus:
            wait_until(lambda: len(prometheus.targets()) == 2, within=60, what="two targets")
            found = examine("--prometheus", prometheus.url)
            assert "labels" in wrong(found)
            assert "series are mixed" in found["labels"].sentence

    def test_labels_of_no_worker(self, examine: Examine, start: Start, consul: Consul) -> None:
        """A job without our relabelling is found: no dashboard finds a worker by its address."""
        start()
        config = yaml.safe_load(scrape(consul))
        relabelling = config["scrape_configs"][0].pop("relabel_configs")
        for number in (0, 1):
            config["scrape_configs"][0]["relabel_configs"] = relabelling[:number]
            with Prometheus(config, flags=HASTY) as prometheus:
                wait_until(lambda: prometheus.query_value("count(up == 1)") == 1, within=60, what="a scrape")
                found = examine("--prometheus", prometheus.url)
            assert wrong(found) == {"labels"}
            assert "not 'web-1:0'" in found["labels"].sentence if number else "not 'shop'" in found["labels"].sentence
            assert "relabel_configs" in found["labels"].cure
            assert "interval" not in found

    def test_short_lives(self, examine: Examine, consul: Consul) -> None:
        """Workers that live for few scrapes are found, however short Prometheus has looked."""
        starts = itertools.count(1)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # the library's name
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(f"process_start_time_seconds {next(starts) // 2}\n".encode())

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the library's name
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever).start()
            try:
                put(consul, "shop.web-1.0", meta(), Port=server.server_port)
                with Prometheus(scrape(consul), flags=HASTY) as prometheus:
                    changes = "changes(process_start_time_seconds[1h]) > 3"
                    wait_until(lambda: prometheus.query(changes), within=60, what="several lives")
                    found = examine("--prometheus", prometheus.url)
            finally:
                server.shutdown()
        assert wrong(found) == {"interval"}
        assert "Workers live for 2 s" in found["interval"].sentence

    def test_lifetime(self) -> None:
        """Four scrapes a life are enough; with few replacements nothing is concluded."""
        target = {"scrapeInterval": "15s"}
        for scrapes, state in (("4", "ok"), ("3.9", "wrong")):
            assert targets.lifetime([target], [{"metric": {}, "value": [0, scrapes]}]).state == state
        assert targets.lifetime([target], []).state == "ok"
