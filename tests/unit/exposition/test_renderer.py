"""The page: byte for byte prometheus_client's, in the format that was asked for."""

import gzip
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info, Summary, metrics
from prometheus_client import exposition as text
from prometheus_client.core import GaugeHistogramMetricFamily, GaugeMetricFamily, UnknownMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from consul_prom.exposition import family_renderer
from consul_prom.exposition import renderer as page_renderer
from tests.unit.pages import render

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


class _Named(Collector):
    """A collector that shows more than it has registered."""

    def describe(self) -> list[Metric]:
        return [GaugeMetricFamily("named", "-")]

    def collect(self) -> list[Metric]:
        return [GaugeMetricFamily("named", "-", value=1), GaugeMetricFamily("more", "-", value=1)]


class _Given(Collector):
    """A collector of the metrics that it is given."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Sequence[Metric]:
        return self._families


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
        """A header of half a megabyte is read to its end; in quadratic time it would outlast the test's limit."""
        page = render(registry, accept=item * (500_000 // len(item)), accept_encoding=item * (500_000 // len(item)))
        assert page.body == _plain(registry)

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
            from consul_prom.exposition import renderer as page_renderer
            registry = CollectorRegistry()
            Counter("reqs", "-", registry=registry)
            _, _, pieces = page_renderer.Renderer(registry).render("", "gzip")
            assert gzip.decompress(b"".join(pieces)) == generate_latest(registry)
            print(page_renderer.compress.__module__)
        """
        command = [sys.executable, "-c", dedent(program)]
        assert subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout == f"{wanted}\n"

    @pytest.mark.parametrize("accept_encoding", ["", "gzip"])
    def test_caches_are_told(self, full: CollectorRegistry, accept_encoding: str) -> None:
        """A cache between learns which headers the page depends on."""
        page = render(full, accept="", accept_encoding=accept_encoding)
        assert page.headers["Vary"] == "Accept, Accept-Encoding"


class TestEncoding:
    """Label values that are not valid UTF-8: an application may take them from a request."""

    BAD = "\udcff"

    def _use(self, registry: CollectorRegistry, *labels: str) -> None:
        kinds: list[Any] = [Counter, Gauge, Histogram, Summary]
        for kind in kinds:
            metric = kind(kind.__name__.lower(), "-", ["x", "y"], registry=registry)
            for label in labels:
                getattr(metric.labels(label, "1"), "observe" if kind in {Histogram, Summary} else "inc")(1)
        Info("info", "-", ["x"], registry=registry)
        for label in labels:
            registry._names_to_collectors["info"].labels(label).info({"a": "b"})  # type: ignore[attr-defined]

    @pytest.mark.parametrize("accept", ["", PROMETHEUS])
    @pytest.mark.parametrize("labels", [(BAD,), (BAD, "a"), ("a", BAD, "b" + BAD, "c"), ("a", BAD + "\udfff")])
    def test_series_is_left_out(
        self, registry: CollectorRegistry, labels: tuple[str, ...], accept: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Such a series of any metric is left out, and the page has all others, at each scrape."""
        monkeypatch.setattr(metrics, "_use_created", False)  # no two registries are made at one time
        self._use(registry, *labels)
        clean = CollectorRegistry()
        self._use(clean, *[label for label in labels if self.BAD not in label])
        renderer = page_renderer.Renderer(registry)
        encode, _ = text.choose_encoder(accept)
        for _ in range(2):
            assert render(renderer, accept=accept).body == encode(clean)
        assert render(renderer, accept=accept, names=["counter_total"]).body == encode(
            clean.restricted_registry(["counter_total"])
        )

    def test_is_said_once(self, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture) -> None:
        """One WARNING names the metric, and one says that it is over."""
        caplog.set_level(logging.INFO)
        counter = Counter("reqs", "-", ["x"], registry=registry)
        counter.labels(self.BAD).inc()
        renderer = page_renderer.Renderer(registry)
        for _ in range(3):
            render(renderer)
            render(renderer, accept=PROMETHEUS)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "reqs has a label value that is not valid UTF-8" in caplog.text
        counter.clear()
        render(renderer)
        assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]

    def test_exemplar(self, registry: CollectorRegistry) -> None:
        """Such an exemplar is left out, and the sample stays."""
        counter = Counter("reqs", "-", registry=registry)
        histogram = Histogram("took", "-", registry=registry, buckets=(1,))
        renderer = page_renderer.Renderer(registry)
        for trace in ("a", self.BAD):
            counter.inc(1, {"trace": trace})
            histogram.observe(0.5, {"trace": trace})
            page = render(renderer, accept=PROMETHEUS).body
        assert b"reqs_total 2.0\n" in page
        assert b'took_bucket{le="1.0"} 2.0\n' in page

    def test_custom_collector(self, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture) -> None:
        """Of a custom collector's metrics the same is left out, or all of one with such a help; it stays as it is."""
        family = GaugeMetricFamily("queue", "-", labels=["x"])
        for label in ("a", self.BAD):
            family.add_metric([label], 1)
        families = [family, GaugeMetricFamily("odd", self.BAD, value=1), GaugeMetricFamily("more", "-", value=1)]
        registry.register(_Given(families))
        page = render(registry).body
        assert re.findall(rb"^\w.*", page, re.MULTILINE) == [b'queue{x="a"} 1.0', b"more 1.0"]
        assert len(family.samples) == 2
        assert [record.getMessage().partition(" ")[0] for record in caplog.records] == ["queue", "odd"]


class TestNames:
    """``name[]`` keeps only some samples."""

    @pytest.mark.parametrize("accept", ["", PROMETHEUS])
    def test_chosen_names(self, full: CollectorRegistry, accept: str) -> None:
        """Only the samples of these names are on the page, as prometheus_client restricts a registry."""
        names = ["reqs_total", "size_bytes_count", "absent"]
        page = render(full, accept=accept, accept_encoding="", names=names)
        encode, _ = text.choose_encoder(accept)
        wanted = encode(full.restricted_registry(names))  # in any order
        assert sorted(page.body.splitlines()) == sorted(wanted.splitlines())
        assert b"reqs_total" in page.body
        assert b"temperature" not in page.body
        assert b"size_bytes_sum" not in page.body

    @pytest.mark.parametrize("accept", ["", PROMETHEUS])
    @pytest.mark.parametrize("names", [["took_seconds_bucket"], ["took_seconds_created", "took_seconds_sum"], ["reqs"]])
    def test_some_samples_of_a_metric(self, full: CollectorRegistry, names: list[str], accept: str) -> None:
        """Of a metric any of its samples can be chosen, each as prometheus_client writes it."""
        encode, _ = text.choose_encoder(accept)
        assert render(full, accept=accept, names=names).body == encode(full.restricted_registry(names))

    def test_page_from_kept_families(self, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
        """A page of chosen names is written in slices, from what is kept of other scrapes, and keeps it all."""
        counter = Counter("reqs", "-", ["x"], registry=registry)
        for number in range(3 * family_renderer.BLOCK):
            counter.labels(number).inc()
        renderer = page_renderer.Renderer(registry)
        whole = render(renderer).body
        monkeypatch.setattr(page_renderer.Renderer, "_by_library", None)
        monkeypatch.setattr(family_renderer, "_fill", None)
        assert render(renderer, names=["reqs_total"]).body == text.generate_latest(
            registry.restricted_registry(["reqs_total"])
        )
        assert len([piece for piece in renderer.render("", "", ["reqs_total"]).pieces if not piece]) >= 3
        assert render(renderer).body == whole

    def test_names_that_make_no_difference(self, full: CollectorRegistry) -> None:
        """Requests that differ only in names that nothing has ask for one page; a custom collector may have any."""

        def chosen(*names: str) -> object:
            return page_renderer.Renderer(full).render("", "", names).names

        assert chosen("reqs_total", "absent") == chosen("x", "reqs_total") == {"reqs_total"}
        assert chosen("absent") == frozenset()
        assert chosen() is None
        full.register(_Named())
        assert chosen("named", "more") == {"named", "more"}
        assert b"more 1.0" in render(full, names=["named", "more"]).body

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

    def test_function_that_raises_is_asked_once(self, registry: CollectorRegistry) -> None:
        """A gauge's function that raises is asked once in a scrape, as by prometheus_client."""
        asked = []

        def fail() -> float:
            asked.append(1)
            raise LookupError("no such queue")

        Gauge("queue", "", ["x"], registry=registry).labels("1").set_function(fail)
        for names in ((), ("queue",)):
            with pytest.raises(LookupError):
                render(registry, names=names)
        assert len(asked) == 2
