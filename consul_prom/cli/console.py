"""What the commands show: rich in a terminal, plain lines in a pipe, and only what a terminal may safely be shown."""

import errno
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal

from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

COLOURS: Final = {
    "dead": "red",
    "failed": "red",
    "refused": "red",
    "critical": "red",
    "unknown": "yellow",
    "warning": "yellow",
    "would remove": "yellow",
    "alive": "green",
    "passing": "green",
    "removed": "green",
}


class _Console(Console):
    """Rich's own would exit with 1, which says that something was found."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Screen:
    """Standard output."""

    def __init__(self) -> None:
        self._console = _Console(highlight=False)

    @property
    def is_terminal(self) -> bool:
        return self._console.is_terminal

    def say(self, text: str = "", *, style: str = "") -> None:
        """One paragraph; a pipe gets it as one line."""
        self._console.print(Text(self._clean(text), style=style), soft_wrap=not self.is_terminal)

    def verbatim(self, text: str) -> None:
        """Lines to copy, never wrapped."""
        for line in text.splitlines():
            self._console.print(Text(self._clean(line)), soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: Sequence[str] = ()) -> None:
        """*numbers* are the columns to align at the right."""
        cells = [["" if cell is None else self._clean(str(cell)) for cell in row] for row in rows]
        if self.is_terminal:
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
            widest = max((len(row[0]) for row in cells), default=0)
            for column in columns:
                # The first column is a name to copy: it stays in one line if that leaves the others room.
                whole = column == columns[0] and widest <= self._console.width // 2
                side: Literal["left", "right"] = "right" if column in numbers else "left"
                table.add_column(column, justify=side, overflow="fold", no_wrap=whole)
            for row in cells:
                table.add_row(*(Text(cell, style=COLOURS.get(cell, "")) for cell in row))
            self._console.print(table)
        else:
            self.verbatim(_aligned([list(columns), *cells], {columns.index(column) for column in numbers}))

    @contextmanager
    def progress(self, label: str, *, total: int) -> Iterator[Callable[[], None]]:
        """A bar; call what it gives for each step. A pipe gets one line, when all is done."""
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=self._console,
            disable=not self.is_terminal,
        )
        with bar:
            task = bar.add_task(label, total=total)
            yield lambda: bar.advance(task)
        if not self.is_terminal:
            self.say(f"{label}: {total}")

    @contextmanager
    def live(self) -> Iterator[Callable[[Sequence[str]], None]]:
        """Lines that replace each other, as many as the terminal is high; the first two stay.

        A pipe gets all of them, each time.
        """
        if not self.is_terminal:
            yield lambda lines: self.verbatim("\n".join(lines))
            return
        with _ended_as_by_ctrl_c(), Live(console=self._console, auto_refresh=False, screen=True) as live:

            def show(lines: Sequence[str]) -> None:
                room = self._console.height - 1
                shown = [*lines[:room], f"and {len(lines) - room} more"] if len(lines) > room + 1 else lines
                text = Text("\n".join(self._clean(line) for line in shown), no_wrap=True, overflow="crop")
                live.update(text, refresh=True)

            yield show

    @contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        """Say what is waited for; a terminal shows that it goes on."""
        self.say(label)
        if self.is_terminal:
            with self._console.status(""):
                yield
        else:
            yield

    def _clean(self, text: str) -> str:
        """What others registered may hold escape sequences, and what the terminal cannot encode would end us."""
        shown = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
        return shown.encode(self._console.encoding, "backslashreplace").decode(self._console.encoding)


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP as SIGINT: by default they end Python without giving the terminal back.

    A signal that is ignored, as under nohup, stays ignored.
    """
    ends = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in ends if signal.getsignal(number) is signal.SIG_DFL}
    for number in before:
        signal.signal(number, signal.getsignal(signal.SIGINT))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _aligned(rows: Sequence[Sequence[str]], numbers: set[int]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
