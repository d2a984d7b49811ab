"""The counters of a slot, in a mapped file: what was counted is the kernel's at once, and outlives its process.

The file is records, appended whole, each with its size and a checksum: a head (whose ledger, of which boot), families
(a metric's type, name, labels, buckets) and series. A series' record ends in its cells: doubles that change in place.
Its first cell says when it was last in use, its second when it was created; the values follow.

A take-over writes what is still wanted to a new file and renames it: this alone compacts, and until the rename the
old file is whole. If the new file cannot be written, the old one is continued. Nothing is synced to the disk: after a
power loss, another boot, a ledger is not continued.
"""

import errno
import json
import logging
import math
import mmap
import os
import stat
import struct
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple
from weakref import WeakSet

from consul_prom.errors import LedgerError

log = logging.getLogger(__name__)

SIZE: Final = 64 * 2**20
"""Of the mapping, once for all; the file is sparse."""
STEP: Final = 64 * 2**10
LARGE: Final = 4 * STEP
KEEP: Final = 24 * 3600.0
"""Seconds that a series which no process uses stays: long enough for rare ones to be seen by ``increase()``."""
MOST_UNUSED: Final = 10_000
RETRY: Final = 60.0
LONGEST_GAP: Final = 300.0
"""Seconds after which Prometheus takes a series for gone: nobody scrapes more seldom, so nobody was there meanwhile."""

MAGIC: Final = b"consul-prom ledger 2\n\0\0\0"
_HEAD, _FAMILY, _SERIES = range(3)
_START: Final = struct.Struct("=II")  # size, checksum of what follows up to the cells
_SUMMED: Final = struct.Struct("=HHI")  # kind, number of cells, length of the payload, which is padded to 8
_NUMBER: Final = struct.Struct("=I")
_TIMES: Final = struct.Struct("=dd")
_ZEROS: Final = bytes(8)
_BETWEEN: Final = b"\xff"  # in no UTF-8 text
IN_USE: Final = math.inf
NEVER: Final = math.inf
USED, CREATED, VALUES = range(3)
_PORT, _VACANT, _SCRAPED, _GAP = range(4)
_STATE: Final = struct.Struct("=dddd")
_CELL: Final = struct.Struct("=d")
_BEGIN: Final = 4096
"""Bytes in which the head stands."""


@dataclass(frozen=True, slots=True)
class Family:
    """A metric's identity: a ledger's series are continued only by a metric of the same."""

    kind: str
    name: str
    labelnames: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    documentation: str = field(default="", compare=False)
    unit: str = field(default="", compare=False)

    def __hash__(self) -> int:
        return hash(self.name)  # that of all fields would be half of a birth's cost

    @property
    def values(self) -> int:
        """How many: a counter's one; a summary's count and sum; a histogram's sum and buckets."""
        return {"counter": 1, "summary": 2}.get(self.kind, 1 + len(self.bounds))


Labels = tuple[str, ...]


class _Known(NamedTuple):
    """What the records of a family's series have in common."""

    family: Family
    number: bytes
    zeros: bytes


@dataclass(frozen=True, slots=True)
class Series:
    """What a file holds of one: when it was last in use (`IN_USE`: by the last process), created, and its values."""

    family: Family
    labels: Labels
    used: float
    created: float
    values: tuple[float, ...]
    cell: int = field(default=0, compare=False)
    """Where it stands in the file that it was read from."""

    @property
    def count(self) -> float:
        """A counter's value; how much a summary or a histogram observed."""
        return sum(self.values[1:]) if self.family.kind == "histogram" else self.values[0]


@dataclass(frozen=True, slots=True)
class State:
    """What stands beside a ledger's head, at *offset*, and changes in place.

    The `port` of its worker's endpoint; since when there is no worker, `vacant` (0: it may live, `NEVER`: let it be);
    when it was `scraped` at last, and the longest `gap` between two scrapes; times since 1970.
    """

    head: dict[str, Any]
    offset: int
    port: int = 0
    vacant: float = 0.0
    scraped: float = 0.0
    gap: float = 0.0


