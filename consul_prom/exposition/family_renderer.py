"""A metric family as text that is kept between scrapes, in which only the numbers that changed are written anew.

What a family looks like is the library's own work: it writes one series, with marks where label values and numbers go,
and that is the form of all others. So the formats are known to it alone. What is not as we know it raises, and is left
to the library.
"""

import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain, compress, count, cycle
from operator import ne
from typing import Any, ClassVar, Final

from prometheus_client import Counter, Enum, Gauge, Histogram, Summary, metrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from consul_prom.ledger.source import Only, Source
from consul_prom.ledger.values import MappedValue, MutexValue, reader

Encode = Callable[[Collector], bytes]
Read = Callable[[], Sequence[float]]
Reader = Callable[[Sequence[Any]], Read]

BLOCK: Final = 512  # numbers that are looked at in one go: a third of a millisecond where all have changed
READERS: Final[Mapping[type, Reader]] = {
    # An attribute is read in one step, so no value's lock is needed.
    MutexValue: lambda found: lambda: [value._value for value in found],
    MappedValue: lambda found: lambda: [value.get() for value in found],
}
TOTALS: Final[Mapping[type, Reader]] = {
    **READERS,
    MappedValue: lambda found: lambda: [value.total() for value in found],
}
CELLS: Final[Mapping[type, Reader]] = {**READERS, MappedValue: reader}
_in_go: Final[Callable[[float], str]] = floatToGoString
_CREATED: Final = 0.25  # what stands for a time of creation in a form; numbers are 0.5, 1.5, ...
_GAP: Final = "\n"  # for a number, in a form
_UNFIT: Final = re.compile(r"[\0\n]")  # in a name: what the library writes could not be taken apart
_SPECIAL: Final = re.compile(r'[\\\n"]')  # in a label value
_OF_FAMILY: Final = ("collect", "_get_metric", "_multi_samples", "_samples")
_OF_SERIES: Final = ("_samples", "_child_samples")
METHODS: Final = {
    (kind, name): getattr(kind, name, None)
    for kind in (Counter, Gauge, Summary, Histogram, Enum)
    for name in (*_OF_FAMILY, "_child_samples")
}
"""As they were when this was imported."""


@dataclass(slots=True)
class _Section:
    """A head, and the form of one series below it; text 0.0.4 has the times of creation in a second section.

    `form` is for ``%`` with what the `columns` of these numbers have for a series: label values, time of creation. In
    place of a number and the end of its line it has an empty line, which is in no line's text. `lines` are the
    library's, with marks and places.
    """

    head: bytes
    lines: list[str]
    form: str = ""
    columns: list[int] = field(default_factory=list)
    has_numbers: bool = False


