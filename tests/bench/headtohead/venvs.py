"""A Python for each contender: the bench's own, or one of a venv that is made once and kept in the user's cache."""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.headtohead.contender import Contender, Unavailable
from tests.services.binaries import cache_folder
from tests.services.building import announce


def python(contender: Contender) -> Path:
    """Its interpreter.

    Raises:
        Unavailable: its packages cannot be installed.
    """
    if not contender.requirements:
        return Path(sys.executable)
    digest = hashlib.sha256("\0".join([sys.version, *contender.requirements]).encode()).hexdigest()
    folder = cache_folder() / "venvs" / digest[:16]
    if not folder.exists():
        announce(f"Making a venv with {', '.join(contender.requirements)}, only this once (kept in {folder}).")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="making-") as fresh:
            made = Path(fresh, "venv")
            _run([sys.executable, "-m", "venv", str(made)])
            pip = [str(made / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            _run([*pip, *contender.requirements])
            made.rename(folder)  # its python finds it by where it is; only scripts would not, and none is used
    return folder / "bin/python"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise Unavailable(f"{' '.join(command[1:])}: {lines[-1]}")
