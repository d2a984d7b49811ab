"""Whether a request came with a right password, by HTTP's basic authentication and bcrypt.

https://www.rfc-editor.org/rfc/rfc7617
"""

import asyncio
import base64
import hashlib
import ipaddress
import logging
import secrets
import threading
from collections.abc import Mapping
from typing import Final

from consul_prom.errors import EndpointError
from consul_prom.logs import ThrottledLogger

log = logging.getLogger(__name__)

LINE: Final = 8
"""Passwords that wait for their check: so many that were never seen, and as many that were refused for want of room."""
REMEMBERED: Final = 1000
"""Passwords of each kind, as hashes of 32 bytes."""


class Passwords:
    """Checks passwords one after another, and remembers the answers: bcrypt is slow by design, and scrapers come again.

    Each peer address has one place in the line, so that one that guesses does not keep the others waiting. A password
    that finds no room is refused, and finds a place of its own when it comes again: a scraper repeats its password at
    each scrape, and a client that guesses does not.
    """

    def __init__(self) -> None:
        self._log = ThrottledLogger(log)
        self._key = secrets.token_bytes(32)
        self._right = _Memory()
        self._wrong = _Memory()
        self._refused = _Memory()
        self._checks: dict[bytes, asyncio.Task[bool]] = {}
        self._places: set[tuple[str, bool]] = set()
        self._one_at_a_time = asyncio.Lock()

    async def permit(self, authorization: str, users: Mapping[str, str], *, peer: str) -> bool:
        """Whether the header *authorization* has the password of one of *users*, whose hashes these are.

        Raises:
            EndpointError: that cannot be told now.
        """
        credentials = _credentials(authorization)
        if credentials is None:
            return False
        user, password = credentials
        proof = hashlib.blake2b(f"{user}\0{users.get(user)}\0{password}".encode(), key=self._key).digest()
        if proof in self._right or proof in self._wrong:
            return proof in self._right
        if proof not in self._checks:
            # An unknown user takes as long as a wrong password.
            self._begin(proof, password, users.get(user) or next(iter(users.values())), user in users, peer)
        return await asyncio.shield(self._checks[proof])  # the answer is of use even if the client has gone

    def _begin(self, proof: bytes, password: str, hashed: str, is_user: bool, peer: str) -> None:  # noqa: FBT001
        came_before = proof in self._refused
        place = _network(peer), came_before
        if place in self._places or sum(before == came_before for _, before in self._places) >= LINE:
            self._refused.add(proof)
            raise EndpointError("too many passwords are being checked: try again")
        self._places.add(place)
        task = self._checks[proof] = asyncio.create_task(self._check(proof, password, hashed, is_user))

        def end(task: asyncio.Task[bool]) -> None:
            self._places.discard(place)
            del self._checks[proof]
            if not task.cancelled():
                task.exception()  # which is the waiting clients', if there are any left

        task.add_done_callback(end)

    async def _check(self, proof: bytes, password: str, hashed: str, is_user: bool) -> bool:  # noqa: FBT001
        async with self._one_at_a_time:
            found = await self._matches(password, hashed) and is_user
        (self._right if found else self._wrong).add(proof)
        return found

    async def _matches(self, password: str, hashed: str) -> bool:
        """In a thread of its own, since guesses must not hold up our loop."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bool] = loop.create_future()

        def settle(found: bool) -> None:  # noqa: FBT001  # a value, not a switch
            if not answer.cancelled():
                answer.set_result(found)

        def check() -> None:
            found = _bcrypt_matches(password, hashed)
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, found)

        try:
            threading.Thread(target=check, name="consul-prom-bcrypt", daemon=True).start()
        except RuntimeError as error:
            sentence = "no password can be checked: %s; raise the limit of threads (ulimit -u, pids.max)"
            self._log.failed(sentence, error)
            raise EndpointError("no thread to check a password in") from error
        self._log.over("passwords can be checked again")
        return await answer


class _Memory:
    """The last REMEMBERED proofs that were added."""

    def __init__(self) -> None:
        self._proofs: dict[bytes, None] = {}

    def __contains__(self, proof: bytes) -> bool:
        return proof in self._proofs

    def add(self, proof: bytes) -> None:
        self._proofs[proof] = None
        if len(self._proofs) > REMEMBERED:
            del self._proofs[next(iter(self._proofs))]


def _network(peer: str) -> str:
    """The addresses that count as one peer: an IPv6 host has a whole /64."""
    address = peer.partition("%")[0]
    return str(ipaddress.ip_network((address, 64), strict=False)) if ":" in address else address


def _credentials(authorization: str) -> tuple[str, str] | None:
    scheme, _, rest = authorization.partition(" ")
    try:
        user, colon, password = base64.b64decode(rest.strip(), validate=True).decode().partition(":")
    except ValueError:
        return None
    return (user, password) if colon and scheme.lower() == "basic" else None


def _bcrypt_matches(password: str, hashed: str) -> bool:
    import bcrypt

    try:
        return bcrypt.checkpw(password.encode()[:72], hashed.encode())  # what is longer, bcrypt ignores
    except ValueError:  # a NUL, say
        return False
