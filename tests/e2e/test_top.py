"""`consul-prom top` on real workers."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from consul_prom.cli import main as cli_main
from consul_prom.cli import top
from consul_prom.cli.top import HEAD, Target
from consul_prom.consul.client import AgentClient
from consul_prom.settings.settings import load
from tests.services.consul import Consul
from tests.services.gunicorn import HOOKS, Gunicorn
from tests.services.waiting import wait_until
from tests.services.workers import PACKAGE, meta


@pytest.fixture
def shop() -> Any:
    with Consul() as consul:
        settings = {"CONSUL_HTTP_ADDR": consul.url, "CONSUL_PROM_SERVICE": "shop"}
        with Gunicorn(workers=2, settings=settings, options=HOOKS) as shop:
            wait_until(
                lambda: len(consul.call("/v1/agent/services")[1]) == 3, within=60, what="two workers and the master"
            )
            yield consul, shop


def test_real_workers(shop: Any, tmp_path: Path) -> None:
    """Real workers, and not their master, are shown with what they do; one that cannot be read is a finding."""
    consul, server = shop
    environ = {"CONSUL_HTTP_ADDR": consul.url, "CONSUL_PROM_SERVICE": "shop"}

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(cli_main.commands, ("top", *arguments), env=environ)

    server.get("/fire")
    result = run("--once", "--sort=requests")
    assert result.exit_code == 0, result.output
    head, sums, *rows = result.stdout.splitlines()
    assert head == HEAD
    assert re.match(r"2 workers +\d", sums)
    assert len(rows) == 2
    found = json.loads(run("--json").stdout)
    assert [row["state"] for row in found] == ["up", "up"]
    assert all(row["memory"] > 10**6 and row["lag"] >= 0 and row["age"] > 0 for row in found)
    body = {"ID": "shop.gone.0", "Name": "shop-metrics", "Address": "127.0.0.1", "Port": 1}
    body["Meta"] = meta(host="gone", instance="gone:0")
    assert consul.call("/v1/agent/service/register", method="PUT", body=body)[0] == 200
    result = run("--once", "--filter=gone")
    assert result.exit_code == 1
    assert "refused" in result.stdout
    assert run("--once", "--filter=nobody").stdout.startswith("The agent at")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        live_in_a_terminal(environ, number)


def live_in_a_terminal(environ: dict[str, str], number: signal.Signals) -> None:
    """It is drawn again and again until a signal, which leaves the terminal as it was, without a stack trace."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(PACKAGE), "TERM": "xterm", "COLUMNS": "80", "LINES": "24", **environ}
    command = [sys.executable, "-m", "consul_prom", "top", "--interval=0.2"]
    process = subprocess.Popen(command, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text, deadline = "", time.monotonic() + 60
    try:
        while text.count("req/s") < 3 and time.monotonic() < deadline:
            if select.select([ours], [], [], 1)[0]:
                text += os.read(ours, 65536).decode()
        process.send_signal(number)
        while select.select([ours], [], [], 10)[0]:
            try:
                text += os.read(ours, 65536).decode()
            except OSError:  # the other end was closed
                break
        assert process.wait(10) == 0, text
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert text.count("req/s") >= 3
    assert "3 workers" in text
    assert "Traceback" not in text
    for on, off in (("\x1b[?25l", "\x1b[?25h"), ("\x1b[?1049h", "\x1b[?1049l")):
        assert 0 <= text.find(on) < text.rfind(off), "the cursor is shown and the alternate screen is left"


async def test_hundreds(shop: Any) -> None:
    """Three hundred workers are read within one turn, and shown with those that a screen has room for."""
    consul, _ = shop
    real = next(it for it in consul.call("/v1/agent/services")[1].values() if it["Meta"]["slot"] == "0")
    settings = load({"service": "shop", "consul_http_addr": consul.url}, environ={})
    agent = AgentClient(settings)
    targets = [Target(f"web-1:{slot}", "http", real["Address"], real["Port"], adopted=False) for slot in range(300)]

    async def everywhere(_settings: object, _agent: object) -> list[Target]:
        return targets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top, "_targets", everywhere)
        looks = top.watch(settings, agent, interval=0.2)
        for _ in range(2):
            rows = await anext(looks)
            assert [row.state for row in rows] == ["up"] * 300
        await looks.aclose()
    await agent.aclose()
