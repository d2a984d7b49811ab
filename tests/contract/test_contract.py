"""What this package relies on in Consul: the same cases on the dev agent and on real Consul."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote

import aiohttp
import consul as python_consul2
import pytest
from aiohttp import web
from yarl import URL

from consul_prom.devagent import DevAgent, running
from tests.services.consul import Consul
from tests.services.waiting import eventually

REGISTER = "/v1/agent/service/register"
Document = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class Agent:
    """An agent as HTTP sees it; forgets at the end what was registered through `register`."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self._session = session
        self._registered: set[str] = set()

    async def call(
        self, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None
    ) -> Answer:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        url = URL(self.url + path, encoded=True)
        async with self._session.request(method, url, data=data, headers=headers, allow_redirects=False) as response:
            return Answer(response.status, response.headers, await response.text())

    async def get(self, path: str) -> Answer:
        return await self.call("GET", path)

    async def register(self, document: Document, query: str = "") -> None:
        answer = await self.call("PUT", REGISTER + query, document)
        assert (answer.status, answer.text) == (200, ""), answer
        self._registered.add(document.get("ID") or document["Name"])

    async def deregister(self, service_id: str) -> Answer:
        return await self.call("PUT", f"/v1/agent/service/deregister/{quote(service_id, safe='')}")

    async def service(self, service_id: str, query: str = "") -> Answer:
        return await self.get(f"/v1/agent/service/{quote(service_id, safe='')}{query}")

    async def health(self, service_id: str, query: str = "") -> Answer:
        return await self.get(f"/v1/agent/health/service/id/{quote(service_id, safe='')}{query}")

    async def check(self, service_id: str) -> Document:
        """The one check of a service."""
        expression = quote(f'ServiceID == "{service_id}"')
        (check,) = (await self.get(f"/v1/agent/checks?filter={expression}")).json.values()
        return dict(check)

    async def forget(self) -> None:
        for service_id in self._registered:
            await self.deregister(service_id)


@contextlib.asynccontextmanager
async def agent_at(url: str) -> AsyncIterator[Agent]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        yield Agent(url, session)


@pytest.fixture(scope="module")
def dev_url() -> Iterator[str]:
    with running() as agent:
        yield agent.url


@pytest.fixture(scope="module")
def real_url() -> Iterator[str]:
    with Consul() as consul:
        yield consul.url


@pytest.fixture(params=["dev", "real"])
async def agent(request: pytest.FixtureRequest) -> AsyncIterator[Agent]:
    """One agent of each kind for all cases, each of which has names of its own."""
    async with agent_at(request.getfixturevalue(f"{request.param}_url")) as agent:
        yield agent
        await agent.forget()


class WorkerRuntime(Protocol):
    """An agent that a test may end and start again."""

    @property
    def url(self) -> str: ...
    async def start(self) -> None: ...
    async def aclose(self) -> None: ...
    async def kill(self) -> None: ...


class RealLife:
    def __init__(self, consul: Consul) -> None:
        self._consul = consul
        self.url = consul.url

    async def start(self) -> None:
        await asyncio.to_thread(self._consul.start)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._consul.stop)

    async def kill(self) -> None:
        await asyncio.to_thread(self._consul.kill)


@pytest.fixture(params=["dev", "real"])
async def life(request: pytest.FixtureRequest) -> AsyncIterator[WorkerRuntime]:
    if request.param == "dev":
        async with DevAgent() as agent:
            yield agent
    else:
        with Consul() as consul:
            yield RealLife(consul)


class Target:
    """What a check probes: answers as told, and remembers what it was asked."""

    def __init__(self) -> None:
        self.status = 200
        self.body = "fine"
        self.answers = asyncio.Event()
        self.answers.set()
        self.location = ""
        self.asked: list[tuple[str, str, Mapping[str, str], str]] = []
        self.url = ""

    async def answer(self, request: web.BaseRequest) -> web.Response:
        self.asked.append((request.method, request.path, request.headers, await request.text()))
        await self.answers.wait()
        if self.location and request.path == "/":
            return web.Response(status=302, headers={"Location": self.location})
        return web.Response(status=self.status, text=self.body)


