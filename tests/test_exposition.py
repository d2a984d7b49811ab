"""The page: byte for byte prometheus_client's, in the format that was asked for."""

import gzip
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info, Summary
from prometheus_client import exposition as text
from prometheus_client.core import GaugeHistogramMetricFamily, GaugeMetricFamily, UnknownMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from tests.pages import render

PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
PROMETHEUS_WITH_PROTOBUF = (
    "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.6,"
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
CONSUL = "text/plain, text/*, */*"
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"

ESCAPINGS = ("allow-utf-8", "underscores", "dots", "values")
PLAIN = "text/plain; version=0.0.4; charset=utf-8"
PLAIN_1 = "text/plain; version=1.0.0; charset=utf-8; escaping={}"
OPEN = "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping={}"

Encoder = Callable[[CollectorRegistry], bytes]


class _Custom(Collector):
    """What an application's own collector may give: timestamps, odd types, a dotted name."""

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("queue.length", "A name that is not legacy.", labels=["a.b"])
        family.add_metric(["ü"], 3, timestamp=1_700_000_000.123)
        yield family
        yield UnknownMetricFamily("odd", "Untyped.", value=float("inf"))
        yield GaugeHistogramMetricFamily("sizes", "A gauge histogram.", buckets=[("1.0", 2), ("+Inf", 3)], gsum_value=4)


@pytest.fixture
def full(registry: CollectorRegistry) -> CollectorRegistry:
    """One metric of each kind, and the values that are hard to write."""
    return _filled(registry)


def _filled(registry: CollectorRegistry) -> CollectorRegistry:
    requests = Counter("reqs", 'With "quotes", a \\ and a\nnewline.', ["view"], registry=registry)
    for view in ("fire", 'a"b', "a\\b", "a\nb", "", "smörgås \U0001f600"):
        requests.labels(view).inc(0.1)
    requests.labels("fire").inc(2, exemplar={"trace_id": "abc"})
    Gauge("temperature", "Odd numbers.", registry=registry).set(float("nan"))
    Histogram("took_seconds", "A histogram.", unit="seconds", registry=registry).observe(0.3, {"trace_id": "def"})
    Summary("size_bytes", "A summary.", registry=registry).observe(1e21)
    Info("build", "An info.", registry=registry).info({"version": "1"})
    Enum("state", "A state set.", states=["up", "down"], registry=registry)
    registry.register(_Custom())
    return registry


def _plain(registry: CollectorRegistry) -> bytes:
    return text.generate_latest(registry)


def _plain_1(escaping: str) -> Encoder:
    return partial(text.generate_latest, escaping=escaping)


def _open(escaping: str) -> Encoder:
    return partial(openmetrics.generate_latest, escaping=escaping, version="1.0.0")


class TestFormats:
    """Which format, and that it is prometheus_client's."""

    @pytest.mark.parametrize(
        "accept",
        [
            "",
            "*/*",
            "text/*",
            "text/plain",
            "text/plain;version=0.0.4",
            "TEXT/PLAIN ; VERSION=0.0.4",
            CONSUL,
            BROWSER,
            "application/json",
            "application/openmetrics-text;version=0.0.1",
            "application/openmetrics-text;version=2.0.0",
            "text/plain;version=0.0.5",
            "text/plain;version=2.0.0",
            "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited",
        ],
    )
    def test_text(self, full: CollectorRegistry, accept: str) -> None:
        """Text 0.0.4 is for who asks for it, for nothing special, or for what we do not speak."""
        page = render(full, accept=accept, accept_encoding="")
        assert page.headers["Content-Type"] == PLAIN == text.CONTENT_TYPE_PLAIN_0_0_4
        assert page.body == _plain(full)

    @pytest.mark.parametrize("escaping", ESCAPINGS)
    def test_text_1(self, full: CollectorRegistry, escaping: str) -> None:
        """Text 1.0.0 comes in the escaping that was asked for."""
        page = render(full, accept=f"text/plain; version=1.0.0; escaping={escaping}", accept_encoding="")
        assert page.headers["Content-Type"] == PLAIN_1.format(escaping)
        assert page.body == _plain_1(escaping)(full)

    @pytest.mark.parametrize("version", ["", ";version=1.0.0", " ; version = 1.0.0"])
    @pytest.mark.parametrize("escaping", ESCAPINGS)
    def test_openmetrics(self, full: CollectorRegistry, version: str, escaping: str) -> None:
        """OpenMetrics 1.0.0 comes in the escaping that was asked for, also without a version."""
        accept = f"application/openmetrics-text{version};escaping={escaping}"
        page = render(full, accept=accept, accept_encoding="")
        assert page.headers["Content-Type"] == OPEN.format(escaping)
        assert page.body == _open(escaping)(full)
        assert page.body.endswith(b"# EOF\n")

    @pytest.mark.parametrize("escaping", ["", ";escaping=", ";escaping=none", ";escaping=allow-utf-8x"])
    def test_unknown_escaping(self, full: CollectorRegistry, escaping: str) -> None:
        """Without a known escaping it is underscores, and the answer says so."""
        for kind, shown, encode in (("text/plain", PLAIN_1, _plain_1), ("application/openmetrics-text", OPEN, _open)):
            page = render(full, accept=f"{kind};version=1.0.0{escaping}", accept_encoding="")
            assert page.headers["Content-Type"] == shown.format("underscores")
            assert page.body == encode("underscores")(full)

    @pytest.mark.parametrize("accept", [PROMETHEUS, PROMETHEUS_WITH_PROTOBUF])
    def test_prometheus(self, full: CollectorRegistry, accept: str) -> None:
        """Prometheus 3.14 gets OpenMetrics 1.0.0 with UTF-8, just as from prometheus_client's own server."""
        page = render(full, accept=accept, accept_encoding="")
        encode, content_type = text.choose_encoder(accept)
        assert page.headers["Content-Type"] == content_type == OPEN.format("allow-utf-8")
        assert page.body == encode(full)

    def test_openmetrics_parses(self, registry: CollectorRegistry) -> None:
        """An OpenMetrics parser reads the page back."""
        Counter("reqs", "Requests.", ["view"], registry=registry).labels('f"i\\r\ne').inc(3)
        page = render(registry, accept=PROMETHEUS, accept_encoding="")
        (family,) = text_string_to_metric_families(page.body.decode())  # type: ignore[no-untyped-call]
        assert [sample.labels for sample in family.samples if sample.value == 3] == [{"view": 'f"i\\r\ne'}]

    @pytest.mark.parametrize(
        ("accept", "wanted"),
        [
            ("application/openmetrics-text;q=0.1,text/plain;q=0.9", PLAIN),
            ("application/openmetrics-text;q=0.9,text/plain;q=0.1", OPEN.format("underscores")),
            ("text/plain;q=0.1,application/openmetrics-text;q=0.9", OPEN.format("underscores")),
            ("text/plain,application/openmetrics-text", PLAIN),
            ("application/openmetrics-text,text/plain", OPEN.format("underscores")),
            ("application/openmetrics-text;q=0", PLAIN),
            ("application/openmetrics-text;q=0.000,text/plain;version=1.0.0;q=0.001", PLAIN_1.format("underscores")),
            ("*/*,application/openmetrics-text;q=0.5", PLAIN),
            ("application/json,application/openmetrics-text;q=0.5", OPEN.format("underscores")),
            (
                "application/openmetrics-text;version=2.0.0,application/openmetrics-text;q=0.1",
                OPEN.format("underscores"),
            ),
            ("application/openmetrics-text; q=0.5 ; version=1.0.0 , text/plain; q=0.4", OPEN.format("underscores")),
        ],
    )
    def test_weights(self, full: CollectorRegistry, accept: str, wanted: str) -> None:
        """The greatest weight wins, the first of equal ones, and never one of 0."""
        assert render(full, accept=accept, accept_encoding="").headers["Content-Type"] == wanted


class TestHostileHeaders:
    """Nothing that a scraper sends breaks the page."""

    @pytest.mark.parametrize("weight", ["nan", "-nan", "-1", "-inf", "", "abc", "0x1", "1 1", "\u0661\u0662x"])
    def test_wrong_weight(self, full: CollectorRegistry, weight: str) -> None:
        """An entry whose weight is no weight is left out."""
        accept = f"application/openmetrics-text;q={weight}"
        assert render(full, accept=accept, accept_encoding="").headers["Content-Type"] == PLAIN

    @pytest.mark.parametrize("weight", ["inf", "1e999", "9999", "1_0"])
    def test_too_large_a_weight(self, full: CollectorRegistry, weight: str) -> None:
        """A weight beyond 1 gives a page like any other."""
        accept = f"application/openmetrics-text;q={weight}, text/plain"
        page = render(full, accept=accept, accept_encoding=f"gzip;q={weight}")
        assert gzip.decompress(page.body) in {_plain(full), _open("underscores")(full)}

    @pytest.mark.parametrize(
        "accept",
        [
            "application/openmetrics-text;version=abc",
            "application/openmetrics-text;version=",
            "application/openmetrics-text;version=1",
            "application/openmetrics-text;version=1.0.0.0",
            "application/openmetrics-text;version=999999999999999999999.0.0",
            "text/plain;version=abc",
            ";;;,,,===",
            ",",
            ";q=1",
            "\x00\xff",
            "/",
            "*",
            "text/plain;" * 5000,
        ],
    )
    def test_garbage(self, full: CollectorRegistry, accept: str) -> None:
        """A header that makes no sense gets text 0.0.4."""
        page = render(full, accept=accept, accept_encoding="")
        assert page.headers["Content-Type"] == PLAIN
        assert page.body == _plain(full)

    @pytest.mark.parametrize("item", ["text/html;q=0.5,", ";", "=", "application/openmetrics-text;version=x,", "\t "])
    def test_huge(self, registry: CollectorRegistry, item: str) -> None:
        """A header of half a megabyte takes a moment, no more."""
        begun = time.perf_counter()
        render(registry, accept=item * (500_000 // len(item)), accept_encoding=item * (500_000 // len(item)))
        assert time.perf_counter() - begun < 5

    @given(st.text(), st.text())
    def test_anything(self, accept: str, accept_encoding: str) -> None:
        """Whatever the headers are, there is a page, and its headers are plain ASCII of ours."""
        registry = CollectorRegistry()
        Gauge("one", "", registry=registry).set(1)
        page = render(registry, accept=accept, accept_encoding=accept_encoding)
        assert page.headers["Content-Type"].split(";")[0] in {"text/plain", "application/openmetrics-text"}
        assert b"one 1.0\n" in (gzip.decompress(page.body) if "Content-Encoding" in page.headers else page.body)

    @given(st.from_regex(r"(application/openmetrics-text|text/plain|\*/\*)(;(q|version|escaping)=[\w.-]{0,5}){0,3}"))
    def test_near_misses(self, accept: str) -> None:
        """What looks nearly right is answered like what is right, or like nothing."""
        registry = _filled(CollectorRegistry())
        page = render(registry, accept=accept, accept_encoding="")
        kind, version = page.headers["Content-Type"].split("; ")[:2]
        wanted = {
            ("text/plain", "version=0.0.4"): _plain,
            ("text/plain", "version=1.0.0"): _plain_1("underscores"),
            ("application/openmetrics-text", "version=1.0.0"): _open("underscores"),
        }
        assert page.body == wanted[kind, version](registry)


class TestCompression:
    """gzip, where it is accepted."""

    @pytest.mark.parametrize(
        "accept_encoding",
        [
            "gzip",
            "GZip",
            "deflate, gzip",
            "gzip;q=0.1",
            "br;q=1.0, gzip;q=0.8, *;q=0.1",
            " gzip ; q=1",
            "gzip;q=0,gzip",
        ],
    )
    def test_gzip(self, full: CollectorRegistry, accept_encoding: str) -> None:
        """A page for who accepts gzip is the same page, compressed."""
        page = render(full, accept="", accept_encoding=accept_encoding)
        assert page.headers["Content-Encoding"] == "gzip"
        assert gzip.decompress(page.body) == _plain(full)
        assert len(page.body) < len(_plain(full))

    @pytest.mark.parametrize(
        "accept_encoding",
        ["", "identity", "gzip;q=0", "gzip;q=0.000", "deflate, br", "*", "x", "gzip;q=nan", "gzipped"],
    )
    def test_identity(self, full: CollectorRegistry, accept_encoding: str) -> None:
        """Who does not accept gzip gets the page as it is."""
        page = render(full, accept="", accept_encoding=accept_encoding)
        assert "Content-Encoding" not in page.headers
        assert page.body == _plain(full)

    @pytest.mark.parametrize(("hidden", "wanted"), [("", "isal.isal_zlib"), ("sys.modules['isal'] = None", "zlib")])
    def test_compressor(self, hidden: str, wanted: str) -> None:
        """The extra `isal` compresses where it is installed, and zlib does elsewhere: both to the same page."""
        program = f"""
            import sys
            {hidden}
            import gzip
            from prometheus_client import CollectorRegistry, Counter
            from prometheus_client.exposition import generate_latest
            from consul_prom import exposition
            registry = CollectorRegistry()
            Counter("reqs", "-", registry=registry)
            _, pieces = exposition.Renderer(registry).render("", "gzip")
            assert gzip.decompress(b"".join(pieces)) == generate_latest(registry)
            print(exposition.compress.__module__)
        """
        command = [sys.executable, "-c", dedent(program)]
        assert subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout == f"{wanted}\n"

    @pytest.mark.parametrize("accept_encoding", ["", "gzip"])
    def test_caches_are_told(self, full: CollectorRegistry, accept_encoding: str) -> None:
        """A cache between learns which headers the page depends on."""
        page = render(full, accept="", accept_encoding=accept_encoding)
        assert page.headers["Vary"] == "Accept, Accept-Encoding"


class TestNames:
    """``name[]`` keeps only some samples."""

    @pytest.mark.parametrize("accept", ["", PROMETHEUS])
    def test_chosen_names(self, full: CollectorRegistry, accept: str) -> None:
        """Only the samples of these names are on the page, as prometheus_client restricts a registry."""
        names = ["reqs_total", "size_bytes_count", "absent"]
        page = render(full, accept=accept, accept_encoding="", names=names)
        encode, _ = text.choose_encoder(accept)
        assert page.body == encode(full.restricted_registry(names))
        assert b"reqs_total" in page.body
        assert b"temperature" not in page.body
        assert b"size_bytes_sum" not in page.body

    @pytest.mark.parametrize(("accept", "body"), [("", b""), (PROMETHEUS, b"# EOF\n")])
    def test_no_such_name(self, full: CollectorRegistry, accept: str, body: bytes) -> None:
        """Names that nothing has give an empty page that is still well-formed."""
        assert render(full, accept=accept, accept_encoding="", names=["absent"]).body == body

    def test_exception_of_a_collector_passes(self, registry: CollectorRegistry) -> None:
        """A collector's exception is the caller's."""

        def fail() -> float:
            raise LookupError("no such queue")

        Gauge("queue", "", registry=registry).set_function(fail)
        with pytest.raises(LookupError, match="no such queue"):
            render(registry, accept="", accept_encoding="")
