"""Reads one HTTP/1.1 answer of Vault into memory that is wiped.

Not `http.client`: its buffers keep what went through them, and a body that breaks off is
copied into the text of an exception. A body here is a bytearray from the socket on.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from dataclasses import dataclass
from typing import Any

from services.keyvault.kek.vault import states

_BUFFER = 16 * 1024
_MAX_BODY = 16 * 1024 * 1024
_NO_BODY = (204, 304)


class WireError(Exception):
    """The request had no whole answer; `state` says how: unreachable, slow, broken, tls."""

    def __init__(self, state: str) -> None:
        """Keep the state; what the system or Vault said is not kept."""
        super().__init__(state)
        self.state = state


@dataclass(slots=True, repr=False)
class Reply:
    """An answer of Vault. The body may hold a data key: wipe it."""

    status: int
    body: bytearray

    def says(self, phrase: bytes) -> bool:
        """Say whether the body has a phrase, without making anything else of it."""
        return phrase in self.body

    def is_nothing(self) -> bool:
        """Say whether this is Vault's 404 for nothing at a path, which no engine's or
        namespace's absence is."""
        return self.status == 404 and self.says(b'"errors":[]')

    def fields(self, part: str, *names: str) -> dict[str, Any]:
        """Return one object of a body that holds no data key; it has fields of these names.

        Raises:
            KekUnavailableError: the body is none of Vault's.
        """
        found = None
        with contextlib.suppress(ValueError):
            answer = json.loads(self.body)
            found = answer.get(part) if isinstance(answer, dict) else None
        if not isinstance(found, dict) or not found.keys() >= set(names):
            raise states.unavailable("broken")
        return found

    def wipe(self) -> None:
        """Overwrite the body with zeros."""
        self.body[:] = bytes(len(self.body))

    def __repr__(self) -> str:
        """Show the status only."""
        return f"<Reply {self.status}>"


def remaining(deadline: float) -> float:
    """Return the seconds until a deadline (monotonic). Raises TimeoutError where it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class Reader:
    """Reads answers from a connection, through one buffer that is wiped after each."""

    def __init__(self, connection: socket.socket) -> None:
        """Read from a connected socket."""
        self._socket = connection
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._deadline = 0.0

    def answer(self, deadline: float) -> tuple[Reply, bool]:
        """Return the next answer, and whether the connection may be used again.

        Raises WireError, TimeoutError, OSError.
        """
        self._deadline = deadline
        try:
            status, headers = self._head()
            if status in _NO_BODY:
                body = bytearray()
            elif headers.get(b"transfer-encoding", b"").lower() == b"chunked":
                body = self._chunked()
            else:
                body = self._sized(_number(headers.get(b"content-length", b"-"), 10))
            return Reply(status, body), headers.get(b"connection", b"").lower() != b"close"
        finally:
            self._view[: self._end] = bytes(self._end)
            self._start = self._end = 0

    def _head(self) -> tuple[int, dict[bytes, bytes]]:
        parts = self._line().split(b" ", 2)
        if len(parts) < 2 or parts[0] != b"HTTP/1.1":
            raise WireError("broken")
        headers = {}
        while line := self._line():
            name, _, value = line.partition(b":")
            headers[name.strip().lower()] = value.strip()
        return _number(parts[1], 10), headers

    def _line(self) -> bytes:
        """Return a line of the head, or the size of a chunk; never a part of a body."""
        while (end := self._buffer.find(b"\r\n", self._start, self._end)) < 0:
            self._receive()
        line = bytes(self._view[self._start : end])
        self._start = end + 2
        return line

    def _receive(self) -> None:
        if self._start == self._end:
            self._start = self._end = 0
        if self._end == _BUFFER:
            raise WireError("broken")  # a head longer than any of Vault's
        self._socket.settimeout(remaining(self._deadline))
        count = self._socket.recv_into(self._view[self._end :])
        if count == 0:
            raise WireError("broken")
        self._end += count

    def _sized(self, length: int) -> bytearray:
        if length > _MAX_BODY:
            raise WireError("broken")
        body = bytearray(length)
        view, done = memoryview(body), 0
        while done < length:
            if self._start == self._end:
                self._receive()
            count = min(length - done, self._end - self._start)
            view[done : done + count] = self._view[self._start : self._start + count]
            self._start += count
            done += count
        return body

    def _chunked(self) -> bytearray:
        # Pieces first: a bytearray that grows leaves copies of what it held.
        pieces, total = [], 0
        while size := _number(self._line().partition(b";")[0].strip(), 16):
            total += size
            pieces.append(self._sized(size if total <= _MAX_BODY else _MAX_BODY + 1))
            self._line()
        while self._line():
            pass  # trailers
        body, at = bytearray(total), 0
        for piece in pieces:
            body[at : at + len(piece)] = piece
            at += len(piece)
            piece[:] = bytes(len(piece))
        return body


def _number(text: bytes, base: int) -> int:
    try:
        number = int(text, base)
    except ValueError:
        number = -1
    if number < 0:
        raise WireError("broken")
    return number
