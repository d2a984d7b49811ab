"""Go's durations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_prom.devagent import durations

SAME = [
    (0, "0s"),
    (1, "1ns"),
    (1_500, "1.5µs"),
    (100_000_000, "100ms"),
    (1_000_000_000, "1s"),
    (1_500_000_000, "1.5s"),
    (60_000_000_000, "1m0s"),
    (90_000_000_000, "1m30s"),
    (600_000_000_000, "10m0s"),
    (3_600_000_000_000, "1h0m0s"),
    (360_000_000_000_000, "100h0m0s"),
]


@pytest.mark.parametrize(("number", "text"), SAME)
def test_text_of(number: int, text: str) -> None:
    """A duration is printed as Go prints it."""
    assert durations.text_of(number) == text
    assert durations.parse(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("-0", 0), ("+5s", 5 * 10**9), ("-1s", -(10**9)), (".5s", 5 * 10**8), ("1.s", 10**9), ("1μs", 1_000)],
)
def test_parse(text: str, number: int) -> None:
    """A duration may have a sign and leave out digits."""
    assert durations.parse(text) == number


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10", 'time: missing unit in duration "10"'),
        ("1m10", 'time: missing unit in duration "1m10"'),
        ("1d", 'time: unknown unit "d" in duration "1d"'),
        ("1 s", 'time: unknown unit " s" in duration "1 s"'),
        ("", 'time: invalid duration ""'),
        ("s", 'time: invalid duration "s"'),
        ("-", 'time: invalid duration "-"'),
        (".s", 'time: invalid duration ".s"'),
        ("2562048h", 'time: invalid duration "2562048h"'),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    """A text that is no duration is refused in Go's words."""
    with pytest.raises(ValueError, match="time: ") as caught:
        durations.parse(text)
    assert str(caught.value) == message


@given(st.integers(min_value=0, max_value=2**63 - 1))
def test_round_trip(number: int) -> None:
    """What is printed is read back as the same duration."""
    assert durations.parse(durations.text_of(number)) == number
