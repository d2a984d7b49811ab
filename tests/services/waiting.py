"""Waiting for a condition, always with a deadline."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

T = TypeVar("T")

PATIENCE = 5.0
"""A busy machine gets this many times the seconds that a test names."""
MOST = 240.0
"""Seconds; a test's own time-out would hide the thing that was awaited."""


def wait_until(check: Callable[[], T], *, within: float, what: str, every: float = 0.05) -> T:
    """Call *check* until it returns something true, and return that.

    An AssertionError of *check* means "not yet". *within* is more than enough for a machine that does nothing else.

    Raises:
        AssertionError: a busy machine had enough time, too; the message names *what*.
    """
    within = _patient(within)
    deadline = time.monotonic() + within
    while True:
        refusal: AssertionError | None = None
        try:
            if result := check():
                return result
        except AssertionError as error:
            refusal = error
        if time.monotonic() >= deadline:
            raise AssertionError(_late(what, within)) from refusal
        time.sleep(every)


@overload
async def eventually(check: Callable[[], Awaitable[T]], *, within: float, what: str, every: float = 0.05) -> T: ...
@overload
async def eventually(check: Callable[[], T], *, within: float, what: str, every: float = 0.05) -> T: ...
async def eventually(check: Callable[[], Any], *, within: float, what: str, every: float = 0.05) -> Any:
    """The same as `wait_until` without blocking the loop; *check* may be asynchronous and is cancelled when late."""
    refusal: AssertionError | None = None
    within = _patient(within)
    deadline = asyncio.timeout(within)
    try:
        async with deadline:
            while True:
                try:
                    result = check()
                    if inspect.isawaitable(result):
                        result = await result
                    if result:
                        return result
                    refusal = None
                except AssertionError as error:
                    refusal = error
                await asyncio.sleep(every)
    except TimeoutError:
        if not deadline.expired():  # it is the condition's own
            raise
        raise AssertionError(_late(what, within)) from refusal


def _patient(within: float) -> float:
    return max(within, min(within * PATIENCE, MOST))


def _late(what: str, within: float) -> str:
    return f"not within {within:g} s: {what}"
