"""The benches that are run by hand still run, with tiny numbers; what they print is not judged."""

import re

import pytest

from tests.bench import exposition, footprint, port, rest, scale, start, stop
from tests.services.binaries import require


def test_footprint(capsys: pytest.CaptureFixture[str]) -> None:
    """The bench of imports and memory prints a row a step."""
    footprint.main(1)
    printed = capsys.readouterr().out
    assert [name for name, _ in footprint.STEPS if name not in printed] == []


def test_exposition(capsys: pytest.CaptureFixture[str]) -> None:
    """The bench of pages prints a row for each kind of scrape, and for each level of compression."""
    exposition.main(1, 500)
    rows = re.findall(r"^(.*?)  .* ms \(", capsys.readouterr().out, re.MULTILINE)
    scrapes = ["generate_latest", "first scrape", "all changed", "10 % changed", "none changed"]
    assert [row.strip() for row in rows] == [
        *scrapes,
        *(f"ledger: {scrape}" for scrape in scrapes),
        *(f"gzip, level {level}" for level in (1, 2, 4, 6, 9)),
    ]


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


@pytest.mark.timeout(240)
def test_stop(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The bench of stops prints a row a model and state of the agent."""
    require("consul")
    monkeypatch.setattr(stop, "MODELS", {"sync": stop.MODELS["sync"]})
    stop.main(1)
    rows = re.findall(r"^sync +(is well|hangs) +(?:-?[0-9.]+ *){4}$", capsys.readouterr().out, re.MULTILINE)
    assert rows == ["is well", "hangs"]


def test_port(capsys: pytest.CaptureFixture[str]) -> None:
    """The bench of those who should not be there prints a row for the calm and for each of them."""
    port.main(0.5, rounds=1)
    assert re.findall(r"^(\w+) .* ms .* ms +\d+ of \d+ ", capsys.readouterr().out, re.MULTILINE) == [
        "calm",
        "crowd",
        "loris",
        "scanner",
    ]