@pytest.fixture
async def target() -> AsyncIterator[Target]:
    target = Target()
    runner = web.ServerRunner(web.Server(target.answer, access_log=None), shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    target.url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
    yield target
    target.answers.set()
    await runner.cleanup()


@pytest.fixture
def document() -> Document:
    """A registration as ours is, under a name that nobody else has; its check does not run during a test."""
    name = f"shop-{secrets.token_hex(4)}"
    return {
        "Name": name,
        "ID": f"{name}.web-1.0",
        "Tags": ["consul-prom", "v1"],
        "Address": "127.0.0.1",
        "Port": 9100,
        "Meta": {"external-source": "consul-prom", "managed_by": "consul-prom", "slot": "0"},
        "Check": {
            "HTTP": "http://127.0.0.1:9100/-/healthy",
            "Interval": "1000h",
            "Timeout": "2s",
            "Status": "passing",
            "DeregisterCriticalServiceAfter": "10m",
        },
    }


def probing(document: Document, url: str, **fields: Any) -> Document:
    """The document with a check that probes `url` every second, the shortest interval that Consul knows."""
    return document | {"Check": {"HTTP": url, "Interval": "1s", "Timeout": "2s"} | fields}


@contextlib.asynccontextmanager
async def blocked(call: Awaitable[Answer]) -> AsyncIterator[asyncio.Future[Answer]]:
    """The call under way; half a second without an answer proves that it blocks."""
    task = asyncio.ensure_future(call)
    done, _ = await asyncio.wait([task], timeout=0.5)
    assert not done, f"did not block: {task.result()}"
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# Registration


async def test_register_is_seen_at_once(agent: Agent, document: Document) -> None:
    """Agent shows a new service under its ID at once, with what was registered."""
    await agent.register(document)
    answer = await agent.service(document["ID"])
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    shown = answer.json
    assert shown.pop("ContentHash") == answer.headers["X-Consul-ContentHash"]
    address = {"Address": "127.0.0.1", "Port": 9100}
    assert shown == {
        "ID": document["ID"],
        "Service": document["Name"],
        "Tags": document["Tags"],
        "Meta": document["Meta"],
        "Port": 9100,
        "Address": "127.0.0.1",
        "TaggedAddresses": {"lan_ipv4": address, "wan_ipv4": address},
        "Weights": {"Passing": 1, "Warning": 1},
        "EnableTagOverride": False,
        "Datacenter": "dc1",
    }


async def test_register_least(agent: Agent, document: Document) -> None:
    """Agent takes a name alone for a service, whose ID it then is."""
    await agent.register({"Name": document["Name"]})
    shown = (await agent.service(document["Name"])).json
    assert (shown["ID"], shown["Port"], shown["Address"], shown["Tags"], shown["Meta"]) == (
        document["Name"],
        0,
        "",
        [],
        {},
    )
    assert "TaggedAddresses" not in shown


async def test_initial_status(agent: Agent, document: Document) -> None:
    """Agent believes the initial status until the first probe, with an empty output."""
    await agent.register(document)
    check = await agent.check(document["ID"])
    assert (check["Status"], check["Output"]) == ("passing", "")
    assert (await agent.health(document["ID"])).status == 200


async def test_no_initial_status(agent: Agent, document: Document) -> None:
    """Agent holds a check without an initial status for critical until the first probe."""
    del document["Check"]["Status"]
    await agent.register(document)
    assert (await agent.check(document["ID"]))["Status"] == "critical"
    assert (await agent.health(document["ID"])).status == 503


async def test_check_is_shown(agent: Agent, document: Document) -> None:
    """Agent shows a check with its kind and its times, but not what it probes."""
    document["Check"] |= {"Interval": "90s", "Notes": "ours"}
    await agent.register(document)
    check = await agent.check(document["ID"])
    del check["Node"]
    assert check == {
        "CheckID": f"service:{document['ID']}",
        "Name": f"Service '{document['Name']}' check",
        "Status": "passing",
        "Notes": "ours",
        "Output": "",
        "ServiceID": document["ID"],
        "ServiceName": document["Name"],
        "ServiceTags": document["Tags"],
        "Type": "http",
        "Interval": "1m30s",
        "Timeout": "2s",
        "ExposedPort": 0,
        "Definition": {},
        "CreateIndex": 0,
        "ModifyIndex": 0,
    }


@pytest.mark.parametrize("query", ["", "?replace-existing-checks=true", "?replace-existing-checks"])
async def test_register_again_keeps_status(agent: Agent, document: Document, target: Target, query: str) -> None:
    """Agent keeps the check's status and output over an identical registration, whatever the body says."""
    await agent.register(probing(document, target.url, Status="critical"))

    async def passes() -> bool:
        return (await agent.health(document["ID"])).status == 200

    await eventually(passes, within=10, what="the first probe")
    before = await agent.check(document["ID"])
    target.status = 500
    await agent.register(probing(document, target.url, Status="critical", Interval="1000h"), query)
    after = await agent.check(document["ID"])
    assert after["Status"] == "passing"
    assert after["Output"] == before["Output"] != ""


async def test_register_again_keeps_critical(agent: Agent, document: Document) -> None:
    """Agent keeps a check critical although a second registration says passing."""
    document["Check"]["Status"] = "critical"
    await agent.register(document)
    document["Check"]["Status"] = "passing"
    await agent.register(document)
    assert (await agent.check(document["ID"]))["Status"] == "critical"


async def check_ids(agent: Agent, service_id: str) -> list[str]:
    return sorted(check["CheckID"] for check in (await agent.health(service_id)).json["Checks"])


@pytest.mark.parametrize(
    ("query", "kept"),
    [
        ("", True),
        ("?replace-existing-checks=false", True),
        ("?replace-existing-checks=1", True),
        ("?replace-existing-checks", False),
        ("?replace-existing-checks=true", False),
    ],
)
async def test_other_check(agent: Agent, document: Document, query: str, *, kept: bool) -> None:
    """Agent keeps the checks that a registration does not name, unless asked to replace them."""
    await agent.register(document)
    other = document["ID"] + ":other"
    document["Check"]["CheckID"] = other
    await agent.register(document, query)
    assert await check_ids(agent, document["ID"]) == sorted([other, f"service:{document['ID']}"] if kept else [other])


async def test_without_check(agent: Agent, document: Document) -> None:
    """Agent calls a service without checks passing."""
    await agent.register(document)
    del document["Check"]
    await agent.register(document, "?replace-existing-checks=true")
    answer = await agent.health(document["ID"])
    assert answer.status == 200
    assert (answer.json["AggregatedStatus"], answer.json["Checks"]) == ("passing", [])


async def test_several_checks(agent: Agent, document: Document) -> None:
    """Agent numbers the checks of a service that has several, and judges by the worst."""
    check = document.pop("Check")
    document["Checks"] = [check, check | {"Status": "warning"}]
    await agent.register(document)
    assert await check_ids(agent, document["ID"]) == [f"service:{document['ID']}:1", f"service:{document['ID']}:2"]
    assert (await agent.health(document["ID"])).status == 429


async def test_register_changes_name(agent: Agent, document: Document) -> None:
    """Agent moves an ID to another name, and the catalog follows."""
    await agent.register(document)
    other = document | {"Name": document["Name"] + "-other"}
    await agent.register(other)
    assert (await agent.get(f"/v1/health/service/{document['Name']}")).json == []
    (entry,) = (await agent.get(f"/v1/health/service/{other['Name']}")).json
    assert entry["Service"]["ID"] == document["ID"]


@pytest.mark.parametrize(
    "fields",
    [
        {"Port": 0},
        {"Port": 70000},
        {"Port": -1},
        {"Address": "no.such.host"},
        {"Address": ""},
        {"Tags": None, "Meta": None, "Weights": None},
        {"Meta": {"k" * 128: "v" * 512}},
        {"Meta": {f"k{number}": "" for number in range(64)}},
        {"Check": {}},
        {"Check": {"TCP": "127.0.0.1:9", "Interval": "1000h"}},
        {"Check": {"HTTP": "http://127.0.0.1:9", "Interval": 3600_000_000_000, "DeregisterCriticalServiceAfter": 10}},
        {"Check": {"HTTP": "http://127.0.0.1:9", "Interval": "100ms", "deregister_critical_service_after": "10s"}},
        {"Check": {"HTTP": "http://127.0.0.1:9", "Interval": "1.5h", "tls_skip_verify": True, "service_id": "x"}},
        {"Name": "not a DNS name"},
    ],
    ids=str,
)
async def test_accepted(agent: Agent, document: Document, fields: Document) -> None:
    """Agent takes what one might expect it to refuse."""
    await agent.register(document | fields)


async def test_keys_in_any_case(agent: Agent, document: Document) -> None:
    """Agent reads keys in any case, and of two takes the last."""
    lower = {key.lower(): value for key, value in document.items()}
    lower["check"] = {key.upper(): value for key, value in document["Check"].items()}
    answer = await agent.call("PUT", REGISTER, lower | {"enable_tag_override": True, "ADDRESS": "127.0.0.2"})
    assert answer.status == 200
    shown = (await agent.service(document["ID"])).json
    assert (shown["Address"], shown["EnableTagOverride"]) == ("127.0.0.2", True)
    assert (await agent.check(document["ID"]))["Status"] == "passing"
    await agent.deregister(document["ID"])


async def test_content_type(agent: Agent, document: Document) -> None:
    """Agent does not mind the content type of a registration, nor what follows it."""
    body = json.dumps(document).encode() + b" and more"
    answer = await agent.call("PUT", REGISTER, body, headers={"Content-Type": "text/plain"})
    assert answer.status == 200
    await agent.deregister(document["ID"])


WRONG = "Request decode failed: json: cannot unmarshal"
HTTP = {"HTTP": "http://127.0.0.1:9"}
META = "Invalid Service Meta: Couldn't load metadata pair"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"Foo": 1}, 'Request decode failed: json: unknown field "Foo"'),
        ({"Namespace": "x"}, 'Request decode failed: json: unknown field "Namespace"'),
        ({"Check": HTTP | {"Foo": 1}}, 'Request decode failed: json: unknown field "Foo"'),
        ({"Check": HTTP | {"check_id": "x"}}, 'Request decode failed: json: unknown field "check_id"'),
        (
            {"Meta": {"a": 1}},
            f"{WRONG} number into Go struct field .Alias.Meta of type string",
        ),
        (
            {"Tags": "a"},
            f"{WRONG} string into Go struct field .Alias.Tags of type []string",
        ),
        (
            {"Port": "1"},
            f"{WRONG} string into Go struct field .Alias.Port of type int",
        ),
        (
            {"Port": 1.5},
            f"{WRONG} number 1.5 into Go struct field .Alias.Port of type int",
        ),
        (
            {"Meta": []},
            f"{WRONG} array into Go struct field .Alias.Meta of type map[string]string",
        ),
        (
            {"EnableTagOverride": "true"},
            f"{WRONG} string into Go struct field .Alias.EnableTagOverride of type bool",
        ),
        (
            {"Check": HTTP | {"Header": {"A": "b"}}},
            f"{WRONG} string into Go struct field .Alias.Check.Alias.Header of type []string",
        ),
        ({"Check": HTTP | {"Interval": "10"}}, 'Request decode failed: time: missing unit in duration "10"'),
        ({"Check": HTTP | {"Interval": "1d"}}, 'Request decode failed: time: unknown unit "d" in duration "1d"'),
        ({"Check": HTTP | {"Interval": "soon"}}, 'Request decode failed: time: invalid duration "soon"'),
        ({"Check": HTTP | {"Interval": ""}}, 'Request decode failed: time: invalid duration ""'),
        ({"Name": ""}, "Missing service name"),
        ({"Name": None}, "Missing service name"),
        ({"Address": "0.0.0.0"}, "Invalid service address"),
        ({"Address": "::"}, "Invalid service address"),
        ({"Address": "[::]"}, "Invalid service address"),
        ({"Weights": {"Passing": 0}}, "Invalid Weights: Passing must be greater than 0"),
        ({"Weights": {"Passing": 1, "Warning": -1}}, "Invalid Weights: Warning must be greater or equal than 0"),
        ({"Weights": {"Passing": 65536}}, "Invalid Weights: DNS Weight must be between 0 and 65535"),
        (
            {"Meta": {f"k{number}": "" for number in range(65)}},
            "Invalid Service Meta: Node metadata cannot contain more than 64 key/value pairs",
        ),
        ({"Meta": {"": "y"}}, f"{META} ('', 'y'): Key cannot be blank"),
        ({"Meta": {"a b": "y"}}, f"{META} ('a b', 'y'): Key contains invalid characters"),
        ({"Meta": {"k" * 129: "y"}}, f"{META} ('{'k' * 129}', 'y'): Key is too long (limit: 128 characters)"),
        ({"Meta": {"k": "é" * 257}}, f"{META} ('k', '{'é' * 257}'): Value is too long (limit: 512 characters)"),
        ({"Meta": {"consul-x": "y"}}, f"{META} ('consul-x', 'y'): Key prefix 'consul-' is reserved for internal use"),
        (
            {"Check": HTTP},
            "Invalid check: Interval must be > 0 for Script, HTTP, H2PING, TCP, UDP or OSService checks",
        ),
        (
            {"Check": HTTP | {"Interval": "-1s"}},
            "Invalid check: Interval must be > 0 for Script, HTTP, H2PING, TCP, UDP or OSService checks",
        ),
        ({"Check": {"Interval": "1s"}}, "Invalid check: TTL must be > 0 for TTL checks"),
        ({"Weights": {"Passing": None}}, "Invalid Weights: Passing must be greater than 0"),
        ({"Checks": [{}]}, "Invalid check: TTL must be > 0 for TTL checks"),
        (
            {"Check": HTTP | {"Interval": "1s", "OutputMaxSize": -1}},
            "Invalid check: MaxOutputMaxSize must be positive",
        ),
        (
            {"Check": HTTP | {"Interval": "1s", "Status": "up"}},
            "Status for checks must 'passing', 'warning', 'critical'",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else str(value)[-50:],
)
async def test_refused(agent: Agent, document: Document, fields: Document, text: str) -> None:
    """Agent refuses a wrong registration with a 400 that says why, and registers nothing."""
    answer = await agent.call("PUT", REGISTER, document | fields)
    assert (answer.status, answer.text) == (400, text)
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert (await agent.service(document["ID"])).status == 404


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"Tags": ["v1", None]}, {"Tags": ["v1", ""]}),
        ({"Meta": {"team": None, "a": "b"}}, {"Meta": {"team": "", "a": "b"}}),
        ({"Check": HTTP | {"Interval": "1s", "Header": {"X-A": None}}}, {}),
        ({"Check": HTTP | {"Interval": "1s", "Header": {"X-A": ["b", None]}}}, {}),
        ({"Check": HTTP | {"Interval": "1s", "Method": None, "Timeout": None, "Notes": None}}, {}),
    ],
    ids=str,
)
async def test_null(agent: Agent, document: Document, fields: Document, shown: Document) -> None:
    """Agent reads null, inside a list or a map too, as the zero value."""
    await agent.register(document | fields)
    found = (await agent.service(document["ID"])).json
    assert {key: found[key] for key in shown} == shown


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "Request decode failed: EOF"),
        (b"null", "Missing service name"),
        (b"[]", f"{WRONG} array into Go value of type struct"),
        (b"hello", "Request decode failed: "),
        (b'{"Name": "x"', "Request decode failed: "),
        (b'{"Name": NaN}', "Request decode failed: "),
    ],
)
async def test_refused_body(agent: Agent, body: bytes, text: str) -> None:
    """Agent refuses what is no JSON object."""
    answer = await agent.call("PUT", REGISTER, body)
    assert answer.status == 400
    assert answer.text.startswith(text)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", REGISTER, "OPTIONS,PUT"),
        ("GET", "/v1/agent/service/deregister/x", "OPTIONS,PUT"),
        ("DELETE", "/v1/agent/service/x", "OPTIONS,GET"),
        ("PUT", "/v1/agent/services", "OPTIONS,GET"),
        ("PUT", "/v1/internal/acl/authorize", "OPTIONS,POST"),
    ],
)
async def test_wrong_method(agent: Agent, method: str, path: str, allow: str) -> None:
    """Agent says which methods an address has."""
    answer = await agent.call(method, path)
    assert (answer.status, answer.text) == (405, f"method {method} not allowed")
    assert answer.headers["Allow"] == allow


