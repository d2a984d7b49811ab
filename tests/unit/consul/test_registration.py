"""The entry as we want it, and how it differs from what the agent has."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from consul_prom.consul.registration import (
    HEALTH_PATH,
    MARKER,
    EntryID,
    Registration,
    build,
    check_difference,
    difference,
    entry_id,
    go_duration,
    is_ours,
    origin,
    parse_entry_id,
)
from consul_prom.devagent.durations import parse as parse_go_duration
from consul_prom.devagent.durations import text_of as go_prints
from consul_prom.process.identity import process_identity
from consul_prom.settings.parsers import MANAGED_META
from consul_prom.settings.settings import load
from consul_prom.slots.slots import MASTER, Slot, acquire
from tests.conftest import MakeSettings

SERVICES = st.from_regex(r"[a-z][a-z0-9-]{0,54}", fullmatch=True)
HOSTS = st.from_regex(r"[A-Za-z0-9.-]{1,40}", fullmatch=True)
SLOTS = st.integers(0, 4095)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
KEYS = st.from_regex(r"[a-z][a-z0-9_]{0,9}", fullmatch=True)


@pytest.fixture
def slot(slot_directory: Path) -> Slot:
    return dataclasses.replace(acquire(slot_directory, "shop"), number=2)


@pytest.fixture
def wanted(settings: MakeSettings, slot: Slot) -> Registration:
    return _build(settings(), slot)


def _build(settings: Any, slot: Slot, *, adopted: bool = False) -> Registration:
    return build(settings, slot=slot, address="10.0.0.7", port=40123, version="1.2.3", pid=os.getpid(), adopted=adopted)


def _as_the_agent_tells_it(wanted: Registration) -> dict[str, Any]:
    """``GET /v1/agent/service/<id>`` after the document was registered, by way of JSON."""
    document = wanted.document()
    told = {
        "ID": document["ID"],
        "Service": document["Name"],
        "Address": document["Address"],
        "Port": document["Port"],
        "Tags": document["Tags"],
        "Meta": document["Meta"],
        "Weights": {"Passing": 1, "Warning": 1},
        "EnableTagOverride": False,
        "ContentHash": "f00",
        "Datacenter": "dc1",
    }
    found: dict[str, Any] = json.loads(json.dumps(told))
    return found


@st.composite
def _registrations(draw: st.DrawFn) -> Registration:
    host, slot = draw(HOSTS), draw(SLOTS)
    return Registration(
        id=entry_id(draw(SERVICES), host, slot),
        name=draw(SERVICES),
        address=draw(st.ip_addresses().map(str)),
        port=draw(st.integers(1, 65535)),
        tags=tuple(draw(st.lists(TEXTS, max_size=3))),
        meta={**draw(st.dictionaries(KEYS, TEXTS, max_size=3)), "instance": f"{host}:{slot}", "scheme": "http"},
        check_interval=draw(st.floats(1, 1000)),
        check_timeout=draw(st.floats(0.1, 100)),
        deregister_after=draw(st.floats(60, 10**8)),
        health_path=HEALTH_PATH,
        tcp_check=draw(st.booleans()),
    )


class TestDocument:
    """What we send."""

    def test_shape(self, wanted: Registration, slot: Slot) -> None:
        """The document is exactly what the design lists."""
        note = "GET http://10.0.0.7:40123/-/healthy; deregistered after 600s critical"
        assert wanted.document() == {
            "ID": "shop.web-1.2",
            "Name": "shop-metrics",
            "Address": "10.0.0.7",
            "Port": 40123,
            "Tags": ["consul-prom"],
            "Meta": {
                "external-source": "consul-prom",
                "managed_by": "consul-prom",
                "service": "shop",
                "host": "web-1",
                "slot": "2",
                "instance": "web-1:2",
                "pid": str(os.getpid()),
                "proc": process_identity(os.getpid()),
                "dir": f"{slot.directory_id}:{slot.directory}",
                "version": "1.2.3",
                "scheme": "http",
            },
            "Check": {
                "Name": "consul-prom web-1:2",
                "Notes": note,
                "HTTP": "http://10.0.0.7:40123/-/healthy",
                "Interval": "30s",
                "Timeout": "5s",
                "DeregisterCriticalServiceAfter": "600s",
                "TLSSkipVerify": True,
                "Status": "passing",
            },
        }

    def test_tls(self, settings: MakeSettings, slot: Slot) -> None:
        """Where TLS is spoken the check does so too, and verifies nothing; where it could not, it only connects."""
        place: dict[str, Any] = {"slot": slot, "address": "::1", "port": 7, "version": "1", "pid": 1, "scheme": "https"}
        tls, certificates = (build(settings(), **place, tcp_check=tcp).document() for tcp in (False, True))
        assert tls["Meta"]["scheme"] == certificates["Meta"]["scheme"] == "https"
        assert (tls["Check"]["HTTP"], tls["Check"]["TLSSkipVerify"]) == ("https://[::1]:7/-/healthy", True)
        assert certificates["Check"]["TCP"] == "[::1]:7"
        assert certificates["Check"]["Notes"] == "connect to [::1]:7; deregistered after 600s critical"
        assert not {"HTTP", "TLSSkipVerify"} & set(certificates["Check"])

    def test_settings_show(self, settings: MakeSettings, slot: Slot) -> None:
        """Every setting that concerns the entry is in it."""
        chosen = settings(
            consul_service="till",
            host="web.example",
            tags="blue,fast",
            meta="team=a",
            check_interval="10s",
            check_timeout="500ms",
            deregister_after="90s",
        )
        document = _build(chosen, slot).document()
        assert document["ID"] == "shop.web.example.2"
        assert document["Name"] == "till"
        assert document["Tags"] == ["consul-prom", "blue", "fast"]
        assert document["Meta"]["team"] == "a"
        assert document["Meta"]["instance"] == "web.example:2"
        check = document["Check"]
        assert (check["Interval"], check["Timeout"]) == ("10s", "500ms")
        assert check["DeregisterCriticalServiceAfter"] == "90s"

    def test_tags_are_told_once(self, settings: MakeSettings, slot: Slot) -> None:
        """Our tag comes first, and none comes twice."""
        assert _build(settings(tags="b,consul-prom,a,b"), slot).tags == ("consul-prom", "b", "a")

    def test_our_meta_is_what_settings_reserve(self, settings: MakeSettings, slot: Slot, wanted: Registration) -> None:
        """Every key that we set is reserved in the settings; a live worker has all but `adopted`."""
        assert MANAGED_META - set(wanted.meta) == {"adopted"}
        assert set(_build(settings(), slot, adopted=True).meta) == MANAGED_META

    def test_longest_entry_is_within_consuls_limits(self, tmp_path: Path) -> None:
        """With the longest settings, no value is longer than Consul's 512 bytes and there are 64 pairs at most."""
        directory = tmp_path / ("d" * (399 - len(str(tmp_path))))
        # One name of a path has 255 bytes at most; the entry only tells it.
        longest = load(
            {
                "service": "s" * 55,
                "host": "h" * 253,
                "dir": directory,
                "meta": {f"k{number}": "v" * 512 for number in range(64 - len(MANAGED_META))},
            },
            environ={},
        )
        slot = acquire(tmp_path / "slots", "shop")
        wanted = _build(longest, dataclasses.replace(slot, directory=directory, number=4095))
        assert max(len(value.encode()) for value in wanted.meta.values()) <= 512
        assert len(wanted.meta) <= 64
        assert len(wanted.name) <= 63

    @given(_registrations())
    def test_check_is_one_that_consul_understands(self, registration: Registration) -> None:
        """Whatever the settings, the check's URL is that of the address and its times are Go's."""
        check = registration.document()["Check"]
        assert check.get("HTTP", check.get("TCP", "") + HEALTH_PATH).endswith(f":{registration.port}{HEALTH_PATH}")
        assert check["Status"] == "passing"
        for field in ("Interval", "Timeout", "DeregisterCriticalServiceAfter"):
            assert re.fullmatch(r"[1-9][0-9]*(s|ms)", check[field])


