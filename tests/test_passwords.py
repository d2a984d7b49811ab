"""Passwords by bcrypt: who is let in, what that costs, and what is done where it cannot be told."""

import asyncio
import base64
import logging
import threading

import bcrypt
import pytest

from consul_prom import passwords as module
from consul_prom.errors import EndpointError
from consul_prom.passwords import Passwords
from tests.services.waiting import eventually

HASH = bcrypt.hashpw(b"hunter2", bcrypt.gensalt(4)).decode()
USERS = {"me": HASH, "you": HASH}


def basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


@pytest.fixture
def passwords() -> Passwords:
    return Passwords()


async def test_right_and_wrong(passwords: Passwords) -> None:
    """The right password opens, again and again; nothing else does."""
    for user in ("me", "you", "me"):
        assert await passwords.permit(basic(user, "hunter2"), USERS)
    for wrong in (
        *("", "Basic", "Basic !", "Basic w7", f"Bearer {HASH}", basic("me", "hunter3"), basic("me", "")),
        *(basic("they", "hunter2"), basic("", "hunter2"), basic("me", HASH), basic("me", "a\0b")),
        f"Digest {basic('me', 'hunter2').partition(' ')[2]}",
    ):
        assert not await passwords.permit(wrong, USERS), wrong


async def test_scheme_in_lower_case(passwords: Passwords) -> None:
    """The scheme's case does not matter, as RFC 9110 says."""
    assert await passwords.permit(basic("me", "hunter2").replace("Basic", "basic"), USERS)


async def test_long_password(passwords: Passwords) -> None:
    """Of a password bcrypt knows 72 bytes, and what is longer than that works as with other tools."""
    long = "ü" * 60
    hashed = bcrypt.hashpw(long.encode()[:72], bcrypt.gensalt(4)).decode()
    assert await passwords.permit(basic("me", long), {"me": hashed})


async def test_bcrypt_runs_once(passwords: Passwords, monkeypatch: pytest.MonkeyPatch) -> None:
    """A password that was right is not hashed again for the next scrape; one that was wrong is."""
    hashed: list[str] = []

    def matches(password: str, _hashed: str) -> bool:
        hashed.append(password)
        return password == "hunter2"

    monkeypatch.setattr(module, "_bcrypt_matches", matches)
    for _ in range(3):
        assert await passwords.permit(basic("me", "hunter2"), USERS)
        assert not await passwords.permit(basic("me", "wrong"), USERS)
    assert hashed == ["hunter2", "wrong", "wrong", "wrong"]


async def test_unknown_user_costs_the_same(passwords: Passwords, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown user's password is hashed, too: the time does not tell who exists."""
    seen: list[str] = []

    def matches(_password: str, hashed: str) -> bool:
        seen.append(hashed)
        return True

    monkeypatch.setattr(module, "_bcrypt_matches", matches)
    assert not await passwords.permit(basic("they", "hunter2"), USERS)
    assert seen == [HASH]


async def test_no_thread(
    passwords: Passwords, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the system gives no thread it cannot be told, which is one line of the log; what was right stays so."""
    caplog.set_level(logging.INFO)
    assert await passwords.permit(basic("you", "hunter2"), USERS)

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refuse)
        for password in ("hunter2", "hunter3"):
            with pytest.raises(EndpointError, match="no thread to check a password in"):
                await passwords.permit(basic("me", password), USERS)
        assert await passwords.permit(basic("you", "hunter2"), USERS)
    async with asyncio.timeout(10):
        assert await passwords.permit(basic("me", "hunter2"), USERS)
    assert [record.getMessage() for record in caplog.records] == [
        "no password can be checked: can't start new thread; raise the limit of threads (ulimit -u, pids.max)",
        "passwords can be checked again",
    ]


async def test_one_at_a_time(passwords: Passwords, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who guesses keeps one thread busy, however many they are, also when they hang up; the loop goes on."""
    gate, running, most = threading.Event(), 0, 0

    def matches(_password: str, _hashed: str) -> bool:
        nonlocal running, most
        running += 1
        most = max(most, running)
        gate.wait(10)
        running -= 1
        return False

    monkeypatch.setattr(module, "_bcrypt_matches", matches)
    guesses = [asyncio.ensure_future(passwords.permit(basic("me", str(number)), USERS)) for number in range(5)]
    await eventually(lambda: running == 1, within=10, what="one is being checked")
    guesses[0].cancel()
    guesses[1].cancel()
    await asyncio.sleep(0.05)
    gate.set()
    assert await asyncio.gather(*guesses[2:]) == [False] * 3
    assert most == 1
