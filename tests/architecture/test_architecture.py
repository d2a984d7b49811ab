"""The direction of imports, the owners of libraries, what a name costs to import, and a sentence for every test."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

import consul_prom
from tests import ROOT

PACKAGE = ROOT / "consul_prom"

# A module imports only from its own folder and from lower ranks. Folders of the same rank never import each other.
RANKS = {
    0: ["errors", "logs"],
    1: ["settings", "process"],
    2: ["slots", "ledger"],
    3: ["consul", "exposition", "server", "http_metrics"],
    4: ["worker", "generate"],
    5: ["aiohttp", "asgi", "wsgi", "celery", "discovery", "gunicorn", "devagent"],
    6: ["cli"],
    7: ["__init__", "__main__"],
}
RANK_OF = {unit: rank for rank, units in RANKS.items() for unit in units}

OWNERS = {
    "consul": {"consul"},
    "prometheus_async": {"http_metrics", "discovery"},
    "prometheus_client": set(RANK_OF),
    "aiohttp": {"consul", "server", "aiohttp", "devagent"},
    "yarl": {"consul"},
    "yaml": {"server"},
    "bcrypt": {"server"},
    "filelock": {"slots"},
    "isal": {"exposition"},
    "click": {"cli"},
    "rich": {"cli"},
    "gunicorn": {"cli"},
}
OWNERS_FOR_TYPES = {"gunicorn": {"gunicorn"}}
OWNERS_OF_INTERNALS = {"prometheus_client": {"ledger", "exposition"}}
OWNER_OF_THE_ENVIRONMENT = "settings"


class Import(NamedTuple):
    """One name that a module imports; `name` is empty for ``import module``."""

    module: str
    name: str
    line: int
    for_types: bool


def _files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _unit(file: Path) -> str:
    """Return the module or folder of *file* as the table names it."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _imports(file: Path) -> Iterator[Import]:
    """All of them, also those inside functions and those for type checking only."""
    tree = _tree(file)
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, "", node.lineno, node in for_types) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno}: a relative import"
            module = node.module or ""
            yield from (Import(module, alias.name, node.lineno, node in for_types) for alias in node.names)


def _our_unit(found: Import) -> str | None:
    """What of ours is imported, or None for a library's; the version is a fact, not a module."""
    top, *rest = found.module.split(".")
    if top != "consul_prom":
        return None
    if rest:
        return rest[0]
    if found.name == "__version__":
        return None
    return found.name if (PACKAGE / f"{found.name}.py").exists() or (PACKAGE / found.name).is_dir() else "__init__"


def test_every_module_has_a_rank() -> None:
    """Every module and folder has a rank."""
    assert {_unit(file) for file in _files()} <= set(RANK_OF)