class TestDifference:
    """Compare, and name the field."""

    def test_none_when_the_agent_has_it(self, wanted: Registration) -> None:
        """What was registered does not differ from what is wanted, whatever else the agent tells of it."""
        assert difference(wanted, _as_the_agent_tells_it(wanted)) is None

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("Service", "shop"),
            ("Address", "10.0.0.8"),
            ("Port", 40124),
            ("Tags", []),
            ("Tags", None),
            ("Tags", ["consul-prom", "more"]),
            ("Tags", ["more", "consul-prom"]),
        ],
    )
    def test_field_is_named(self, wanted: Registration, field: str, value: object) -> None:
        """A field that was edited is named; the order of tags counts."""
        assert difference(wanted, {**_as_the_agent_tells_it(wanted), field: value}) == field

    @pytest.mark.parametrize("field", ["Service", "Address", "Port", "Tags"])
    def test_missing_field_is_named(self, wanted: Registration, field: str) -> None:
        """A field that the agent does not tell differs."""
        existing = _as_the_agent_tells_it(wanted)
        del existing[field]
        assert difference(wanted, existing) == field

    def test_meta_is_named_by_key(self, wanted: Registration) -> None:
        """A pair that was changed, added or taken away is named by its key, the first in order."""
        existing = _as_the_agent_tells_it(wanted)
        meta = existing["Meta"]
        assert difference(wanted, {**existing, "Meta": {**meta, "pid": "1"}}) == "Meta.pid"
        assert difference(wanted, {**existing, "Meta": {**meta, "more": ""}}) == "Meta.more"
        assert difference(wanted, {**existing, "Meta": {**meta, "slot": "7", "adopted": "1"}}) == "Meta.adopted"
        for key in meta:
            assert (
                difference(wanted, {**existing, "Meta": {k: v for k, v in meta.items() if k != key}}) == f"Meta.{key}"
            )
        assert difference(wanted, {**existing, "Meta": {}}) == "Meta.dir"
        assert difference(wanted, {**existing, "Meta": None}) == "Meta.dir"

    @given(_registrations())
    def test_reflexive(self, registration: Registration) -> None:
        """No registration differs from what the agent tells of it."""
        assert difference(registration, _as_the_agent_tells_it(registration)) is None

    @given(_registrations(), _registrations())
    def test_none_exactly_where_documents_are_equal(self, one: Registration, other: Registration) -> None:
        """Two registrations of one ID and check differ in a field exactly where their documents do."""
        other = dataclasses.replace(
            other,
            id=one.id,
            check_interval=one.check_interval,
            check_timeout=one.check_timeout,
            deregister_after=one.deregister_after,
            tcp_check=one.tcp_check,
        )
        found = difference(one, _as_the_agent_tells_it(other))
        assert (found is None) == (one.document() == other.document())

    @given(_registrations(), st.data())
    def test_one_change_is_the_one_named(self, one: Registration, data: st.DataObject) -> None:
        """When a single field changes, that is the field named."""
        field, change = data.draw(
            st.sampled_from(
                [
                    ("Service", {"name": data.draw(SERVICES)}),
                    ("Address", {"address": data.draw(st.ip_addresses().map(str))}),
                    ("Port", {"port": data.draw(st.integers(1, 65535))}),
                    ("Tags", {"tags": tuple(data.draw(st.lists(TEXTS, max_size=3)))}),
                    ("Meta.pid", {"meta": {**one.meta, "pid": data.draw(TEXTS)}}),
                ]
            )
        )
        other = dataclasses.replace(one, **change)  # type: ignore[arg-type]
        assume(other != one)
        assert difference(one, _as_the_agent_tells_it(other)) == field