# Deregistration and health


async def test_deregister(agent: Agent, document: Document) -> None:
    """Agent forgets a service and its checks at once."""
    await agent.register(document)
    answer = await agent.deregister(document["ID"])
    assert (answer.status, answer.text) == (200, "")
    answer = await agent.service(document["ID"])
    assert (answer.status, answer.text) == (404, f"unknown service ID: {document['ID']}")
    expression = quote(f'ServiceID == "{document["ID"]}"')
    assert (await agent.get(f"/v1/agent/checks?filter={expression}")).json == {}


async def test_deregister_unknown(agent: Agent) -> None:
    """Agent says of an unknown ID that it is unknown."""
    answer = await agent.deregister("nope-1")
    text = 'Unknown service ID "nope-1". Ensure that the service ID is passed, not the service name.'
    assert (answer.status, answer.text) == (404, text)
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"


async def test_register_again_starts_anew(agent: Agent, document: Document) -> None:
    """Agent believes the initial status again after a deregistration."""
    document["Check"]["Status"] = "critical"
    await agent.register(document)
    await agent.deregister(document["ID"])
    document["Check"]["Status"] = "passing"
    await agent.register(document)
    assert (await agent.check(document["ID"]))["Status"] == "passing"


@pytest.mark.parametrize(("status", "code"), [("passing", 200), ("warning", 429), ("critical", 503)])
async def test_health(agent: Agent, document: Document, status: str, code: int) -> None:
    """Agent gives the health of a service as a status code, a header, JSON and text."""
    document["Check"]["Status"] = status
    await agent.register(document)
    answer = await agent.health(document["ID"])
    assert (answer.status, answer.headers["X-Consul-Reason"]) == (code, status)
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json["AggregatedStatus"] == status
    assert answer.json["Service"]["ID"] == document["ID"]
    (check,) = answer.json["Checks"]
    assert (check["Status"], check["ServiceID"]) == (status, document["ID"])
    answer = await agent.health(document["ID"], "?format=text")
    assert (answer.status, answer.text, answer.headers["Content-Type"]) == (code, status, "text/plain")


