"""Quote text that another program sent: one printable line, cut to length, without our secrets.

A program that echoes the request sends our token and password back, as they are or encoded: in JSON, HTML, a URL,
Python's repr or base64.
"""

import base64
import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from itertools import groupby
from typing import Final

HIDDEN: Final = "***"
_LARGEST: Final = 2**16
"""Characters that are looked at: an answer may have 32 MiB."""
_LONGEST: Final = 16
"""Characters that one character of a secret may be encoded as, for example ``&amp;#x0022;``."""
_NAMES: Final = {'"': "quot", "&": "amp", "'": "apos", "<": "lt", ">": "gt"}


def quote(text: str, secrets: Collection[str], *, most: int = 200) -> str:
    """Return the first *most* characters of *text* on one line; asterisks replace each of the *secrets*."""
    line = " ".join(text[:_LARGEST].split())
    line = "".join(character if character.isprintable() else "\ufffd" for character in line)
    pattern, longest = _pattern(frozenset(secrets))
    if len(text) > _LARGEST:  # the end of the line may be the beginning of a secret
        most = max(0, min(most, len(line) - longest))
    # The mask is as long as the secret, so that the cut leaves no part of a secret that goes on behind it.
    masked = pattern.sub(lambda match: "\0" * len(match[0]), line[: most + longest])[:most]
    return re.sub("\0+", HIDDEN, masked)


@lru_cache(maxsize=8)
def _pattern(secrets: frozenset[str]) -> tuple[re.Pattern[str], int]:
    """What matches any of the *secrets*, and the length of the longest match."""
    known = sorted(filter(None, map(str.strip, secrets)), key=lambda secret: (-len(secret), secret))
    forms = [form for secret in known for form in (_encoded(secret), *_in_base64(secret))]
    longest = _LONGEST * max((2 * len(secret) + 8 for secret in known), default=0)
    return re.compile("|".join(forms) or "(?!)"), longest


def _in_base64(secret: str) -> Iterable[str]:
    """The three ways in which the bytes before the secret may shift it in base64 text."""
    any_digit = "[A-Za-z0-9+/_-]?"  # holds bits of the secret and of its neighbour
    for before, mixed in enumerate((0, 2, 3)):
        data = bytes(before) + secret.encode()
        digits = base64.b64encode(data).decode().rstrip("=")[mixed : -1 if len(data) % 3 else None]
        if len(digits) >= 4:
            yield any_digit * bool(mixed) + _encoded(digits, {"+": "-", "/": "_"}) + any_digit + "(?:=|%3[Dd]){0,2}"


def _encoded(text: str, others: dict[str, str] | None = None) -> str:
    """A pattern for *text*, whose signs may be encoded; *others* may replace them."""
    pattern = ""
    for sign, group in groupby(text):
        code, number = f"{ord(sign):02x}", len(list(group))
        if sign.isalnum():  # no encoder touches these
            pattern += sign * number
            continue
        forms = [re.escape(sign), rf"%(?:25){{0,2}}{code}", f"u00{code}", f"x{code}"]
        forms.append(f"&(?:amp;)?(?:#0?{ord(sign)}|#x0{{0,2}}{code}|{_NAMES.get(sign, '#')});")
        if sign == " ":
            forms.append(r"\+")
        if others and sign in others:
            forms.append(re.escape(others[sign]))
        times = f"1,{number}" if sign == " " else number  # white space is one space in the line
        pattern += rf"(?:\\{{0,4}}(?i:{'|'.join(forms)})){{{times}}}"
    return pattern