@pytest.mark.parametrize("file", _files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down(file: Path) -> None:
    """A module imports only from its own folder and from lower ranks."""
    mine = _unit(file)
    for found in _imports(file):
        theirs = _our_unit(found)
        if theirs is None or (theirs == mine and (PACKAGE / mine).is_dir()):
            continue
        assert RANK_OF[theirs] < RANK_OF[mine], f"{mine} imports {theirs} in line {found.line}"


def test_dev_agent_stands_alone() -> None:
    """The dev agent imports nothing of ours."""
    for file in (PACKAGE / "devagent").glob("*.py"):
        assert {_our_unit(found) for found in _imports(file)} <= {None, "devagent"}, file.name


def test_registrar_never_imports_client() -> None:
    """The registrar owns the protocol of what it asks of an agent, and knows no client."""
    imported = {found.module for found in _imports(PACKAGE / "consul" / "registrar.py")}
    assert "consul_prom.consul.client" not in imported


@pytest.mark.parametrize("file", _files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_libraries_have_owners(file: Path) -> None:
    """A library is imported by its owners only, and the insides of prometheus_client by few."""
    mine = _unit(file)
    for found in _imports(file):
        library = found.module.split(".")[0]
        if library in sys.stdlib_module_names or library == "consul_prom":
            continue
        where = f"{mine} imports {library} in line {found.line}"
        assert library in OWNERS, where
        assert mine in OWNERS[library] | (OWNERS_FOR_TYPES.get(library, set()) if found.for_types else set()), where
        if library in OWNERS_OF_INTERNALS:
            public = found.module in {library, f"{library}.core"} and not find_spec(f"{library}.{found.name}")
            inside = found.name.startswith("_") or not public
            assert not inside or mine in OWNERS_OF_INTERNALS[library], where


def test_environment_has_one_owner() -> None:
    """Only the settings read the process' environment."""
    for file in _files():
        nodes = list(ast.walk(_tree(file)))
        attributes = {
            node.attr
            for node in nodes
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
        }
        named = {found.name for found in _imports(file) if found.module == "os"}
        if _unit(file) != OWNER_OF_THE_ENVIRONMENT:
            assert not (attributes | named) & {"environ", "environb", "getenv", "getenvb", "putenv"}, file.name


def test_names_of_modules_say_something() -> None:
    """No module is a drawer for what has no place."""
    assert not {"utils", "helpers", "common", "base", "misc"} & {file.stem for file in _files()}


class TestPackage:
    """What ``import consul_prom`` gives, and costs."""

    def test_exports(self) -> None:
        """`__all__` is sorted, each of its names resolves, and each is a home of its own or here."""
        assert consul_prom.__all__ == sorted(consul_prom.__all__)
        for name in consul_prom.__all__:
            assert getattr(consul_prom, name) is not None
        assert consul_prom._HOMES.keys() | consul_prom._MODULES == set(consul_prom.__all__) - {"__version__"}

    def test_dir(self) -> None:
        """`dir()` lists the public names and nothing else, before and after their use."""
        for use in ("", "consul_prom.asgi, consul_prom.gunicorn, consul_prom.wsgi, consul_prom.setup"):
            assert _run(f"import consul_prom\n{use}\nprint(*dir(consul_prom))").split() == consul_prom.__all__

    def test_homes_are_right(self) -> None:
        """Each name is defined in the module that it is fetched from."""
        for name, home in consul_prom._HOMES.items():
            assert f"{getattr(consul_prom, name).__module__}.".startswith(f"{home}.")

    def test_star_import(self) -> None:
        """A star import gives exactly what is exported."""
        code = "from consul_prom import *; print(*sorted(name for name in dir() if name not in before))"
        assert _run("before = {*dir(), 'before'}\n" + code).split() == consul_prom.__all__

    def test_unknown_name(self) -> None:
        """A name that is not there is an AttributeError that says so."""
        with pytest.raises(AttributeError, match="module 'consul_prom' has no attribute 'nonsense'"):
            _ = consul_prom.nonsense
        with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
            exec("from consul_prom import nonsense", {})  # noqa: S102  # as a user would write it

    def test_is_lazy(self) -> None:
        """Importing the package imports no library, and a command pays for none of a worker's."""
        assert _libraries("import consul_prom; consul_prom.__version__") == set()

    def test_errors_are_cheap(self) -> None:
        """An exception of ours can be named without a library, too."""
        assert _libraries("from consul_prom import ConsulPromError, SettingsError") == set()

    def test_worker_imports_no_command_and_no_client(self) -> None:
        """A worker's modules import neither a command's libraries nor python-consul2, which imports requests."""
        found = _libraries("import consul_prom; consul_prom.setup, consul_prom.Worker")
        assert found >= {"aiohttp", "prometheus_client", "prometheus_async", "filelock"}
        assert not found & {"click", "rich", "pygments", "consul", "requests", "gunicorn", "yaml", "bcrypt"}

    def test_hooks_are_light(self) -> None:
        """Gunicorn's hooks import no aiohttp, which gevent must patch first."""
        assert "aiohttp" not in _libraries("import consul_prom.gunicorn")

    def test_running_worker_has_no_command(self, tmp_path: Path) -> None:
        """Nor does a worker that runs and talks to an agent; python-consul2 is there by then."""
        code = f"""
import time
import consul_prom
worker = consul_prom.Worker(service="shop", address="127.0.0.1", dir={str(tmp_path / "slots")!r}, stop_timeout=1,
                            consul_http_addr="127.0.0.1:1")
worker.start()
deadline = time.monotonic() + 20
while "consul.base" not in sys.modules and time.monotonic() < deadline:
    time.sleep(0.01)
worker.stop()
"""
        found = _libraries(code)
        assert "consul" in found
        assert not found & {"click", "rich", "pygments", "gunicorn", "yaml", "bcrypt"}


def test_every_test_has_a_sentence() -> None:
    """Every test says in one sentence what is true when it passes."""
    silent = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(_tree(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                sentence = (ast.get_docstring(node) or "").split("\n\n")[0]
                if not re.fullmatch(r"\S.*\.", sentence, re.DOTALL):
                    silent.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert silent == []


def _run(code: str) -> str:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + code],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _libraries(code: str) -> set[str]:
    """Which libraries are imported once *code* has run; what was there before does not count."""
    printed = _run(
        "import site\nbefore = set(sys.modules)\n"
        + code
        + "\nprint(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    return {name for name in printed.split() if name not in sys.stdlib_module_names and name != "consul_prom"}
