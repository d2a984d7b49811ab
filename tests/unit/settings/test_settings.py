"""What can be set: every row, every way to get it wrong, and what is never shown."""

import dataclasses
import os
import re
import typing
from collections.abc import Mapping
from contextlib import suppress
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_prom.errors import SettingsError
from consul_prom.settings.parsers import (
    MANAGED_META,
    AgentAddress,
    Ports,
    Secret,
    parse_bool,
    parse_duration,
    parse_list,
)
from consul_prom.settings.settings import ROWS, Arguments, Settings, check_worker, child_environment, load
from consul_prom.slots.slots import MASTER

BY_NAME = {row.name: row for row in ROWS}

# One good text of each setting, another one, and what they parse to.
GOOD: dict[str, tuple[str, Any, str, Any]] = {
    "service": ("shop", "shop", "till", "till"),
    "consul_service": ("shop-m", "shop-m", "till-m", "till-m"),
    "host": ("web-1", "web-1", "web-2.example", "web-2.example"),
    "address": ("10.0.0.7", "10.0.0.7", "::1", "::1"),
    "bind": ("0.0.0.0", "0.0.0.0", "::", "::"),
    "port": ("9100", Ports(9100), "9100-9131", Ports(9100, 9131)),
    "tags": ("a,b", ("a", "b"), "c", ("c",)),
    "meta": ("team=a", {"team": "a"}, "team=b,zone=c", {"team": "b", "zone": "c"}),
    "dir": ("/srv/a", Path("/srv/a"), "/srv/b", Path("/srv/b")),
    "check_interval": ("7s", 7.0, "1m", 60.0),
    "check_timeout": ("500ms", 0.5, "3", 3.0),
    "deregister_after": ("1m", 60.0, "2h", 7200.0),
    "start_timeout": ("3s", 3.0, "4s", 4.0),
    "stop_timeout": ("3s", 3.0, "4s", 4.0),
    "required": ("true", True, "false", False),
    "web_config": ("/wa", "/wa", "/wb", "/wb"),
    "allow": ("10.0.0.0/8, ::1", (ip_network("10.0.0.0/8"), ip_network("::1")), "10.0.0.7", (ip_network("10.0.0.7"),)),
    "request_metrics": ("false", False, "true", True),
    "ledger": ("false", False, "true", True),
    "retain": ("5m", 300.0, "0", 0.0),
    "linger": ("5s", 5.0, "0", 0.0),
    "disabled": ("1", True, "0", False),
    "consul_http_addr": ("agent:1", AgentAddress(host="agent", port=1), "agent:2", AgentAddress(host="agent", port=2)),
    "consul_http_token": ("s3cret", "s3cret", "t4cret", "t4cret"),
    "consul_http_token_file": ("/t", "/t", "/u", "/u"),
    "consul_http_auth": ("me:s3cret", "me:s3cret", "me:t4cret", "me:t4cret"),
    "consul_http_ssl": ("true", True, "false", False),
    "consul_http_ssl_verify": ("false", False, "true", True),
    "consul_cacert": ("/ca", "/ca", "/cb", "/cb"),
    "consul_capath": ("/ca", "/ca", "/cb", "/cb"),
    "consul_client_cert": ("/ca", "/ca", "/cb", "/cb"),
    "consul_client_key": ("/ca", "/ca", "/cb", "/cb"),
    "consul_tls_server_name": ("a", "a", "b", "b"),
    "consul_namespace": ("a", "a", "b", "b"),
    "consul_partition": ("a", "a", "b", "b"),
}
PARTNER = {"consul_client_cert": "consul_client_key", "consul_client_key": "consul_client_cert"}


def _load(arguments: Mapping[str, object] | None = None, /, **environ: str) -> Settings:
    return load(arguments or {}, environ=environ, hostname=lambda: "web-9", uid=lambda: 1000)


