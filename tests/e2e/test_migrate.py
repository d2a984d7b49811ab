"""deploy/migrate: what one had is what it says, and what one writes now works."""

import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY

from consul_prom.devagent import DevAgent
from consul_prom.generate import scrape_config
from consul_prom.settings.settings import load
from consul_prom.worker.master_page import MasterPage
from tests import ROOT
from tests.services.consul import Consul
from tests.services.gunicorn import HOOKS, Gunicorn
from tests.services.prometheus import HASTY, Prometheus
from tests.services.waiting import wait_until

TEXT = (ROOT / "deploy" / "migrate" / "README.md").read_text(encoding="utf-8")


def pair(title: str) -> tuple[str, str]:
    """Before and after, of the section with this title."""
    (section,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    before, after = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return before, after


def python(code: str, agent: DevAgent | Consul, tmp_path: Path, **environ: str) -> str:
    """What a program prints."""
    ours = {"PYTHONPATH": str(ROOT), "CONSUL_HTTP_ADDR": agent.url, "CONSUL_PROM_DIR": str(tmp_path / "slots")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **ours, **environ},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ASK = """
import asyncio, json
from aiohttp.test_utils import TestClient, TestServer

async def ask():
    async with TestClient(TestServer(await get_application())) as client:
        status = (await client.get("/metrics")).status
        print(json.dumps([status, list(REGISTRY._names_to_collectors)]))
"""


def test_naive(agent: DevAgent, tmp_path: Path) -> None:
    """The route goes, the metrics stay, and the worker has its own."""
    seen = []
    for code in pair("From a plain `/metrics` route"):
        program = f"{code}\nfrom prometheus_client import REGISTRY\n{ASK}\nasyncio.run(ask())"
        seen.append(json.loads(python(program, agent, tmp_path)))
    (before, old), (after, new) = seen
    assert (before, after) == (200, 404)
    assert "orders_total" in old
    assert {"orders_total", "consul_prom_registered", "http_requests_total"} <= set(new)


def test_multiprocess(agent: DevAgent, tmp_path: Path) -> None:
    """Before there are files to clean up, and a view that fails without them; now workers and master are targets."""
    before, after = pair("From prometheus_client's multiprocess mode")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "gauge_liveall_7.db").touch()
    call = f"{before}\nclass worker: pid = 7\nchild_exit(None, worker)"
    python(call, agent, tmp_path, PROMETHEUS_MULTIPROC_DIR=str(tmp_path / "files"))
    assert list((tmp_path / "files").iterdir()) == []
    view = f"""{before}
from wsgiref.handlers import SimpleHandler
from wsgiref.util import setup_testing_defaults
import io
environ, page = {{"SERVER_PROTOCOL": "HTTP/1.1"}}, io.BytesIO()
setup_testing_defaults(environ)
SimpleHandler(io.BytesIO(), page, io.StringIO(), environ).run(metrics)
print(page.getvalue().split()[1].decode())
"""
    assert python(view, agent, tmp_path, PROMETHEUS_MULTIPROC_DIR=str(tmp_path / "files")) == "200\n"
    assert python(view, agent, tmp_path) == "500\n"
    (tmp_path / "gunicorn.conf.py").write_text(after)
    options = (f"-c={tmp_path / 'gunicorn.conf.py'}", "--no-control-socket")
    settings = {"CONSUL_HTTP_ADDR": agent.url}
    with Gunicorn("tests.e2e.plain:wsgi", workers=2, worker_class="sync", settings=settings, options=options):
        wait_until(lambda: len(agent.state.services) == 3, within=60, what="two workers' entries and the master's")
        slots = sorted(service.meta["slot"] for service in agent.state.services.values())
        assert slots == ["0", "1", "master"]
    assert not agent.state.services


def test_prometheus_async(agent: DevAgent, tmp_path: Path) -> None:
    """Two servers of one host have an entry each, until their process ends."""
    _, after = pair("From prometheus_async's own ConsulAgent")
    call = (
        f"{after}\nimport asyncio, os\nfrom urllib.request import urlopen\nasync def main():\n"
        "    servers = [await serve() for _ in range(2)]\n"
        "    print([server.is_registered for server in servers])\n"
        "    print(urlopen(os.environ['CONSUL_HTTP_ADDR'] + '/v1/agent/services').read().count(b'managed_by'))\n"
        "asyncio.run(main())"
    )
    assert python(call, agent, tmp_path, CONSUL_PROM_REQUIRED="true") == "[True, True]\n2\n"
    assert not agent.state.services


