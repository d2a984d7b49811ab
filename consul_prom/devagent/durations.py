"""Go's durations, as Consul reads and prints them; a duration is an integer of nanoseconds.

Source: https://pkg.go.dev/time#ParseDuration and https://pkg.go.dev/time#Duration.String
"""

import json
import re
from decimal import Decimal

SECOND = 10**9
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
# Both ways to write a micro sign are valid: U+00B5 and U+03BC.
_UNITS = {
    "ns": 1,
    "us": 10**3,
    "\u00b5s": 10**3,
    "\u03bcs": 10**3,
    "ms": 10**6,
    "s": SECOND,
    "m": MINUTE,
    "h": HOUR,
}
_PART = re.compile(r"(\d+\.?\d*|\.\d+)([^\d.]*)", re.ASCII)


def parse(text: str) -> int:
    """Nanoseconds of a text like `1m30s`; ValueError has Go's own message."""
    sign, rest = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
    if rest == "0":
        return 0
    total = Decimal(0)
    position = 0
    while part := _PART.match(rest, position):
        number, unit = part.groups()
        if not unit:
            raise ValueError(f"time: missing unit in duration {quoted(text)}")
        if unit not in _UNITS:
            raise ValueError(f"time: unknown unit {quoted(unit)} in duration {quoted(text)}")
        total += Decimal(number) * _UNITS[unit]
        position = part.end()
    if position == 0 or position < len(rest) or total >= 2**63:
        raise ValueError(f"time: invalid duration {quoted(text)}")
    return sign * int(total)


def text_of(duration: int) -> str:
    """Go's own way to print a duration that is not negative: `1m30s`, `10m0s`, `100ms`, `0s`."""
    if duration == 0:
        return "0s"
    for name, unit in (("ns", 1), ("\u00b5s", 10**3), ("ms", 10**6)):
        if duration < unit * 1000:
            return f"{_plain(duration, unit)}{name}"
    hours, rest = divmod(duration, HOUR)
    minutes, rest = divmod(rest, MINUTE)
    seconds = f"{_plain(rest, SECOND)}s"
    if hours:
        return f"{hours}h{minutes}m{seconds}"
    return f"{minutes}m{seconds}" if minutes else seconds


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _plain(duration: int, unit: int) -> str:
    number = f"{Decimal(duration) / unit:f}"
    return number.rstrip("0").rstrip(".") if "." in number else number