class Family:
    """What a collector of one of the library's classes, and of no subclass, has on the page."""

    has_created: ClassVar[bool] = True
    has_exemplars: ClassVar[bool] = True
    differs: ClassVar[Any] = ne  # sums are never -0.0, so that equal ones have the same text

    def __init__(self, collector: Any, encode: Encode, *, source: Source, shows_exemplars: bool) -> None:
        self.staying: Any = collector._lock if collector._labelnames else nullcontext()
        # Labelled series move under this lock, and get another dictionary then; others may move at any time.
        self.readers = (CELLS if collector._labelnames else TOTALS) if source.totals else READERS
        self.shows_exemplars = shows_exemplars and self.has_exemplars
        self.name: str = collector._name
        self.labelnames: Sequence[str] = collector._labelnames
        self.sections: list[_Section] = []
        self.callback_raised = False
        self._collector = collector
        self._encode = encode
        self._inherited = source.inherited
        self._dictionary: dict[Sequence[str], Any] = {}
        self._shape: tuple[object, ...] = ()
        self._blocks: list[_Block] = []

    @property
    def incomplete(self) -> bool:
        """Whether the page that was written last lacks what UTF-8 cannot encode."""
        return any(block.incomplete for block in self._blocks)

    def pieces(self, names: frozenset[str] | None = None) -> Iterator[bytes]:
        """The family's part of the page, after an empty piece for each block that was looked at.

        *names* keeps only the samples of these names. Whatever it raises, the library has to write the family, unless
        it was a gauge's function, in `callback_raised`. This can be asked again at the next scrape.
        """
        self.callback_raised = False
        try:
            _check(self._collector)
            slices = self._slices()
            first = slices[0][:1] if slices else []
            self._find_form(first)
            chosen = self._choose(first, names)
            written = [[head] for head, _ in chosen]
            for number, children in enumerate(slices if chosen else []):
                block = self._block(number, children)
                for section, (_, kept), lines in zip(written, chosen, block.write(), strict=True):
                    section.append(lines if all(kept) else _keep(lines, kept))
                yield b""
            del self._blocks[len(slices) :]
        except Exception:
            self._blocks = []
            raise
        if names is None or any(any(lines) for _, *lines in written):
            yield from chain.from_iterable(written)

    def _slices(self) -> list[list[Any]]:
        """The series in the order of the page, as many together as a block takes."""
        collector = self._collector
        if not collector._labelnames:
            return [[collector]]
        inherited = self._inherited(collector)  # before the lock, as it may have to be made
        with collector._lock:  # so that no series is on its way from the one to the other
            if collector._metrics is not self._dictionary:
                self._dictionary, self._blocks = collector._metrics, []
            parts = [list(self._dictionary.values()), list(inherited._metrics.values()) if inherited else []]
        step = BLOCK // len(self.suffixes()) + 1
        return [series[start : start + step] for series in parts for start in range(0, len(series), step)]

    def _block(self, number: int, children: list[Any]) -> "_Block":
        """The block of that number, made anew where its series are others."""
        if not (number < len(self._blocks) and self._blocks[number].is_of(children)):
            self._blocks[number : number + 1] = [_Block(self, children)]
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
            self._take_apart(self._written_by_library(children))
            self._shape = shape

    def _choose(self, children: Sequence[Any], names: frozenset[str] | None) -> list[tuple[bytes, list[bool]]]:
        """For each section its head, and which lines of a series stay with *names*; nothing where that is none."""
        if names is None:
            return [(section.head, [True] * len(section.lines)) for section in self.sections]
        heads = {line: head for head, lines in _parts(self._written_by_library(children, names)) for line in lines}
        if not heads:
            return []
        return [
            (next((heads[line] for line in section.lines if line in heads), b""), [it in heads for it in section.lines])
            for section in self.sections
        ]

    def _written_by_library(self, children: Sequence[Any], names: frozenset[str] | None = None) -> str:
        """One series, with marks as its label values and, as its numbers, their places."""
        metric, places = self._collector._get_metric(), count(0.5)
        marks = {name: f"\0{number}\0" for number, name in enumerate(self._collector._labelnames)}
        samples = [sample for child in children for sample in type(child)._child_samples(child)]
        if children and [suffix for suffix, *_ in samples if suffix != "_created"] != list(self.suffixes()):
            raise ValueError("samples that were not expected")
        for suffix, labels, *_ in samples:
            value = _CREATED if suffix == "_created" else next(places)
            metric.add_sample(metric.name + suffix, {**marks, **labels}, value)
        found = [metric if names is None else metric._restricted_metric(names)]
        return self._encode(Only(*filter(None, found))).removesuffix(self._encode(Only())).decode()

    def _take_apart(self, page: str) -> None:
        self.sections, places = [_Section(head, lines) for head, lines in _parts(page)], count(0.5)
        for section in self.sections:
            for line in section.lines:
                prefix, value = line.rsplit(" ", 1)
                is_number = float(value) != _CREATED
                if is_number and float(value) != next(places):
                    raise ValueError("numbers in another order")
                self._add_line(section, prefix, is_number=is_number)
        if sum(section.has_numbers for section in self.sections) > 1:
            raise ValueError("numbers in two places")

    def _add_line(self, section: _Section, prefix: str, *, is_number: bool) -> None:
        """To a section's form. What stands between marks is as it is in every series."""
        pieces = prefix.replace("%", "%%").split("\0")
        section.columns += map(int, pieces[1::2])
        pieces[1::2] = ["%s"] * len(pieces[1::2])
        section.form += f"{''.join(pieces)} {_GAP if is_number else '%s'}\n"
        section.has_numbers |= is_number
        if not is_number:
            section.columns.append(len(self._collector._labelnames))

    def parts(self) -> Sequence[object]:
        """What the form depends on beside names and documentation."""
        return ()

    def suffixes(self) -> Sequence[str]:
        """Those of the samples that show the numbers of a series."""
        raise NotImplementedError

    def fits(self, children: Sequence[Any]) -> bool:
        """Whether *children* are as the library made them."""
        kind = type(self._collector)
        plain = kind, METHODS[kind, "_samples"], METHODS[kind, "_child_samples"]
        return {(type(child), child._samples.__func__, child._child_samples.__func__) for child in children} == {plain}

    def values(self, children: Sequence[Any]) -> list[Any]:
        """The objects that hold their numbers, as many for each; those that may have exemplars come first."""
        raise NotImplementedError

    def numbers(self, children: Sequence[Any], read: Sequence[float]) -> Sequence[float]:  # noqa: ARG002
        """What the page shows where *read* is what their values hold."""
        return read


