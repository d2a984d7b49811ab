"""The contest's table is fair, and loud about who was not there."""

import subprocess
from collections.abc import Iterator

import pytest

from tests.bench.headtohead.contender import Unavailable, load
from tests.bench.headtohead.measure import Figures, guarded, reason
from tests.bench.headtohead.plan import CONTENDERS
from tests.bench.headtohead.programs import program
from tests.bench.headtohead.report import Results, markdown, verdict

NAMES = ("ours", "multiprocess", "nothing")
AT_MOST = "requests a second at most: 4 workers"


@pytest.mark.parametrize(
    ("row", "ours", "theirs", "expected"),
    [
        ("one inc", [1.0], [2.0], "**first**, by 2.0 x"),
        ("one inc", [2.0], [1.0], "behind, 2.0 x multiprocess mode"),
        ("one inc", [1.05], [1.0], "equal"),
        ("one inc", [1.0, 3.0], [2.0, 6.0], "equal"),
        ("one inc", [0.0], [2.0], "**first**"),
        ("one inc", [2.0], [0.0], "behind, 2.00 to 0"),
        ("one inc", [0.0], [0.0], "equal"),
        ("more on disk", [-0.01], [0.0], "equal"),
        (AT_MOST, [100.0], [300.0], "behind, 3.0 x multiprocess mode"),
        (AT_MOST, [300.0], [100.0], "**first**, by 3.0 x"),
        ("series in Prometheus", [300.0], [100.0], ""),
    ],
)
def test_verdict(row: str, ours: list[float], theirs: list[float], expected: str) -> None:
    """We are first or behind by more than a tenth, and where spreads do not meet; who takes no part does not count."""
    assert verdict(Results(NAMES, {row: {"ours": ours, "multiprocess": theirs, "nothing": [0.001]}}), row) == expected


def test_even() -> None:
    """CPU that was used while the load generator took twice as long counts half; a time then has to differ by more."""
    cpu, generator, p99 = (
        f"{kind}: 4 workers"
        for kind in (
            "CPU of everything, s per 1,000 requests",
            "CPU of the load generator, s per 1,000 requests",
            "request p99, ms",
        )
    )
    both = {"ours": [2.0], "multiprocess": [1.0]}
    results = Results(NAMES, {cpu: dict(both), generator: dict(both), p99: dict(both)})
    assert verdict(results, cpu) == "behind, 2.0 x multiprocess mode"
    results.even()
    assert results.figures[cpu] == {"ours": [1.5], "multiprocess": [1.5]}
    assert results.figures[p99] == both
    assert verdict(results, p99) == "equal"


def test_incomplete() -> None:
    """Who did not get its counters to Prometheus beats nobody."""
    row, seen = "one scrape of all workers, ms: 4 workers, scraped each 1 s", "counters in Prometheus, %: 4 workers"
    results = Results(NAMES, {row: {"ours": [2.0], "multiprocess": [1.0]}, seen: {"multiprocess": [98.0]}})
    assert verdict(results, row) == ""
    results.figures[seen]["multiprocess"] = [100.0]
    assert verdict(results, row) == "behind, 2.0 x multiprocess mode"


def test_absent() -> None:
    """Who cannot be had is a loud cell in each row, and a line with the reason."""
    results = Results(NAMES)
    results.add("ours", "recycles", {"more on disk": [1.0]})
    results.add("multiprocess", "recycles", {}, "not run: no disk")
    table = markdown(results, head="today")
    assert "| more on disk | 1.00 | **not run** | - |" in table
    assert "- multiprocess mode, recycles: not run: no disk" in table


def test_same() -> None:
    """A row in which nobody differs is a sentence."""
    results = Results(NAMES, {"requests failed: 4 workers": {"ours": [0.0], "multiprocess": [0.0], "nothing": [0.0]}})
    assert "\nThe same for all: requests failed: 4 workers.\n" in markdown(results, head="today")
    results.figures["requests failed: 4 workers"]["multiprocess"] = [1.0]
    assert "| requests failed: 4 workers | 0.00 | 1.00 | 0.00 | **first** |" in markdown(results, head="today")


def test_excuse() -> None:
    """Where we are behind, the table says why; where we are not, it does not."""
    results = Results(NAMES, {"memory a worker": {"ours": [2.0], "multiprocess": [1.0]}})
    assert "- behind in *memory a worker*: " in markdown(results, head="today")
    results.figures["memory a worker"]["ours"] = [1.0]
    assert "- behind in" not in markdown(results, head="today")


def test_missing_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is neither built nor in PATH is named with where to get it."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unavailable, match="redis-server is not in PATH; Debian's package redis-server has it"):
        program("redis-server")


def test_partial() -> None:
    """What was measured before something failed is kept, with the reason for the rest."""

    def measurements() -> Iterator[Figures]:
        yield {"one inc": [1.0]}
        raise Unavailable("hey is not here")

    assert guarded(measurements()) == ({"one inc": [1.0]}, "not run: hey is not here")


def test_contenders() -> None:
    """Each contender has a title of its own and a line that says how it works."""
    contenders = [load(name) for name in CONTENDERS]
    assert len({contender.title for contender in contenders}) == len(CONTENDERS)
    assert all(contender.how for contender in contenders)


def test_reason() -> None:
    """A program that took too long is named without the machine's path to it."""
    assert reason(subprocess.TimeoutExpired(["/somewhere/hey", "-n"], 120)) == "failed: hey took more than 120 s"
    assert reason(ValueError("so\nit is")) == "failed: so"
    assert reason(ValueError()) == "failed: ValueError"
