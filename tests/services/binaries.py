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
    """Path of the program, or the end of the test: a skip, and a failure with TEST_REQUIRE_SERVICES=1."""
    outcome = _outcome(name)
    return outcome if isinstance(outcome, Path) else _give_up(outcome)


def prepare(names: Iterable[str]) -> None:
    """Find or build the programs now, outside any test; `require` then answers at once, also about a failure."""
    for name in names:
        if isinstance(problem := _outcome(name), str):
            announce(problem)


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
    if explicit := environ.get(variable := f"{name.upper()}_BIN"):
        if not _executable(Path(explicit)):
            raise ServiceUnavailable(f"{variable}={explicit} is not an executable file")
        return Path(explicit)
    kept = cache_folder(environ=environ) / recipe.key
    if _executable(kept / name):
        return kept / name
    if (installed := shutil.which(name, path=environ.get("PATH", ""))) and _says(installed, version=recipe.version):
        return Path(installed)
    build(recipe, into=kept, environ=environ, say=say)
    return kept / name


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


def _says(program: str, *, version: str) -> bool:
    return re.search(rf"(?<![\d.]){re.escape(version)}(?![\w.+-])", version_text(program)) is not None


def _executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


@functools.cache
def _outcome(name: str) -> Path | str:
    """Path, or why there is none: a failed build is not tried again for the next test."""
    try:
        return find(name)
    except ServiceUnavailable as problem:
        return f"{name} is unavailable: {problem}"


def _give_up(reason: str) -> NoReturn:
    if os.environ.get("TEST_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{reason} (and TEST_REQUIRE_SERVICES=1 forbids to skip)", pytrace=False)
    pytest.skip(f"REAL SERVICE MISSING, NOTHING WAS TESTED: {reason}")
