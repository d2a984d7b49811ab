"""Passwords by bcrypt: who is let in, what that costs, and what is done where it cannot be told."""

import asyncio
import base64
import logging
import threading
from collections.abc import Iterator

import bcrypt
import pytest

from consul_prom.errors import EndpointError
from consul_prom.server import basic_auth as module
from consul_prom.server.basic_auth import Passwords
from tests.services.waiting import eventually

HASH = bcrypt.hashpw(b"hunter2", bcrypt.gensalt(4)).decode()
USERS = {"me": HASH, "you": HASH}
PEER = "192.0.2.1"
OTHER = "192.0.2.2"


def basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


@pytest.fixture
def passwords() -> Passwords:
    return Passwords()


async def test_right_and_wrong(passwords: Passwords) -> None:
    """The right password opens, again and again; nothing else does."""
    for user in ("me", "you", "me"):
        assert await passwords.permit(basic(user, "hunter2"), USERS, peer=PEER)
    for wrong in (
        *("", "Basic", "Basic !", "Basic w7", f"Bearer {HASH}", basic("me", "hunter3"), basic("me", "")),
        *(basic("they", "hunter2"), basic("", "hunter2"), basic("me", HASH), basic("me", "a\0b")),
        f"Digest {basic('me', 'hunter2').partition(' ')[2]}",
    ):
        assert not await passwords.permit(wrong, USERS, peer=PEER), wrong


async def test_scheme_in_lower_case(passwords: Passwords) -> None:
    """The scheme's case does not matter, as RFC 9110 says."""
    assert await passwords.permit(basic("me", "hunter2").replace("Basic", "basic"), USERS, peer=PEER)


async def test_long_password(passwords: Passwords) -> None:
    """Of a password bcrypt knows 72 bytes, and what is longer than that works as with other tools."""
    long = "ü" * 60
    hashed = bcrypt.hashpw(long.encode()[:72], bcrypt.gensalt(4)).decode()
    assert await passwords.permit(basic("me", long), {"me": hashed}, peer=PEER)


async def test_bcrypt_runs_once(passwords: Passwords, monkeypatch: pytest.MonkeyPatch) -> None:
    """A password is hashed once, whether it is right or wrong, until others have been forgotten for newer ones."""
    hashed: list[str] = []

    def matches(password: str, _hashed: str) -> bool:
        hashed.append(password)
        return password == "hunter2"

    monkeypatch.setattr(module, "_bcrypt_matches", matches)
    for _ in range(3):
        assert await passwords.permit(basic("me", "hunter2"), USERS, peer=PEER)
        assert not await passwords.permit(basic("me", "wrong"), USERS, peer=PEER)
    assert hashed == ["hunter2", "wrong"]
    monkeypatch.setattr(module, "REMEMBERED", 1)
    for password in ("new", "wrong", "hunter2"):
        assert await passwords.permit(basic("me", password), USERS, peer=PEER) is (password == "hunter2")
    assert hashed == ["hunter2", "wrong", "new", "wrong"]


async def test_user_that_is_added(passwords: Passwords) -> None:
    """A password that was wrong, because its user was unknown, is right once the file has the user."""
    assert not await passwords.permit(basic("they", "hunter2"), USERS, peer=PEER)
    assert await passwords.permit(basic("they", "hunter2"), {**USERS, "they": HASH}, peer=PEER)