async def test_health_unknown(agent: Agent) -> None:
    """Agent says of the health of an unknown ID that the ID is unknown."""
    answer = await agent.health("nope-1")
    assert (answer.status, answer.headers["X-Consul-Reason"]) == (404, "ServiceId nope-1 not found")
    assert answer.json == {"AggregatedStatus": "critical", "Service": None, "Checks": None}
    answer = await agent.health("nope-1", "?format=text")
    assert (answer.status, answer.text) == (404, "ServiceId nope-1 not found")


# Blocking by hash


async def hash_of(agent: Agent, document: Document) -> str:
    await agent.register(document)
    return str((await agent.service(document["ID"])).json["ContentHash"])


@pytest.mark.parametrize("query", ["?wait=60s", "?hash=&wait=60s", "?hash=wrong&wait=60s"])
async def test_hash_does_not_block(agent: Agent, document: Document, query: str) -> None:
    """Agent answers at once without a hash, or with one that is not the present one."""
    await agent.register(document)
    async with asyncio.timeout(5):
        assert (await agent.service(document["ID"], query)).status == 200


async def test_hash_unknown(agent: Agent) -> None:
    """Agent answers at once that it does not know an ID."""
    async with asyncio.timeout(5):
        answer = await agent.service("nope-1", "?hash=abc&wait=60s")
    assert (answer.status, answer.text) == (404, "unknown service ID: nope-1")


@pytest.mark.parametrize(("wait", "seconds"), [("500ms", 0.5), ("1s", 1.0), ("1.5s", 1.5), ("0.01m", 0.6)])
async def test_hash_wait(agent: Agent, document: Document, wait: str, seconds: float) -> None:
    """Agent answers with what there is after the wait, and up to a sixteenth more."""
    known = await hash_of(agent, document)
    start = time.monotonic()
    answer = await agent.service(document["ID"], f"?hash={known}&wait={wait}")
    assert (answer.status, answer.headers["X-Consul-ContentHash"]) == (200, known)
    assert seconds <= time.monotonic() - start < seconds * 17 / 16 + 1


@pytest.mark.parametrize("wait", ["0s", "-1s", "-1h", "0", "", "24h"])
async def test_hash_wait_default(agent: Agent, document: Document, wait: str) -> None:
    """Agent takes no wait, and none that makes sense, for a long one."""
    known = await hash_of(agent, document)
    async with blocked(agent.service(document["ID"], f"?hash={known}&wait={wait}")):
        pass


@pytest.mark.parametrize("wait", ["5", "abc", "1d", "1.5.5s", "s"])
async def test_wait_refused(agent: Agent, document: Document, wait: str) -> None:
    """Agent refuses a wait without a unit."""
    await agent.register(document)
    answer = await agent.service(document["ID"], f"?wait={wait}")
    assert (answer.status, answer.text) == (400, "Invalid wait time")


async def test_hash_deregister(agent: Agent, document: Document) -> None:
    """Agent tells those who block on a service at once that it has gone."""
    known = await hash_of(agent, document)
    async with blocked(agent.service(document["ID"], f"?hash={known}&wait=60s")) as watch, asyncio.timeout(5):
        await agent.deregister(document["ID"])
        answer = await watch
    assert (answer.status, answer.text) == (404, f"unknown service ID: {document['ID']}")


