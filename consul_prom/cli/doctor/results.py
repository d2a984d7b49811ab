"""What a look finds, in words."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

State = Literal["ok", "wrong", "unknown"]


class Finding(NamedTuple):
    """What a check found; *cure* says what to do where it is wrong, or how to find out."""

    check: str
    state: State
    sentence: str
    cure: str = ""


def number_of(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def listed(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
