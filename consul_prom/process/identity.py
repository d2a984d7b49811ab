"""The identity of a process: boot, pid namespace and start time tell it from a later process with the same pid."""

import os
import time
from functools import cache
from pathlib import Path


def is_gone(pid: int, identity: str) -> bool:
    """Whether the process that had *identity* is gone, as far as can be seen from here."""
    try:
        (boot, namespace, _), here = identity.split("."), _here(Path("/proc"))
    except (OSError, ValueError):
        return False
    return boot != here[0] or (namespace == here[1] and process_identity(pid) != identity)


def process_identity(pid: int, *, proc: Path = Path("/proc")) -> str | None:
    """``<boot id>.<pid namespace>.<start ticks>``: what tells a process from a later one of the same pid.

    None where the process is gone (a zombie is), or the system has no /proc to tell.
    """
    try:
        boot, namespace = _here(proc)
        status = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *numbers = status.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state in "ZX" else f"{boot}.{namespace}.{numbers[18]}"


def process_age(identity: str | None) -> float:
    """Seconds since the process of *identity* began; 0 where the system does not tell."""
    try:
        ticks = int((identity or "").split(".")[2])
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    except (AttributeError, IndexError, ValueError, OSError):
        return 0.0


def _here(proc: Path) -> tuple[str, str]:
    """The boot and the pid namespace that we are in."""
    return _boot(proc), os.readlink(f"{proc}/self/ns/pid").removeprefix("pid:[").removesuffix("]")  # noqa: PTH115


@cache
def _boot(proc: Path) -> str:
    return (proc / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