async def test_hash_changed(agent: Agent, document: Document) -> None:
    """Agent tells those who block on a service at once that it has changed."""
    known = await hash_of(agent, document)
    async with blocked(agent.service(document["ID"], f"?hash={known}&wait=60s")) as watch, asyncio.timeout(5):
        await agent.register(document | {"Tags": ["edited"]})
        answer = await watch
    assert answer.status == 200
    assert answer.headers["X-Consul-ContentHash"] == answer.json["ContentHash"] != known
    assert answer.json["Tags"] == ["edited"]


@pytest.mark.parametrize("query", ["", "?replace-existing-checks=true"])
async def test_hash_same(agent: Agent, document: Document, query: str) -> None:
    """Agent does not tell of a registration that changes nothing, or only a check."""
    known = await hash_of(agent, document)
    async with blocked(agent.service(document["ID"], f"?hash={known}&wait=2s")) as watch:
        await agent.register(document, query)
        document["Check"]["Interval"] = "2000h"
        await agent.register(document, query)
        del document["Check"]
        await agent.register(document, query)
        answer = await watch
    assert (answer.status, answer.headers["X-Consul-ContentHash"]) == (200, known)


async def test_hash_of_status(agent: Agent, document: Document, target: Target) -> None:
    """Agent does not tell those who block on a service of the status of its check."""
    known = await hash_of(agent, probing(document, target.url))
    async with blocked(agent.service(document["ID"], f"?hash={known}&wait=3s")) as watch:

        async def passes() -> bool:
            return (await agent.health(document["ID"])).status == 200

        await eventually(passes, within=10, what="the first probe")
        answer = await watch
    assert (answer.status, answer.headers["X-Consul-ContentHash"]) == (200, known)


async def test_hash_is_of_content(agent: Agent, document: Document) -> None:
    """Agent gives the same content the same hash after it was gone."""
    known = await hash_of(agent, document)
    await agent.deregister(document["ID"])
    assert await hash_of(agent, document) == known


async def test_many_watches(agent: Agent, document: Document) -> None:
    """Agent lets many block at a time, and wakes only those whose service changes."""
    documents = [document | {"ID": f"{document['ID']}-{number}"} for number in range(20)]
    known = [await hash_of(agent, each) for each in documents]
    watches = [
        asyncio.ensure_future(agent.service(each["ID"], f"?hash={hash_}&wait=60s"))
        for each, hash_ in zip(documents, known, strict=True)
    ]
    await agent.deregister(documents[3]["ID"])
    done, waiting = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED, timeout=5)
    assert [watch.result().status for watch in done] == [404]
    for watch in waiting:
        watch.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


# The agent's own life


async def test_stop_answers(life: WorkerRuntime, document: Document) -> None:
    """Agent answers those who block with the same hash when it is told to stop, then refuses connections."""
    async with agent_at(life.url) as agent:
        known = await hash_of(agent, document)
        async with blocked(agent.service(document["ID"], f"?hash={known}&wait=60s")) as watch, asyncio.timeout(20):
            stopping = asyncio.ensure_future(life.aclose())
            answer = await watch
            await stopping
        assert (answer.status, answer.headers["X-Consul-ContentHash"]) == (200, known)
        with pytest.raises(aiohttp.ClientConnectorError):
            await agent.service(document["ID"])


async def test_kill_resets(life: WorkerRuntime, document: Document) -> None:
    """Agent breaks the connections of those who block when it is killed."""
    async with agent_at(life.url) as agent:
        known = await hash_of(agent, document)
        async with blocked(agent.service(document["ID"], f"?hash={known}&wait=60s")) as watch, asyncio.timeout(20):
            await life.kill()
            with pytest.raises(aiohttp.ClientError):
                await watch


async def test_restart_forgets(life: WorkerRuntime, document: Document) -> None:
    """Agent without a data directory knows nothing after a restart, and gives the same content the same hash."""
    async with agent_at(life.url) as agent:
        known = await hash_of(agent, document)
        await life.kill()
        await life.start()
        assert (await agent.service(document["ID"])).status == 404
        assert await hash_of(agent, document) == known


# Checks


async def test_probe_request(agent: Agent, document: Document, target: Target) -> None:
    """Agent probes with a plain GET of its own name, over a new connection each time."""
    await agent.register(probing(document, target.url + "-/healthy?a=b"))
    await eventually(lambda: len(target.asked) > 1, within=10, what="two probes")
    method, path, headers, body = target.asked[0]
    assert (method, path, body) == ("GET", "/-/healthy", "")
    assert dict(headers) == {
        "Host": target.url.removeprefix("http://").removesuffix("/"),
        "User-Agent": "Consul Health Check",
        "Accept": "text/plain, text/*, */*",
        "Accept-Encoding": "gzip",
        "Connection": "close",
    }


async def test_probe_as_told(agent: Agent, document: Document, target: Target) -> None:
    """Agent probes with the method, headers and body that the check has."""
    fields = {"Method": "POST", "Body": "hello", "Header": {"Authorization": ["Basic x"], "User-Agent": ["me"]}}
    await agent.register(probing(document, target.url, **fields))
    await eventually(lambda: target.asked, within=10, what="a probe")
    method, _, headers, body = target.asked[0]
    assert (method, body, headers["Authorization"], headers["User-Agent"]) == ("POST", "hello", "Basic x", "me")


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (200, "passing"),
        (204, "passing"),
        (299, "passing"),
        (304, "critical"),
        (404, "critical"),
        (429, "warning"),
        (500, "critical"),
    ],
)
async def test_probe_status(agent: Agent, document: Document, target: Target, code: int, status: str) -> None:
    """Agent takes 2xx for passing, 429 for warning, all else for critical."""
    target.status = code
    other = "passing" if status == "critical" else "critical"
    await agent.register(probing(document, target.url, Status=other))

    async def told() -> bool:
        return bool((await agent.check(document["ID"]))["Status"] == status)

    await eventually(told, within=10, what=status)


async def test_probe_output(agent: Agent, document: Document, target: Target) -> None:
    """Agent keeps what the target said as the check's output."""
    await agent.register(probing(document, target.url))

    async def output() -> str:
        return str((await agent.check(document["ID"]))["Output"])

    said = await eventually(output, within=10, what="an output")
    assert said == f"HTTP GET {target.url}: 200 OK Output: fine"


async def test_probe_long_output(agent: Agent, document: Document, target: Target) -> None:
    """Agent keeps 4096 bytes of what the target said, the last ones."""
    target.body = "a" * 10_000 + "z" * 4000
    await agent.register(probing(document, target.url))

    async def output() -> str:
        return str((await agent.check(document["ID"]))["Output"])

    said = await eventually(output, within=10, what="an output")
    assert said == f"HTTP GET {target.url}: 200 OK Output: {'a' * 96}{'z' * 4000}"