def _refusal(arguments: Mapping[str, object] | None = None, /, **environ: str) -> str:
    with pytest.raises(SettingsError) as caught:
        _load(arguments, **environ)
    assert caught.value.from_code == bool(arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def _shown(value: object) -> object:
    return value.reveal() if isinstance(value, Secret) else value


class TestRows:
    """Each setting, and the three places that list them."""

    def test_rows_fields_and_arguments_agree(self) -> None:
        """Rows, the fields of Settings and the keys of Arguments are the same names in the same order."""
        names = [row.name for row in ROWS]
        assert [field.name for field in dataclasses.fields(Settings)] == names
        assert list(Arguments.__annotations__) == names
        assert list(GOOD) == names

    def test_variables_are_consuls_or_ours(self) -> None:
        """Every variable bears a prefix, and an argument's name is the variable's without ours."""
        for row in ROWS:
            assert row.env.startswith(("CONSUL_PROM_", "CONSUL_"))
            assert row.env in {row.name.upper(), f"CONSUL_PROM_{row.name.upper()}"}

    def test_help_is_a_sentence(self) -> None:
        """Every row explains itself in one line that ends with a full stop."""
        for row in ROWS:
            assert row.help.endswith(".")
            assert "\n" not in row.help
            assert row.kind

    @pytest.mark.parametrize("name", GOOD)
    def test_argument_beats_environment_beats_default(self, name: str) -> None:
        """An explicit argument wins over the environment, and that over the default."""
        row, (first, parsed, second, other) = BY_NAME[name], GOOD[name]
        partner: dict[str, object] = {PARTNER[name]: "/partner"} if name in PARTNER else {}
        plain = _shown(getattr(_load(), name))
        assert plain != parsed or plain != other
        for text, wanted in ((first, parsed), (second, other)):
            assert _shown(getattr(_load(partner, **{row.env: text}), name)) == wanted
            for beaten in (first, second, "\x7f wrong"):
                assert _shown(getattr(_load({**partner, name: text}, **{row.env: beaten}), name)) == wanted

    @pytest.mark.parametrize("name", GOOD)
    def test_none_and_empty_mean_unset(self, name: str) -> None:
        """An argument of None leaves the environment its say, and an empty variable is none."""
        assert getattr(_load({name: None}, **{BY_NAME[name].env: ""}), name) == getattr(_load(), name)

    @pytest.mark.parametrize("name", GOOD)
    def test_what_is_no_text_is_refused_by_name_and_value(self, name: str) -> None:
        """Bytes that are no UTF-8 are refused in a sentence that names the setting and, unless secret, the value."""
        row, value = BY_NAME[name], "k=/\udcff"
        for sentence, label in ((_refusal({name: value}), name), (_refusal(**{row.env: value}), row.env)):
            assert sentence.startswith(f"{label} " if row.secret else f"{label}={value!r} ")

    @pytest.mark.parametrize("name", GOOD)
    def test_wrong_types_are_refused(self, name: str) -> None:
        """An argument of another type is refused as such, without an exception of Python's own."""
        sentence = _refusal({name: object()})
        assert sentence.startswith(name)

    def test_unknown_argument_is_refused(self) -> None:
        """A misspelled argument is named."""
        assert _refusal({"sevrice": "shop"}) == "there is no setting 'sevrice'"

    def test_settings_are_frozen(self) -> None:
        """A setting never changes once it is read."""
        with pytest.raises(dataclasses.FrozenInstanceError):
            _load().service = "till"  # type: ignore[misc]

    def test_real_environment_is_the_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without arguments, this process' environment, host name and user count."""
        monkeypatch.setenv("CONSUL_PROM_SERVICE", "shop")
        settings = load({})
        assert settings.service == "shop"
        assert str(os.getuid()) in str(settings.dir) or os.getuid() == 0


class TestDefaults:
    """What counts where nothing is set."""

    def test_defaults(self) -> None:
        """Every default is as the design fixes it."""
        settings = _load({"service": "shop"})
        assert settings.consul_service == "shop-metrics"
        assert settings.host == "web-9"
        assert (settings.address, settings.bind, settings.port) == (None, None, Ports())
        assert (settings.tags, dict(settings.meta)) == ((), {})
        assert (settings.check_interval, settings.check_timeout, settings.deregister_after) == (30.0, 5.0, 600.0)
        assert (settings.start_timeout, settings.stop_timeout) == (10.0, 2.0)
        assert (settings.required, settings.request_metrics, settings.disabled) == (False, True, False)
        assert str(settings.consul_http_addr) == "http://127.0.0.1:8500"
        assert (settings.consul_http_token, settings.consul_http_auth) == (None, None)
        assert (settings.consul_http_ssl, settings.consul_http_ssl_verify) == (False, True)

    @pytest.mark.parametrize(("uid", "path"), [(0, "/run/consul-prom"), (1000, "/var/tmp/consul-prom-1000")])
    def test_directory_depends_on_the_user(self, uid: int, path: str) -> None:
        """Root's directory is in /run, everybody else has one of their own."""
        assert load({}, environ={}, uid=lambda: uid).dir == Path(path)

    @pytest.mark.parametrize(
        ("hostname", "host"),
        [
            ("web-1.example.org", "web-1.example.org"),
            ("web_1 (blue)", "web-1--blue-"),
            ("wéb\n1", "w-b-1"),
            ("", "localhost"),
            ("10.0.0.7", "10-0-0-7"),
            ("::1", "--1"),
            ("x" * 300, "x" * 253),
        ],
    )
    def test_host_name_is_made_fit(self, hostname: str, host: str) -> None:
        """Characters that an ID cannot hold become '-', and a name that looks like an address is made a name."""
        assert load({}, environ={}, hostname=lambda: hostname).host == host

    @given(st.text(max_size=300))
    def test_every_host_name_gives_a_host(self, hostname: str) -> None:
        """Whatever the system calls itself is accepted, and the result could have been set by hand."""
        host = load({}, environ={}, hostname=lambda: hostname).host
        assert load({"host": host}, environ={}).host == host


class TestNames:
    """Services, hosts, addresses."""

    @pytest.mark.parametrize("name", ["s", "shop-2", "a" * 55, "s--"])
    def test_service_names(self, name: str) -> None:
        """A service is lower-case letters, digits and '-', and its Consul service fits into a DNS label."""
        settings = _load({"service": name})
        assert settings.service == name
        assert len(settings.consul_service) <= 63

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            *((name, "") for name in ("", "1shop", "-shop", "a" * 56, "A" * 56, "shöp", "shop\n", "_shop")),
            ("Shop", "; use 'shop'"),
            ("my_shop", "; use 'my-shop'"),
            ("shop.x", "; use 'shop-x'"),
            ("My Shop_2", "; use 'my-shop-2'"),
        ],
    )
    def test_wrong_service_names(self, name: str, hint: str) -> None:
        """Any other name is refused, with the rule and, if there is one, the nearest name that fits."""
        wanted = "must be lower-case letters, digits and '-', a letter first, at most 55 characters"
        assert _refusal({"service": name}) == f"service={name!r} {wanted}{hint}"

    @pytest.mark.parametrize("name", ["Shop", "a" * 64, "a.b"])
    def test_wrong_consul_service_names(self, name: str) -> None:
        """A Consul service has 63 characters at most."""
        assert "at most 63 characters" in _refusal({"consul_service": name})

    def test_host_is_lower_case(self) -> None:
        """A host is lower case: Consul's catalogue keeps one of two IDs that differ only in case."""
        assert _load({"host": "Web-1.Example"}).host == "web-1.example"
        assert load({}, environ={}, hostname=lambda: "WEB-1").host == "web-1"

    @pytest.mark.parametrize("host", ["web_1", "a b", "h" * 254, "wéb", ""])
    def test_wrong_hosts(self, host: str) -> None:
        """A host that is set is not made fit but refused."""
        assert "must be letters, digits, '.' and '-'" in _refusal({"host": host})

    def test_host_is_never_an_address(self) -> None:
        """An address is refused, with the setting that is for it."""
        wanted = "CONSUL_PROM_HOST='10.0.0.7' must be a name, not an address (CONSUL_PROM_ADDRESS is for that)"
        assert _refusal(CONSUL_PROM_HOST="10.0.0.7") == wanted

    @pytest.mark.parametrize(
        ("text", "address"),
        [
            ("10.0.0.7", "10.0.0.7"),
            ("[2001:DB8::1]", "2001:db8::1"),
            ("::1", "::1"),
            ("::ffff:10.0.0.7", "10.0.0.7"),
        ],
    )
    def test_addresses(self, text: str, address: str) -> None:
        """An address is brought into one form, without brackets, lower-case, and IPv4 where it is."""
        assert _load({"address": text}).address == address
        assert _load({"bind": text}).bind == address

    @pytest.mark.parametrize("text", ["0.0.0.0", "::", "[::]", "::ffff:0.0.0.0"])
    def test_wildcard_is_no_address(self, text: str) -> None:
        """A wildcard is refused as address, and allowed to listen on."""
        sentence = _refusal(CONSUL_PROM_ADDRESS=text)
        assert sentence.startswith(f"CONSUL_PROM_ADDRESS={text!r} is a wildcard")
        assert "CONSUL_PROM_BIND" in sentence
        assert _load({"bind": text}).bind in {"0.0.0.0", "::"}

    @pytest.mark.parametrize("text", ["web-1", "10.0.0", "10.0.0.256", "10.0.0.7:80", "1", "", "10.0.0.7/8"])
    def test_no_address(self, text: str) -> None:
        """What is no address is refused, for both settings."""
        assert _refusal({"address": text}) == f"address={text!r} is no IP address"
        assert _refusal({"bind": text}) == f"bind={text!r} is no IP address"


