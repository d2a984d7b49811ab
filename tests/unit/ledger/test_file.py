"""The ledger's file: what is continued, what is not, and that a fault leaves the last whole state or none."""

import errno
import logging
import os
import stat
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from consul_prom.errors import LedgerError
from consul_prom.ledger import file as ledger_file
from consul_prom.ledger.file import IN_USE, KEEP, MOST_UNUSED, SIZE, STEP, VALUES, Family, Ledger, Series, read

HITS = Family("counter", "hits", ("route",), documentation="Hits.")
SECONDS = Family("histogram", "seconds", (), (0.5, float("inf")), unit="")
ODD = ("é", "", "\0", "\x7f", "ÿ\n", "🦜")
NOW = 1_000_000.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shop.0.ledger"


def take_over(path: Path, **changed: Any) -> Ledger:
    return Ledger.take_over(path, **{"boot": "b1", "instance": "web-1:0", "now": NOW, **changed})


def count(book: Ledger, family: Family, *labels: str, value: float = 1.0) -> int:
    cell = book.inherited[family].pop(labels, None)
    if cell is None:
        cell = book.bear(family, labels, created=5.0)
    book.claim(cell)
    book.cells[cell + VALUES] += value
    return cell


def count_many(book: Ledger) -> None:
    for number in range(10_000):
        count(book, HITS, f"/{number}")


def found(path: Path) -> dict[tuple[str, ...], Series]:
    contents = read(path)
    assert contents
    return {(series.family.name, *series.labels): series for series in contents.series}


def totals(path: Path) -> dict[tuple[str, ...], float]:
    return {key: series.values[0] for key, series in found(path).items()}


