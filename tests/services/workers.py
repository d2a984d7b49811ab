"""Real workers in processes of their own, for tests in which somebody dies."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import consul_prom
from consul_prom.devagent import DevAgent
from tests.services.waiting import wait_until

PACKAGE = Path(consul_prom.__file__).parent.parent
SCRIPT = """
import signal
import consul_prom

consul_prom.Worker().start()
signal.pause()
"""


class Workers:
    """Starts workers of the service ``shop`` on the host ``web-1``, and ends what is left of them."""

    def __init__(self, agent: DevAgent, directory: Path) -> None:
        self._agent = agent
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, **settings: str) -> subprocess.Popen[bytes]:
        """A worker that is registered; *settings* are environment variables."""
        process = subprocess.Popen([sys.executable, "-c", SCRIPT], env=self._environment(settings))
        self._processes.append(process)
        wait_until(lambda: self.entries(process.pid), within=20, what="registered")
        return process

    def run(self, script: str, **settings: str) -> str:
        """What another *script*, run in a worker's environment to its end, has printed."""
        done = self.run_any(script, **settings)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run_any(self, script: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """The same for a script that may fail."""
        command, environ = [sys.executable, "-c", script], self._environment(settings)
        return subprocess.run(command, env=environ, timeout=60, check=False, capture_output=True, text=True)

    def hold(self, process: subprocess.Popen[bytes]) -> None:
        """Stop it: it lives, and neither sweeps nor notices what is done to its files."""
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()

    def entries(self, pid: int) -> list[str]:
        """The IDs of the entries that name *pid*."""
        services = list(self._agent.state.services.values())
        return [service.service_id for service in services if service.meta.get("pid") == str(pid)]

    def close(self) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGCONT)
            self.kill(process)

    def _environment(self, settings: Mapping[str, str]) -> dict[str, str]:
        ours = {
            "PYTHONPATH": str(PACKAGE),
            "CONSUL_HTTP_ADDR": self._agent.url,
            "CONSUL_PROM_DIR": str(self._directory),
            "CONSUL_PROM_SERVICE": "shop",
            "CONSUL_PROM_HOST": "web-1",
        }
        return {**os.environ, **ours, **settings}


def meta(**changes: Any) -> dict[str, Any]:
    """The meta of a worker ``web-1:0`` of ``shop`` whose directory is gone."""
    ours = {"external-source": "consul-prom", "managed_by": "consul-prom", "dir": "0123456789abcdef:/gone/slots"}
    ours |= {"service": "shop", "host": "web-1", "slot": "0", "instance": "web-1:0", "scheme": "http"}
    return {**ours, "pid": "1", "proc": "", "version": "0", **changes}


def put(agent: DevAgent, entry_id: str, entry_meta: dict[str, Any]) -> None:
    """An entry that no worker made."""
    body = json.dumps({"ID": entry_id, "Name": "shop-metrics", "Address": "127.0.0.1", "Port": 1, "Meta": entry_meta})
    request = urllib.request.Request(f"{agent.url}/v1/agent/service/register", body.encode(), method="PUT")
    with urllib.request.urlopen(request, timeout=5) as answer:
        assert answer.status == 200