class TestPorts:
    """One, none or a range."""

    @pytest.mark.parametrize(
        ("given_", "shown", "slot_0", "slot_3"),
        [
            ("0", "0", [0], [0]),
            (0, "0", [0], [0]),
            (9100, "9100", [9100], [9103]),
            ("9100-9103", "9100-9103", [9100, 9101, 9102, 9103], [9103, 9100, 9101, 9102]),
            ("9100-9101", "9100-9101", [9100, 9101], [9101, 9100]),
            ("65535", "65535", [65535], []),
            ("9100-9100", "9100-9100", [9100], [9100]),
        ],
    )
    def test_candidates(self, given_: str | int, shown: str, slot_0: list[int], slot_3: list[int]) -> None:
        """A slot tries its own port, and in a range the others after it."""
        ports = _load({"port": given_}).port
        assert str(ports) == shown
        assert ports.candidates(0) == slot_0
        assert ports.candidates(3) == slot_3

    def test_master(self) -> None:
        """The master's page has the last port of a range, or the one before the base."""
        assert Ports(9100).candidates(MASTER) == [9099]
        assert Ports(9100, 9102).candidates(MASTER) == [9102, 9100, 9101]
        assert Ports().candidates(MASTER) == [0]

    @given(first=st.integers(1, 65535), size=st.integers(1, 300), slot=st.integers(0, 4095))
    def test_range_offers_each_of_its_ports_once(self, first: int, size: int, slot: int) -> None:
        """Whatever the slot, all ports of a range are tried, and no other."""
        last = min(first + size, 65535)
        assert sorted(Ports(first, last).candidates(slot)) == list(range(first, last + 1))

    @pytest.mark.parametrize(
        "text", ["-1", "65536", "99999", "x", "9100-", "-9100", "9200-9100", "0-5", "1-70000", "1-2-3", "1 - 2", "1.0"]
    )
    def test_wrong_ports(self, text: str) -> None:
        """What is no port and no range is refused, with an example."""
        assert _refusal({"port": text}).startswith(f"port={text!r} must be 0, a port, or a range like 9100-9131")

    @pytest.mark.parametrize("value", [-1, True, 1.5, 10**9], ids=repr)
    def test_wrong_port_numbers(self, value: object) -> None:
        """A number that is no port is refused as well."""
        assert _refusal({"port": value}).startswith(f"port={value!r} must be 0, a port, or a range")