class TestCheckDifference:
    """The entry's check, which the agent tells apart from the entry."""

    @staticmethod
    def _told(wanted: Registration) -> dict[str, Any]:
        """``GET /v1/agent/checks`` after the document was registered; Go prints times in a form of its own."""
        check = wanted.document()["Check"]
        return {
            "CheckID": f"service:{wanted.id}",
            "Name": check["Name"],
            "Notes": check["Notes"],
            "Type": "tcp" if "TCP" in check else "http",
            "Interval": go_prints(parse_go_duration(check["Interval"])),
            "Timeout": go_prints(parse_go_duration(check["Timeout"])),
            "Status": "critical",
            "Output": "",
        }

    @given(_registrations())
    def test_reflexive(self, registration: Registration) -> None:
        """No registration's check differs from what the agent tells of it, whatever the fractions of its times."""
        assert check_difference(registration, [self._told(registration)]) is None

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("Name", "other"),
            ("Notes", "GET http://10.0.0.7:1/-/healthy; deregistered after 600s critical"),
            ("Type", "tcp"),
            ("Interval", "31s"),
            ("Interval", "30.001s"),
            ("Timeout", ""),
            ("Timeout", None),
        ],
    )
    def test_field_is_named(self, wanted: Registration, field: str, value: object) -> None:
        """A field that was edited, or that the agent does not tell, is named."""
        assert check_difference(wanted, [{**self._told(wanted), field: value}]) == f"Check.{field}"

    def test_number_of_checks(self, wanted: Registration) -> None:
        """Our check is there; others beside it, as maintenance mode is one, are an operator's word."""
        other = {**self._told(wanted), "CheckID": "_service_maintenance:shop.web-1.0", "Type": "maintenance"}
        assert check_difference(wanted, []) == "Checks"
        assert check_difference(wanted, [other]) == "Checks"
        assert check_difference(wanted, [other, self._told(wanted)]) is None

    @pytest.mark.parametrize("change", [{"port": 1}, {"address": "10.0.0.8"}, {"deregister_after": 61.0}])
    def test_what_the_agent_does_not_show(self, wanted: Registration, change: dict[str, Any]) -> None:
        """The URL and the time to deregister, which no answer of the agent has, are seen through the notes."""
        assert check_difference(dataclasses.replace(wanted, **change), [self._told(wanted)]) == "Check.Notes"


