"""A metric family as text that is kept between scrapes, in which only the numbers that changed are written anew.

What a family looks like is the library's own work: it writes one series, with marks where label values and numbers go,
and that is the form of all others. So the formats are known to it alone. What we know is where its classes keep their
numbers; it is asked once whether we are right (`known`). What is not as we know it raises, and is left to the library.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain, compress, count, starmap
from operator import is_not, ne
from typing import Any, ClassVar, Final

from prometheus_client import Counter, Enum, Gauge, Histogram, Metric, Summary, metrics, values
from prometheus_client import exposition as text
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

log = logging.getLogger(__name__)

Encode = Callable[[Collector], bytes]

BLOCK: Final = 1024  # numbers that are looked at in one go: half a millisecond where all have changed
_CREATED: Final = 0.25  # what stands for a time of creation in a form; numbers are 0.5, 1.5, ...
_UNFIT: Final = re.compile(r"[\0\n]")  # in a name: what the library writes could not be taken apart
_SPECIAL: Final = re.compile(r'[\\\n"%]')  # in a label value
_READABLE: Final = {values.MutexValue}  # classes of values whose `_value` is the number that the page shows
_OF_FAMILY: Final = ("collect", "_get_metric", "_multi_samples")
_OF_SERIES: Final = ("_samples", "_child_samples")
_METHODS: Final = {
    (kind, name): getattr(kind, name, None)
    for kind in (Counter, Gauge, Summary, Histogram, Enum)
    for name in (*_OF_FAMILY, *_OF_SERIES)
}


class Only:
    """A collector of the metrics that it is given."""

    def __init__(self, *found: Metric) -> None:
        self._found = found

    def collect(self) -> Sequence[Metric]:
        return self._found


@dataclass(slots=True)
class _Section:
    """A head, and the lines of one series below it; text 0.0.4 has the times of creation in a second section.

    `form` is for ``str.format`` with label values and time of creation; that gives a template for ``%`` with numbers.
    """

    head: bytes = b""
    form: str = ""
    has_numbers: bool = False


class Family:
    """What a collector of one of the library's classes, and of no subclass, has on the page."""

    has_created: ClassVar[bool] = True
    differs: ClassVar[Callable[[Any, Any], bool]] = ne

    def __init__(self, collector: Any, encode: Encode, *, shows_exemplars: bool) -> None:
        self.shows_exemplars = shows_exemplars
        self.sections: list[_Section] = []
        self._collector = collector
        self._encode = encode
        self._shape: tuple[object, ...] = ()
        self._blocks: list[_Block] = []

    def pieces(self) -> Iterator[bytes]:
        """The family's part of the page, after an empty piece for each block that was looked at.

        Whatever it raises, the library has to write the family; this can be asked again at the next scrape.
        """
        if not _is_plain(self._collector, _OF_FAMILY):
            raise TypeError("an instance with methods of its own")
        series = self._series()
        children, labels = list(series.values()), list(series)
        self._find_form(children)
        written = [[section.head] for section in self.sections]
        step = BLOCK // len(self.suffixes()) + 1
        for start in range(0, len(children), step):
            block = self._block(start // step, children[start : start + step], labels[start : start + step])
            for section, lines in zip(written, block.write(), strict=True):
                section.append(lines)
            yield b""
        del self._blocks[-(-len(children) // step) :]
        yield b"".join(chain.from_iterable(written))

    def _series(self) -> dict[Sequence[str], Any]:
        """The series by their label values, in the order of the page."""
        if not self._collector._labelnames or self._collector._labelvalues:
            return {(): self._collector}
        with self._collector._lock:
            return dict(self._collector._metrics)

    def _block(self, number: int, children: list[Any], labels: list[Sequence[str]]) -> "_Block":
        """The block of that number, made anew where its series are others."""
        if not (number < len(self._blocks) and self._blocks[number].is_of(children)):
            self._blocks[number : number + 1] = [_Block(self, children, labels)]
        return self._blocks[number]

    def _find_form(self, children: Sequence[Any]) -> None:
        """Have the library write a series, where that is not done, or no longer right."""
        collector = self._collector
        names = (collector._name, collector._unit, *collector._labelnames, *self.parts())
        shape = (bool(children), collector._documentation, metrics._use_created, *names)
        if shape != self._shape:
            self._blocks, self._shape = [], ()
            if any(map(_UNFIT.search, map(str, names))):
                raise ValueError("a name with a character that the form needs")
            self._take_apart(self._written_by_library(children[:1]))
            self._shape = shape

    def _written_by_library(self, children: Sequence[Any]) -> str:
        """One series, with marks as its label values and, as its numbers, their places."""
        metric, places = self._collector._get_metric(), count(0.5)
        marks = {name: f"\0{number}\0" for number, name in enumerate(self._collector._labelnames)}
        samples = [sample for child in children for sample in type(child)._child_samples(child)]
        if children and [suffix for suffix, *_ in samples if suffix != "_created"] != list(self.suffixes()):
            raise ValueError("samples that were not expected")
        for suffix, labels, *_ in samples:
            value = _CREATED if suffix == "_created" else next(places)
            metric.add_sample(metric.name + suffix, {**marks, **labels}, value)
        return self._encode(Only(metric)).removesuffix(self._encode(Only())).decode()

    def _take_apart(self, page: str) -> None:
        self.sections, places = [], count(0.5)
        for line in page.split("\n")[:-1]:
            if line.startswith("# "):
                if not self.sections or self.sections[-1].form:
                    self.sections.append(_Section())
                self.sections[-1].head += f"{line}\n".encode()
            else:
                prefix, value = line.rsplit(" ", 1)
                is_number = float(value) != _CREATED
                if is_number and float(value) != next(places):
                    raise ValueError("numbers in another order")
                self.sections[-1].form += self._blank(prefix, is_number=is_number)
                self.sections[-1].has_numbers |= is_number
        if sum(section.has_numbers for section in self.sections) > 1:
            raise ValueError("numbers in two places")

    def _blank(self, prefix: str, *, is_number: bool) -> str:
        """A line's form. What stands between marks is as it is in every series."""
        pieces = prefix.replace("%", "%%").replace("{", "{{").replace("}", "}}").split("\0")
        pieces[1::2] = [f"{{{number}}}" for number in pieces[1::2]]
        return f"{''.join(pieces)} {'%b' if is_number else f'{{{len(self._collector._labelnames)}}}'}\n"

    def parts(self) -> Sequence[object]:
        """What the form depends on beside names and documentation."""
        return ()

    def suffixes(self) -> Sequence[str]:
        """Those of the samples that show the numbers of a series."""
        raise NotImplementedError

    def fits(self, child: Any) -> bool:
        """Whether *child* is as the library made it."""
        is_plain = type(child) is type(self._collector) and _is_plain(child, _OF_SERIES)
        return is_plain and all(type(value) in _READABLE for value in self.values(child))

    def values(self, child: Any) -> Sequence[object]:
        """The objects that hold its numbers."""
        return ()

    def numbers(self, children: Sequence[Any]) -> list[Any]:
        """Those of one series after the other. An attribute is read in one step, so no value's lock is needed."""
        raise NotImplementedError

    def exemplars(self, children: Sequence[Any]) -> list[Exemplar | None]:
        """As many for each series, those of its first numbers."""
        return []


class _Block:
    """Some series that follow each other, as a template of their lines and the texts of their numbers."""

    def __init__(self, family: Family, children: list[Any], labels: Sequence[Sequence[str]]) -> None:
        if not all(map(family.fits, children)):
            raise TypeError("a series that is not like others of its class")
        self._family = family
        self._children = children
        self._created = self._read_created(children)
        self._numbers: list[Any] = [None] * (len(children) * len(family.suffixes()))
        self._texts = [b""] * len(self._numbers)
        if _SPECIAL.search("".join(chain.from_iterable(labels))):
            labels = [[_escape(value).replace("%", "%%") for value in of_one] for of_one in labels]
        if self._created:
            labels = [(*of_one, floatToGoString(created)) for of_one, created in zip(labels, self._created, strict=True)]
        self._templates = ["".join(starmap(section.form.format, labels)).encode() for section in family.sections]

    def is_of(self, children: list[Any]) -> bool:
        """Whether these are the same series, none of them reset."""
        return self._children == children and self._created == self._read_created(children)

    def write(self) -> list[bytes]:
        """The lines of all series, for each section."""
        numbers = self._family.numbers(self._children)
        for place in compress(count(), map(self._family.differs, numbers, self._numbers)):
            self._texts[place] = _text(numbers[place]).encode()
        if self._family.shows_exemplars:
            self._add_exemplars(numbers)
        self._numbers = numbers
        texts = tuple(self._texts)
        return [
            template % (texts if section.has_numbers else ())
            for section, template in zip(self._family.sections, self._templates, strict=True)
        ]

    def _add_exemplars(self, numbers: list[Any]) -> None:
        found = self._family.exemplars(self._children)
        for index in compress(count(), found):
            child, nth = divmod(index, len(found) // len(self._children))
            place = child * len(self._family.suffixes()) + nth
            self._texts[place] = f"{_text(numbers[place])}{_exemplar(found[index])}".encode()
            numbers[place] = None  # is written again next time: an exemplar's labels may change without a trace

    def _read_created(self, children: Sequence[Any]) -> list[float]:
        return [child._created for child in children] if self._family.has_created else []


class _Counters(Family):
    def suffixes(self) -> Sequence[str]:
        return ("_total",)

    def values(self, child: Any) -> Sequence[object]:
        return (child._value,)

    def numbers(self, children: Sequence[Any]) -> list[Any]:
        return [child._value._value for child in children]

    def exemplars(self, children: Sequence[Any]) -> list[Exemplar | None]:
        return [child._value._exemplar for child in children]


class _Gauges(Family):
    has_created = False
    differs = is_not  # 0.0 equals -0.0

    def suffixes(self) -> Sequence[str]:
        return ("",)

    def fits(self, child: Any) -> bool:
        return type(child) is Gauge and type(child._value) in _READABLE  # it may get a function at any time

    def numbers(self, children: Sequence[Any]) -> list[Any]:
        plain = _METHODS[Gauge, "_child_samples"]
        return [child._value._value if child._child_samples.__func__ is plain else _asked(child) for child in children]


class _Summaries(Family):
    def suffixes(self) -> Sequence[str]:
        return ("_count", "_sum")

    def values(self, child: Any) -> Sequence[object]:
        return (child._count, child._sum)

    def numbers(self, children: Sequence[Any]) -> list[Any]:
        return [value._value for child in children for value in (child._count, child._sum)]


class _Histograms(Family):
    def parts(self) -> Sequence[object]:
        return tuple(self._collector._upper_bounds)

    def suffixes(self) -> Sequence[str]:
        bounds = self._collector._upper_bounds
        return ["_bucket"] * len(bounds) + ["_count"] + ["_sum"] * (bounds[0] >= 0)

    def fits(self, child: Any) -> bool:
        return super().fits(child) and child._upper_bounds == self._collector._upper_bounds

    def values(self, child: Any) -> Sequence[object]:
        return (*child._buckets, child._sum)

    def numbers(self, children: Sequence[Any]) -> list[Any]:
        numbers, has_sum = [], self._collector._upper_bounds[0] >= 0
        for child in children:
            numbers += accumulate([bucket._value for bucket in child._buckets])
            numbers.append(numbers[-1])
            if has_sum:
                numbers.append(child._sum._value)
        return numbers

    def exemplars(self, children: Sequence[Any]) -> list[Exemplar | None]:
        return [bucket._exemplar for child in children for bucket in child._buckets]


class _Enums(Family):
    has_created = False

    def parts(self) -> Sequence[object]:
        return tuple(self._collector._states)

    def suffixes(self) -> Sequence[str]:
        return [""] * len(self._collector._states)

    def fits(self, child: Any) -> bool:
        return super().fits(child) and child._states is self._collector._states

    def numbers(self, children: Sequence[Any]) -> list[Any]:
        states = range(len(self._collector._states))
        return [1.0 if state == child._value else 0.0 for child in children for state in states]


def _is_plain(found: Any, names: Sequence[str]) -> bool:
    """Whether *found* has these methods as its class had them when this was imported."""
    return all(getattr(getattr(found, name), "__func__", None) is _METHODS[type(found), name] for name in names)


def _asked(gauge: Any) -> float:
    """What the function of a gauge says."""
    ((_, _, value, *_),) = gauge._child_samples()
    return float(value)


def _text(number: Any) -> str:
    """A number as the library writes it, which is as Python does in this range."""
    return repr(number) if type(number) is float and -1e6 < number < 1e6 else floatToGoString(number)


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _exemplar(exemplar: Exemplar) -> str:
    labels = ",".join(f'{name}="{_escape(value)}"' for name, value in sorted(exemplar.labels.items()))
    when = "" if exemplar.timestamp is None else f" {exemplar.timestamp}"
    return f" # {{{labels}}} {floatToGoString(exemplar.value)}{when}"


@cache
def known() -> dict[type, type[Family]]:
    """Our families by the library's classes, as far as they write the same as the library that is installed."""
    if values.ValueClass is not values.MutexValue:  # multiprocess mode: its values are files
        return {}
    families = {Counter: _Counters, Gauge: _Gauges, Summary: _Summaries, Histogram: _Histograms, Enum: _Enums}
    return {kind: family for kind, family in families.items() if _is_right(kind, family)}


def _is_right(kind: Any, family: type[Family]) -> bool:
    """Whether *family* writes two series of *kind* as the library does, in both formats."""
    try:
        options = {"states": ["up", "down"]} if kind is Enum else {}
        metric = kind("a.b", 'Odd "\\\n".', ["b", "a.c"], registry=None, **options)
        metric.labels("b", "{0}%s")
        _use(metric.labels('"\\\n', "ü"))
        return all(
            b"".join(family(metric, encode, shows_exemplars=encode is openmetrics.generate_latest).pieces())
            == encode(Only(*metric.collect())).removesuffix(encode(Only()))
            for encode in (text.generate_latest, openmetrics.generate_latest)
        )
    except Exception:
        log.debug("this prometheus_client is not as expected: its %s is left to it", kind.__name__, exc_info=True)
        return False


def _use(series: Any) -> None:
    match series:
        case Counter():
            series.inc(1e6, {"b": '"', "a": ""})
        case Gauge():
            series.set(-0.25)
        case Enum():
            series.state("down")
        case Histogram() | Summary():
            series.observe(0.3)
            series.observe(float("inf"))
