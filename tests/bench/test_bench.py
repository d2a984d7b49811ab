"""The benches that are run by hand still run, with tiny numbers; what they print is not judged."""

import re

import pytest

from tests.bench import footprint, growth, hotpath, rest, scale, start
from tests.services.binaries import require


def test_footprint(capsys: pytest.CaptureFixture[str]) -> None:
    """The bench of imports and memory prints a row a step."""
    footprint.main(1)
    printed = capsys.readouterr().out
    assert [name for name, _ in footprint.STEPS if name not in printed] == []


def test_start(capsys: pytest.CaptureFixture[str]) -> None:
    """The bench of starts prints both times."""
    require("consul")
    require("prometheus")
    start.main(1)
    assert re.findall(r"^(registered|first scrape) +[0-9.]+ s", capsys.readouterr().out, re.MULTILINE) == [
        "registered",
        "first scrape",
    ]


def test_rest(capsys: pytest.CaptureFixture[str]) -> None:
    """The bench of idle workers prints what each talks, and what all cost."""
    require("consul")
    rest.main(0.02, fleets=[(3, 2)], settle=0.2)
    printed = capsys.readouterr().out
    assert "\n3 that hold a connection, each and by minute\n" in printed
    assert re.search(r"connections open, on average +1\.00", printed)
    assert re.search(r"threads +1\.00", printed)


def test_scale(capsys: pytest.CaptureFixture[str]) -> None:
    """The bench of many registrars prints a row a size, all of them registered and none critical."""
    require("consul")
    scale.main(0.3, sizes=[2, 5], intervals=[1], settle=0.2)
    rows = re.findall(r"^ +([25]) +1 s +[0-9.]+ s +0, 0 .* (\d+) +\d+$", capsys.readouterr().out, re.MULTILINE)
    assert rows == [("2", "0"), ("5", "0")] * 2


def test_hotpath(capsys: pytest.CaptureFixture[str]) -> None:
    """The bench of counting prints a row an act, with both ratios."""
    hotpath.main(1, incs=500, births=40)
    rows = re.findall(
        r"^(inc|observe|birth of a \w+) +(?:[0-9.]+ \([^)]+\) *){5}$", capsys.readouterr().out, re.MULTILINE
    )
    assert rows == ["inc", "observe", "birth of a counter", "birth of a histogram"]


def test_growth(capsys: pytest.CaptureFixture[str]) -> None:
    """The bench of growth prints what is on the disk."""
    growth.main(lives=10, sets=2)
    assert re.findall(r"^ +(1|10) +(\d+) +\d+ +[0-9.]+$", capsys.readouterr().out, re.MULTILINE) == [
        ("1", "3"),
        ("10", "30"),
    ]
