"""What the dev agent holds, in virtual time."""

import json
from typing import Any

import pytest

from consul_prom.devagent.definition import parse
from consul_prom.devagent.documents import content_hash
from consul_prom.devagent.errors import Refused
from consul_prom.devagent.state import State
from tests.conftest import Clock


@pytest.fixture
def state(clock: Clock) -> State:
    return State(clock=clock, epoch=lambda: 1_800_000_000.0)


def register(state: State, service_id: str = "shop.web-1.0", **fields: Any) -> None:
    check = {"HTTP": "http://127.0.0.1:9", "Interval": "10s", "DeregisterCriticalServiceAfter": "10s"}
    document = {"Name": "shop", "ID": service_id, "Check": check | fields.pop("Check", {})} | fields
    state.register(parse(json.dumps(document).encode()))


CHECK = "service:shop.web-1.0"


def test_reaps_after_a_minute(state: State, clock: Clock) -> None:
    """State gives up a service when its check was critical for more than a minute, although less was asked."""
    register(state)
    state.update_check(CHECK, "critical", "refused")
    clock.now += 60
    assert state.reap() == []
    clock.now += 0.1
    assert state.reap() == ["shop.web-1.0"]
    assert (state.services, state.checks, state.named("shop")) == ({}, {}, [])
    assert state.reap() == []


def test_reaps_as_late_as_asked(state: State, clock: Clock) -> None:
    """State waits longer than a minute if told so."""
    register(state, Check={"DeregisterCriticalServiceAfter": "10m"})
    state.update_check(CHECK, "critical", "refused")
    clock.now += 600
    assert state.reap() == []
    clock.now += 0.1
    assert state.reap() == ["shop.web-1.0"]


def test_minimum_is_adjustable(state: State, clock: Clock) -> None:
    """State takes another minimum for tests that cannot wait."""
    state.reap_after_at_least = 0.0
    register(state)
    state.update_check(CHECK, "critical", "refused")
    clock.now += 10.1
    assert state.reap() == ["shop.web-1.0"]


def test_reaps_only_what_asked_for_it(state: State, clock: Clock) -> None:
    """State keeps a critical service whose check does not want to be reaped."""
    register(state, Check={"DeregisterCriticalServiceAfter": None})
    state.update_check(CHECK, "critical", "refused")
    clock.now += 10_000
    assert state.reap() == []


def test_critical_without_probe(state: State, clock: Clock) -> None:
    """State keeps a service whose check is critical only because it never ran."""
    register(state)
    clock.now += 10_000
    assert state.status_of("shop.web-1.0") == "critical"
    assert state.reap() == []


@pytest.mark.parametrize("status", ["passing", "warning"])
def test_recovery_forgives(state: State, clock: Clock, status: str) -> None:
    """State counts the critical time from the last time that the check became critical."""
    register(state)
    state.update_check(CHECK, "critical", "refused")
    clock.now += 59
    state.update_check(CHECK, status, "here")
    state.update_check(CHECK, "critical", "refused")
    clock.now += 59
    state.update_check(CHECK, "critical", "still refused")
    assert state.reap() == []
    clock.now += 2
    assert state.reap() == ["shop.web-1.0"]


def test_registration_forgives(state: State, clock: Clock) -> None:
    """State counts the critical time anew after an identical registration, though the status stays."""
    register(state)
    state.update_check(CHECK, "critical", "refused")
    clock.now += 59
    register(state, Check={"Status": "passing"})
    assert state.checks[CHECK].status == "critical"
    clock.now += 59
    state.update_check(CHECK, "critical", "refused")
    clock.now += 59
    assert state.reap() == []


def test_index_starts_from_the_clock() -> None:
    """State never has a smaller index after a restart, however much happened before."""
    old = State(epoch=lambda: 1_800_000_000.0)
    for number in range(1_000):
        register(old, Tags=[str(number)])
    new = State(epoch=lambda: 1_800_000_001.0)
    assert new.service_index("shop") > old.service_index("shop")
    assert new.catalog_index > old.catalog_index


def test_index_of_names(state: State) -> None:
    """State counts an index for each name, greater with each change that can be seen under it."""
    seen = [state.service_index("shop")]
    register(state)
    seen.append(state.service_index("shop"))
    register(state, Tags=["v2"])
    seen.append(state.service_index("shop"))
    state.update_check(CHECK, "passing", "fine")
    seen.append(state.service_index("shop"))
    register(state, "other.web-1.0", Name="other")
    assert state.service_index("shop") == seen[-1] < state.service_index("other")
    state.deregister("shop.web-1.0")
    seen.append(state.service_index("shop"))
    register(state)
    seen.append(state.service_index("shop"))
    assert seen == sorted(set(seen))


def test_names_do_not_pile_up(state: State) -> None:
    """State forgets the names that nobody bears any more."""
    for number in range(100):
        register(state, f"x{number}", Name=f"x{number}")
        state.deregister(f"x{number}")
    assert state._service_indexes == {}


def test_output_is_no_news(state: State) -> None:
    """State does not wake anybody for a new output alone."""
    register(state)
    state.update_check(CHECK, "passing", "fine")
    woken: list[str] = []
    state.changed = lambda: woken.append("changed")
    index = state.service_index("shop")
    state.update_check(CHECK, "passing", "still fine")
    assert (woken, state.service_index("shop"), state.checks[CHECK].output) == ([], index, "still fine")
    state.update_check(CHECK, "warning", "busy")
    assert (woken, state.service_index("shop")) == (["changed"], index + 1)


def test_update_of_unknown_check(state: State) -> None:
    """State ignores what a probe found whose check has gone."""
    index = state.service_index("shop")
    state.update_check(CHECK, "passing", "fine")
    assert (state.checks, state.service_index("shop")) == ({}, index)


def test_deregister_unknown(state: State) -> None:
    """State refuses to deregister what it does not know."""
    with pytest.raises(Refused, match='Unknown service ID "nope"') as caught:
        state.deregister("nope")
    assert caught.value.status == 404


def test_check_moves_with_its_id(state: State) -> None:
    """State holds one check of an ID, whoever registered it last."""
    register(state, "a", Check={"CheckID": "mine"})
    register(state, "b", Check={"CheckID": "mine"})
    assert [check.check_id for check in state.checks_of("b")] == ["mine"]
    assert state.checks_of("a") == []


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({}, True),
        ({"Meta": {"b": "2", "a": "1"}}, True),
        ({"Check": {"Interval": "20s"}}, True),
        ({"Tags": ["b", "a"]}, False),
        ({"Tags": ["a"]}, False),
        ({"Port": 1}, False),
        ({"Address": "127.0.0.2"}, False),
        ({"Meta": {"a": "1"}}, False),
        ({"Name": "other"}, False),
        ({"Weights": {"Passing": 2, "Warning": 1}}, False),
        ({"EnableTagOverride": True}, False),
    ],
)
def test_hash_of_content(state: State, fields: dict[str, Any], *, same: bool) -> None:
    """State's services have the same hash if and only if they have the same content."""
    base: dict[str, Any] = {"Tags": ["a", "b"], "Meta": {"a": "1", "b": "2"}}
    register(state, **base)
    before = content_hash(state.services["shop.web-1.0"])
    register(state, **{**base, **fields})
    assert (content_hash(state.services["shop.web-1.0"]) == before) == same
