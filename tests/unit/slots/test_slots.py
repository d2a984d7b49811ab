"""Slots: who holds which, for how long, and in what directory."""

import errno
import fcntl
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from consul_prom.errors import SlotError
from consul_prom.process.identity import process_age, process_identity
from consul_prom.slots import slots
from consul_prom.slots.directory import directory_id
from consul_prom.slots.slots import acquire, try_slot
from tests import ROOT
from tests.services.waiting import wait_until

DEADLINE = 20.0


@contextmanager
def _program(code: str, *arguments: object) -> "Iterator[subprocess.Popen[str]]":
    """A Python program of our own, given two pipes; gone at the end."""
    prologue = "import os, sys\nfrom pathlib import Path\nfrom consul_prom.slots import slots\n"
    program = subprocess.Popen(
        [sys.executable, "-c", prologue + code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with program:
        try:
            yield program
        finally:
            program.kill()


def _line(program: "subprocess.Popen[str]") -> str:
    assert program.stdout
    return program.stdout.readline().strip()


def _output(code: str, *arguments: object) -> str:
    with _program(code, *arguments) as program:
        output, _ = program.communicate(timeout=DEADLINE)
    assert program.returncode == 0
    return output.strip()


HOLD = """
slot = slots.acquire(Path(sys.argv[1]), "shop")
print(slot.number, flush=True)
"""


class TestNumbers:
    """Which slot a process gets."""

    def test_smallest_free_slot(self, slot_directory: Path) -> None:
        """Each worker gets the smallest slot that nobody holds, a released one first."""
        held = [acquire(slot_directory, "shop") for _ in range(3)]
        assert [slot.number for slot in held] == [0, 1, 2]
        held[1].release()
        again = acquire(slot_directory, "shop")
        assert again.number == 1
        assert acquire(slot_directory, "shop").number == 3

    def test_services_have_slots_of_their_own(self, slot_directory: Path) -> None:
        """Two services share a directory, not the numbers."""
        shop, till = acquire(slot_directory, "shop"), acquire(slot_directory, "till")
        assert (shop.number, till.number) == (0, 0)
        assert shop.directory_id == till.directory_id

    def test_no_slot_left(self, slot_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """When all slots are held, the sentence says so."""
        monkeypatch.setattr(slots, "MOST_SLOTS", 2)
        held = [acquire(slot_directory, "shop") for _ in range(2)]
        with pytest.raises(SlotError, match="all 2 slots of 'shop' are held"):
            acquire(slot_directory, "shop")
        assert all(slot.intact for slot in held)

    def test_release_is_idempotent(self, slot_directory: Path) -> None:
        """A second release does nothing, not even to the slot's next worker."""
        first = acquire(slot_directory, "shop")
        first.release()
        second = acquire(slot_directory, "shop")
        first.release()
        assert try_slot(slot_directory, "shop", second.number) is None
        assert not first.intact
        assert second.intact

    def test_lock_files_stay(self, slot_directory: Path) -> None:
        """A released slot leaves its file, private to us: unlinking it would part those who wait."""
        acquire(slot_directory, "shop").release()
        file = slot_directory / "shop.0.lock"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600

    def test_fifty_at_once(self, tmp_path: Path) -> None:
        """Fifty processes that start at one moment get fifty slots without a gap, and agree on one directory id."""
        code = """
        def worker(go, done):
            os.read(go, 1)
            try:
                slot = slots.acquire(Path(sys.argv[1]), "shop")
                os.write(1, f"{slot.number} {slot.directory_id}\\n".encode())
            finally:
                os.read(done, 1)  # until the parent closes it
                os._exit(0)
        go, start = os.pipe()
        done, finish = os.pipe()
        children = []
        for _ in range(50):
            pid = os.fork()
            if not pid:
                os.close(start), os.close(finish)
                worker(go, done)
            children.append(pid)
        os.close(start)
        sys.stdin.readline()
        os.close(finish)
        for pid in children:
            os.waitpid(pid, 0)
        """
        for round_ in range(3):
            with _program(_dedent(code), tmp_path / f"slots-{round_}") as program:
                lines = [_line(program).split() for _ in range(50)]
                program.communicate("\n", timeout=DEADLINE)
            assert sorted(int(number) for number, _ in lines) == list(range(50))
            assert {identity for _, identity in lines} == {directory_id(tmp_path / f"slots-{round_}")}


class TestProcesses:
    """The lock ends with the process that took it, and with no other."""

    @pytest.mark.parametrize(
        "end",
        [
            "os.kill(os.getpid(), 9)",
            "os.kill(os.getpid(), 15)",
            "os.abort()",
            "os._exit(1)",
            "sys.exit(0)",
            "raise MemoryError",
        ],
    )
    def test_slot_is_free_after_any_end(self, slot_directory: Path, end: str) -> None:
        """However a process ends, its slot is the next one's."""
        code = f"import resource\nresource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n{HOLD}sys.stdin.readline()\n{end}"
        with _program(code, slot_directory) as program:
            assert _line(program) == "0"
            assert try_slot(slot_directory, "shop", 0) is None
            program.communicate("\n", timeout=DEADLINE)
            assert acquire(slot_directory, "shop").number == 0

    @pytest.mark.parametrize(
        "child",
        [
            "pid = os.fork()\nif not pid: sleep()",
            "import multiprocessing as m\np = m.get_context('fork').Process(target=sleep)\np.start()\npid = p.pid",
            "import subprocess\npid = subprocess.Popen(['sleep', '60'], close_fds=False, stdout=2).pid",
        ],
        ids=["fork", "multiprocessing", "subprocess"],
    )
    def test_child_that_outlives_a_killed_parent_keeps_no_slot(self, slot_directory: Path, child: str) -> None:
        """A child of the application lives on after kill -9 of its parent, and the slot is free all the same."""
        sleep = "import time\ndef sleep():\n    time.sleep(60)\n    os._exit(0)\n"
        code = f"{sleep}{HOLD}{child}\nprint(pid, flush=True)\nsleep()"
        with _program(code, slot_directory) as program:
            assert _line(program) == "0"
            orphan = int(_line(program))
            try:
                assert try_slot(slot_directory, "shop", 0) is None
                program.kill()
                program.wait(DEADLINE)
                assert process_identity(orphan)
                wait_until(
                    lambda: try_slot(slot_directory, "shop", 0) is not None, within=DEADLINE, what="the slot is free"
                )
                assert process_identity(orphan)
            finally:
                os.kill(orphan, signal.SIGKILL)

    @pytest.mark.parametrize("act", ["slot.release()", "pass", "del slot", "import gc; del slot; gc.collect()"])
    def test_forked_child_does_not_release_its_parents_slot(self, slot_directory: Path, act: str) -> None:
        """Whatever a forked child does with its copy of the slot, the parent goes on holding it."""
        code = f"""
        slot = slots.acquire(Path(sys.argv[1]), "shop")
        pid = os.fork()
        if not pid:
            intact = slot.intact
            {act}
            os._exit(42 if intact else 0)
        assert os.waitpid(pid, 0)[1] == 0, "the child holds a lock"
        print(slots.try_slot(Path(sys.argv[1]), "shop", 0), slot.intact)
        """
        assert _output(_dedent(code), slot_directory) == "None True"

    def test_forked_child_takes_a_slot_of_its_own(self, slot_directory: Path) -> None:
        """A forked child may be a worker too, in the next slot, and gives up only that."""
        code = """
        slot = slots.acquire(Path(sys.argv[1]), "shop")
        pid = os.fork()
        if not pid:
            own = slots.acquire(Path(sys.argv[1]), "shop")
            print(own.number, own.intact, flush=True)
            own.release()
            os._exit(0)
        os.waitpid(pid, 0)
        print(slot.number, slot.intact, slots.try_slot(Path(sys.argv[1]), "shop", 1) is not None)
        """
        assert _output(_dedent(code), slot_directory).splitlines() == ["1 True", "0 True True"]

    def test_process_without_standard_input(self, slot_directory: Path) -> None:
        """A daemon whose lock has the descriptor 0 holds its slot like any other."""
        code = 'os.close(0)\nslot = slots.acquire(Path(sys.argv[1]), "shop")\nprint(slot.intact)'
        assert _output(code, slot_directory) == "True"


class TestRemains:
    """Where to look for what the dead left."""

    @staticmethod
    def leave(directory: Path, service: str, number: int, *hosts: str) -> int:
        """A slot as a killed process leaves it; its pid."""
        process = subprocess.Popen(["sleep", "60"])
        note = " ".join((str(process.pid), str(process_identity(process.pid)), *hosts))
        slots.path_of(directory, service, number).write_text(note)
        process.kill()
        process.wait()
        return process.pid

    def test_of_all_services(self, slot_directory: Path) -> None:
        """The dead of all services are told, the caretaker's slot among them, with the agent's addresses."""
        first = self.leave(slot_directory, "shop", 3, "10.0.0.1", "::1")
        second = self.leave(slot_directory, "bar", slots.MASTER)
        acquire(slot_directory, "shop")
        assert slots.remains(slot_directory) == [
            slots.StaleSlot("bar", slots.MASTER, second, ()),
            slots.StaleSlot("shop", 3, first, ("10.0.0.1", "::1")),
        ]
        assert slots.abandoned(slot_directory, "shop") == [3]
        assert slots.abandoned(slot_directory, "bar") == []

    def test_addresses(self, slot_directory: Path) -> None:
        """Who has a slot notes the agent's addresses with it, and settles all at once."""
        slot = acquire(slot_directory, "shop")
        slot.occupy(["10.0.0.1"])
        assert list(slot.note or ()) == [os.getpid(), process_identity(os.getpid()), ("10.0.0.1",)]
        slot.settle()
        assert slot.note is None
        slots.path_of(slot_directory, "shop", 0).unlink()
        assert slot.note is None

    @pytest.mark.parametrize("text", ["", "1", "x y", "1 a.b", "1 a.b.c.d", "\u00e9 \u00e9", "1 None"])
    def test_odd_files(self, slot_directory: Path, text: str) -> None:
        """What no process noted is nobody's remains, nor is a file of another kind."""
        for name in ("shop.0.lock", "shop.master.lock", "shop.x.lock"):
            (slot_directory / name).write_text(text)
        self.leave(slot_directory, "shop", 1)
        (slot_directory / "shop.1.lock").rename(slot_directory / "shop.one.lock")
        assert slots.remains(slot_directory) == []

    def test_alone(self, slot_directory: Path) -> None:
        """One process of a service at a time is in there, and who cannot get in says so."""
        with slots.alone(slot_directory, "shop"):
            with slots.alone(slot_directory, "bar"):
                pass
            child = os.fork()
            if not child:
                try:
                    with slots.alone(slot_directory, "shop"):
                        os._exit(0)
                except SlotError:
                    os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


class TestAdopted:
    """A slot that has no worker, and is kept until a newborn wants it."""

    @pytest.fixture
    def slot(self, slot_directory: Path) -> slots.Slot:
        slot = slots.acquire(slot_directory, "shop")
        slot.adopt()
        return slot

    def test_is_asked_for(self, slot: slots.Slot, slot_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A newborn asks for it once, and gets it when it is given up."""
        monkeypatch.setattr(slots, "PATIENCE", 10.0)
        assert not slot.wanted
        with ThreadPoolExecutor() as pool:
            newborn = pool.submit(slots.acquire, slot_directory, "shop")
            wait_until(lambda: slot.wanted, within=5, what="a wish")
            time.sleep(0.02)
            assert slot.note
            assert slot.note.words.count("wanted") == 1
            assert not newborn.done()
            slot.release()
            assert newborn.result(10).number == 0
        assert not newborn.result().wanted

    def test_is_not_given_up(self, slot: slots.Slot, slot_directory: Path) -> None:
        """Who gets no answer takes the next."""
        assert slots.acquire(slot_directory, "shop").number == 1
        assert slot.wanted

    def test_cannot_be_asked_for(self, slot: slots.Slot, slot_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nor does a disk that is too full for the wish keep anybody from the next."""

        def refuse(_descriptor: int, _text: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as full:
            full.setattr(os, "write", refuse)
            newborn = slots.acquire(slot_directory, "shop")
        assert (newborn.number, slot.wanted) == (1, False)

    def test_last_change(self, slot: slots.Slot, slot_directory: Path) -> None:
        """Whoever comes, or replaces a file, changes it; a look changes nothing, nor does a note in a slot's file."""

        def seen() -> int:
            time.sleep(0.01)  # a file system's clock ticks each 4 ms
            return slots.last_change(slot_directory)

        before = seen()
        slots.survey(slot_directory, "shop")
        slot.adopt()
        assert seen() == before
        slots.acquire(slot_directory, "shop")
        assert (came := seen()) != before
        (slot_directory / "id").replace(slot_directory / "shop.0.ledger")
        assert seen() != came
        assert slots.last_change(slot_directory / "missing") == 0

    def test_survey(self, slot: slots.Slot, slot_directory: Path) -> None:
        """It is vacant, as those are that were settled, or whose worker is dead."""
        others = [slots.acquire(slot_directory, "shop") for _ in range(4)]
        others[0].settle()
        others[1].lock.release()
        (slot_directory / "shop.3.lock").write_text("1 a.b.c", encoding="ascii")
        assert slots.survey(slot_directory, "shop") == slots.Survey(2, [0, 1, 3])
        assert slot.number == 0

    def test_of_the_dead(self, slot: slots.Slot, slot_directory: Path) -> None:
        """What was adopted by a process that is gone may have an entry; so may what was given up in vain."""
        path = slots.path_of(slot_directory, "shop", 0)
        words = path.read_text().replace("adopted", "adopted 10.0.0.1 wanted")
        path.write_text(f"0{words.removeprefix(str(os.getpid()))}")
        assert slots.remains(slot_directory, "shop") == [slots.StaleSlot("shop", 0, 0, ("10.0.0.1",))]
        slot.abandon()
        assert slots.remains(slot_directory, "shop") == [slots.StaleSlot("shop", 0, 0, ("10.0.0.1",))]
        slot.settle()
        slot.abandon()
        assert slots.remains(slot_directory, "shop") == [slots.StaleSlot("shop", 0, 0, ())]


class TestNotNoted:
    """A lock whose holder has not noted itself."""

    def test_moment(self, slot_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A newborn waits for it a moment, once, not for each slot: on a full disk nobody can note anything."""
        slept: list[float] = []
        clock = SimpleNamespace(sleep=slept.append, monotonic=lambda: sum(slept), time=time.time)
        monkeypatch.setattr(slots, "time", clock)
        held = [slots.acquire(slot_directory, "shop") for _ in range(5)]
        for slot in held:
            slot.settle()
        assert slots.acquire(slot_directory, "shop").number == 5
        assert slots.PATIENCE <= sum(slept) < 2 * slots.PATIENCE


class TestIntact:
    """Whether what we hold is still what others see."""

    @pytest.fixture
    def slot(self, slot_directory: Path) -> slots.Slot:
        return acquire(slot_directory, "shop")

    def test_held(self, slot: slots.Slot) -> None:
        """A slot in an untouched directory is intact."""
        assert slot.intact

    def test_wiped(self, slot: slots.Slot) -> None:
        """A directory that was wiped is noticed, and the next slot has another id."""
        shutil.rmtree(slot.directory)
        assert not slot.intact
        again = acquire(slot.directory, "shop")
        assert again.number == 0
        assert again.directory_id != slot.directory_id
        assert again.intact
        assert not slot.intact
        slot.release()
        assert again.intact

    def test_file_replaced(self, slot: slots.Slot) -> None:
        """A lock file that was replaced by another is noticed."""
        file = slot.directory / "shop.0.lock"
        file.rename(file.with_suffix(".old"))
        file.touch()
        assert not slot.intact

    def test_file_behind_a_link(self, slot: slots.Slot) -> None:
        """A link to our own file is not our file."""
        file = slot.directory / "shop.0.lock"
        file.rename(file.with_suffix(".old"))
        file.symlink_to(file.with_suffix(".old"))
        assert not slot.intact

    def test_directory_moved(self, slot: slots.Slot) -> None:
        """A directory that was moved away is noticed, though our lock is in it still."""
        slot.directory.rename(slot.directory.with_name("moved"))
        assert not slot.intact


class TestDirectory:
    """What is made, and what is refused."""

    def test_made_with_its_parents(self, tmp_path: Path) -> None:
        """A missing directory is made, closed to others whatever the umask is."""
        directory = tmp_path / "a" / "b" / "slots"
        before = os.umask(0)
        try:
            acquire(directory, "shop")
        finally:
            os.umask(before)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700

    def test_symbolic_link(self, tmp_path: Path, slot_directory: Path) -> None:
        """A link is refused, even to a directory that would do, and one to nowhere."""
        for target in (slot_directory, tmp_path / "nowhere"):
            link = tmp_path / f"to-{target.name}"
            link.symlink_to(target)
            with pytest.raises(SlotError, match=f"CONSUL_PROM_DIR='{link}' is a symbolic link"):
                acquire(link, "shop")

    def test_no_directory(self, tmp_path: Path) -> None:
        """A file in its place is refused."""
        (tmp_path / "file").touch()
        with pytest.raises(SlotError, match="is not a directory"):
            acquire(tmp_path / "file", "shop")

    def test_below_a_file(self, tmp_path: Path) -> None:
        """A path that leads through a file is refused with the system's words, and the file is named."""
        file = tmp_path / "file"
        file.touch()
        with pytest.raises(SlotError, match=rf"cannot be used: (Not a directory|File exists): {file}$"):
            acquire(file / "slots", "shop")

    def test_someone_elses(self, slot_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another user's directory is refused, with both user ids."""
        owner = slot_directory.stat().st_uid
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
        with pytest.raises(SlotError, match=rf"belongs to uid {owner}, not to ours \({owner + 1}\)"):
            acquire(slot_directory, "shop")

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
    def test_given_away(self, slot_directory: Path) -> None:
        """Root, who could use it, refuses a user's directory as well."""
        os.chown(slot_directory, 12345, -1)
        with pytest.raises(SlotError, match="belongs to uid 12345"):
            acquire(slot_directory, "shop")

    @pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o740, 0o702, 0o1777])
    def test_open_to_others(self, slot_directory: Path, mode: int) -> None:
        """A directory that others could look into or change is refused, with its mode and a remedy fit for /tmp too."""
        slot_directory.chmod(mode)
        with pytest.raises(SlotError, match=f"has mode {mode:04o}: others can get at it; name one below it, or,"):
            acquire(slot_directory, "shop")

    @pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
    def test_cannot_be_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        """Where no directory can be made, the sentence has the system's reason."""
        monkeypatch.setattr(os, "mkdir", _failing(number))
        with pytest.raises(SlotError, match=f"cannot be used: {os.strerror(number)}") as caught:
            acquire(tmp_path / "slots", "shop")
        assert str(caught.value).startswith("CONSUL_PROM_DIR='")

    @pytest.mark.parametrize("call", ["fsync", "link"])
    def test_no_space_for_the_id(self, slot_directory: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
        """A disk that fills while the id is written leaves nothing behind, and the next start writes it."""
        with monkeypatch.context() as patch:
            patch.setattr(os, call, _failing(errno.ENOSPC))
            with pytest.raises(SlotError, match="cannot be used: No space left on device"):
                acquire(slot_directory, "shop")
        assert list(slot_directory.iterdir()) == []
        assert acquire(slot_directory, "shop").number == 0

    def test_sentence_stays_the_same(self, slot_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A failure that lasts has one sentence, by which a log knows it: no random file name is in it."""

        def refusing(real: Callable[..., Any]) -> Callable[..., Any]:
            def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
                if path.name.startswith("id."):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
                return real(path, *arguments, **options)

            return refuse

        for name in ("open", "unlink"):
            monkeypatch.setattr(Path, name, refusing(getattr(Path, name)))
        wanted = f"CONSUL_PROM_DIR={str(slot_directory)!r} cannot be used: Permission denied"
        for _ in range(2):
            with pytest.raises(SlotError, match=f"^{re.escape(wanted)}$"):
                acquire(slot_directory, "shop")

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EMFILE, errno.EDQUOT])
    def test_lock_file_cannot_be_made(self, slot_directory: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        """A lock file that cannot be made is a sentence, not the next slot's turn."""
        acquire(slot_directory, "till")
        real = os.open

        def refuse(path: Any, *arguments: Any, **options: Any) -> int:
            if str(path).endswith(".lock"):
                raise OSError(number, os.strerror(number), path)
            return real(path, *arguments, **options)

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(SlotError, match=f"cannot be used: {os.strerror(number)}"):
            acquire(slot_directory, "shop")

    def test_no_locks(self, slot_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file system without locks is refused: a file that merely exists would outlive its process."""
        monkeypatch.setattr(fcntl, "flock", _failing(errno.ENOSYS))
        with pytest.raises(SlotError, match="cannot be used: Function not implemented"):
            acquire(slot_directory, "shop")

    @pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("elsewhere")], ids=["folder", "link"])
    def test_lock_file_is_something_else(self, slot_directory: Path, make: Callable[[Path], None]) -> None:
        """A folder or a link in the place of a lock file is not followed."""
        make(slot_directory / "shop.0.lock")
        with pytest.raises(SlotError, match="cannot be used: "):
            acquire(slot_directory, "shop")
        assert not (slot_directory / "elsewhere").exists()


class TestIdentity:
    """The random id of a directory."""

    def test_is_made_once(self, slot_directory: Path) -> None:
        """The first worker writes it, all others read it, and no other file is left."""
        first, second = acquire(slot_directory, "shop"), acquire(slot_directory, "shop")
        assert first.directory_id == second.directory_id == directory_id(slot_directory)
        assert re.fullmatch(r"[0-9a-f]{16}", first.directory_id)
        assert {file.name for file in slot_directory.iterdir()} == {"id", "shop.0.lock", "shop.1.lock"}

    def test_outlives_all_workers(self, slot_directory: Path) -> None:
        """It stays when nobody holds a slot."""
        first = acquire(slot_directory, "shop")
        first.release()
        assert acquire(slot_directory, "shop").directory_id == first.directory_id

    def test_differs_between_directories(self, tmp_path: Path) -> None:
        """No two directories have the same."""
        assert acquire(tmp_path / "a", "shop").directory_id != acquire(tmp_path / "b", "shop").directory_id

    def test_appears_whole(self, slot_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """At no call of the system is a file `id` seen that is not the whole id."""
        seen: list[str] = []
        for name in ("fsync", "link", "unlink"):
            monkeypatch.setattr(os, name, _observed(getattr(os, name), slot_directory / "id", seen))
        identity = acquire(slot_directory, "shop").directory_id
        assert set(seen) == {"", identity}

    def test_loser_takes_the_winners(self, slot_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of two first workers the one that links later takes the other's id."""
        real = os.link

        def link_late(source: Any, target: Any) -> None:
            (slot_directory / "id").write_text("the-winner's")
            real(source, target)

        monkeypatch.setattr(os, "link", link_late)
        assert acquire(slot_directory, "shop").directory_id == "the-winner's"

    def test_unreadable(self, slot_directory: Path) -> None:
        """An id that is empty or no text is refused, and none where there is no directory."""
        assert directory_id(slot_directory / "gone") is None
        for content in (b"", b" \n", b"\xff\xfe"):
            (slot_directory / "id").write_bytes(content)
            assert directory_id(slot_directory) is None
            with pytest.raises(SlotError, match="does not keep the file 'id'"):
                acquire(slot_directory, "shop")
            assert [file.name for file in slot_directory.iterdir()] == ["id"]


class TestProcessIdentity:
    """What tells a process from a later one of the same pid."""

    def test_of_a_live_process(self) -> None:
        """It is boot, namespace and start, and stays the same while the process lives."""
        mine = process_identity(os.getpid())
        assert mine
        assert re.fullmatch(r"[0-9a-f-]{36}\.\d+\.\d+", mine)
        assert process_identity(os.getpid()) == mine
        assert mine.startswith(Path("/proc/sys/kernel/random/boot_id").read_text().strip())

    def test_age(self) -> None:
        """An identity tells for how long its process has lived."""
        with subprocess.Popen(["sleep", "60"]) as process:
            identity = process_identity(process.pid)
            before = process_age(identity)
            time.sleep(0.05)
            assert before < process_age(identity) < process_age(process_identity(os.getpid()))
            process.kill()
        assert process_age(None) == process_age("a.b.c") == 0

    def test_of_two_processes(self) -> None:
        """Two processes of one boot differ in nothing but the start."""
        with _program("sys.stdin.readline()") as program:
            mine, other = process_identity(os.getpid()), process_identity(program.pid)
        assert mine
        assert other
        assert mine != other
        assert mine.rpartition(".")[0] == other.rpartition(".")[0]

    def test_of_a_zombie_and_of_nobody(self) -> None:
        """A process that ended is gone, before and after its parent has looked."""
        with _program("") as program:
            status = Path(f"/proc/{program.pid}/stat")
            wait_until(lambda: ") Z " in status.read_text(), within=DEADLINE, what="the program is a zombie")
            assert process_identity(program.pid) is None
            program.wait(DEADLINE)
            assert process_identity(program.pid) is None

    @pytest.mark.parametrize("name", ["a) Z 1 2 (b", ")", "(((", "x y\nz) X", "ü) R 9 9"])
    def test_of_an_odd_name(self, tmp_path: Path, name: str) -> None:
        """A program's name with parentheses, blanks or a newline does not shift the numbers."""
        program = tmp_path / name
        shutil.copy("/bin/sleep", program)
        plain = subprocess.Popen(["/bin/sleep", "60"])
        odd = subprocess.Popen([program, "60"])
        try:
            wanted, found = process_identity(plain.pid), process_identity(odd.pid)
            assert wanted
            assert found
            assert 0 <= int(found.rpartition(".")[2]) - int(wanted.rpartition(".")[2]) < 1000
        finally:
            for sleeper in (plain, odd):
                sleeper.kill()
                sleeper.wait(DEADLINE)

    def test_fields_of_the_file(self, tmp_path: Path) -> None:
        """The start is the 22nd field of `stat`, the namespace that of the reader."""
        proc = _proc(tmp_path, "7 (a) b) S " + " ".join(str(field) for field in range(4, 53)))
        assert process_identity(7, proc=proc) == "the-boot.4026531836.22"
        assert process_identity(8, proc=proc) is None

    @pytest.mark.parametrize("state", ["Z", "X"])
    def test_dead_states(self, tmp_path: Path, state: str) -> None:
        """Dead is as good as gone."""
        assert process_identity(7, proc=_proc(tmp_path, f"7 (a) {state} " + "1 " * 49)) is None

    def test_no_proc(self, tmp_path: Path) -> None:
        """A system without /proc tells nothing."""
        assert process_identity(os.getpid(), proc=tmp_path) is None


def _dedent(code: str) -> str:
    lines = code.strip("\n").splitlines()
    return "\n".join(line.removeprefix(" " * 8) for line in lines)


def _failing(number: int) -> Callable[..., Any]:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def _observed(real: Callable[..., Any], file: Path, seen: list[str]) -> Callable[..., Any]:
    def look() -> None:
        seen.append(file.read_text() if file.exists() else "")

    def call(*arguments: Any, **options: Any) -> Any:
        look()
        try:
            return real(*arguments, **options)
        finally:
            look()

    return call


def _proc(folder: Path, status: str) -> Path:
    for name in ("sys/kernel/random", "self/ns", "7"):
        (folder / name).mkdir(parents=True)
    (folder / "sys/kernel/random/boot_id").write_text("the-boot\n")
    (folder / "self/ns/pid").symlink_to("pid:[4026531836]")
    (folder / "7/stat").write_text(status)
    return folder
