"""A small HTTP/1.1 server on asyncio streams: keep-alive, bounded, and able to misbehave.

A library would stand in the way of cutting an answer in the middle.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_BODY_BYTES: Final = 32 * 1024 * 1024
_IDLE_SECONDS: Final = 75.0
_TRICKLE_SECONDS: Final = 600.0
_PHRASES: Final = {status.value: status.phrase for status in HTTPStatus}


@dataclass(frozen=True, slots=True)
class Request:
    """One request; header names are lower case, of a repeated one the last counts."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)

    def json(self) -> object:
        """The body as JSON, or None if it isn't."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


@dataclass(frozen=True, slots=True)
class Trickle:
    """What is sent in place of an answer: a beginning, then a drop every so often, for ever."""

    begin: bytes
    drop: bytes
    seconds: float


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer: a body, or the events of a stream, each a chunk (RFC 9112, 7.1).

    ``cut_after`` bytes of it (head included) are sent, then the line is cut.
    """

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    events: tuple[bytes, ...] | None = None
    cut_after: int | None = None
    trickle: Trickle | None = None
    pause: float = 0.0
    """Seconds before each event."""

    def head(self) -> bytes:
        """Status line and headers."""
        length = f"content-length: {len(self.body)}"
        lines = [
            f"HTTP/1.1 {self.status} {_PHRASES.get(self.status, 'Unknown')}",
            f"date: {formatdate(usegmt=True)}",
            length if self.events is None else "transfer-encoding: chunked",
            *(f"{name}: {value}" for name, value in self.headers),
        ]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"

    def wire(self) -> bytes:
        """The whole answer as it goes over the line."""
        if self.events is None:
            return self.head() + self.body
        return b"".join([self.head(), *map(chunk, self.events), b"0\r\n\r\n"])


def chunk(data: bytes) -> bytes:
    """Data as one chunk."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def stream_reply(events: Iterable[bytes]) -> Reply:
    """An answer that is a stream of server-sent events."""
    headers = (("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache"))
    return Reply(200, headers=headers, events=tuple(events))


def json_reply(status: int, document: object, headers: tuple[tuple[str, str], ...] = ()) -> Reply:
    """An answer with a JSON body."""
    body = json.dumps(document).encode()
    return Reply(status, body, (("content-type", "application/json"), *headers))


Handler = Callable[[Request], Awaitable[Reply]]


class _BadRequestError(Exception):
    """What came is not HTTP that this server reads."""


class Listener:
    """A listening socket and its connections."""

    def __init__(self, sock: socket.socket, accepting: asyncio.Task[None]) -> None:
        """Take over both."""
        self.port: int = sock.getsockname()[1]
        self._sock = sock
        self._accepting = accepting

    def close(self) -> None:
        """Accept nothing more."""
        self._accepting.cancel()
        self._sock.close()


async def serve(
    handler: Handler,
    host: str,
    port: int,
    tls: ssl.SSLContext | None = None,
    hangs: Callable[[], bool] = lambda: False,
) -> Listener:
    """Listen on host and port (0: any free one) and answer with the handler.

    Where `hangs` says so, a connection is accepted and nothing else happens to it.
    """
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()
    hanging: list[socket.socket] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await _connection(handler, reader, writer)
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            pass  # the client went away, or never spoke HTTP
        except asyncio.CancelledError:
            pass  # the emulator stops; asyncio 3.11 would report this task as failed
        finally:
            writer.transport.abort()

    async def take(sock: socket.socket) -> None:
        reader = asyncio.StreamReader(limit=MAX_HEAD_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader, connected)
        with contextlib.suppress(OSError, TimeoutError):  # no handshake
            await loop.connect_accepted_socket(
                lambda: protocol, sock, ssl=tls, ssl_handshake_timeout=10 if tls else None
            )

    async def accept(listening: socket.socket) -> None:
        while True:
            sock, _ = await loop.sock_accept(listening)
            if hangs():
                hanging.append(sock)
                continue
            task = loop.create_task(take(sock))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    listening = socket.create_server((host, port), backlog=512)
    listening.setblocking(False)
    return Listener(listening, loop.create_task(accept(listening)))


async def _connection(
    handler: Handler, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    # So that drain() means: written. (With high=0 asyncio's TLS transport pauses for ever.)
    writer.transport.set_write_buffer_limits(high=1, low=0)
    while True:
        try:
            async with asyncio.timeout(_IDLE_SECONDS):
                request = await _read_request(reader)
        except _BadRequestError:
            writer.write(Reply(400, b"bad request\n", (("connection", "close"),)).wire())
            await writer.drain()
            break
        reply = await handler(request)
        if reply.trickle is not None:
            await _trickle(writer, reply.trickle)
            return
        if reply.pause:
            await _pace(writer, reply)
            return
        wire = reply.wire()
        writer.write(wire if reply.cut_after is None else wire[: reply.cut_after])
        await writer.drain()
        if reply.cut_after is not None:
            return
        if request.headers.get("connection", "").lower() == "close":
            break
    writer.close()
    await writer.wait_closed()


async def _pace(writer: asyncio.StreamWriter, reply: Reply) -> None:
    writer.write(reply.head())
    for data in (*(reply.events or ()), b""):
        await writer.drain()
        await asyncio.sleep(reply.pause)
        writer.write(chunk(data))
    await writer.drain()


async def _trickle(writer: asyncio.StreamWriter, trickle: Trickle) -> None:
    writer.write(trickle.begin)
    async with asyncio.timeout(_TRICKLE_SECONDS):
        while True:
            await writer.drain()
            await asyncio.sleep(trickle.seconds)
            writer.write(trickle.drop)


async def _read_request(reader: asyncio.StreamReader) -> Request:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    try:
        method, target, version = lines[0].split(" ")
        pairs = [line.split(":", 1) for line in lines[1:] if line]
        headers = {name.strip().lower(): value.strip() for name, value in pairs}
        url = urlsplit(target)
    except ValueError:
        raise _BadRequestError from None
    if version != "HTTP/1.1":
        raise _BadRequestError
    body = await _read_body(reader, headers)
    return Request(method, unquote(url.path), dict(parse_qsl(url.query)), headers, body)


async def _read_body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    # The providers' clients, ours included, always announce a length.
    length = headers.get("content-length", "0")
    if "transfer-encoding" in headers or not length.isdecimal() or int(length) > MAX_BODY_BYTES:
        raise _BadRequestError
    return await reader.readexactly(int(length))
