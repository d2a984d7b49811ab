"""The real programs start, say their version, answer, and leave nothing behind."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.services.binaries import require, version_text
from tests.services.consul import Consul
from tests.services.program import Program, own_address
from tests.services.prometheus import Prometheus, PromtoolRefusal, promtool_check_config
from tests.services.waiting import eventually, wait_until

Script = Callable[..., Path]


class TestWaiting:
    def test_result(self) -> None:
        """Waiting returns the first true answer."""
        answers = iter([0, "", "yes"])
        assert wait_until(lambda: next(answers), within=5, what="yes", every=0) == "yes"

    def test_late(self) -> None:
        """Waiting ends at its deadline with what was awaited and the last refusal."""

        def never() -> bool:
            raise AssertionError("three targets")

        with pytest.raises(AssertionError, match=r"not within 0\.5 s: a fourth") as late:
            wait_until(never, within=0.1, what="a fourth")
        assert "three targets" in str(late.value.__cause__)

    async def test_eventually(self) -> None:
        """Waiting in a loop takes plain and asynchronous conditions."""

        async def soon() -> int:
            return 3

        assert await eventually(soon, within=5, what="three") == 3
        assert await eventually(lambda: "plain", within=5, what="plain") == "plain"

    async def test_eventually_late(self) -> None:
        """Waiting in a loop cancels a condition that hangs."""
        cancelled = []

        async def hang() -> None:
            try:
                await eventually(lambda: False, within=60, what="the inner one")
            finally:
                cancelled.append(True)

        with pytest.raises(AssertionError, match="the outer one"):
            await eventually(hang, within=0.1, what="the outer one")
        assert cancelled == [True]

    async def test_eventually_error(self) -> None:
        """Waiting in a loop passes on what the condition raises, a TimeoutError too."""

        async def broken() -> None:
            raise TimeoutError("mine")

        with pytest.raises(TimeoutError, match="mine"):
            await eventually(broken, within=60, what="nothing")


def gone(pid: int) -> bool:
    """Whether no process has this id, not even a zombie."""
    return not Path(f"/proc/{pid}").exists()


class TestConsul:
    def test_story(self) -> None:
        """Consul starts on an address of its own, answers, and leaves no process and no directory."""
        with Consul() as consul:
            pid, directory = consul.pid, consul.directory
            assert consul.url == f"http://{consul.address}:8500"
            assert consul.call("/v1/status/leader") == (200, f"{consul.address}:8300")
            status, agent = consul.call("/v1/agent/self")
            assert (status, agent["Config"]["Version"]) == (200, "1.19.2")
        assert gone(pid)
        assert not directory.exists()

    def test_version(self) -> None:
        """Consul says the pinned version."""
        assert version_text(require("consul")).startswith("Consul v1.19.2\n")

    def test_restart(self) -> None:
        """A server with a data directory knows its services after a kill."""
        with Consul(dev=False) as consul:
            service = {"ID": "x-1", "Name": "x", "Port": 1}
            assert consul.call("/v1/agent/service/register", method="PUT", body=service)[0] == 200
            pid = consul.pid
            consul.kill()
            assert gone(pid)
            consul.start()
            assert consul.call("/v1/agent/service/x-1")[1]["Port"] == 1
            consul.restart()
            assert consul.call("/v1/agent/service/x-1")[0] == 200

    def test_pause(self) -> None:
        """A paused agent accepts connections and does not answer; it can be stopped even so."""
        with Consul() as consul:
            consul.pause()
            with pytest.raises(TimeoutError):
                consul.call("/v1/status/leader", timeout=0.2)
            consul.resume()
            assert consul.call("/v1/status/leader")[0] == 200
            consul.pause()
            pid = consul.pid
        assert gone(pid)

    def test_acl(self) -> None:
        """An agent that denies everything is ready when its management token works."""
        token = "6b0d3a5c-31a2-4d0f-9a84-0d5f6f0a1c11"
        acl = {"enabled": True, "default_policy": "deny", "tokens": {"initial_management": token}}
        with Consul(config={"acl": acl}) as consul:
            assert consul.call("/v1/acl/token/self")[1]["SecretID"] == token
            assert consul.call("/v1/agent/self", headers={"X-Consul-Token": ""})[0] == 403

    def test_unix_socket(self, tmp_path: Path) -> None:
        """An agent behind a Unix socket is awaited and called through it."""
        url = f"unix://{tmp_path / 'consul.sock'}"
        with Consul(config={"addresses": {"http": url}}) as consul:
            assert consul.url == url
            assert consul.call("/v1/agent/self")[0] == 200

    def test_bad_config(self) -> None:
        """An agent that ends at once shows its log and leaves no directory."""
        consul = Consul(config={"no_such_key": 1})
        with pytest.raises(AssertionError, match="no_such_key"):
            consul.start()
        assert not consul.running
        assert consul._temporary is None


class TestPrometheus:
    def test_story(self) -> None:
        """Prometheus starts, scrapes itself, answers queries, and leaves no process and no directory."""
        address = own_address()
        scrape = [{"job_name": "self", "static_configs": [{"targets": [f"{address}:9090"]}]}]
        with Prometheus(scrape, address=address) as prometheus:
            pid, directory = prometheus.pid, prometheus.directory
            wait_until(lambda: prometheus.query_value('up{job="self"}') == 1, within=30, what="a scrape")
            assert prometheus.query_value("vector(3) < 3") is None
            assert prometheus.query_value("scalar(vector(3))") == 3
            [target] = prometheus.targets()
            assert (target["labels"]["job"], target["health"]) == ("self", "up")
            with pytest.raises(ValueError, match="parse error"):
                prometheus.query("sum(")
        assert gone(pid)
        assert not directory.exists()

    @pytest.mark.parametrize("name", ["prometheus", "promtool"])
    def test_version(self, name: str) -> None:
        """Prometheus and promtool say the pinned version."""
        assert version_text(require(name)).startswith(f"{name}, version 3.14.0 ")

    def test_consul(self) -> None:
        """Prometheus was built with the discovery that all this is about."""
        text = "scrape_configs: [{job_name: x, consul_sd_configs: [{server: '%s:8500', services: [x]}]}]"
        with Consul() as consul:
            service = {"ID": "x-1", "Name": "x", "Address": consul.address, "Port": 8500}
            assert consul.call("/v1/agent/service/register", method="PUT", body=service)[0] == 200
            with Prometheus(text % consul.address) as prometheus:
                wait_until(prometheus.targets, within=60, what="a target from Consul")


class TestPromtool:
    def test_good(self) -> None:
        """Promtool accepts a configuration with discovery through Consul."""
        promtool_check_config("scrape_configs: [{job_name: x, consul_sd_configs: [{services: [x]}]}]")

    def test_bad(self) -> None:
        """Promtool's words about a wrong configuration are the error's."""
        with pytest.raises(PromtoolRefusal, match="field token_file not found"):
            promtool_check_config("scrape_configs: [{job_name: x, consul_sd_configs: [{token_file: x}]}]")


class TestProgram:
    def test_own_address(self) -> None:
        """Addresses are of the loopback network, differ, and leave 127.0 and 127.1 alone."""
        addresses = {own_address() for _ in range(100)}
        assert len(addresses) == 100
        assert all(address.startswith("127.") for address in addresses)
        assert not any(address.startswith(("127.0.", "127.1.")) for address in addresses)

    def test_late(self, monkeypatch: pytest.MonkeyPatch, script: Script) -> None:
        """A program that does not get ready is ended, and its log is shown."""
        monkeypatch.setattr(Program, "start_within", 0.2)
        with pytest.raises(AssertionError, match=r"(?s)not within 1 s: consul ready at http.*still thinking"):
            Consul(binary=script("sleeper", "echo still thinking; exec sleep 60")).start()

    def test_stubborn(self, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
        """A program that ignores SIGTERM is killed at the deadline."""
        monkeypatch.setattr(Consul, "_ready", lambda self: "ready" in self.log.read_text())
        stubborn = script("stubborn", "trap '' TERM; echo ready; while :; do read -r _ < /dev/zero; done")
        with Consul(binary=stubborn) as consul:
            pid = consul.pid
            assert consul.stop(within=0.2) == -9
        assert gone(pid)
