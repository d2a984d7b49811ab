"""A slot is one small integer of a service and directory, held by a file lock for as long as its process lives.

The kernel ends the lock with the process, however that ends. Lock files stay: unlinking one would part its waiters
over two inodes. filelock closes the descriptor in every forked child, so that a child never keeps its parent's slot.
"""

import errno
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from filelock import FileLock, Timeout

from consul_prom.errors import SlotError
from consul_prom.process.identity import is_gone, process_identity
from consul_prom.slots.directory import directory_id, prepare

Lock = FileLock
MASTER: Final = -1
"""The slot whose holder is the caretaker; its entry is the page of Gunicorn's masters."""
MOST_SLOTS: Final = 4096
PATIENCE: Final = 0.1
TOUCH: Final = 3600.0
_ADOPTED, _WANTED = "adopted", "wanted"


@dataclass(frozen=True, slots=True)
class Slot:
    """A held slot: `number`, and the `directory` with its random `directory_id`, which ends in the entry's meta."""

    number: int
    directory: Path
    directory_id: str
    lock: FileLock

    def occupy(self, hosts: Sequence[str] = ()) -> None:
        """Note who holds the slot, and at which addresses the agent is, for those who find it abandoned."""
        _note(self.lock, " ".join((str(os.getpid()), str(process_identity(os.getpid())), *hosts)))

    def adopt(self) -> None:
        """Note that no worker lives in the slot: we only keep it until one asks for it, which `wanted` tells."""
        self.occupy([_ADOPTED])

    @property
    def wanted(self) -> bool:
        """Whether a newborn asks for the slot that we have adopted."""
        note = _read(Path(self.lock.lock_file))
        return bool(note and note.wanted)

    @property
    def note_size(self) -> int:
        """The size of the note in bytes, which grows when a newborn asks; much cheaper than `wanted`."""
        return os.fstat(_descriptor(self.lock)).st_size

    def abandon(self) -> None:
        """Note that the slot may have an entry, where its agent is, and that nobody is behind it."""
        hosts = self.note.hosts if self.note else ()
        _note(self.lock, " ".join(("0", str(process_identity(os.getpid())), *hosts)))

    @property
    def note(self) -> "OwnerRecord | None":
        """What the slot's file says of who may have left an entry: the last holder that did not settle."""
        return _read(Path(self.lock.lock_file))

    @property
    def intact(self) -> bool:
        """Whether the file that we hold is still the one at its path: a wiped directory lets others lock anew.

        Asked from time to time, it keeps the directory from those who remove what nobody touched for days (tmpfiles.d).
        """
        try:
            held = os.fstat(_descriptor(self.lock))
        except OSError:  # the lock was released
            return False
        with suppress(OSError):
            if time.time() - held.st_mtime > TOUCH:
                os.utime(_descriptor(self.lock))
                os.utime(self.directory / "id")
        try:
            seen = Path(self.lock.lock_file).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # a directory that cannot be read is no other one, and nobody can lock anew in it
            return True
        return (held.st_dev, held.st_ino) == (seen.st_dev, seen.st_ino)

    @property
    def boot(self) -> str:
        """Which boot of the system this is; empty where the system does not tell."""
        return (process_identity(os.getpid()) or "").partition(".")[0]

    def settle(self) -> None:
        """Note that the slot has no entry any more, so that nobody need look for one when its process is gone."""
        _note(self.lock, "")

    def release(self) -> None:
        """Give the slot up; does nothing in a forked child, which never held it."""
        with suppress(RuntimeError):  # filelock refuses a lock inherited over a fork
            self.lock.release(force=True)


def acquire(directory: Path, service: str, *, prefer: int = 0) -> Slot:
    """The smallest slot of *service* in *directory* that no live process holds, or *prefer* where that is free.

    Raises:
        SlotError: the directory cannot be used; the message names CONSUL_PROM_DIR and says why.
    """
    try:
        identity, noted_by = prepare(directory), time.monotonic() + PATIENCE
        for number in (prefer, *range(MOST_SLOTS)):
            lock = _try_patiently(directory, service, number, noted_by=noted_by)
            if lock is not None:
                slot = Slot(number, directory, identity, lock)
                slot.occupy()
                return slot
    except OSError as error:
        reason, culprit = error.strerror or str(error), str(error.filename or directory)
        what = reason if culprit == str(directory) else f"{reason}: {culprit}"
        raise SlotError(f"CONSUL_PROM_DIR={str(directory)!r} cannot be used: {what}") from error
    raise SlotError(f"CONSUL_PROM_DIR={str(directory)!r}: all {MOST_SLOTS} slots of {service!r} are held")


def place(number: int) -> str:
    """A slot as IDs, instances and files name it."""
    return "master" if number == MASTER else str(number)


def path_of(directory: Path, service: str, number: int) -> Path:
    """The lock file of a slot."""
    return directory / f"{service}.{place(number)}.lock"


def try_slot(directory: Path, service: str, number: int) -> Slot | None:
    """A slot whose worker is gone, or None where a live process holds it. What its file says stays as it is.

    That of number MASTER makes one worker of *service* and *directory* the caretaker.
    """
    lock = _try(path_of(directory, service, number))
    return Slot(number, directory, directory_id(directory) or "", lock) if lock else None


