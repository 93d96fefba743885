"""What the command prints: text through rich for people, proto JSON for programs.

Results go to stdout; progress, notes and errors to stderr. No text is parsed as
markup, and everything that a server said is cleaned first.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

from byokeep.cli.base.text import clean

if TYPE_CHECKING:
    import datetime

    from google.protobuf.message import Message
    from google.protobuf.timestamp_pb2 import Timestamp
    from rich.console import Console, RenderableType
    from rich.text import Text

    from byokeep.cli.base.errors import CliError

# Not a terminal: no wrapping, so that a line stays a line for grep.
_WIDE = 500
# On a terminal that is narrower still, lines break as they come.
_NARROW = 20

STATE_STYLES: Mapping[str, str] = {
    "ACTIVE": "green",
    "PENDING": "yellow",
    "SUPERSEDED": "dim",
    "NEEDS_REKEY": "bold red",
    "REVOKED": "red",
    "DESTROYED": "dim",
    "SUSPENDED": "yellow",
    "COMPLETED": "green",
    "RUNNING": "cyan",
    "QUEUED": "yellow",
    "FAILED": "bold red",
    "CANCELLED": "dim",
}


class Progress(Protocol):
    """Where a command says what it is waiting for."""

    def __call__(self, text: str, steady: str = "") -> None:
        """Replace the text that is shown. `steady` is it without what changes all the time: a log
        gets no new line for that."""


class Bar(Protocol):
    """Where a command says how far it has come."""

    def __call__(self, done: int, total: int, text: str) -> None:
        """Replace what is shown; a total of 0: not known yet."""


class Output:
    """Standard output and standard error of one run."""

    def __init__(self, *, as_json: bool = False) -> None:
        """Choose JSON or text."""
        self.as_json = as_json

    def json(self, value: object) -> None:
        """Print one JSON document."""
        print(_dumped(value, indent=2))

    def json_line(self, value: object) -> None:
        """Print one line of NDJSON, at once."""
        print(_dumped(value), flush=True)

    def print(self, text: Text | str = "", style: str = "") -> None:
        """Print a line for people."""
        self._out.print(text, style=style or None, soft_wrap=not self._wraps)

    def hanging(self, lead: Text, line: Text, rest: Text | None = None) -> None:
        """Print a line; on a terminal its wrapped rest stands under where it begins, after `rest`
        (as wide as `lead`; default: blanks)."""
        from rich.text import Text

        if not self._wraps:
            self.print(lead + line)
            return
        room = max(self._out.width - lead.cell_len, _NARROW)
        for part in line.wrap(self._out, room):
            self.print(lead + part)
            lead = rest or Text(" " * lead.cell_len)

    def renderable(self, what: RenderableType) -> None:
        """Print something that rich lays out."""
        if self._wraps:
            self._out.print(what)
            return
        # rich fills lines with blanks, which would only be noise in a file.
        with self._out.capture() as captured:
            self._out.print(what)
        print("\n".join(line.rstrip() for line in captured.get().splitlines()))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Text | str]]) -> None:
        """Print a table without borders; where it is too wide, its rows one under another."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for place, column in enumerate(columns):
            # What a row is known by is copied: it stays in one piece.
            table.add_column(column, overflow="fold", no_wrap=not place)
        for row in rows:
            table.add_row(*row)
        unbounded = self._out.options.update(max_width=_WIDE)
        wanted = self._out.measure(table, options=unbounded).maximum
        if wanted > self._out.width:
            self._rows(columns, rows)
        else:
            self.renderable(table)

    def _rows(self, columns: Sequence[str], rows: Sequence[Sequence[Text | str]]) -> None:
        """Print a table that is too wide: a row is its first cell, and under it what is named."""
        from rich.text import Text

        for first, *rest in rows:
            self.print(first)
            named = Text()
            for column, cell in zip(columns[1:], rest, strict=True):
                if str(cell) not in ("", "-"):
                    named.append("  " * bool(named)).append(f"{column.lower()} ", "dim")
                    named.append_text(cell if isinstance(cell, Text) else Text(cell))
            self.hanging(Text("  "), named)

    def note(self, text: str, style: str = "dim") -> None:
        """Print a line on stderr that a script may ignore; JSON leaves it out."""
        if self.as_json:
            return
        self._err.print(text, style=style)

    def warn(self, text: str) -> None:
        """Print a warning on stderr."""
        if self.as_json:
            print(_dumped({"warning": text}), file=sys.stderr)
            return
        self._err.print(f"warning: {text}", style="yellow")

    @contextmanager
    def progress(self, text: str) -> Iterator[Progress]:
        """Show a spinner on a terminal; elsewhere a line of stderr for each new text."""
        if self.as_json:
            yield lambda text, steady="": None
        elif self._err.is_terminal:
            with self._err.status(text) as status:
                yield lambda text, steady="": status.update(text)
        else:
            self._err.print(text)
            shown = text

            def update(text: str, steady: str = "") -> None:
                nonlocal shown
                if shown not in (text, steady):
                    self._err.print(text)
                shown = steady or text

            yield update

    @contextmanager
    def bar(self, text: str) -> Iterator[Bar]:
        """Show a bar on a terminal; elsewhere a line of stderr for each tenth of the way."""
        if self.as_json:
            yield lambda done, total, text: None
        elif self._err.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            with RichProgress(*columns, console=self._err, transient=True) as progress:
                task = progress.add_task(text, total=None)
                yield lambda done, total, text: progress.update(
                    task, completed=done, total=total or None, description=text
                )
        else:
            shown = ""

            def update(done: int, total: int, text: str) -> None:
                nonlocal shown
                line = f"{text} {10 * done // total * 10} %" if total else text
                if line != shown:
                    self._err.print(line)
                    shown = line

            yield update

    @property
    def unicode(self) -> bool:
        """Return whether stdout can show more than ASCII."""
        return "utf" in (getattr(sys.stdout, "encoding", None) or "").lower()

    @property
    def _wraps(self) -> bool:
        # Not what rich takes for a terminal: FORCE_COLOR makes one of a CI run's log, where a
        # line's wrapped rest could begin as a command.
        return sys.stdout.isatty()

    @cached_property
    def _out(self) -> Console:
        return _console(sys.stdout.isatty(), stderr=False)

    @cached_property
    def _err(self) -> Console:
        return _console(sys.stderr.isatty(), stderr=True)


