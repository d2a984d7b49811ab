"""The benches that are run by hand still run, with tiny numbers; what they print is not judged."""

import dataclasses
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.bench import exposition, footprint, growth, hotpath, pauses, port, rest, scale, start, stop, targets
from tests.bench.headtohead import __main__ as contest
from tests.bench.headtohead.plan import QUICK, Cell
from tests.bench.headtohead.system import EAGER
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
    """The bench of starts prints its three times."""
    require("consul")
    require("prometheus")
    start.main(1)
    found = re.findall(r"^(registered|first scrape|adopted slot) +[0-9.]+ s", capsys.readouterr().out, re.MULTILINE)
    assert found == ["registered", "first scrape", "adopted slot"]


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


def test_stop(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The bench of stops prints a row a model and state of the agent."""
    require("consul")
    monkeypatch.setattr(stop, "MODELS", {"sync": stop.MODELS["sync"]})
    stop.main(1)
    rows = re.findall(r"^sync +(is well|hangs) +(?:-?[0-9.]+ *){6}$", capsys.readouterr().out, re.MULTILINE)
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


def test_head_to_head(tmp_path: Path) -> None:
    """The contest runs, says who was not there, and writes a table with a verdict a row and a chart with its bars."""
    require("consul")
    require("prometheus")
    cell = Cell(1, 40, (1,))
    plan = dataclasses.replace(QUICK, cells=(cell,), window=1, costs=1, recycles=0)
    results = contest.run(["ours", "multiprocess"], plan)
    results.add("pushgateway", "costs", {}, "not run: it is not here")
    contest.write(results, tmp_path, head="today")
    assert results.figures[f"counters in Prometheus, %: {cell}"] == {"ours": [100], "multiprocess": [100]}
    assert results.reasons == [("pushgateway", "costs", "not run: it is not here")]
    table, chart = ((tmp_path / f"headtohead.{kind}").read_text() for kind in ("md", "svg"))
    figure = r"[0-9.,]+(?: <sub>[0-9., to]+</sub>)?"
    assert re.search(rf"^\| one inc, µs \| {figure} \| {figure} \| [*a-z]+", table, re.MULTILINE)
    assert re.search(rf"CPU of everything[^|\n]*{cell}", table)  # as a row, or among what is the same for all
    assert "- Pushgateway, costs: not run: it is not here" in table
    assert ET.fromstring(chart).tag.endswith("svg")  # noqa: S314  # just written
    assert chart.count(">consul-prom<") >= 3


def test_targets(capsys: pytest.CaptureFixture[str]) -> None:
    """The bench of many targets prints a row for narrow pages and one for wide, and what rules save."""
    require("consul")
    require("prometheus")
    targets.main(1, sizes=[2], flags=[EAGER])
    printed = capsys.readouterr().out
    assert re.findall(r"^ +2 +(\d+) .* \d+$", printed, re.MULTILINE) == ["10", "110"]
    assert re.search(r"rules, 2 workers: the sum takes [0-9]+ ms a query", printed)


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


def test_pauses(capsys: pytest.CaptureFixture[str]) -> None:
    """The bench of pauses prints a row a way."""
    pauses.main(1, 0.3, 100)
    rows = re.findall(r"^(.{16})(?: +[0-9.]+ \([^)]+\)){3}$", capsys.readouterr().out, re.MULTILINE)
    assert [row.strip() for row in rows] == list(pauses.WAYS)
