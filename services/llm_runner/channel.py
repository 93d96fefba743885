"""What parent and child say to each other over their socket pair.

A frame is the payload's length (4 bytes, big-endian), its kind (1 byte) and the payload, a
serialized message. The two take turns: after the assignment the parent only answers what the
child asked, so that neither side ever has more than one small frame in flight.

    child                                parent
                                         ASSIGN            runner.Assign
    ACCEPTED           runner.Accepted
                                         PROCEED           runner.Proceed
                                         LEASE             keyvault.LeaseKeyResponse
    OPENED             keyvault.PlaintextReport
    CALL_STARTED       runner.CallStarted
                                         ACK               empty
    DIAL               host:port
                                         DIALLED           empty, the connected socket beside it;
                                                           else one byte, an UnreachableCause
    CALL_PROGRESS      runner.CallProgress
    CHUNK_SPLIT        runner.ChunkSplit: no call is open, for a chunk is split that has no answer
    CHUNK_RESULT       runner.ChunkResult
    VALIDATION_RESULT  runner.ValidationResult
    END                runner.Outcome without its report; the child exits
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import select
import socket
import struct
from collections.abc import Iterator
from typing import Final, NoReturn

from byokeep.orchestrator.v1 import key_pb2
from google.protobuf.message import Message

from services.llm_runner.withhold import Withheld

MAX_PAYLOAD: Final = 17 * 1024 * 1024
_HEADER: Final = struct.Struct(">IB")
_READ_BYTES: Final = 64 * 1024
_HANG_UP: Final = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class Kind(enum.IntEnum):
    """The kind of a frame."""

    ASSIGN = 1
    PROCEED = 2
    LEASE = 3
    ACK = 4
    DIALLED = 5
    ACCEPTED = 16
    OPENED = 17
    CALL_STARTED = 18
    CALL_PROGRESS = 19
    CHUNK_SPLIT = 20
    CHUNK_RESULT = 21
    VALIDATION_RESULT = 22
    DIAL = 23
    END = 24


class ChannelClosedError(Exception):
    """The other end is gone, or said something that is no frame."""


class ChildEnd:
    """The child's end: blocking, and fatal to its process once the parent is gone."""

    _withheld: Withheld | None = None

    def __init__(self, sock: socket.socket) -> None:
        """Take over the socket."""
        self._sock = sock
        self._fds: list[int] = []

    def withhold(self, key: str) -> None:
        """Mask a key in every message from now on: this is the child's one way out."""
        self._withheld = Withheld(key)

    def send(self, kind: Kind, message: Message | bytes = b"") -> None:
        """Send one frame."""
        if isinstance(message, Message):
            if self._withheld is not None:
                self._withheld.mask(message)
            message = message.SerializeToString()
        self._write(kind, message)

    def _write(self, kind: Kind, payload: bytes) -> None:
        try:
            self._sock.sendall(_frame(kind, payload))
        except OSError:
            vanish()

    def receive(self, kind: Kind) -> bytes:
        """Return the payload of the next frame, which has to be of this kind."""
        length, got = _HEADER.unpack(self._read(_HEADER.size))
        if got != kind or length > MAX_PAYLOAD:
            vanish()
        return self._read(length)

    def receive_dialled(self) -> socket.socket | key_pb2.UnreachableCause.ValueType:
        """Return the socket that came with a DIALLED frame, or why there is none."""
        cause = self.receive(Kind.DIALLED)
        if self._fds:
            return socket.socket(fileno=self._fds.pop())
        return key_pb2.UnreachableCause.ValueType(cause[0])

    def wait(self, sock: socket.socket | None, events: int, seconds: float | None) -> bool:
        """Wait for a socket's events, or, without a socket, for the time to pass.

        False when the time passed. The process ends where the parent is gone meanwhile.
        """
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        if sock is not None:
            poll.register(sock, events)
        ready = poll.poll(None if seconds is None else max(0, round(seconds * 1000)))
        if any(fd == self._sock.fileno() and event & _HANG_UP for fd, event in ready):
            vanish()
        return bool(ready)

    def _read(self, length: int) -> bytes:
        buffer = bytearray()
        while len(buffer) < length:
            data = b""
            with contextlib.suppress(OSError):
                # A descriptor comes with the first byte of its frame; plain recv() would drop it.
                data, fds, _, _ = socket.recv_fds(
                    self._sock, min(length - len(buffer), _READ_BYTES), 1
                )
                self._fds += fds
            if not data:
                vanish()
            buffer += data
        return bytes(buffer)


def vanish() -> NoReturn:
    """End the child at once: nobody is left to work for, and nothing may stop it."""
    os._exit(0)


class ParentEnd:
    """The parent's end, on asyncio."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over the socket."""
        sock.setblocking(False)
        self._sock = sock
        self._buffer = bytearray()
        self._loop = asyncio.get_running_loop()

    async def send(self, kind: Kind, message: Message | bytes = b"") -> None:
        """Send one frame. Raises ChannelClosedError."""
        with _closed():
            await self._loop.sock_sendall(self._sock, _frame(kind, message))

    def answer(self, kind: Kind, payload: bytes = b"", sock: socket.socket | None = None) -> None:
        """Send a small frame, with a socket or without; the child waits for it, so it fits.

        Raises ChannelClosedError.
        """
        with _closed():
            socket.send_fds(self._sock, [_frame(kind, payload)], [sock.fileno()] if sock else [])

    async def receive(self) -> tuple[Kind, bytes]:
        """Return the next frame. Raises ChannelClosedError at the child's end."""
        with _closed():
            while True:
                if len(self._buffer) >= _HEADER.size:
                    length, kind = _HEADER.unpack_from(self._buffer)
                    if length > MAX_PAYLOAD:
                        raise ChannelClosedError("a frame is too long")
                    end = _HEADER.size + length
                    if len(self._buffer) >= end:
                        payload = bytes(self._buffer[_HEADER.size : end])
                        del self._buffer[:end]
                        return Kind(kind), payload
                data = await self._loop.sock_recv(self._sock, _READ_BYTES)
                if not data:
                    raise ChannelClosedError("the child closed its end")
                self._buffer += data

    def close(self) -> None:
        """Close it; the child sees that and ends."""
        self._sock.close()


@contextlib.contextmanager
def _closed() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError):
        raise ChannelClosedError("the child is gone") from None


def _frame(kind: Kind, message: Message | bytes) -> bytes:
    payload = message if isinstance(message, bytes) else message.SerializeToString()
    return _HEADER.pack(len(payload), kind) + payload