class _Block:
    """Some series that follow each other, as the texts of their numbers and of all that stands between those."""

    def __init__(self, family: Family, children: list[Any]) -> None:
        if not family.fits(children):
            raise TypeError("a series that is not like others of its class")
        self._family = family
        self._all = children
        self._children = _encodable(children)
        self.incomplete = False
        self._created = self._read_created(self._children)
        self._values = family.values(self._children)
        with family.staying:
            self._read = _reader(self._values, family.readers)
        self._numbers: Any = [None] * (len(self._children) * len(family.suffixes()))
        columns = self._columns()
        self._sections = [_fill(section, columns) for section in family.sections]
        self._numbered = max(self._sections, key=len)

    def is_of(self, children: list[Any]) -> bool:
        """Whether these are the same series, none of them reset.

        Where those of a labelled metric get other values, it gets another dictionary.
        """
        return (
            self._all == children
            and self._created == self._read_created(self._children)
            and (len(children) > 1 or self._values == self._family.values(self._children))
        )

    def write(self) -> Iterator[bytes]:
        """The lines of all series, for each section."""
        family = self._family
        texts = _Texts()
        self.incomplete = len(self._children) < len(self._all)
        numbers = family.numbers(self._children, self._read())
        if family.differs is ne:
            numbers = array("d", numbers)  # first: a numpy.float32 equals a float that has other digits
        for place in compress(count(), map(family.differs, numbers, self._numbers)):
            self._numbered[2 * place + 1] = texts[numbers[place] or str(numbers[place])]  # 0.0 equals -0.0
        if family.shows_exemplars:
            self._add_exemplars(numbers)
        self._numbers = numbers
        return map(b"".join, self._sections)

    def _columns(self) -> list[Sequence[str]]:
        """What the forms have room for, a column each: label values, and the time of creation."""
        columns: list[Sequence[str]] = list(zip(*[child._labelvalues for child in self._children], strict=True))
        columns = columns or [()] * len(self._family.labelnames)
        if _SPECIAL.search("".join(map("".join, columns))):
            columns = [list(map(_escape, column)) for column in columns]
        created = [_time(when) for when in self._created]
        return [*columns, created or [""] * len(self._children)]

    def _add_exemplars(self, numbers: Sequence[float]) -> None:
        exemplars = [value._exemplar for value in self._values]
        if exemplars.count(None) == len(exemplars):
            return
        for index in compress(count(), exemplars):
            child, nth = divmod(index, len(exemplars) // len(self._children))
            place = child * len(self._family.suffixes()) + nth
            exemplar = _exemplar(exemplars[index])
            if not is_encodable(exemplar):
                self.incomplete, exemplar = True, ""
            self._numbered[2 * place + 1] = f"{_text(numbers[place])}{exemplar}\n".encode()

    def _read_created(self, children: Sequence[Any]) -> list[float]:
        return [child._created for child in children] if self._family.has_created else []


def is_encodable(*texts: str) -> bool:
    """Whether the page, which is UTF-8, can carry *texts*: not what came as other bytes, and is lone surrogates."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _encodable(children: list[Any]) -> list[Any]:
    """Those whose labels can be encoded."""
    if is_encodable(*chain.from_iterable([child._labelvalues for child in children])):
        return children
    return [child for child in children if is_encodable(*child._labelvalues)]


def _parts(page: str) -> list[tuple[bytes, list[str]]]:
    """Each head in what the library wrote, and the lines below it."""
    parts: list[tuple[list[str], list[str]]] = []
    for line in page.split("\n")[:-1]:
        is_head = line.startswith("# ")
        if is_head and (not parts or parts[-1][1]):
            parts.append(([], []))
        parts[-1][not is_head].append(line)
    return [("".join(f"{line}\n" for line in head).encode(), lines) for head, lines in parts]


def _keep(lines: bytes, kept: Sequence[bool]) -> bytes:
    """Of the *lines* of each series those that are *kept*."""
    return b"\n".join([*compress(lines.split(b"\n")[:-1], cycle(kept)), b""])


def _fill(section: _Section, columns: Sequence[Sequence[str]]) -> list[bytes]:
    """What stands between the numbers, and room for them."""
    rows = zip(*[columns[number] for number in section.columns], strict=True) if section.columns else [()]
    between = "".join([section.form % row for row in rows]).encode().split(b"\n\n")
    lines = [b""] * (2 * len(between) - 1)
    lines[::2] = between
    return lines


def _reader(found: Sequence[Any], readers: Mapping[type, Reader]) -> Read:
    """How to read *found*; a KeyError where we do not know their class."""
    kinds = set(map(type, found)) or {MutexValue}
    if len(kinds) == 1:
        return readers[kinds.pop()](found)
    each = [readers[type(value)]([value]) for value in found]
    return lambda: [number for read in each for number in read()]


def _check(collector: Any) -> None:
    """Its methods, and those of its class, are those that the class had when this was imported."""
    kind = type(collector)
    own = all(getattr(getattr(collector, name), "__func__", None) is METHODS[kind, name] for name in _OF_FAMILY)
    if not own or any(getattr(kind, name) is not METHODS[kind, name] for name in _OF_SERIES):
        raise TypeError("a metric with methods of its own")


class _Texts(dict[Any, bytes]):
    """Numbers, or their texts, as the library ends a line with them. Many are equal, and share one."""

    def __missing__(self, number: Any) -> bytes:
        text = self[number] = f"{_text(number)}\n".encode()
        return text


def _text(number: Any) -> str:
    """A number as the library writes it, which is as Python does in this range."""
    return repr(number) if type(number) is float and -1e6 < number < 1e6 else _in_go(number)


def _time(when: float) -> str:
    """As the library writes a time since 1970, at half of what it costs there."""
    if not 1e9 <= when < 1e10:
        return _in_go(when)
    digits = repr(when)
    return f"{digits[0]}.{digits[1:10]}{digits[11:]}".rstrip("0.") + "e+09"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _exemplar(exemplar: Exemplar) -> str:
    labels = ",".join(f'{name}="{_escape(value)}"' for name, value in sorted(exemplar.labels.items()))
    when = "" if exemplar.timestamp is None else f" {exemplar.timestamp}"
    return f" # {{{labels}}} {_in_go(exemplar.value)}{when}"
