"""What Prometheus counts is what the application counted, whatever ends its workers."""

import pytest

from tests.bench.exactness.harness import SCENARIOS, run


@pytest.mark.parametrize("name", ["kill, recycle, HUP"])
def test_exact(name: str) -> None:
    """Workers are killed, recycled and reloaded; each of two Prometheus servers counts each request once."""
    (scenario,) = (it for it in SCENARIOS if it.name == name)
    result = run(scenario, "ledger", 1500)
    assert result.truth >= 1500
    assert result.counted == result.observed == (result.truth, result.truth)
    assert result.saved == result.truth