def test_prometheus_async_before(agent: DevAgent, tmp_path: Path) -> None:
    """Before, a second server took the first one's entry."""
    before, _ = pair("From prometheus_async's own ConsulAgent")
    call = (
        f"{before}\nimport asyncio\n"
        f"import yarl\nurl = yarl.URL({agent.url!r}) / 'v1' / 'agent'\nmake = ConsulAgent\n"
        "def ConsulAgent(name):\n    made = make(name=name)\n    made.consul.agent_url = url\n    return made\n"
        "async def main():\n    [await serve() for _ in range(2)]\nasyncio.run(main())"
    )
    python(call, agent, tmp_path)
    assert len(agent.state.services) == 1


class Gateway(http.server.BaseHTTPRequestHandler):
    """Keeps what is pushed."""

    pushed: list[bytes]

    def do_PUT(self) -> None:  # the library's name
        self.pushed.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the library's name
        pass


def test_pushgateway(agent: DevAgent, tmp_path: Path) -> None:
    """Before, the last value was pushed; now a real Prometheus has it when the job is over, and no entry is left."""
    before, after = pair("From the Pushgateway, for a job")
    Gateway.pushed = []
    with http.server.HTTPServer(("127.0.0.1", 0), Gateway) as gateway:
        thread = threading.Thread(target=gateway.serve_forever)
        thread.start()
        python(f"{before}\njob('127.0.0.1:{gateway.server_port}')", agent, tmp_path)
        gateway.shutdown()
        thread.join()
    assert b"rows_total 1000.0" in Gateway.pushed[0]
    with Consul() as consul:
        text = scrape_config.prometheus(load({"service": "nightly", "consul_http_addr": consul.url}, environ={}))
        with Prometheus(text.replace("refresh_interval: 5s", "refresh_interval: 1s"), flags=HASTY) as prometheus:
            python(f"{after}\njob()", consul, tmp_path)
            assert prometheus.query_value('max_over_time(rows_total{job="nightly"}[1m])') == 1000
        assert not consul.call("/v1/agent/services")[1]


def test_statsd_client(agent: DevAgent, tmp_path: Path) -> None:
    """What was sent as counter and timer is counted and timed, by a label, and in seconds."""
    before, after = pair("From statsd or DogStatsD clients")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as statsd:
        statsd.bind(("127.0.0.1", 0))
        statsd.settimeout(10)
        python(f"{before}\nsold({statsd.getsockname()!r}, 0.25)", agent, tmp_path)
        sent = [statsd.recv(1000) for _ in range(2)]
    assert sent == [b"orders:1|c|#view:fire", b"orders.duration:250.0|ms|#view:fire"]
    page = python(
        f"{after}\nimport prometheus_client\nsold(0.25)\nprint(prometheus_client.generate_latest().decode())",
        agent,
        tmp_path,
    )
    assert 'orders_total{view="fire"} 1.0' in page
    assert 'orders_duration_seconds_sum{view="fire"} 0.25' in page


def test_statsd(agent: DevAgent, tmp_path: Path) -> None:
    """The names on the left are those that Gunicorn sends to statsd; what is now on the right of them is there."""
    sent: set[str] = set()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as statsd:
        statsd.bind(("127.0.0.1", 0))
        statsd.settimeout(0.1)

        def receive() -> set[str]:
            with suppress(TimeoutError):
                while True:
                    sent.update(re.findall(r"^[\w.]+", statsd.recv(65536).decode(), re.MULTILINE))
            return sent

        options = (f"--statsd-host=127.0.0.1:{statsd.getsockname()[1]}", *HOOKS)
        settings = {"CONSUL_HTTP_ADDR": agent.url, "CONSUL_PROM_SERVICE": "shop"}
        with Gunicorn(
            "tests.e2e.wsgi_app:app", workers=1, worker_class="sync", settings=settings, options=options
        ) as shop:
            shop.call("/fail")
            # The worker sends what it tells of a request after the answer.
            wait_until(lambda: "gunicorn.request.status.500" in receive(), within=30, what="the request's status")
            os.kill(min(shop.workers()), signal.SIGKILL)
            left = set(re.findall(r"`(gunicorn\.[\w.]+)` \|", TEXT))
            assert len(left) >= 5
            wait_until(lambda: left <= receive(), within=30, what=f"all of {left}")


def test_names_are_ours(tmp_path: Path) -> None:
    """The names on the right are those that a worker has."""
    table = TEXT.split("| Where |")[1].split("\n\n")[0]
    cells = " ".join(row.split("|")[3] for row in table.splitlines()[2:])
    ours = set(re.findall(r"\b((?:http|process|consul_prom|gunicorn)_\w+)", cells))
    assert len(ours) >= 5
    known = {name for collector in REGISTRY._collector_to_names.values() for name in collector}
    requests = {"http_requests_total", "http_request_duration_seconds", "consul_prom_worker_info"}
    masters = {name for it in MasterPage(tmp_path, "shop").collect() for name in (it.name, f"{it.name}_total")}
    assert ours <= known | requests | masters
    assert load({"port": "8001-8049"}, environ={}).port.last == 8049