async def test_probe_redirect(agent: Agent, document: Document, target: Target) -> None:
    """Agent follows the redirects of what it probes."""
    target.location = "/elsewhere"
    await agent.register(probing(document, target.url))

    async def passes() -> bool:
        return (await agent.health(document["ID"])).status == 200

    await eventually(passes, within=10, what="passing")
    assert [path for _, path, _, _ in target.asked[:2]] == ["/", "/elsewhere"]


async def test_probe_timeout(agent: Agent, document: Document, target: Target) -> None:
    """Agent calls critical what does not answer in time."""
    target.answers.clear()
    await agent.register(probing(document, target.url, Timeout="100ms", Status="passing"))

    async def output() -> str:
        return str((await agent.check(document["ID"]))["Output"])

    assert "context deadline exceeded" in await eventually(output, within=10, what="an output")
    assert (await agent.health(document["ID"])).status == 503


@pytest.mark.parametrize("kind", ["HTTP", "TCP"])
async def test_probe_refused(agent: Agent, document: Document, unused_tcp_port: int, kind: str) -> None:
    """Agent calls critical what does not listen."""
    where = f"127.0.0.1:{unused_tcp_port}"
    check = {kind: f"http://{where}/" if kind == "HTTP" else where, "Interval": "1s", "Status": "passing"}
    await agent.register(document | {"Check": check})

    async def fails() -> bool:
        return (await agent.health(document["ID"])).status == 503

    await eventually(fails, within=10, what="critical")
    assert where in (await agent.check(document["ID"]))["Output"]


async def test_probe_tcp(agent: Agent, document: Document, target: Target) -> None:
    """Agent calls passing what accepts a TCP connection, and sends nothing."""
    where = target.url.removeprefix("http://").removesuffix("/")
    await agent.register(document | {"Check": {"TCP": where, "Interval": "1s"}})

    async def passes() -> bool:
        return (await agent.health(document["ID"])).status == 200

    await eventually(passes, within=10, what="passing")
    check = await agent.check(document["ID"])
    assert (check["Type"], check["Output"]) == ("tcp", f"TCP connect {where}: Success")
    assert target.asked == []


async def test_probe_follows_registration(agent: Agent, document: Document, target: Target) -> None:
    """Agent probes what the latest registration says, and nothing after the deregistration."""
    await agent.register(probing(document, target.url + "old"))
    await eventually(lambda: target.asked, within=10, what="a probe")
    await agent.register(probing(document, target.url + "new"))
    asked = len(target.asked)
    await eventually(lambda: len(target.asked) > asked + 1, within=10, what="more probes")
    assert {path for _, path, _, _ in target.asked[asked + 1 :]} == {"/new"}
    await agent.deregister(document["ID"])
    known = len(target.asked)
    await agent.register(probing(document | {"ID": document["ID"] + "-other"}, target.url + "other"))
    await eventually(lambda: len(target.asked) > known + 2, within=15, what="probes of the other")
    assert {path for _, path, _, _ in target.asked[known + 1 :]} == {"/other"}


@pytest.mark.full
async def test_reaped(agent: Agent, document: Document, unused_tcp_port: int) -> None:
    """Agent deregisters what was critical for a minute, though ten seconds were asked, at its next look each 30 s."""
    url = f"http://127.0.0.1:{unused_tcp_port}/"
    await agent.register(probing(document, url, Status="passing", DeregisterCriticalServiceAfter="10s"))
    start = time.monotonic()

    async def gone() -> bool:
        return (await agent.service(document["ID"])).status == 404

    await eventually(gone, within=110, what="reaped", every=0.5)
    assert 60 < time.monotonic() - start < 100


# IDs


ODD_IDS = ["a/b", "a//b", "/lead", "trail/", "a%b", "a?b", "a#b", "a b", "a+b", "a&b", 'a"b', "a:b", "a.b", ".a", "ü"]


@pytest.mark.parametrize("odd", [*ODD_IDS, "x" * 2000], ids=lambda odd: odd[:10])
async def test_odd_id(agent: Agent, document: Document, odd: str) -> None:
    """Agent takes any ID whose path is percent-encoded."""
    await agent.register(document | {"ID": odd})
    assert (await agent.service(odd)).json["ID"] == odd
    assert (await agent.health(odd)).status == 200
    assert (await agent.deregister(odd)).status == 200
    assert (await agent.service(odd)).status == 404


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/agent/service/.", 307),
        ("/v1/agent/service/..", 307),
        ("/v1/agent/service/a//b", 307),
        ("/v1/agent/service//a", 307),
        ("/v1/agent/service/a%0Ab", 400),
        ("/v1/agent/service/no/slash", 404),
    ],
)
async def test_id_that_cannot_be_asked_for(agent: Agent, path: str, status: int) -> None:
    """Agent redirects a path with empty or dotted steps, and refuses one that cannot be printed."""
    assert (await agent.get(path)).status == status


async def test_id_with_plain_slash(agent: Agent, document: Document) -> None:
    """Agent finds an ID with a slash that was not encoded."""
    await agent.register(document | {"ID": document["Name"] + "/b"})
    assert (await agent.get(f"/v1/agent/service/{document['Name']}/b")).status == 200


# Reading what the agent holds


OURS = 'Meta["external-source"] == "consul-prom"'


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("", True),
        (OURS, True),
        ('Meta.managed_by == "consul-prom"', True),
        ('Meta.managed_by=="consul-prom"', True),
        ('Meta.managed_by == "other"', False),
        ('Meta.nothing == "consul-prom"', False),
        ('Service == "{name}"', True),
        ('Service == "{name}-other"', False),
        (OURS + ' and Service == "{name}"', True),
        (OURS + ' and Service == "{name}" and "v1" in Tags', True),
        (OURS + ' and Service == "{name}" and "v2" in Tags', False),
        ('ID == "{name}.web-1.0"', True),
        ('"consul-prom" in Tags', True),
        ('Tags contains "consul-prom"', True),
        ('Tags contains "consul"', False),
        ('"consul-prom" in Meta.managed_by', True),
        (' Service  ==  "{name}"  and  ID == "{name}.web-1.0" ', True),
    ],
)
async def test_filter(agent: Agent, document: Document, expression: str, *, found: bool) -> None:
    """Agent lists the services that a filter describes."""
    await agent.register(document)
    expression = quote(expression.replace("{name}", document["Name"]))
    answer = await agent.get(f"/v1/agent/services?filter={expression}")
    assert answer.status == 200
    assert (document["ID"] in answer.json) == found
    if found:
        shown = (await agent.service(document["ID"])).json
        del shown["ContentHash"]
        assert answer.json[document["ID"]] == shown