class TestTagsAndMeta:
    """What Consul would refuse is refused before."""

    def test_lists(self) -> None:
        """Items are parted by commas, stripped, and empty ones are left out; a sequence works as well."""
        assert parse_list(" a, b ,,c ") == ("a", "b", "c")
        assert parse_list(["a", " b "]) == ("a", "b")
        assert _load({"tags": ("a", "b")}).tags == _load(CONSUL_PROM_TAGS="a,b").tags == ("a", "b")

    def test_longest_tag(self) -> None:
        """A tag has 63 bytes at most, counted as Consul counts."""
        assert _load({"tags": "é" * 31 + "x"}).tags == ("é" * 31 + "x",)
        sentence = _refusal({"tags": ["ok", "é" * 32]})
        assert "has a tag of 64 bytes" in sentence
        assert "63 at most" in sentence

    def test_networks(self) -> None:
        """Networks are a list; one with bits beyond its mask, or a name, is refused with what is wrong."""
        assert _load({"allow": ["10.0.0.0/8", "2001:db8::/32"]}).allow == (
            ip_network("10.0.0.0/8"),
            ip_network("2001:db8::/32"),
        )
        for wrong in ("10.0.0.1/8", "prometheus", "10.0.0.0/33"):
            sentence = _refusal(CONSUL_PROM_ALLOW=f"10.0.0.0/8,{wrong}")
            assert "must be networks like 10.0.0.0/8" in sentence
            assert wrong in sentence

    def test_ip4_networks_as_ip6(self) -> None:
        """An IPv4 network that is written as IPv6 is that IPv4 network, as peers are compared by their IPv4 address."""
        for text, network in (
            ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
            ("::ffff:192.0.2.1", "192.0.2.1/32"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            ("::/0", "::/0"),
            ("::/64", "::/64"),
        ):
            assert _load(CONSUL_PROM_ALLOW=text).allow == (ip_network(network),)

    def test_meta_of_both_forms(self) -> None:
        """Meta is a mapping, or pairs of a key and a value, which may hold '='."""
        assert _load(CONSUL_PROM_META=" a = 1 , b=c=d ,e=").meta == {"a": "1", "b": "c=d", "e": ""}
        assert _load({"meta": {"a": "1"}}).meta == {"a": "1"}

    def test_meta_is_a_copy(self) -> None:
        """A mapping that changes later changes no setting."""
        mine = {"a": "1"}
        settings = _load({"meta": mine})
        mine["a"] = "2"
        assert settings.meta == {"a": "1"}

    def test_meta_without_equals(self) -> None:
        """A key without a value is refused."""
        assert _refusal(CONSUL_PROM_META="a=1,b").endswith("must be key=value pairs, parted by commas")

    @pytest.mark.parametrize("key", ["a b", "a.b", "é", "k" * 129, "consul-x", ""])
    def test_wrong_meta_keys(self, key: str) -> None:
        """A key that Consul refuses is refused with Consul's rule."""
        assert f"has the key {key!r}; Consul wants [A-Za-z0-9_-]" in _refusal({"meta": {key: "v"}})

    @pytest.mark.parametrize("key", sorted(MANAGED_META))
    def test_our_own_keys(self, key: str) -> None:
        """A key that we set ourselves is refused."""
        assert f"has the key {key!r}, which is our own" in _refusal({"meta": {key: "v"}})

    def test_longest_meta(self) -> None:
        """A key has 128 characters, a value 512 bytes, and there is room for 64 pairs with our own."""
        room = 64 - len(MANAGED_META)
        assert _load({"meta": {"k" * 128: "é" * 256}}).meta
        assert "has a value of 513 bytes for 'k'" in _refusal({"meta": {"k": "é" * 256 + "x"}})
        assert len(_load({"meta": {f"k{number}": "" for number in range(room)}}).meta) == room
        sentence = _refusal({"meta": {f"k{number}": "" for number in range(room + 1)}})
        assert f"has {room + 1} keys; Consul wants {room} at most beside our own" in sentence

    def test_meta_values_are_texts(self) -> None:
        """A number as value is refused, as the agent would."""
        assert _refusal({"meta": {"k": 1}}).endswith("is of the wrong type")


class TestDirectory:
    """The directory of the slots."""

    @pytest.mark.parametrize("text", ["slots", "./slots", "~/slots", "", "/a\0b"])
    def test_wrong_paths(self, text: str) -> None:
        """A path that depends on the working directory, or that no system takes, is refused."""
        assert _refusal({"dir": text}) == f"dir={text!r} must be an absolute path"

    def test_longest_path(self) -> None:
        """The path fits into the entry's meta, where Consul counts bytes."""
        longest = Path("/" + "é" * 199 + "x")
        assert _load({"dir": longest}).dir == longest
        assert "longer than 400 bytes" in _refusal({"dir": "/" + "é" * 200})


class TestDurations:
    """Times in Go's form, or seconds."""

    @pytest.mark.parametrize(
        ("value", "seconds"),
        [
            ("10s", 10),
            ("10m", 600),
            ("1h", 3600),
            ("1m30s", 90),
            ("500ms", 0.5),
            ("1.5s", 1.5),
            ("10", 10),
            (2, 2),
            (0.5, 0.5),
        ],
    )
    def test_durations(self, value: str | float, seconds: float) -> None:
        """A duration is a number with a unit, several of them, or bare seconds."""
        assert parse_duration(value) == seconds

    @pytest.mark.parametrize(
        "value", ["", "s", "10 s", "-1s", "1d", "1e3", "10sm", "nan", "inf", ".5", "1.s", "\u0661s", True, -1, 1e-9]
    )
    def test_wrong_durations(self, value: str | float) -> None:
        """Anything else is refused, with an example."""
        wanted = f"check_interval={value!r} must be a duration like 10s, 10m or a number of seconds"
        assert _refusal({"check_interval": value}) == wanted

    @pytest.mark.parametrize(
        ("name", "value", "least"),
        [
            ("check_interval", "999ms", "1 s"),
            ("check_timeout", 0, "0.1 s"),
            ("deregister_after", "59s", "60 s, the least that Consul knows"),
            ("start_timeout", 0.05, "0.1 s"),
            ("stop_timeout", "0s", "0.1 s"),
        ],
    )
    def test_least(self, name: str, value: object, least: str) -> None:
        """Every time has a least value, which its refusal names."""
        assert _refusal({name: value}) == f"{name}={value!r} must be at least {least}"

    @pytest.mark.parametrize("value", ["100000001s", "9" * 400, 10**9])
    def test_longest(self, value: object) -> None:
        """A time that Go cannot hold is refused as too long."""
        assert _refusal({"stop_timeout": value}).endswith("must be at most 100000000 s")

    @given(st.floats(0.1, 10**8, allow_nan=False))
    def test_numbers_pass_unchanged(self, seconds: float) -> None:
        """A number of seconds stays what it is, whatever its fraction."""
        assert _load({"stop_timeout": seconds}).stop_timeout == seconds


class TestBooleans:
    """Go's ParseBool, which Consul uses."""

    @pytest.mark.parametrize("value", ["1", "t", "T", "true", "TRUE", "True", True], ids=repr)
    def test_true(self, value: str | bool) -> None:  # noqa: FBT001  # a value
        """Go's words for true, and True, are true."""
        assert parse_bool(value) is True

    @pytest.mark.parametrize("value", ["0", "f", "F", "false", "FALSE", "False", False], ids=repr)
    def test_false(self, value: str | bool) -> None:  # noqa: FBT001  # a value
        """Go's words for false, and False, are false."""
        assert parse_bool(value) is False

    @pytest.mark.parametrize("value", ["yes", "on", "tRUE", " true", "2", "no"])
    def test_neither(self, value: str) -> None:
        """Other words are refused: a typo must not switch anything."""
        assert _refusal(CONSUL_HTTP_SSL_VERIFY=value) == f"CONSUL_HTTP_SSL_VERIFY={value!r} must be true or false"


class TestAgentAddress:
    """CONSUL_HTTP_ADDR of every shape."""

    @pytest.mark.parametrize(
        ("text", "address", "shown"),
        [
            ("127.0.0.1:8500", AgentAddress(), "http://127.0.0.1:8500"),
            ("agent", AgentAddress(host="agent", port=80), "http://agent:80"),
            ("http://agent", AgentAddress(host="agent", port=80), "http://agent:80"),
            ("http://agent:8500/", AgentAddress(host="agent"), "http://agent:8500"),
            ("https://agent", AgentAddress("https", "agent", 443), "https://agent:443"),
            ("https://agent.example.:8501", AgentAddress("https", "agent.example.", 8501), None),
            ("http://my_agent:8500", AgentAddress(host="my_agent"), "http://my_agent:8500"),
            ("[::1]:8500", AgentAddress(host="::1"), "http://[::1]:8500"),
            ("https://[2001:db8::1]:8501", AgentAddress("https", "2001:db8::1", 8501), None),
            ("http://agent:8500/consul/", AgentAddress(host="agent", prefix="/consul"), "http://agent:8500/consul"),
            ("agent:1/a/b%20c", AgentAddress(host="agent", port=1, prefix="/a/b%20c"), "http://agent:1/a/b%20c"),
            ("unix:///run/consul.sock", AgentAddress(socket="/run/consul.sock"), "unix:///run/consul.sock"),
        ],
    )
    def test_shapes(self, text: str, address: AgentAddress, shown: str | None) -> None:
        """Host and port, http, https, a unix socket, IPv6 in brackets and a prefix are all understood."""
        found = _load(CONSUL_HTTP_ADDR=text).consul_http_addr
        assert found == address
        assert str(found) == (shown or text)
        assert _load({"consul_http_addr": str(found)}).consul_http_addr == found

    @pytest.mark.parametrize(
        "text",
        [
            "http://",
            "https:///x",
            ":8500",
            "::1:8500",
            "agent:0",
            "agent:65536",
            "agent:x",
            "agent:-1",
            "agent:+80",
            "agent:8_5",
            "agent:\uff18",
            "http://[::1",
            "[1:2]:8500",
            "[::1]x:80",
            "[fe80::1%eth0]:80",
            "[v1.a]:80",
            "a b:80",
            " agent:80",
            "agent:80\n",
            "a..b:80",
            "bücher:80",
            "h" * 64,
            "agent:80?x=1",
            "agent:80#x",
            "http://agent:80/a b",
            "http://agent:80/é",
            "http:agent:80",
            "//agent:80",
            "agent%41:80",
        ],
    )
    def test_wrong_shapes(self, text: str) -> None:
        """Any other shape is refused, with the right ones."""
        shown = re.sub(r"[?#].*", "?***'", repr(text))
        wanted = (
            f"CONSUL_HTTP_ADDR={shown} must look like host:port, http://host:port, https://host:port or unix:///path"
        )
        assert _refusal(CONSUL_HTTP_ADDR=text) == wanted

    @pytest.mark.parametrize("text", ["ftp://agent", "HTTPS://agent", "tcp://agent:1", "://agent"])
    def test_unknown_scheme(self, text: str) -> None:
        """A scheme that Consul does not know is named."""
        assert "has the unknown scheme" in _refusal(CONSUL_HTTP_ADDR=text)

    def test_relative_socket(self) -> None:
        """A unix socket needs an absolute path, fit for a system call."""
        assert "must name an absolute path" in _refusal(CONSUL_HTTP_ADDR="unix://run/consul.sock")
        assert "NUL" in _refusal({"consul_http_addr": "unix:///a\0b"})

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("agent", "https://agent:443"),
            ("agent:8501", "https://agent:8501"),
            ("http://agent:8501", "https://agent:8501"),
            ("https://agent:8501", "https://agent:8501"),
            ("unix:///sock", "unix:///sock"),
        ],
    )
    def test_ssl_wins_over_the_scheme(self, text: str, shown: str) -> None:
        """CONSUL_HTTP_SSL makes every address https, as in Consul, but leaves a socket alone."""
        assert str(_load(CONSUL_HTTP_ADDR=text, CONSUL_HTTP_SSL="1").consul_http_addr) == shown

    def test_ssl_false_does_not_downgrade(self) -> None:
        """CONSUL_HTTP_SSL=false leaves https as it is, as true leaves a socket."""
        assert _load(CONSUL_HTTP_ADDR="unix:///s", CONSUL_HTTP_SSL="1").consul_http_addr == AgentAddress(socket="/s")
        assert str(_load(CONSUL_HTTP_ADDR="https://agent:1", CONSUL_HTTP_SSL="0").consul_http_addr) == "https://agent:1"


