"""README says what is so: its blocks run, its tables are those of the code, its queries are accepted."""

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest
from aiohttp import web
from click import Context, Group
from prometheus_client import REGISTRY, Counter, generate_latest

import consul_prom
from consul_prom.cli import main as cli_main
from consul_prom.generate import scrape_config
from consul_prom.generate.settings_table import settings_table
from consul_prom.gunicorn.stats import MasterStats
from consul_prom.settings.settings import load
from consul_prom.worker.master_page import MasterPage
from tests import ROOT
from tests.services.consul import Consul
from tests.services.gunicorn import Gunicorn
from tests.services.prometheus import Prometheus
from tests.services.waiting import wait_until

README = (ROOT / "README.md").read_text(encoding="utf-8")


BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def block(kind: str) -> str:
    """The one block of a kind."""
    (found,) = [text for its_kind, text in BLOCKS if its_kind == kind]
    return str(found)


def commands() -> list[str]:
    """The lines of the blocks that have no kind, without the drawing."""
    lines = [line for kind, text in BLOCKS if not kind for line in text.splitlines()]
    return [line for line in lines if re.match(r"[a-z0-9]+ ", line)]


async def test_application() -> None:
    """The application of the README is one, and counts."""
    names: dict[str, object] = {}
    exec(compile(block("python"), "README.md", "exec"), names)  # noqa: S102  # our own text
    reqs, get_application = names["REQS"], names["get_application"]
    assert isinstance(reqs, Counter)
    assert callable(get_application)
    try:
        app = await get_application()
        assert isinstance(app, web.Application)
        assert "/fire" in {resource.canonical for resource in app.router.resources()}
    finally:
        REGISTRY.unregister(reqs)


def test_first_screen() -> None:
    """Problem, picture and cure fit one screen, which says what is so below; the whole is read in minutes."""
    first = README.split("\n## ")[0]
    assert first.count("\n") <= 40
    assert block("py").strip() in block("python")
    assert block("sh").strip() in README.replace(block("sh"), "", 1)
    assert README.count("\n") <= 350


def test_snippet() -> None:
    """The scrape configuration is the one that the command prints."""
    assert block("yaml") == scrape_config.prometheus(load({"service": "shop"}, environ={}))


def test_settings() -> None:
    """The table of the settings is the code's."""
    assert settings_table() in README


def test_commands() -> None:
    """Every command of the table exists, and every command that exists is in the table."""
    rows = re.findall(r"^\| (`consul-prom.*?) \|", README, re.MULTILINE)
    mentioned = {name for row in rows for name in re.findall(r"`(?:consul-prom )?([a-z ]+)`", row)}
    assert mentioned == set(_leaves(cli_main.commands))


def test_installs() -> None:
    """Nothing tells pip to get consul-prom from a package index, where it is not; the extras that are named exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wheel = f"./consul_prom-{consul_prom.__version__}-py3-none-any.whl"
    own_words = [path for folder in ("consul_prom", "deploy") for path in (ROOT / folder).rglob("*") if path.is_file()]
    found = []
    for path in (ROOT / "README.md", *own_words):
        text = path.read_bytes().decode("utf-8", errors="replace") if path.suffix not in {".pyc", ".png"} else ""
        for options, source, named in re.findall(r"pip install ((?:-\S+ )*)'?([^\s'\[`]+)(?:\[([\w,]+)\])?", text):
            found.append((path.name, options, source))
            assert not re.search(r"consul.prom", source) or source == wheel, path
            assert not named or (source in {".", wheel} and set(named.split(",")) <= set(extras)), path
    assert {"README.md", "shop.service", "Dockerfile", "demo.py", "web_config.py"} <= {name for name, *_ in found}


def test_gunicorn() -> None:
    """The gunicorn line is what the tests run."""
    assert "gunicorn app:get_application --workers=4 --worker-class=aiohttp.GunicornWebWorker" in commands()


def test_own_metrics() -> None:
    """The metrics that are named are those that a worker has."""
    program = (
        "import consul_prom, prometheus_client, sys\n"
        "worker = consul_prom.Worker(service='shop', dir=sys.argv[1], address='127.0.0.1')\n"
        "worker.start()\n"
        "print(prometheus_client.generate_latest().decode())\n"
        "worker.stop()\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        page = subprocess.check_output([sys.executable, "-c", program, f"{folder}/slots"], text=True, timeout=60)
    kinds = dict(re.findall(r"^# TYPE (consul_prom_\w+) (\w+)$", page, re.MULTILINE))
    had = {name.removesuffix("_created") for name in kinds if not name.endswith("_created")}
    assert set(re.findall(r"`(consul_prom_\w+)`", README)) == had


def test_metrics_of_the_master(slot_directory: Path) -> None:
    """The metrics that are named are those that the masters' page has, the reasons and labels too."""
    MasterStats(slot_directory, "shop")
    page = generate_latest(MasterPage(slot_directory, "shop").registry()).decode()
    assert set(re.findall(r"`(gunicorn_\w+)`", README)) == set(re.findall(r"^# TYPE (\w+)", page, re.MULTILINE))
    (reasons,) = re.findall(r"by `reason`: (.*?);", README, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", reasons)) == set(re.findall(r'reason="(\w+)"', page))


@pytest.fixture(scope="module")
def queries() -> list[str]:
    """The PromQL of the table."""
    table = README.split("| question | PromQL |")[1].split("\n\n")[0]
    return re.findall(r"\| `(.+)` \|", table)


def test_queries(queries: list[str]) -> None:
    """Every query of the table gives a result for a shop that is asked."""
    assert len(queries) >= 5
    hooks = ["-c=python:consul_prom.gunicorn"]
    assert hooks[0].replace("=", " ") in README
    with (
        Consul() as consul,
        Gunicorn(
            workers=2, settings={"CONSUL_HTTP_ADDR": consul.url, "CONSUL_PROM_SERVICE": "shop"}, options=hooks
        ) as shop,
    ):
        scrape = scrape_config.prometheus(load({"service": "shop", "consul_http_addr": consul.url}, environ={}))
        with Prometheus(scrape) as prometheus:

            def all_answer() -> bool:
                shop.get("/fire")
                shop.call("/fail")
                return all(prometheus.query(query) for query in queries)

            wait_until(all_answer, within=60, what="a result for every query", every=0.5)


def test_is_short() -> None:
    """The first screen ends before 40 lines, and all of it before 350."""
    lines = README.splitlines()
    assert next(number for number, line in enumerate(lines) if line.startswith("## ")) <= 40
    assert len(lines) <= 350


def test_files_are_there() -> None:
    """Every file that is named or linked is there."""
    table = README.split("| in `deploy/` | |")[1].split("\n\n")[0]
    named = [f"deploy/{name}" for row in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    linked = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert len(named) >= 8
    for name in (*named, *linked):
        assert (ROOT / name).exists(), name


def test_changes() -> None:
    """The version is the package's."""
    assert consul_prom.__version__ in subprocess.check_output(
        [sys.executable, "-m", "consul_prom", "--version"], text=True, cwd=ROOT, timeout=60
    )


def _leaves(command: object, prefix: str = "") -> list[str]:
    if not isinstance(command, Group):
        return [prefix.strip()]
    context = Context(command)
    found = [(name, command.get_command(context, name)) for name in command.list_commands(context)]
    return [leaf for name, child in found for leaf in _leaves(child, f"{prefix} {name}")]