@contextmanager
def alone(directory: Path, service: str) -> Iterator[None]:
    """For as long as this lasts, which must be a moment, no other process of *service* is in here."""
    lock = FileLock(directory / f"{service}.masters", mode=0o600, thread_local=False, fallback_to_soft=False)
    try:
        with lock.acquire(timeout=PATIENCE):
            yield
    except Timeout as error:
        raise SlotError(f"CONSUL_PROM_DIR={str(directory)!r}: {lock.lock_file} is held by somebody") from error


class StaleSlot(NamedTuple):
    """A slot whose last process, *pid*, is gone and may have left an entry, in the agent at one of *hosts*."""

    service: str
    number: int
    pid: int
    hosts: tuple[str, ...]


def remains(directory: Path, service: str = "*") -> list[StaleSlot]:
    """Where to look for what the dead of *service*, or of all, left. Takes no lock: a newborn might stumble on it.

    It is no proof: that is the slot's lock.
    """
    found, gone = [], cache(is_gone)  # the caretaker holds all adopted slots, which may be some hundred
    for path in sorted(directory.glob(f"{service}.*.lock")):
        whose, number, _ = path.name.split(".", 2)
        note = _read(path)
        if note and gone(note.pid, note.identity) and (number.isdecimal() or number == place(MASTER)):
            found.append(StaleSlot(whose, int(number) if number.isdecimal() else MASTER, note.pid, note.hosts))
    return found


def last_change(directory: Path) -> int:
    """When a file last came, went or was replaced, in ns; 0 where there is no directory.

    A worker that takes over a ledger replaces a file, and so does a master that has something to say.
    """
    with suppress(OSError):
        return directory.stat().st_mtime_ns
    return 0


class Survey(NamedTuple):
    """How many slots of a service have a worker, as their lock files say, and the numbers of those that have none."""

    inhabited: int
    vacant: list[int]


def survey(directory: Path, service: str) -> Survey:
    """Takes no lock, and is no proof."""
    inhabited, vacant = 0, []
    for path in directory.glob(f"{service}.*.lock"):
        number, note = path.name.split(".")[1], _read(path)
        if number.isdecimal():
            if note and note.lives:
                inhabited += 1
            else:
                vacant.append(int(number))
    return Survey(inhabited, sorted(vacant))


def abandoned(directory: Path, service: str) -> list[int]:
    """The numbers of a service's slots that may have entries of the dead."""
    return sorted(it.number for it in remains(directory, service) if it.number != MASTER)


def _try(path: Path) -> FileLock | None:
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))  # filelock would make it, for all
    lock = FileLock(path, mode=0o600, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def _try_patiently(directory: Path, service: str, number: int, *, noted_by: float) -> FileLock | None:
    """Who holds the lock of a slot without a worker sweeps up, or has adopted it, and gives it up at once if asked.

    Until *noted_by* one that says nothing of its holder may be such a slot too.
    """
    path, ends_at = path_of(directory, service, number), time.monotonic() + PATIENCE
    while (lock := _try(path)) is None:
        note, now = _read(path), time.monotonic()
        if now > ends_at or (note.lives if note else now > noted_by):
            return None
        if note and note.adopted and not note.wanted:
            _ask_for(path)
        time.sleep(0.005)
    return lock


def _ask_for(path: Path) -> None:
    """A full disk, or a directory that was wiped, costs no more than this slot: a newborn waits, and takes the next."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.write(descriptor, f" {_WANTED}".encode())
        finally:
            os.close(descriptor)


def _note(lock: FileLock, text: str) -> None:
    """A full disk keeps nobody from a slot: what is not noted is found by the slot's next worker."""
    with suppress(OSError):
        os.ftruncate(_descriptor(lock), 0)
        os.pwrite(_descriptor(lock), text.encode(), 0)


class OwnerRecord(NamedTuple):
    """What a lock file says of the process that holds it, or held it at last."""

    pid: int
    identity: str
    words: tuple[str, ...]

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(word for word in self.words if word not in {_ADOPTED, _WANTED})

    @property
    def adopted(self) -> bool:
        return _ADOPTED in self.words

    @property
    def wanted(self) -> bool:
        return self.adopted and _WANTED in self.words

    @property
    def lives(self) -> bool:
        """Whether a worker lives in the slot."""
        return not self.adopted and not self.is_dead

    @property
    def is_dead(self) -> bool:
        """Whether the process is gone, as far as can be seen from here."""
        return is_gone(self.pid, self.identity)


def _read(path: Path) -> OwnerRecord | None:
    try:
        pid, identity, *words = path.read_text(encoding="ascii").split()
        return OwnerRecord(int(pid), identity, tuple(words))
    except (OSError, ValueError):
        return None


def _descriptor(lock: FileLock) -> int:
    descriptor = lock._context.lock_file_fd  # noqa: SLF001  # filelock tells its descriptor in no other way
    return -1 if descriptor is None else descriptor