@dataclass(frozen=True, slots=True)
class Contents:
    """A ledger as it was read: its families by number, and where its last whole record ends.

    `torn` where the file ends in half a record.
    """

    head: dict[str, Any]
    series: list[Series]
    torn: bool
    families: dict[int, Family]
    end: int


_OPEN: Final[WeakSet["Ledger"]] = WeakSet()


class Ledger:
    """A slot's ledger, ours for as long as we hold the slot.

    `cells` is the whole file as doubles. `inherited` has the series that no metric of this process has claimed, by
    family and labels: the index of their first cell.
    """

    def __init__(self, path: Path, flags: int = os.O_CREAT | os.O_TRUNC) -> None:
        """An empty one in a new file, for its owner only."""
        self._descriptor = os.open(path, os.O_RDWR | flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(self._descriptor, SIZE)
            self._bytes = memoryview(mmap.mmap(self._descriptor, SIZE))
        except OSError:
            self.close()
            raise
        _OPEN.add(self)
        self._end = self._allocated = self._state = 0
        self._shown = 0
        self._zeroing = False
        self._retry_at = 0.0
        self._families: dict[Family, _Known] = {}
        self._numbers = 0
        self.cells = self._bytes.cast("d")
        self.inherited: dict[Family, dict[Labels, int]] = defaultdict(dict)

    @classmethod
    def take_over(cls, path: Path, *, boot: str, instance: str, now: float | None = None) -> "Ledger":
        """Continue the ledger at *path*, or begin one. Only who holds the slot may.

        Raises:
            LedgerError: none can be written; the old one is gone then, because it would lag what is exposed.
        """
        head = {"boot": boot, "instance": instance}
        contents = _continued(path, head)
        series = _wanted(contents.series if contents else [], time.time() if now is None else now)
        state = peek(path)
        try:
            return cls._copy(path, head, series, state)
        except (OSError, LedgerError) as error:
            reason = _reason(error)
        try:
            if contents and state:
                ledger = cls._resume(path, contents, series, state)
                log.warning(
                    "%s is continued without being compacted, its copy cannot be written: %s. New series may live in "
                    "memory only (CONSUL_PROM_DIR)",
                    path,
                    reason,
                )
                return ledger
        except OSError as error:
            reason = _reason(error)
        discard(path)
        raise LedgerError(f"{path} cannot be written: {reason}; see CONSUL_PROM_DIR")

    @classmethod
    def _copy(cls, path: Path, head: dict[str, Any], series: list[Series], before: State | None) -> "Ledger":
        """A new file in place of that at *path*."""
        aside = path.with_name(path.name + ".new")
        ledger = None
        try:
            ledger = cls(aside)
            state = (before.port, 0, before.scraped, before.gap) if before else (0, 0, 0, 0)
            ledger._write(MAGIC + _record(_HEAD, json.dumps(head).encode(), _STATE.pack(*state)))
            ledger._state = (ledger._end - _STATE.size) // 8
            for one in series:
                cell = ledger.bear(one.family, one.labels, created=one.created, values=one.values, used=one.used)
                ledger.inherited[one.family][one.labels] = cell
            os.replace(aside, path)  # noqa: PTH105  # the tests stop at each call of os
        except (OSError, LedgerError):
            if ledger:
                ledger.close()
            discard(aside)
            raise
        return ledger

    @classmethod
    def _resume(cls, path: Path, contents: Contents, wanted: list[Series], state: State) -> "Ledger":
        """The file at *path* itself, whose *contents* go on where they stand. It needs no space."""
        ledger = cls(path, 0)
        for number, family in contents.families.items():
            ledger._families[family] = _known(family, number)
        ledger._numbers = max(contents.families, default=-1) + 1
        ledger._end = ledger._allocated = contents.end
        ledger._state = state.offset // 8
        rest = bytes(ledger._bytes[contents.end :]).rstrip(b"\0") if contents.torn else b""
        ledger._bytes[contents.end : contents.end + len(rest)] = bytes(len(rest))  # it was written, so it has its space
        used = {one.cell: one.used for one in wanted}
        for one in contents.series:
            ledger.cells[one.cell + USED] = used.get(one.cell, 0.0)
        for one in wanted:
            ledger.inherited[one.family][one.labels] = one.cell
        ledger.cells[ledger._state + _VACANT] = 0.0
        return ledger

    def bear(
        self, family: Family, labels: Labels, *, created: float, values: tuple[float, ...] = (), used: float = IN_USE
    ) -> int:
        """Append a series; the index of its first cell. Its values are 0 unless given.

        Raises:
            LedgerError: there is no room.
            UnicodeEncodeError: a label is not valid UTF-8, so that no page could show the series.
        """
        known = self._families.get(family) or self.introduce(family)
        payload = known.number + _BETWEEN.join([label.encode() for label in labels])
        numbers = struct.pack(f"={len(values)}d", *values) if values else known.zeros
        record = _record(_SERIES, payload, _TIMES.pack(used, created) + numbers)
        return (self._write(record) + len(record) - len(numbers)) // 8 - VALUES

    def claim(self, cell: int) -> None:
        """The series whose first cell is *cell* is in use, and will be inherited."""
        self.cells[cell + USED] = IN_USE

    def drop(self, cell: int) -> None:
        """It will not be inherited."""
        self.cells[cell + USED] = 0.0

    @property
    def used(self) -> int:
        """How many of the `cells` are written to."""
        return self._end // 8

    @property
    def port(self) -> int:
        """Where the slot is served, or was at last: who goes on there spares scrapers to look anew; 0 = nowhere yet."""
        return int(self.cells[self._state + _PORT])

    @port.setter
    def port(self, port: int) -> None:
        self.cells[self._state + _PORT] = port

    def scraped(self, now: float) -> None:
        """Note a scrape."""
        cells, state = self.cells, self._state
        gap = now - (cells[state + _SCRAPED] or now)
        if gap <= LONGEST_GAP:
            cells[state + _GAP] = max(cells[state + _GAP], gap)
        cells[state + _SCRAPED] = now
        self._shown = self._digest()

    @property
    def unscraped(self) -> bool:
        """Whether anything was counted since the last scrape was noted."""
        return self._shown != self._digest()

    def _digest(self) -> int:
        """Of all that changes but for the notes beside the head."""
        return zlib.crc32(self._bytes[8 * self._state + _STATE.size : self._end])

    def close(self) -> None:
        """Room is no longer to be had. The mapping stays for as long as somebody counts in it."""
        _OPEN.discard(self)
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def abandon(self) -> None:
        """The same in a forked child, where mmap's own descriptor shall not stay either: only its file tells which."""
        ours, null = os.fstat(self._descriptor), os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for entry in Path("/dev/fd").iterdir():
            with suppress(OSError):  # the listing's own is closed by now
                if os.path.samestat(os.fstat(int(entry.name)), ours):
                    os.dup2(null, int(entry.name), inheritable=False)
        os.close(null)
        self.close()

    def introduce(self, family: Family) -> "_Known":
        """Append a family, or its new help.

        Raises:
            LedgerError: there is no room.
        """
        known = self._families.get(family)
        if known is None or known.family.documentation != family.documentation:
            number = self._numbers  # no call between these two
            self._numbers = number + 1
            self._write(_record(_FAMILY, json.dumps({**asdict(family), "number": number}).encode()))
            known = self._families[family] = _known(family, number)
        return known

    def _write(self, record: bytes) -> int:
        """Append, with the rest zero: what a kill leaves of it fails its checksum. The offset of what was written."""
        size = len(record)
        while self._end + size > self._allocated:
            self._grow(self._end + size + STEP)
        # No call up to here: a birth by a signal handler or the garbage collector finds the room taken, or leaves it.
        start = self._end
        self._end = start + size
        self._bytes[start : start + size] = record
        return start

    def _grow(self, end: int) -> None:
        """Space is allocated before it is written to: a full disk is an error here, and a SIGBUS there."""
        if end > SIZE:
            raise LedgerError(f"it is full ({SIZE >> 20} MiB)")
        if self._zeroing or time.monotonic() < self._retry_at:
            raise LedgerError("there was no space for it just now")
        try:
            if not _allocate(self._descriptor, self._allocated, end):
                self._zeroing = True  # a birth by a signal handler would be written over
                _write_zeros(self._descriptor, self._allocated, end)
        except OSError as error:
            self._retry_at = time.monotonic() + RETRY
            raise LedgerError(_reason(error)) from error
        finally:
            self._zeroing = False
        self._allocated = max(self._allocated, end)


def _after_fork_in_child() -> None:
    for ledger in list(_OPEN):
        ledger.abandon()


os.register_at_fork(after_in_child=_after_fork_in_child)


def read(path: Path) -> Contents | None:
    """The ledger at *path*, whole up to the first record that is not; None where there is none of our making."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or not found.st_size:
            return None
        with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as data:
            return _parse(data) if data[: len(MAGIC)] == MAGIC else None
    finally:
        os.close(descriptor)


def is_large(path: Path) -> bool:
    """Whether continuing the ledger at *path* takes longer than a start may: from some 2,000 series on."""
    try:
        return 512 * path.stat().st_blocks > LARGE
    except OSError:
        return False


def peek(path: Path) -> State | None:
    """What stands beside the head of the ledger at *path*; None where there is none of our making."""
    with suppress(OSError, ValueError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            begin = os.read(descriptor, _BEGIN)
        finally:
            os.close(descriptor)
        if begin.startswith(MAGIC):
            for kind, payload, cells, end in _records(begin, len(MAGIC)):
                if kind == _HEAD and len(cells) == _STATE.size // 8:
                    return State(json.loads(payload), end - _STATE.size, int(cells[0]), *cells[1:])
                break
    return None


def vacate(path: Path, state: State, since: float) -> None:
    """Note in a ledger, whose slot we hold, since when it has no worker.

    Raises OSError.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.pwrite(descriptor, _CELL.pack(since), state.offset + 8 * _VACANT)
    finally:
        os.close(descriptor)


def ledger_path(directory: Path, service: str, slot: int) -> Path:
    return directory / f"{service}.{slot}.ledger"


def in_directory(directory: Path, service: str = "") -> list[tuple[Path, Contents]]:
    """The ledgers of *directory*, of all services or one, that can be read."""
    found = []
    for path in sorted(directory.glob(f"{service or '*'}.*.ledger")):
        with suppress(OSError, ValueError, LookupError, TypeError):
            contents = read(path)
            if contents:
                found.append((path, contents))
    return found


def discard(path: Path) -> None:
    """Nobody shall continue the ledger at *path*: its slot's counters were exposed without it."""
    with suppress(OSError):
        os.unlink(path)  # noqa: PTH108  # the tests stop at each call of os


def _continued(path: Path, head: dict[str, Any]) -> Contents | None:
    """What the ledger at *path* holds, if it is of this boot and instance; else one sentence, unless there is none."""
    try:
        contents = read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s is not continued, counters start anew: %s", path, _reason(error))
        return None
    except (ValueError, LookupError, TypeError):
        log.warning("%s is not continued, counters start anew: it holds a record that we do not write", path)
        return None
    if contents is None:
        log.warning("%s is not continued, counters start anew: it is not ours, or another version's", path)
        return None
    if contents.head != head:
        log.info("%s is not continued, counters start anew: it is of another boot or host name", path)
        return None
    if contents.torn:
        log.warning("%s ends in half a record; what stands before it is continued", path)
    return contents


def _wanted(series: list[Series], now: float) -> list[Series]:
    """Without the series that are unused for too long, the oldest first where they are too many; in their order."""
    unused = sorted(one.used for one in series if one.used != IN_USE and one.used >= now - KEEP)
    oldest = unused[-MOST_UNUSED] if len(unused) >= MOST_UNUSED else now - KEEP
    return [
        one if one.used <= now else Series(one.family, one.labels, now, one.created, one.values, one.cell)
        for one in series
        if one.used >= oldest
    ]


def _known(family: Family, number: int) -> _Known:
    return _Known(family, _NUMBER.pack(number), bytes(8 * family.values))


def _record(kind: int, payload: bytes, cells: bytes = b"") -> bytes:
    length = len(payload)
    summed = _SUMMED.pack(kind, len(cells) // 8, length) + payload
    padding = -length % 8
    size = _START.size + len(summed) + padding + len(cells)
    return _START.pack(size, zlib.crc32(summed)) + summed + _ZEROS[:padding] + cells


def _parse(data: mmap.mmap) -> Contents:
    head: dict[str, Any] = {}
    families: dict[int, Family] = {}
    helps: dict[Family, str] = {}
    found: dict[tuple[Family, Labels], tuple[int, tuple[float, ...]]] = {}
    offset = len(MAGIC)
    for kind, payload, cells, end in _records(data, offset):
        offset = end
        if kind == _HEAD:
            head = json.loads(payload)
        elif kind == _FAMILY:
            row = json.loads(payload)
            row.update(labelnames=tuple(row["labelnames"]), bounds=tuple(row["bounds"]))
            number = row.pop("number")
            latest = families[number] = Family(**row)
            helps[latest] = latest.documentation
        else:
            family = families[_NUMBER.unpack_from(payload)[0]]
            texts = payload[_NUMBER.size :].split(_BETWEEN) if family.labelnames else ()
            if cells[USED] > 0:  # what was removed and born again stands further on
                with suppress(UnicodeDecodeError):  # no page can show it; an earlier version of ours wrote it
                    found[family, tuple([text.decode() for text in texts])] = end // 8 - len(cells), cells
    latest_of = {family: replace(family, documentation=text) for family, text in helps.items()}
    series = [
        Series(latest_of[family], labels, cells[USED], cells[CREATED], cells[VALUES:], cell)
        for (family, labels), (cell, cells) in found.items()
    ]
    return Contents(head, series, any(data[offset : offset + _START.size]), families, offset)


def _records(data: mmap.mmap | bytes, offset: int) -> Iterator[tuple[int, bytes, tuple[float, ...], int]]:
    """Kind, payload, cells and end of each record up to the first that is not whole."""
    head = _START.size + _SUMMED.size
    while offset + head <= len(data):
        size, checksum = _START.unpack_from(data, offset)
        kind, cells, length = _SUMMED.unpack_from(data, offset + _START.size)
        body = offset + head
        end = body + length + -length % 8 + 8 * cells
        if not size or end != offset + size or end > len(data):
            return
        if zlib.crc32(data[offset + _START.size : body + length]) != checksum:
            return
        yield kind, data[body : body + length], struct.unpack_from(f"={cells}d", data, end - 8 * cells), end
        offset = end


def _allocate(descriptor: int, start: int, end: int) -> bool:
    """False where the system or the file system knows no way; what is allocated already is as it was."""
    try:
        if start < end:  # else a birth by a signal handler has seen to it
            os.posix_fallocate(descriptor, start, end - start)
    except AttributeError:
        return False
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL}:
            raise
        return False
    return True


def _write_zeros(descriptor: int, start: int, end: int) -> None:
    while start < end:
        start += os.pwrite(descriptor, bytes(min(end - start, STEP)), start)


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