@pytest.mark.parametrize(
    "expression",
    ["Service", 'Service = "x"', 'Foo == "x"', 'Meta.a-b == "x"', 'ID == "a" AND ID == "b"', 'ID == "a" and'],
)
async def test_filter_refused(agent: Agent, expression: str) -> None:
    """Agent lists nothing by a filter that it does not understand."""
    assert (await agent.get(f"/v1/agent/services?filter={quote(expression)}")).status >= 500


async def test_checks_of_service(agent: Agent, document: Document) -> None:
    """Agent lists the checks of one service."""
    await agent.register(document)
    await agent.register(document | {"ID": document["ID"] + "-other"})
    expression = quote(f'ServiceID == "{document["ID"]}"')
    assert list((await agent.get(f"/v1/agent/checks?filter={expression}")).json) == [f"service:{document['ID']}"]


async def test_self(agent: Agent) -> None:
    """Agent says of itself what it is, where it is and what it advertises."""
    answer = await agent.get("/v1/agent/self")
    assert answer.status == 200
    config, member, debug = (answer.json[part] for part in ("Config", "Member", "DebugConfig"))
    assert (config["Datacenter"], config["Version"]) == ("dc1", "1.19.2")
    assert member["Addr"] == debug["AdvertiseAddrLAN"] == URL(agent.url).host
    assert config["NodeName"] == member["Name"] != ""
    assert (member["Status"], member["Tags"]["dc"]) == (1, "dc1")


async def test_leader(agent: Agent) -> None:
    """Agent names its leader as a JSON text."""
    assert (await agent.get("/v1/status/leader")).json == f"{URL(agent.url).host}:8300"


async def test_rights(agent: Agent) -> None:
    """Agent without ACLs says so to whoever asks what a token may do."""
    asked = [{"Resource": "service", "Access": "write", "Segment": "shop-metrics"}]
    answer = await agent.call("POST", "/v1/internal/acl/authorize", asked)
    assert (answer.status, answer.text) == (401, "ACL support disabled")


# The catalog, as Prometheus reads it


STALE = "stale=&wait=120000ms"


async def test_catalog_entry(agent: Agent, document: Document) -> None:
    """Agent shows a service with its node and checks, as Prometheus needs them."""
    await agent.register(document)
    answer = await agent.get(f"/v1/health/service/{document['Name']}?{STALE}")
    assert answer.status == 200
    assert int(answer.headers["X-Consul-Index"]) > 0
    assert (answer.headers["X-Consul-KnownLeader"], answer.headers["X-Consul-LastContact"]) == ("true", "0")
    assert answer.headers["X-Consul-Effective-Consistency"] == "stale"
    (entry,) = answer.json
    assert entry["Node"]["Address"] == URL(agent.url).host
    assert set(entry["Node"]["TaggedAddresses"]) == {"lan", "lan_ipv4", "wan", "wan_ipv4"}
    assert entry["Node"]["Meta"]["consul-version"] == "1.19.2"
    shown = {key: entry["Service"][key] for key in ("ID", "Service", "Tags", "Meta", "Port", "Address")}
    assert shown == {key: document[key] for key in ("ID", "Tags", "Meta", "Port", "Address")} | {
        "Service": document["Name"]
    }
    assert [(check["CheckID"], check["Status"]) for check in entry["Checks"]] == [
        ("serfHealth", "passing"),
        (f"service:{document['ID']}", "passing"),
    ]


async def test_catalog_unknown(agent: Agent) -> None:
    """Agent shows an empty list for a name that nobody registered."""
    answer = await agent.get(f"/v1/health/service/nope?{STALE}")
    assert (answer.status, answer.json) == (200, [])


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("tag=v1", True),
        ("tag=V1&tag=consul-prom", True),
        ("tag=v1&tag=v2", False),
        ("passing=1", False),
        ("passing", False),
        ("passing=false", True),
        ("dc=dc1", True),
        ("node-meta=consul-version%3A1.19.2", True),
        ("node-meta=consul-version%3A1", False),
    ],
)
async def test_catalog_query(agent: Agent, document: Document, query: str, *, found: bool) -> None:
    """Agent shows what has all the tags, and what is critical unless told otherwise."""
    document["Check"]["Status"] = "critical"
    await agent.register(document)
    answer = await agent.get(f"/v1/health/service/{document['Name']}?{query}")
    assert [entry["Service"]["ID"] for entry in answer.json] == [document["ID"]] * found


@pytest.mark.parametrize(
    ("query", "status", "text"),
    [
        ("wait=5", 400, "Invalid wait time"),
        ("index=x", 400, "Invalid index"),
        ("passing=maybe", 400, "Invalid value for ?passing"),
        ("dc=nowhere", 500, "No path to datacenter"),
    ],
)
async def test_catalog_query_refused(agent: Agent, query: str, status: int, text: str) -> None:
    """Agent refuses a catalog query that makes no sense."""
    answer = await agent.get(f"/v1/health/service/nope?{query}")
    assert (answer.status, answer.text) == (status, text)


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/v1/health/service/", 400, "Missing service name"),
        ("/v1/agent/health/service/id/", 500, "Missing serviceID"),
        ("/v1/agent/service/", 404, "unknown service ID: "),
    ],
)
async def test_nothing_asked_for(agent: Agent, path: str, status: int, text: str) -> None:
    """Agent refuses to look for what has no name."""
    answer = await agent.get(path)
    assert (answer.status, answer.text) == (status, text)


async def test_catalog_services(agent: Agent, document: Document) -> None:
    """Agent lists the names of all services, with the tags of all that bear them."""
    await agent.register(document)
    await agent.register(document | {"ID": document["ID"] + "-other", "Tags": ["v0"]})
    answer = await agent.get(f"/v1/catalog/services?{STALE}")
    assert int(answer.headers["X-Consul-Index"]) > 0
    assert sorted(answer.json[document["Name"]]) == ["consul-prom", "v0", "v1"]
    await agent.deregister(document["ID"])
    await agent.deregister(document["ID"] + "-other")
    assert document["Name"] not in (await agent.get("/v1/catalog/services")).json


Change = Callable[[Agent, Document], Awaitable[object]]


async def _add(agent: Agent, document: Document) -> None:
    await agent.register(document | {"ID": document["ID"] + "-other"})


async def _edit(agent: Agent, document: Document) -> None:
    await agent.register(document | {"Tags": ["edited"]})


async def _remove(agent: Agent, document: Document) -> None:
    await agent.deregister(document["ID"])