class TestIDs:
    """``<service>.<host>.<slot>``."""

    @given(SERVICES, HOSTS, SLOTS)
    def test_round_trip(self, service: str, host: str, slot: int) -> None:
        """An ID gives back its parts, however many dots the host has."""
        assert parse_entry_id(entry_id(service, host, slot)) == EntryID(service, host, slot)

    def test_host_with_dots(self) -> None:
        """The first part is the service, the last the slot, all between them the host."""
        assert parse_entry_id("shop.web-1.example.org.3") == EntryID("shop", "web-1.example.org", 3)
        assert parse_entry_id("shop.1.2.3") == EntryID("shop", "1.2", 3)

    def test_master(self) -> None:
        """The masters' page has a word in the slot's place, and a host may have that name too."""
        assert entry_id("shop", "web-1", MASTER) == "shop.web-1.master"
        assert parse_entry_id("shop.web-1.master") == EntryID("shop", "web-1", MASTER)
        assert parse_entry_id("shop.web-1.master.master") == EntryID("shop", "web-1.master", MASTER)
        assert parse_entry_id("shop.master.0") == EntryID("shop", "master", 0)
        assert parse_entry_id("shop.web-1.-1") is None

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "shop",
            "shop.3",
            "shop..3",
            "shop.web.",
            "shop.web.x",
            "shop.web.-1",
            "shop.web.07",
            "shop.web.1\n",
            "shop.web.\u0663",
            "shop.web." + "9" * 5000,
            "Shop.web.1",
            ".web.1",
            "shop.a b.1",
            "shop.web/x.1",
        ],
    )
    def test_not_ours(self, text: str) -> None:
        """What no worker would have made is not taken for an ID of ours."""
        assert parse_entry_id(text) is None

    @given(st.one_of(st.text(), st.from_regex(r"[a-z.0-9]{1,20}", fullmatch=True)))
    def test_whatever_parses_is_that_id(self, text: str) -> None:
        """What is taken for an ID gives the same text again."""
        parsed = parse_entry_id(text)
        assert parsed is None or entry_id(*parsed) == text


class TestMarker:
    """Which entries are ours."""

    def test_ours(self, wanted: Registration) -> None:
        """What we register bears the marker."""
        assert is_ours(_as_the_agent_tells_it(wanted))

    @pytest.mark.parametrize(
        "entry",
        [
            {},
            {"Meta": None},
            {"Meta": {}},
            {"Meta": {"managed_by": "consul-prom"}},
            {"Meta": {"external-source": "consul-prom"}},
            {"Meta": {**MARKER, "managed_by": "nomad"}},
            {"Tags": ["consul-prom"], "ID": "shop.web-1.0"},
        ],
    )
    def test_others(self, entry: dict[str, Any]) -> None:
        """An entry without the whole marker is not, whatever its ID and tags are."""
        assert not is_ours(entry)


class TestTexts:
    """URLs and times as Consul and Go want them."""

    def test_origin(self) -> None:
        """An IPv6 address goes into brackets."""
        assert origin("10.0.0.7", 80) == "http://10.0.0.7:80"
        assert origin("2001:db8::1", 9100) == "http://[2001:db8::1]:9100"
        assert origin("::1", 1, scheme="https") == "https://[::1]:1"

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (1, "1s"),
            (0.1, "100ms"),
            (1.5, "1500ms"),
            (90.0, "90s"),
            (10**8, "100000000s"),
            (1e-9, "1ms"),
            (0.1 + 0.2, "300ms"),
        ],
    )
    def test_go_duration(self, seconds: float, text: str) -> None:
        """Times are whole seconds or milliseconds, without an exponent, and never nothing."""
        assert go_duration(seconds) == text

    @given(st.floats(0.1, 10**8))
    def test_go_reads_the_same_time(self, seconds: float) -> None:
        """What Go reads is what was meant, to half a millisecond."""
        assert abs(parse_go_duration(go_duration(seconds)) / 10**9 - seconds) <= 0.000501
