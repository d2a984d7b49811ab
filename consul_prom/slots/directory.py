"""The directory of slots: create it, refuse an unsafe one, and read its random id."""

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from consul_prom.errors import SlotError


def directory_id(directory: Path) -> str | None:
    """The random id of a directory, or None where there is none (any more)."""
    try:
        return (directory / "id").read_text(encoding="ascii").strip() or None
    except (OSError, ValueError):
        return None


def prepare(directory: Path) -> str:
    """Make the directory and its id where they are missing; refuse one that others could tamper with.

    Raises OSError or SlotError.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    found = directory.lstat()
    name = f"CONSUL_PROM_DIR={str(directory)!r}"
    if stat.S_ISLNK(found.st_mode):
        raise SlotError(f"{name} is a symbolic link; name the directory itself")
    if not stat.S_ISDIR(found.st_mode):
        raise SlotError(f"{name} is not a directory")
    if found.st_uid != os.geteuid():
        raise SlotError(f"{name} belongs to uid {found.st_uid}, not to ours ({os.geteuid()}); each user needs its own")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        remedy = "name one below it, or, if it is ours alone, chmod 0700"  # it may well be /tmp
        raise SlotError(f"{name} has mode {mode:04o}: others can get at it; {remedy}")
    return directory_id(directory) or _new_id(directory)


def _new_id(directory: Path) -> str:
    """Written aside and linked, so that of several first workers one wins and nobody reads half an id."""
    aside = directory / f"id.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        with aside.open("x", encoding="ascii") as file:
            file.write(secrets.token_hex(8))
            file.flush()
            os.fsync(file.fileno())  # an id that is empty after a power loss would shut the directory for ever
        with suppress(FileExistsError):
            os.link(aside, directory / "id")
    except OSError as error:
        error.filename = str(directory)  # the name aside is random, and a lasting failure has to keep its sentence
        raise
    finally:
        with suppress(OSError):
            aside.unlink()
    identity = directory_id(directory)
    if identity is None:
        raise SlotError(f"CONSUL_PROM_DIR={str(directory)!r} does not keep the file 'id' that we wrote")
    return identity
