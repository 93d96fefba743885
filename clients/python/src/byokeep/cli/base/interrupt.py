"""Ctrl-C, remembered: gRPC may swallow the KeyboardInterrupt and end a call in its own way."""

from __future__ import annotations

import signal
from types import FrameType

_seen = False


def install() -> None:
    """Raise KeyboardInterrupt on Ctrl-C, and remember it."""
    signal.signal(signal.SIGINT, _handle)


def seen() -> bool:
    """Say whether Ctrl-C was pressed."""
    return _seen


def _handle(number: int, frame: FrameType | None) -> None:
    global _seen
    _seen = True
    raise KeyboardInterrupt