async def test_unknown_user_costs_the_same(passwords: Passwords, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown user's password is hashed, too: the time does not tell who exists."""
    seen: list[str] = []

    def matches(_password: str, hashed: str) -> bool:
        seen.append(hashed)
        return True

    monkeypatch.setattr(module, "_bcrypt_matches", matches)
    assert not await passwords.permit(basic("they", "hunter2"), USERS, peer=PEER)
    assert seen == [HASH]


async def test_no_thread(
    passwords: Passwords, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the system gives no thread it cannot be told, which is one line of the log; what was right stays so."""
    caplog.set_level(logging.INFO)
    assert await passwords.permit(basic("you", "hunter2"), USERS, peer=PEER)

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refuse)
        for password in ("hunter2", "hunter3"):
            with pytest.raises(EndpointError, match="no thread to check a password in"):
                await passwords.permit(basic("me", password), USERS, peer=PEER)
        assert await passwords.permit(basic("you", "hunter2"), USERS, peer=PEER)
    async with asyncio.timeout(10):
        assert await passwords.permit(basic("me", "hunter2"), USERS, peer=PEER)
    assert [record.getMessage() for record in caplog.records] == [
        "no password can be checked: can't start new thread; raise the limit of threads (ulimit -u, pids.max)",
        "passwords can be checked again",
    ]


class Guessing:
    """bcrypt, held up: what is checked, how many at once, and a gate that lets the checks end."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun: list[str] = []
        self.running = self.most = 0

    def __call__(self, password: str, _hashed: str) -> bool:
        self.begun.append(password)
        self.running += 1
        self.most = max(self.most, self.running)
        self.gate.wait(10)
        self.running -= 1
        return password == "hunter2"


@pytest.fixture
def guessing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guessing]:
    guessing = Guessing()
    monkeypatch.setattr(module, "_bcrypt_matches", guessing)
    yield guessing
    guessing.gate.set()


def ask(passwords: Passwords, password: str, peer: str) -> asyncio.Task[bool]:
    return asyncio.create_task(passwords.permit(basic("me", password), USERS, peer=peer))


async def refused(task: asyncio.Task[bool]) -> bool:
    """Whether *task* ended at its first step because there was no room."""
    await asyncio.sleep(0)
    return task.done() and isinstance(task.exception(), EndpointError)


async def test_one_at_a_time(passwords: Passwords, guessing: Guessing) -> None:
    """Passwords are checked one after another, in the order of their arrival; the loop goes on."""
    guesses = [ask(passwords, str(number), f"192.0.2.{number}") for number in range(5)]
    await eventually(lambda: guessing.running == 1, within=10, what="one is being checked")
    guessing.gate.set()
    assert await asyncio.gather(*guesses) == [False] * 5
    assert guessing.most == 1
    assert guessing.begun == ["0", "1", "2", "3", "4"]


async def test_one_place_for_a_peer(passwords: Passwords, guessing: Guessing) -> None:
    """An address that guesses on many connections has one place, and another address is next in the line."""
    first = ask(passwords, "0", OTHER)
    await eventually(lambda: guessing.running == 1, within=10, what="one is being checked")
    for number in range(1, 50):
        assert await refused(ask(passwords, str(number), OTHER))
    right = ask(passwords, "hunter2", PEER)
    guessing.gate.set()
    assert await right
    assert not await first
    assert guessing.begun == ["0", "hunter2"]


async def test_peers_of_ip6(passwords: Passwords, guessing: Guessing) -> None:
    """A /64 of IPv6 counts as one address: a host there has as many as it wants."""
    first = ask(passwords, "0", "2001:db8::1")
    await eventually(lambda: guessing.running == 1, within=10, what="one is being checked")
    assert await refused(ask(passwords, "1", "2001:db8::2%eth0"))
    right = ask(passwords, "hunter2", "2001:db8:0:1::1")
    guessing.gate.set()
    assert await right
    assert not await first


async def test_line_is_bounded(passwords: Passwords, guessing: Guessing) -> None:
    """Guesses from many addresses are refused once the line is full."""
    line = [ask(passwords, str(number), f"192.0.2.{number}") for number in range(module.LINE)]
    assert await refused(ask(passwords, "one too many", "198.51.100.1"))
    guessing.gate.set()
    assert await asyncio.gather(*line) == [False] * module.LINE
    assert len(guessing.begun) == module.LINE


async def test_password_that_comes_again(passwords: Passwords, guessing: Guessing) -> None:
    """A password that was refused finds a place when it comes again, though guesses take every other one.

    So a scraper behind the same address as a client that guesses gets in at its second scrape.
    """
    line = [ask(passwords, str(number), f"192.0.2.{number}") for number in range(module.LINE)]
    assert await refused(ask(passwords, "hunter2", PEER))
    right = ask(passwords, "hunter2", PEER)
    assert not await refused(right)
    guessing.gate.set()
    assert await asyncio.gather(*line, right) == [*[False] * module.LINE, True]


async def test_equal_passwords(passwords: Passwords, guessing: Guessing) -> None:
    """Scrapers with the same password, behind one address or several, share its check."""
    tasks = [ask(passwords, "hunter2", peer) for peer in (PEER, PEER, OTHER)]
    await eventually(lambda: guessing.running == 1, within=10, what="one is being checked")
    guessing.gate.set()
    assert await asyncio.gather(*tasks) == [True] * 3
    assert guessing.begun == ["hunter2"]


async def test_client_that_has_gone(passwords: Passwords, guessing: Guessing) -> None:
    """A check goes on when its client has hung up, so that the next scrape finds its answer."""
    task = ask(passwords, "hunter2", PEER)
    await eventually(lambda: guessing.running == 1, within=10, what="it is being checked")
    task.cancel()
    guessing.gate.set()
    assert await passwords.permit(basic("me", "hunter2"), USERS, peer=OTHER)
    assert guessing.begun == ["hunter2"]
