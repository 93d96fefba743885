"""Logs as JSON lines: events of our own with ids and numbers, and no exception text.

An exception's text may hold what a provider or a library put there, so a report
names the exception's type and the places in the code, never its message or locals.
"""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import Mapping
from typing import TextIO

log = logging.getLogger(__name__)
_AGAIN_SECONDS = 60.0
# Ids that every line of one call, or of one attempt, has.
_correlated: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar(
    "byokeep_correlated", default=types.MappingProxyType({})
)


def correlate(**ids: str) -> None:
    """Add ids to every line of the current task from now on; empty ones are left out."""
    _correlated.set({name: value for name, value in ids.items() if value})


class _Formatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        ours = getattr(record, "byokeep_fields", None)
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "service": self._service,
            "event": _event(record),
        }
        line.update(_correlated.get())
        if ours is None:
            line["logger"] = record.name
        else:
            line.update(ours)
        if record.exc_info and record.exc_info[1] is not None:
            line.update(describe(record.exc_info[1]))
        return json.dumps(line, default=str)


def _event(record: logging.LogRecord) -> str:
    # A library's message is its template: its arguments are not ours to show. asyncio's reports
    # of what nobody caught are no templates: they have exceptions' texts and calls' arguments.
    if not isinstance(record.msg, str) or (record.name == "asyncio" and not record.args):
        return "unhandled" if record.exc_info else type(record.msg).__name__
    return record.msg


def describe(error: BaseException) -> dict[str, object]:
    """Return an exception's type and where it was raised: no message, no locals."""
    frames = traceback.extract_tb(error.__traceback__, limit=-8)
    return {
        "error": f"{type(error).__module__}.{type(error).__qualname__}",
        "at": [f"{frame.filename.rsplit('/', 2)[-1]}:{frame.lineno}" for frame in frames],
    }


def setup(service: str, level: str) -> None:
    """Send our events at `level`, and libraries' from WARNING on, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for ours in ("services", "byokeep"):
        logging.getLogger(ours).setLevel(level.upper())
    warnings.showwarning = _warned


def _warned(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    event(
        log,
        "warning",
        level=logging.WARNING,
        category=category.__name__,
        at=f"{filename.rsplit('/', 2)[-1]}:{lineno}",
    )


def catch_all() -> None:
    """Report what nobody caught as everything else is: Python's own hooks print its text."""

    def died(kind: type[BaseException], error: BaseException, trace: object) -> None:
        failure(log, "died", error)

    def thread_died(report: threading.ExceptHookArgs) -> None:
        if report.exc_value is not None:
            failure(log, "thread_died", report.exc_value)

    def unraisable(report: sys.UnraisableHookArgs) -> None:
        if report.exc_value is not None:
            failure(log, "unraisable", report.exc_value)

    sys.excepthook = died
    threading.excepthook = thread_died
    sys.unraisablehook = unraisable


def event(
    logger: logging.Logger, name: str, *, level: int = logging.INFO, **fields: object
) -> None:
    """Log one event with ids and numbers."""
    logger.log(level, name, extra={"byokeep_fields": fields})


def failure(logger: logging.Logger, name: str, error: BaseException, **fields: object) -> None:
    """Log one event with an exception's type and places."""
    event(logger, name, level=logging.ERROR, **fields, **describe(error))


class Repeated:
    """Tells of what fails again and again once, once more when it changes or a minute has gone,
    and when it is over: at every try, it would bury all else."""

    def __init__(self, logger: logging.Logger) -> None:
        """Tell it to a logger."""
        self._logger = logger
        self._told: dict[str, tuple[str, float]] = {}

    def is_news(self, name: str, what: str) -> bool:
        """Say whether a failure has to be told now."""
        before, when = self._told.get(name, ("", 0.0))
        if what == before and time.monotonic() < when + _AGAIN_SECONDS:
            return False
        self._told[name] = (what, time.monotonic())
        return True

    def failure(self, name: str, error: BaseException, **fields: object) -> None:
        """Log a failure, if it is news."""
        if self.is_news(name, f"{type(error).__qualname__} {sorted(fields.items())}"):
            failure(self._logger, name, error, **fields)

    def well(self, name: str) -> None:
        """Take note that it went well; log that, where it had failed."""
        if self._told.pop(name, None) is not None:
            event(self._logger, f"{name}_no_more")