class TestSecrets:
    """Tokens and passwords are shown to nobody."""

    def test_secrets_hide(self) -> None:
        """No way to make a text of a secret shows it."""
        settings = _load(CONSUL_HTTP_TOKEN="s3cret", CONSUL_HTTP_AUTH="me:s3cret")
        token = settings.consul_http_token
        assert token
        assert token.reveal() == "s3cret"
        assert repr(token) == str(token) == "***"
        for text in (
            repr(token),
            str(token),
            f"{token}",
            f"{token!r:>20}",
            repr(settings),
            str(settings),
        ):
            assert "***" in text
            assert "s3cret" not in text

    def test_rows_of_secrets_are_known(self) -> None:
        """Exactly the token and the password are secret."""
        assert {row.env for row in ROWS if row.secret} == {"CONSUL_HTTP_TOKEN", "CONSUL_HTTP_AUTH"}

    @pytest.mark.parametrize("bad", ["s3cret\n", "s3cret\r\nX-Evil: 1", "s3crét", "s3cret\x7f"])
    @pytest.mark.parametrize("env", ["CONSUL_HTTP_TOKEN", "CONSUL_HTTP_AUTH"])
    def test_wrong_secrets_are_not_shown(self, env: str, bad: str) -> None:
        """A secret that no header can carry is refused without a part of it."""
        for sentence in (_refusal(**{env: bad}), _refusal({env.lower(): bad})):
            assert sentence.endswith("has characters that no HTTP header can carry")
            assert "s3cr" not in sentence

    @pytest.mark.parametrize(
        "text",
        [
            "http://me:s3cret@agent:8500",
            "me:s3cret@agent:8500",
            "https://s3cret@agent",
            "http://me:s3cret/x@agent",
            "http://me:80/s3cret@agent",
            "http://me:s3cret'\"@agent",
            "http://me:s3cret x@agent",
            "http://me:s3cret@x@agent",
            "http://me:s3\u2100s3cret@agent",
            "http://me:s3cret\n@agent",
            "ftp://me:s3cret@agent",
            "unix://me:s3cret@agent",
        ],
    )
    def test_password_in_an_address_is_not_shown(self, text: str) -> None:
        """An address that holds a password is refused without showing it, whatever its odd characters are."""
        for sentence in (_refusal(CONSUL_HTTP_ADDR=text), _refusal({"consul_http_addr": text})):
            assert "s3" not in sentence
            assert "***@" in sentence

    @given(st.text(min_size=1).map(lambda text: f"s3cret{text}s3cret"))
    def test_no_password_shows_in_an_address(self, password: str) -> None:
        """Whatever the characters of a password are, no part of it is in the refusal."""
        assert "s3cret" not in _refusal({"consul_http_addr": f"https://me:{password}@agent:8500"})

    @pytest.mark.parametrize(
        ("arguments", "environ", "token", "file"),
        [
            ({"consul_http_token_file": "/a", "consul_http_token": "a"}, {"CONSUL_HTTP_TOKEN_FILE": "/e"}, "a", "/a"),
            ({"consul_http_token_file": "/a"}, {"CONSUL_HTTP_TOKEN": "e"}, "e", "/a"),
            ({"consul_http_token": "a"}, {"CONSUL_HTTP_TOKEN_FILE": "/e", "CONSUL_HTTP_TOKEN": "e"}, "a", None),
            ({}, {"CONSUL_HTTP_TOKEN_FILE": "/e", "CONSUL_HTTP_TOKEN": "e"}, "e", "/e"),
            ({"consul_http_token": None}, {"CONSUL_HTTP_TOKEN_FILE": "/e"}, None, "/e"),
        ],
    )
    def test_token_precedence(
        self, arguments: dict[str, object], environ: dict[str, str], token: str | None, file: str | None
    ) -> None:
        """A file in code, a token in code, a file of the environment, a token of it: the first that is set counts."""
        settings = _load(arguments, **environ)
        assert settings.consul_http_token_file == file
        assert _shown(settings.consul_http_token) == token

    @pytest.mark.parametrize("name", ["consul_client_cert", "consul_client_key"])
    def test_certificate_and_key_need_each_other(self, name: str) -> None:
        """Half a client certificate is refused, and blamed on whom it came from."""
        assert _refusal({name: "/c"}) == _refusal(**{name.upper(): "/c"})
        assert "CONSUL_CLIENT_CERT and CONSUL_CLIENT_KEY need each other" in _refusal({name: "/c"})

    def test_long_values_are_cut(self) -> None:
        """A refusal shows a hundred characters of a value."""
        assert len(_refusal({"service": "A" * 10_000})) < 300

    def test_cause_is_not_chained(self) -> None:
        """A logged traceback of a refusal shows no exception that could hold the value."""
        with pytest.raises(SettingsError) as caught:
            _load(CONSUL_HTTP_TOKEN="s3crét")
        assert caught.value.__suppress_context__
        assert caught.value.__cause__ is None


