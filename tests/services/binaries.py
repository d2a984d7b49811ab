"""Finding the real programs: environment variable, cache, PATH, or a build."""

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NoReturn

import pytest

from tests.services.building import CONSUL, PROMETHEUS, Recipe, ServiceUnavailable, announce, build

RECIPES: Mapping[str, Recipe] = {"consul": CONSUL, "prometheus": PROMETHEUS, "promtool": PROMETHEUS}


def require(name: str) -> Path:
    """Return the program's path, or end the test: by a skip, or by a failure if TEST_REQUIRE_SERVICES=1."""
    if "PYTEST_VERSION" not in os.environ:  # a bench run by hand: nothing has built the program before
        return find(name)
    try:
        found = _present(name, environ=os.environ)
    except ServiceUnavailable as problem:
        _give_up(str(problem))
    return found or _give_up(f"{name} could not be built; the first lines of this run say why")


def describe(names: Iterable[str], *, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return a line for each program: where it is, or how long its build will take and where it will be kept."""
    lines = []
    for name in names:
        try:
            found = _present(name, environ=environ)
        except ServiceUnavailable as problem:
            lines.append(f"{name}: {problem}")
            continue
        recipe = RECIPES[name]
        missing = (
            f"not built yet; a build takes about {recipe.minutes} minutes on two cores, only once, "
            f"and is kept in {_kept(recipe, environ)}"
        )
        lines.append(f"{name}: {found or missing}")
    return lines


def prepare(names: Iterable[str], *, say: Callable[[str], None]) -> None:
    """Find or build the programs before the first test, and *say* what happens."""
    for name in names:
        try:
            find(name, say=say)
        except ServiceUnavailable as problem:
            say(f"{name} is unavailable: {problem}")


def find(
    name: str,
    *,
    environ: Mapping[str, str] = os.environ,
    say: Callable[[str], None] = announce,
) -> Path:
    """Path of "consul", "prometheus" or "promtool".

    Raises:
        ServiceUnavailable: the variable names no program, or the build failed.
    """
    recipe = RECIPES[name]
    if found := _present(name, environ=environ):
        return found
    build(recipe, into=_kept(recipe, environ), environ=environ, say=say)
    return _kept(recipe, environ) / name


def cache_folder(*, environ: Mapping[str, str] = os.environ) -> Path:
    """Our folder in the user's cache."""
    home = environ.get("HOME") or Path.home()
    return Path(environ.get("XDG_CACHE_HOME") or Path(home, ".cache")) / "consul-prom"


def version_text(program: str | Path) -> str:
    """What the program says about its version; empty if it cannot."""
    argument = "version" if Path(program).name.startswith("consul") else "--version"
    try:
        done = subprocess.run([program, argument], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def _present(name: str, *, environ: Mapping[str, str]) -> Path | None:
    recipe = RECIPES[name]
    if explicit := environ.get(variable := f"{name.upper()}_BIN"):
        if not _executable(Path(explicit)):
            raise ServiceUnavailable(f"{variable}={explicit} is not an executable file")
        return Path(explicit)
    if _executable(kept := _kept(recipe, environ) / name):
        return kept
    installed = shutil.which(name, path=environ.get("PATH", ""))
    return Path(installed) if installed and _says(installed, version=recipe.version) else None


def _kept(recipe: Recipe, environ: Mapping[str, str]) -> Path:
    return cache_folder(environ=environ) / recipe.key


@functools.cache
def _says(program: str, *, version: str) -> bool:
    return re.search(rf"(?<![\d.]){re.escape(version)}(?![\w.+-])", version_text(program)) is not None


def _executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _give_up(reason: str) -> NoReturn:
    if os.environ.get("TEST_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{reason} (and TEST_REQUIRE_SERVICES=1 forbids to skip)", pytrace=False)
    pytest.skip(f"REAL SERVICE MISSING, NOTHING WAS TESTED: {reason}")
