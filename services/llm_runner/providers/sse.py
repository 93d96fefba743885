"""Server-sent events (WHATWG HTML, 9.2.6), as far as providers use them: data alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

MAX_EVENT_BYTES: Final = 4 * 1024 * 1024


class TooLongError(Exception):
    """An event is longer than MAX_EVENT_BYTES."""


class Decoder:
    """Makes events of a stream's bytes; comments and all fields but data say nothing here."""

    def __init__(self) -> None:
        """Nothing has come yet."""
        self._line = bytearray()
        self._data: list[bytes] = []
        self._stray: list[bytes] = []
        self._size = 0

    @property
    def rest(self) -> bytes:
        """What stands after the last event and is none: Gemini ends a stream that fails with a
        bare JSON document (https://github.com/theopenco/llmgateway/pull/3616)."""
        return b"\n".join([*self._stray, bytes(self._line)])

    def events(self, pieces: Iterable[bytes]) -> Iterator[str]:
        """Give out the data of each event once it is complete. Raises TooLongError."""
        for piece in pieces:
            self._size += len(piece)
            for line in self._lines(piece):
                if line:
                    self._field(line)
                    continue
                if self._data:
                    yield b"\n".join(self._data).decode("utf-8", "replace")
                self._data, self._stray, self._size = [], [], 0
            if self._size > MAX_EVENT_BYTES:
                raise TooLongError

    def _lines(self, piece: bytes) -> Iterator[bytes]:
        if b"\n" not in piece:  # so that what drips is not looked at anew with every byte
            self._line += piece
            return
        *lines, rest = bytes(self._line + piece).split(b"\n")
        self._line = bytearray(rest)
        for line in lines:
            yield line.removesuffix(b"\r")

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        elif name not in (b"", b"event", b"id", b"retry"):
            self._stray.append(line)