class TestWorkerNeeds:
    """What a worker needs beyond what every command needs."""

    def test_service(self) -> None:
        """A worker without a service name is told both ways to give one."""
        with pytest.raises(
            SettingsError, match=r"no service name: pass service=\.\.\. or set CONSUL_PROM_SERVICE"
        ) as no:
            check_worker(_load(), environ={})
        assert not no.value.from_code

    @pytest.mark.parametrize("name", ["PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"])
    def test_multiprocess_mode(self, name: str) -> None:
        """Multiprocess mode is refused, with the variable and its value."""
        with pytest.raises(
            SettingsError, match="PROMETHEUS_MULTIPROC_DIR='/m' makes prometheus_client keep its values"
        ):
            check_worker(_load({"service": "shop"}), environ={name: "/m"})

    def test_enough(self) -> None:
        """A service name is all that is needed."""
        check_worker(_load({"service": "shop"}), environ={"PROMETHEUS_MULTIPROC_DIR": ""})


def test_child_environment() -> None:
    """A child has the settings that it is given and no other, and what is no setting."""
    environ = {"PATH": "/bin", "CONSUL_HTTP_TOKEN": "t", "CONSUL_PROM_PORT": "1", "PROMETHEUS_MULTIPROC_DIR": "/m"}
    found = child_environment({"CONSUL_PROM_SERVICE": "shop"}, environ=environ)
    assert found == {"PATH": "/bin", "CONSUL_PROM_SERVICE": "shop"}
    assert not {row.env for row in ROWS} & set(child_environment({}, environ={row.env: "x" for row in ROWS}))


