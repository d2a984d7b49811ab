"""Whether a request came with a right password, by HTTP's basic authentication and bcrypt.

https://www.rfc-editor.org/rfc/rfc7617
"""

import asyncio
import base64
import hashlib
import logging
import secrets
import threading
from collections.abc import Mapping
from typing import Final

from consul_prom.errors import EndpointError
from consul_prom.sparing import SparingLog

log = logging.getLogger(__name__)

REMEMBERED: Final = 100


class Passwords:
    """Remembers those that were right: bcrypt is slow by design, and a scraper comes again and again."""

    def __init__(self) -> None:
        self._log = SparingLog(log)
        self._key = secrets.token_bytes(32)
        self._right: set[bytes] = set()
        self._checking: asyncio.Future[bool] | None = None

    async def permit(self, authorization: str, users: Mapping[str, str]) -> bool:
        """Whether the header *authorization* has the password of one of *users*, whose hashes these are.

        Raises:
            EndpointError: that cannot be told now.
        """
        user, password = _credentials(authorization)
        # An unknown user takes as long as a wrong password.
        hashed = users.get(user) or next(iter(users.values()))
        proof = hashlib.blake2b(f"{user}\0{hashed}\0{password}".encode(), key=self._key).digest()
        if proof in self._right:
            return True
        if not authorization or not await self._matches(password, hashed) or user not in users:
            return False
        self._right = {proof, *list(self._right)[: REMEMBERED - 1]}
        return True

    async def _matches(self, password: str, hashed: str) -> bool:
        """One at a time, in a thread of its own: who guesses shall neither have all cores nor hold up our loop."""
        while self._checking:
            await asyncio.wait({self._checking})
        loop = asyncio.get_running_loop()
        answer = loop.create_future()

        def settle(found: bool) -> None:  # noqa: FBT001  # a value, not a switch
            self._checking = None
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
        self._checking = answer  # not before: nobody would end it
        return await asyncio.shield(answer)


def _credentials(authorization: str) -> tuple[str, str]:
    scheme, _, rest = authorization.partition(" ")
    try:
        user, _, password = base64.b64decode(rest.strip(), validate=True).decode().partition(":")
    except ValueError:
        return "", ""
    return (user, password) if scheme.lower() == "basic" else ("", "")


def _bcrypt_matches(password: str, hashed: str) -> bool:
    import bcrypt

    try:
        return bcrypt.checkpw(password.encode()[:72], hashed.encode())  # what is longer, bcrypt ignores
    except ValueError:  # a NUL, say
        return False