def _dumped(value: object, indent: int | None = None) -> str:
    # ASCII: JSON must not carry terminal control characters either, nor a CI run's commands
    # (see loglines). `#` only occurs in strings, and its escape means the same.
    return json.dumps(value, indent=indent).replace("##", "#\\u0023")


def message_dict(message: Message) -> dict[str, Any]:
    """Return proto JSON, fields at their default included."""
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, always_print_fields_with_no_presence=True)


def short(enum: Any, value: int) -> str:
    """Return an enum value's name without the prefix of its type: `ACTIVE`."""
    descriptor = enum.DESCRIPTOR
    if value not in descriptor.values_by_number:
        return f"UNKNOWN_{value}"
    names = descriptor.values_by_number
    prefix = names[0].name.removesuffix("UNSPECIFIED")
    name: str = names[value].name.removeprefix(prefix)
    return "" if name == "UNSPECIFIED" else name


def state_text(state: str) -> Text:
    """Return a state in its colour."""
    from rich.text import Text

    return Text(state, style=STATE_STYLES.get(state, ""))


def when(stamp: Timestamp) -> str:
    """Return a time in the local zone, to the second; empty where it is not set."""
    import datetime

    return moment(stamp.ToDatetime(datetime.UTC)) if stamp.seconds else ""


def moment(time: datetime.datetime) -> str:
    """Return a time in the local zone, to the second."""
    try:
        local = time.astimezone()
    except OverflowError:
        # On the first and the last day of the calendar, the zone may be past its end.
        local = time
    return local.strftime("%Y-%m-%d %H:%M:%S")


def print_error(error: CliError, *, as_json: bool, verbose: bool) -> None:
    """Print an error on stderr: a sentence, its reason and a hint; or JSON."""
    if as_json:
        print(_dumped(error.to_dict()), file=sys.stderr)
        return
    from rich.text import Text

    line = Text("error: ", style="bold red")
    line.append(clean(error.message), style="default not bold")
    if error.reason:
        line.append(f" ({clean(error.reason)})", style="dim not bold")
    console = _console(sys.stderr.isatty(), stderr=True)
    console.print(line, soft_wrap=not console.is_terminal)
    if error.hint:
        console.print(f"  → {clean(error.hint)}", style="cyan", soft_wrap=not console.is_terminal)
    if verbose and error.details:
        console.print(f"  {error.details}", style="dim", soft_wrap=not console.is_terminal)


def color_system() -> Literal["auto"] | None:
    """Return what rich may use; with NO_COLOR (no-color.org) nothing: it would leave only the
    colours out, and still send bold and dim."""
    return None if os.environ.get("NO_COLOR") else "auto"


def _console(terminal: bool, *, stderr: bool) -> Console:
    from rich.console import Console

    class _Console(Console):
        def on_broken_pipe(self) -> None:
            """Leave it to the command: rich itself would exit 1, which means --fail-on."""
            raise BrokenPipeError

    # A file that can't take an arrow or a dot must not end the command.
    stream = sys.stderr if stderr else sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
    width = None if terminal or "COLUMNS" in os.environ else _WIDE
    return _Console(
        color_system=color_system(),
        stderr=stderr,
        markup=False,
        highlight=False,
        emoji=False,
        width=width,
        soft_wrap=False,
    )