async def _rename(agent: Agent, document: Document) -> None:
    await agent.register(document | {"Name": document["Name"] + "-other"})


async def _nothing(agent: Agent, document: Document) -> None:
    await agent.register(document)


async def _elsewhere(agent: Agent, document: Document) -> None:
    await agent.register(document | {"Name": document["Name"] + "-other", "ID": document["ID"] + "-other"})


@pytest.mark.parametrize("path", ["/v1/health/service/{name}", "/v1/catalog/services"])
@pytest.mark.parametrize("change", [_add, _edit, _remove, _rename])
async def test_index_wakes(agent: Agent, document: Document, path: str, change: Change) -> None:
    """Agent wakes those who block on an index by what they would see, with a greater index."""
    await agent.register(document)
    path = path.replace("{name}", document["Name"])
    index = (await agent.get(path)).headers["X-Consul-Index"]
    async with blocked(agent.get(f"{path}?index={index}&{STALE}")) as watch, asyncio.timeout(10):
        await change(agent, document)
        answer = await watch
    assert answer.status == 200
    assert int(answer.headers["X-Consul-Index"]) > int(index)


@pytest.mark.parametrize("change", [_nothing, _elsewhere])
async def test_index_does_not_wake(agent: Agent, document: Document, change: Change) -> None:
    """Agent does not wake those who block on one name by the same registration, or by another name."""
    await agent.register(document)
    path = f"/v1/health/service/{document['Name']}"
    index = (await agent.get(path)).headers["X-Consul-Index"]
    async with blocked(agent.get(f"{path}?index={index}&stale=&wait=2s")) as watch:
        await change(agent, document)
        answer = await watch
    assert answer.headers["X-Consul-Index"] == index


async def test_index_of_new_name(agent: Agent, document: Document) -> None:
    """Agent wakes those who block on a name that nobody had."""
    path = f"/v1/health/service/{document['Name']}"
    index = (await agent.get(path)).headers["X-Consul-Index"]
    async with blocked(agent.get(f"{path}?index={index}&{STALE}")) as watch, asyncio.timeout(10):
        await agent.register(document)
        answer = await watch
    assert [entry["Service"]["ID"] for entry in answer.json] == [document["ID"]]
    assert int(answer.headers["X-Consul-Index"]) > int(index)


async def test_index_of_status(agent: Agent, document: Document, target: Target) -> None:
    """Agent wakes those who block on a name by the status of a check."""
    await agent.register(probing(document, target.url, Status="passing"))
    await eventually(lambda: target.asked, within=10, what="a probe")
    path = f"/v1/health/service/{document['Name']}"
    index = (await agent.get(path)).headers["X-Consul-Index"]
    async with blocked(agent.get(f"{path}?index={index}&{STALE}")) as watch, asyncio.timeout(10):
        target.status = 500
        answer = await watch
    assert answer.json[0]["Checks"][1]["Status"] == "critical"


async def test_index_at_once(agent: Agent, document: Document) -> None:
    """Agent answers at once to an index that is past or zero, and blocks on one that is yet to come."""
    await agent.register(document)
    path = f"/v1/health/service/{document['Name']}"
    index = int((await agent.get(path)).headers["X-Consul-Index"])
    async with asyncio.timeout(5):
        await agent.get(f"{path}?index={index - 1}&{STALE}")
        await agent.get(f"{path}?index=0&{STALE}")
    async with blocked(agent.get(f"{path}?index={index + 1_000}&{STALE}")):
        pass


async def test_catalogue(agent: Agent, document: Document) -> None:
    """Agent finds an entry in the catalogue by ID and node, until it is deregistered."""
    await agent.register(document)
    node = (await agent.check(document["ID"]))["Node"] if "Check" in document else await _node(agent)
    expression = f'ServiceID == "{document["ID"]}" and Node == "{node}"'
    path = f"/v1/catalog/service/{document['Name']}?filter={quote(expression)}"
    (entry,) = (await agent.get(path)).json
    assert (entry["Node"], entry["ServiceID"], entry["ServiceName"]) == (node, document["ID"], document["Name"])
    assert entry["ServiceMeta"] == document.get("Meta", {})
    other = quote(f'ServiceID == "{document["ID"]}" and Node == "another"')
    assert (await agent.get(f"/v1/catalog/service/{document['Name']}?filter={other}")).json == []
    await agent.deregister(document["ID"])
    assert (await agent.get(path)).json == []


@pytest.mark.parametrize("query", ["?", f"?{STALE}", "?tag=v1&", "?tag=nope&", "?node-meta=rack:1&"])
async def test_catalogue_headers(agent: Agent, document: Document, query: str) -> None:
    """Agent gives the catalogue's entries of a service the headers that the health endpoint gives them."""
    await agent.register(document)
    answer = await agent.get(f"/v1/catalog/service/{document['Name']}{query}")
    other = await agent.get(f"/v1/health/service/{document['Name']}{query}")
    assert len(answer.json) == len(other.json)
    assert int(answer.headers["X-Consul-Index"]) > 0
    for name in ("Index", "KnownLeader", "LastContact", "Effective-Consistency"):
        assert answer.headers[f"X-Consul-{name}"] == other.headers[f"X-Consul-{name}"]


async def test_catalogue_blocks(agent: Agent, document: Document) -> None:
    """Agent blocks on the index of a service in the catalogue until an entry of it changes."""
    await agent.register(document)
    path = f"/v1/catalog/service/{document['Name']}"
    index = int((await agent.get(path)).headers["X-Consul-Index"])
    async with blocked(agent.get(f"{path}?index={index}&{STALE}")) as waiting:
        await agent.deregister(document["ID"])
        answer = await asyncio.wait_for(waiting, 10)
    assert answer.json == []
    assert int(answer.headers["X-Consul-Index"]) > index


async def test_catalogue_without_name(agent: Agent) -> None:
    """Agent refuses to look for a service without a name."""
    answer = await agent.get("/v1/catalog/service/")
    assert (answer.status, answer.text) == (400, "Missing service name")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of groups that nobody here uses
async def test_catalogue_by_python_consul2(agent: Agent, document: Document) -> None:
    """python-consul2 itself reads a service from the catalogue."""
    await agent.register(document)
    url = URL(agent.url)
    theirs = python_consul2.Consul(host=url.host, port=url.port)
    index, entries = await asyncio.to_thread(theirs.catalog.service, document["Name"])
    assert int(index) > 0
    assert [entry["ServiceID"] for entry in entries] == [document["ID"]]


async def _node(agent: Agent) -> str:
    return str((await agent.get("/v1/agent/self")).json["Config"]["NodeName"])