class TestTakeOver:
    """The slot's next worker."""

    def test_goes_on(self, path: Path) -> None:
        """Values, times of creation, families and labels of any Unicode survive a process that was killed."""
        wide = Family("counter", "wide", tuple("abcdef"), documentation="Ünïcode\n", unit="u")
        book = take_over(path)
        count(book, HITS, "/", value=3)
        count(book, SECONDS, value=0.25)
        count(book, wide, *ODD)
        again = take_over(path)
        assert again.inherited.keys() == {HITS, SECONDS, wide}
        assert next(family for family in again.inherited if family == wide).documentation == "Ünïcode\n"
        assert totals(path) == {("hits", "/"): 3, ("seconds",): 0.25, ("wide", *ODD): 1}
        assert {series.created for series in found(path).values()} == {5.0}
        count(again, HITS, "/")
        take_over(path)
        assert totals(path)["hits", "/"] == 4

    def test_label_that_is_no_text(self, path: Path) -> None:
        """A series of a label that UTF-8 cannot encode is not stored, and not continued where it was stored once."""
        book = take_over(path)
        with pytest.raises(UnicodeEncodeError):
            count(book, HITS, "\udcff")
        count(book, HITS, "?")
        count(book, HITS, "/")
        place = bytes(book._bytes[: book._end]).index(b"?")
        start = place - ledger_file._NUMBER.size - ledger_file._SUMMED.size - ledger_file._START.size
        book._bytes[place : place + 1] = b"\xed"  # as a lone surrogate begins
        summed = bytes(book._bytes[start + ledger_file._START.size : place + 1])
        size, _ = ledger_file._START.unpack_from(book._bytes, start)
        book._bytes[start : start + ledger_file._START.size] = ledger_file._START.pack(size, zlib.crc32(summed))
        assert totals(path) == {("hits", "/"): 1}
        assert take_over(path).inherited[HITS].keys() == {("/",)}

    def test_forked_child(self, path: Path) -> None:
        """A forked child has no descriptor of the ledger, whoever has it: its file may be removed meanwhile."""
        book = take_over(path)
        seen = os.fstat(book._descriptor)
        pid = os.fork()
        if not pid:
            held = 0
            for entry in Path("/dev/fd").iterdir():
                with suppress(OSError):
                    held += os.path.samestat(os.fstat(int(entry.name)), seen)
            os._exit(held)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        count(book, HITS, "/")
        assert totals(path) == {("hits", "/"): 1}

    def test_later_one_wins(self, path: Path) -> None:
        """Of a series that was removed and born again, the newborn is continued."""
        book = take_over(path)
        book.drop(count(book, HITS, "/", value=3))
        count(book, HITS, "/", value=1)
        book.drop(count(book, HITS, "/gone"))
        assert list(take_over(path).inherited[HITS]) == [("/",)]
        assert totals(path) == {("hits", "/"): 1}

    @pytest.mark.parametrize("changed", [{"boot": "b2"}, {"instance": "web-2:0"}])
    def test_others(self, path: Path, changed: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
        """A ledger of another boot or host name is not continued, in one sentence."""
        caplog.set_level(logging.INFO)
        count(take_over(path), HITS, "/")
        assert not any(take_over(path, **changed).inherited.values())
        assert [record.message for record in caplog.records] == [
            f"{path} is not continued, counters start anew: it is of another boot or host name"
        ]

    @pytest.mark.parametrize("version", [b"1", b"9"])
    def test_other_version(self, path: Path, version: bytes, caplog: pytest.LogCaptureFixture) -> None:
        """Nor is one of another version, in one sentence."""
        count(take_over(path), HITS, "/")
        with path.open("r+b") as file:
            file.write(b"consul-prom ledger " + version)
        assert not any(take_over(path).inherited.values())
        assert [record.message for record in caplog.records] == [
            f"{path} is not continued, counters start anew: it is not ours, or another version's"
        ]

    @pytest.mark.parametrize("payload", [b"{}", b"{", b'{"labelnames": 1}'])
    def test_other_records(self, path: Path, payload: bytes, caplog: pytest.LogCaptureFixture) -> None:
        """Nor one whose records are whole and not such as ours: the sentence is ours, too."""
        take_over(path)._write(ledger_file._record(ledger_file._FAMILY, payload))
        assert not any(take_over(path).inherited.values())
        assert [record.message for record in caplog.records] == [
            f"{path} is not continued, counters start anew: it holds a record that we do not write"
        ]

    def test_other_user(self, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """Nor another user's."""
        count(take_over(path), HITS, "/")
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
        assert not any(take_over(path).inherited.values())
        assert len(caplog.records) == 1

    def test_symbolic_link(self, path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Nor one behind a symbolic link, which is replaced and not followed."""
        elsewhere = tmp_path / "elsewhere"
        count(take_over(elsewhere), HITS, "/")
        path.symlink_to(elsewhere)
        assert not any(take_over(path).inherited.values())
        assert not path.is_symlink()
        assert totals(elsewhere) == {("hits", "/"): 1}
        assert len(caplog.records) == 1

    def test_nonsense(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Nor what is no ledger, whatever it is: a directory cannot even be replaced."""
        caplog.set_level(logging.INFO)
        for nonsense in (b"", b"x", os.urandom(5000), ledger_file.MAGIC, ledger_file.MAGIC + os.urandom(500)):
            path.write_bytes(nonsense)
            assert not any(take_over(path).inherited.values())
        assert len(caplog.records) == 5
        path.unlink()
        path.mkdir()
        with pytest.raises(LedgerError, match=r"cannot be written: Is a directory; see CONSUL_PROM_DIR"):
            take_over(path)

    def test_torn(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Of a ledger that was cut at any place, the series that are whole before it are continued, and no more."""
        book = take_over(path)
        for number in range(5):
            count(book, HITS, str(number), value=number + 1)
        whole, end = path.read_bytes()[: book._end], book._end
        expected = totals(path)
        for cut in range(0, end, 8):
            path.write_bytes(whole[:cut])
            take_over(path)
            rest = totals(path)
            assert list(rest.items()) == list(expected.items())[: len(rest)]
        assert len(rest) == len(expected) - 1
        assert {record.message for record in caplog.records} >= {
            f"{path} ends in half a record; what stands before it is continued"
        }

    def test_spoilt(self, path: Path) -> None:
        """Where a record's head, payload or checksum was spoilt, the ledger ends before it."""
        book = take_over(path)
        for number in range(3):
            start = book._end
            count(book, HITS, str(number))
        whole = path.read_bytes()[: book._end]
        for place in range(start, start + 16 + 4 + len("2")):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
            assert list(found(path)) == [("hits", "0"), ("hits", "1")], place

    def test_leaves_nothing_else(self, path: Path) -> None:
        """There is one file, for its owner only, and it is sparse."""
        for _ in range(3):
            take_over(path)
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        seen = path.stat()
        assert stat.S_IMODE(seen.st_mode) == 0o600
        assert seen.st_size == SIZE
        assert seen.st_blocks * 512 < 2 * STEP


class TestUnused:
    """Series that no worker uses any more."""

    def test_leave_after_a_day(self, path: Path) -> None:
        """A series leaves when it was not used for 24 h: not because one generation did not touch it."""
        count(take_over(path), HITS, "/")
        for passed in (0.0, 10.0, KEEP - 1, KEEP - 1):
            assert list(take_over(path, now=NOW + passed).inherited[HITS]) == [("/",)]
        assert not take_over(path, now=NOW + KEEP + 1).inherited[HITS]

    def test_oldest_leave(self, path: Path) -> None:
        """Beyond a cap, the oldest leave first; what the last worker used stays whatever their number."""
        for generation in range(4):
            book = take_over(path, now=NOW + generation)
            for number in range(MOST_UNUSED // 2):
                count(book, HITS, f"{generation}.{number}")
        kept = {labels[0].partition(".")[0] for labels in take_over(path, now=NOW + 9).inherited[HITS]}
        assert kept == {"1", "2", "3"}
        book = take_over(path, now=NOW + 10)
        assert {labels[0].partition(".")[0] for labels in book.inherited[HITS]} == {"2", "3"}

    def test_many_in_use(self, path: Path) -> None:
        """More series than the cap, all of them in use, are all continued."""
        book = take_over(path)
        for number in range(MOST_UNUSED + 5):
            count(book, HITS, str(number))
        assert len(take_over(path).inherited[HITS]) == MOST_UNUSED + 5

    def test_in_use_is_inherited_as_used_now(self, path: Path) -> None:
        """When a series was last in use is when its worker was followed by the next."""
        count(take_over(path), HITS, "/")
        assert found(path)["hits", "/"].used == IN_USE
        take_over(path, now=NOW + 7)
        assert found(path)["hits", "/"].used == NOW + 7
        take_over(path, now=NOW + 9)
        assert found(path)["hits", "/"].used == NOW + 7


class TestSpace:
    """It is allocated ahead, so that a full disk is a sentence and no SIGBUS."""

    def test_is_allocated_ahead(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """No record is written where space was not allocated; few births allocate any."""
        book = take_over(path)
        calls: list[object] = []
        real = os.posix_fallocate

        def counted(*arguments: int) -> None:
            calls.append(arguments)
            real(*arguments)

        monkeypatch.setattr(os, "posix_fallocate", counted)
        for number in range(5000):
            count(book, HITS, f"/{number}")
            assert book._end <= book._allocated
        assert 1 <= len(calls) <= 10
        assert path.stat().st_blocks * 512 >= book._end

    def test_without_fallocate(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Zeros are written where the system has no posix_fallocate, or the file system does not know it."""
        monkeypatch.delattr(os, "posix_fallocate")
        book = take_over(path)
        for number in range(2000):
            count(book, HITS, f"/{number}")
        assert path.stat().st_blocks * 512 >= book._end
        monkeypatch.setattr(os, "posix_fallocate", _failing(errno.EOPNOTSUPP), raising=False)
        assert len(take_over(path).inherited[HITS]) == 2000

    def test_disk_full_later(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where a disk is full, births fail with a reason, others go on, and the disk is not asked at each birth."""
        book = take_over(path)
        cell = count(book, HITS, "/")
        asked: list[object] = []
        full = _failing(errno.ENOSPC)

        def counted(*arguments: int) -> None:
            asked.append(arguments)
            full()

        monkeypatch.setattr(os, "posix_fallocate", counted)
        with pytest.raises(LedgerError, match="No space left"):
            count_many(book)
        with pytest.raises(LedgerError, match="just now"):
            count(book, HITS, "/more")
        book.cells[cell + VALUES] += 1
        assert len(asked) == 1
        monkeypatch.undo()
        take_over(path)
        assert totals(path)["hits", "/"] == 2

    @pytest.mark.parametrize("call", ["open", "ftruncate", "posix_fallocate", "replace"])
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
    def test_no_take_over(self, path: Path, call: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where no ledger can be written and none continued, counters live in memory, and no file is left."""
        count(take_over(path, boot="b0"), HITS, "/")
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        monkeypatch.setattr(os, call, _unwritable(call, number))
        with pytest.raises(LedgerError, match=os.strerror(number)):
            take_over(path)
        monkeypatch.undo()
        assert list(path.parent.iterdir()) == []
        assert len(list(Path("/proc/self/fd").iterdir())) == descriptors

    @pytest.mark.parametrize("call", ["open", "posix_fallocate", "replace"])
    @pytest.mark.parametrize("torn", [False, True])
    def test_take_over_on_a_full_disk(
        self, path: Path, call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, torn: bool
    ) -> None:
        """Where a copy cannot be written, the old file is continued as it is, with a WARNING that says why."""
        book = take_over(path)
        book.port = 8000
        book.scraped(NOW)
        count(book, HITS, "/", value=3)
        count(book, SECONDS, value=0.25)
        count(book, HITS, "/more")
        book.drop(count(book, HITS, "/gone"))
        unused = count(book, HITS, "/unused")
        book.cells[unused + ledger_file.USED] = NOW - KEEP - 1
        if torn:
            book._bytes[book._end : book._end + 100] = b"x" * 100
        monkeypatch.setattr(os, call, _unwritable(call, errno.ENOSPC))
        again = take_over(path, now=NOW + 9)
        assert [path.name] == [file.name for file in path.parent.iterdir()]
        assert again.inherited[HITS].keys() == {("/",), ("/more",)}
        assert found(path)["hits", "/"].used == NOW + 9
        assert again.port == 8000
        assert "continued without being compacted, its copy cannot be written: No space left on device" in caplog.text
        count(again, HITS, "/")
        with suppress(LedgerError):  # is there space?
            count(again, HITS, "/new")
        monkeypatch.undo()
        again._retry_at = 0.0
        count(again, HITS, "/later", value=5)
        count(again, Family("summary", "sizes"), value=2)
        take_over(path)
        assert {**totals(path), ("hits", "/new"): 1} == {
            ("hits", "/"): 4,
            ("hits", "/more"): 1,
            ("seconds",): 0.25,
            ("hits", "/later"): 5,
            ("hits", "/new"): 1,
            ("sizes",): 2,
        }

    def test_full(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A ledger that is as large as its mapping takes no more series."""
        monkeypatch.setattr(ledger_file, "SIZE", 2**18)
        book = take_over(path)
        with pytest.raises(LedgerError, match="it is full"):
            count_many(book)
        assert len(take_over(path).inherited[HITS]) > 1000

    @pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
    def test_birth_within_growth(self, path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A birth by a signal handler that interrupts growth finds room, or is refused, and does no harm."""
        if call == "pwrite":
            monkeypatch.delattr(os, "posix_fallocate")
        book = take_over(path)
        real, inner, refused = getattr(os, call), iter(range(10_000)), []

        def interrupted(*arguments: Any) -> Any:
            monkeypatch.setattr(os, call, real)
            try:
                for _ in range(1000):
                    count(book, HITS, f"/inner/{next(inner)}")
            except LedgerError as error:
                refused.append(str(error))
            monkeypatch.setattr(os, call, interrupted)
            return real(*arguments)

        monkeypatch.setattr(os, call, interrupted)
        for number in range(1500):
            count(book, HITS, f"/{number}")
        born = next(inner)
        monkeypatch.setattr(os, call, real)
        found = take_over(path).inherited[HITS]
        assert len([labels for labels in found if "inner" not in labels[0]]) == 1500
        assert len(found) - 1500 == born - len(refused)
        assert (call == "pwrite") == bool(refused)

    def test_growth_before_growth(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A birth by a signal handler that grows the file right before another growth leaves that nothing to do."""
        book = take_over(path)
        real, born = time.monotonic, iter(range(1))

        def interrupted() -> float:
            if next(born, None) is not None:
                for number in range(5000):
                    count(book, HITS, f"/inner/{number}")
            return real()

        monkeypatch.setattr(ledger_file, "time", SimpleNamespace(monotonic=interrupted, time=time.time))
        for number in range(5000):
            count(book, HITS, f"/{number}")
        assert next(born, None) is None
        assert len(take_over(path).inherited[HITS]) == 10_000

    @pytest.mark.parametrize("before", [True, False])
    def test_family_in_a_family(self, path: Path, monkeypatch: pytest.MonkeyPatch, *, before: bool) -> None:
        """A family that a signal handler introduces right before or after another is written has its own series."""
        book = take_over(path)
        real, inner = Ledger._write, iter([SECONDS])

        def interrupted(ledger: Ledger, record: bytes) -> int:
            written = None if before else real(ledger, record)
            for family in inner:
                count(book, family, value=7)
            return real(ledger, record) if written is None else written

        monkeypatch.setattr(Ledger, "_write", interrupted)
        count(book, HITS, "/", value=3)
        assert totals(path) == {("hits", "/"): 3, ("seconds",): 7}


def _unwritable(call: str, number: int) -> Callable[..., Any]:
    """The *call* of os, which fails where it would make something new."""
    real = getattr(os, call)

    def failing(*arguments: Any) -> Any:
        if call == "open" and not arguments[1] & os.O_CREAT:
            return real(*arguments)
        raise OSError(number, os.strerror(number))

    return failing


def _failing(number: int) -> Callable[..., None]:
    def fail(*_arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail
