"""The chart, as SVG: for a few rows of the table, a bar a contender."""

import math
from html import escape
from typing import Final

from tests.bench.headtohead.contender import load
from tests.bench.headtohead.plan import CONTROL, OURS
from tests.bench.headtohead.report import Results, short

LABELS: Final = 270
BARS: Final = 380
WIDTH: Final = LABELS + BARS + 90
LINE: Final = 20
ROWS: Final = ("one inc", "CPU of everything", "one scrape", "request p99", "memory a worker")
"""The first row of the table that begins so, except where `LAST` has it."""
LAST: Final = ("CPU of everything", "one scrape")
"""The last one at an interval of 1 s: of the most workers."""
SPREAD: Final = 10
"""Where the largest is so many times the smallest, bars are drawn by the logarithm."""


def svg(results: Results, *, head: str) -> str:
    """The whole file."""
    y, parts = 50, [_text(10, 20, "Head to head", weight="bold"), _text(10, 40, head)]
    for row in _chosen(results):
        drawn, y = _panel(results, row, y + 24)
        parts += drawn
    style = "font-family='sans-serif' font-size='12'"
    size = f"width='{WIDTH}' height='{y + 10}' viewBox='0 0 {WIDTH} {y + 10}'"
    background = "<rect width='100%' height='100%' fill='#fff'/>"
    return "\n".join([f"<svg xmlns='http://www.w3.org/2000/svg' {size} {style}>", background, *parts, "</svg>", ""])


def _chosen(results: Results) -> list[str]:
    chosen = []
    for kind in ROWS:
        rows = [row for row in results.rows() if row.startswith(kind)]
        if kind in LAST:
            rows = [row for row in rows if row.endswith("scraped each 1 s")][-1:]
        chosen += rows[:1]
    return chosen


def _panel(results: Results, row: str, y: int) -> tuple[list[str], int]:
    """Its elements, and where it ends; the best bar is the shortest."""
    medians = {name: results.median(row, name) for name in results.names}
    known = {name: value for name, value in medians.items() if value is not None}
    most, least = max(known.values()), min((value for value in known.values() if value > 0), default=1.0)
    logarithmic = most > SPREAD * least
    parts = [_text(10, y, f"{row}{', logarithmic' if logarithmic else ''}", weight="bold")]
    for name, value in sorted(known.items(), key=lambda pair: pair[1]):
        y += LINE
        share = math.log(max(value / least, 1) * 2) / math.log(most / least * 2) if logarithmic else value / most
        colour = {OURS: "#1a7f37", CONTROL: "#d0d7de"}.get(name, "#8c959f")
        bar = f"<rect x='{LABELS}' y='{y - 12}' width='{max(share * BARS, 1):.1f}' height='15' fill='{colour}'/>"
        value_at = LABELS + max(share * BARS, 1) + 5
        parts += [_text(20, y, load(name).title), bar, _text(value_at, y, short(value))]
    return parts, y + LINE // 2


def _text(x: float, y: float, text: str, *, weight: str = "normal") -> str:
    return f"<text x='{x:.0f}' y='{y:.0f}' font-weight='{weight}'>{escape(text)}</text>"