class TestAnything:
    """No value whatever leads to another exception than ours."""

    VALUES = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(),
        st.binary(),
        st.lists(st.one_of(st.text(), st.integers())),
        st.dictionaries(st.one_of(st.text(), st.integers()), st.one_of(st.text(), st.none())),
        st.from_regex(r"(https?|unix|x)?(://)?[\w.:@\[\]%/-]{0,30}", fullmatch=True),
        st.from_regex(r"[0-9.]{0,30}(ms|s|m|h|d)?-?[0-9]{0,6}", fullmatch=True),
    )

    @given(st.dictionaries(st.sampled_from([row.name for row in ROWS]), VALUES, max_size=3))
    def test_arguments(self, arguments: dict[str, object]) -> None:
        """Every argument is either understood or refused with SettingsError."""
        with suppress(SettingsError):
            assert repr(load(arguments, environ={}))

    @given(st.dictionaries(st.sampled_from([row.env for row in ROWS]), st.text(), max_size=3))
    def test_environment(self, environ: dict[str, str]) -> None:
        """Every environment is either understood or refused with SettingsError."""
        with suppress(SettingsError):
            assert repr(load({}, environ=environ))

    def test_every_field_has_a_type_that_its_value_has(self) -> None:
        """The values are of the types that Settings declares."""
        settings = _load({name: good[0] for name, good in GOOD.items() if good[0]})
        for name, hint in typing.get_type_hints(Settings).items():
            kinds = typing.get_args(hint) if typing.get_origin(hint) is not tuple else (tuple,)
            plain = tuple(typing.get_origin(kind) or kind for kind in kinds or (hint,))
            if typing.get_origin(hint) is Mapping:
                plain = (Mapping,)
            assert isinstance(getattr(settings, name), plain), name


@pytest.mark.parametrize("text", ["http://agent:8500?token=hunter2", "http://agent:8500#hunter2"])
def test_token_in_the_address(text: str) -> None:
    """A token that somebody puts into the agent's address is shown to nobody."""
    with pytest.raises(SettingsError, match="CONSUL_HTTP_ADDR") as caught:
        load({}, environ={"CONSUL_HTTP_ADDR": text})
    assert "hunter2" not in str(caught.value)
