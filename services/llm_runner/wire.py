"""The child's way to its provider: TLS over a connected socket that the parent handed it.

The child can't dial. It asks its parent, and then verifies that the other end has the
certificate of its provider, so that a wrong socket is of no use to anybody.
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, NoReturn, TypeVar

import certifi
from byokeep.orchestrator.v1 import key_pb2

from services.llm_runner.channel import ChildEnd, Kind

T = TypeVar("T")
Wait = Callable[[socket.socket, int, float], bool]
"""Waits for a socket's events (poll(2)) for so many seconds; False when they passed."""

HANDSHAKE_SECONDS: Final = 10.0
_READ_BYTES: Final = 64 * 1024


class UnreachableError(Exception):
    """There is no connection, and nothing was sent; `cause` says why."""

    def __init__(self, cause: key_pb2.UnreachableCause.ValueType) -> None:
        """See the class."""
        super().__init__("no connection")
        self.cause = cause


class LostError(Exception):
    """The connection broke, or its deadline passed."""

    def __init__(self, *, late: bool) -> None:
        """See the class."""
        super().__init__("the connection was lost")
        self.late = late


def tls_context(environ: Mapping[str, str]) -> ssl.SSLContext:
    """Return the context that verifies providers: the public CAs, or a development CA.

    Raises:
        ValueError: a development setting in production mode.
        OSError: the CA file can't be read.
    """
    ca = environ.get("BYOKEEP_PROVIDER_CA")
    if ca and environ.get("BYOKEEP_MODE") != "development":
        raise ValueError("BYOKEEP_PROVIDER_CA is for BYOKEEP_MODE=development only; unset it")
    context = ssl.create_default_context(cafile=ca or certifi.where())
    context.set_alpn_protocols(["http/1.1"])
    return context


def connect(channel: ChildEnd, tls: ssl.SSLContext, host: str) -> Connection:
    """Return a fresh connection to a host, whose certificate is verified.

    Raises UnreachableError.
    """
    channel.send(Kind.DIAL, f"{host}:443".encode())
    dialled = channel.receive_dialled()
    if isinstance(dialled, int):
        raise UnreachableError(dialled)
    return secure(dialled, tls, host, channel.wait)


def secure(
    sock: socket.socket,
    tls: ssl.SSLContext,
    host: str,
    wait: Wait,
    seconds: float = HANDSHAKE_SECONDS,
) -> Connection:
    """Take over a connected socket and do the handshake. Raises UnreachableError."""
    sock.setblocking(False)
    secured = tls.wrap_socket(
        sock, server_hostname=host, do_handshake_on_connect=False, suppress_ragged_eofs=False
    )
    connection = Connection(secured, wait)
    late = False
    try:
        connection.handshake(time.monotonic() + seconds)
        return connection
    except LostError as error:
        late = error.late
    raise UnreachableError(
        key_pb2.UNREACHABLE_CAUSE_TIMEOUT if late else key_pb2.UNREACHABLE_CAUSE_TLS
    )


class Connection:
    """A TLS connection; every step has a deadline by the monotonic clock, and raises LostError."""

    def __init__(self, sock: ssl.SSLSocket, wait: Wait) -> None:
        """Take over a wrapped, unblocking socket."""
        self._sock = sock
        self._wait = wait

    def handshake(self, until: float) -> None:
        """Do the TLS handshake."""
        self._do(self._sock.do_handshake, until)

    def read(self, until: float) -> bytes:
        """Return what has come, or nothing at the end."""
        return self._do(partial(self._sock.recv, _READ_BYTES), until)

    def write(self, data: bytes, until: float) -> None:
        """Send all of it."""
        view = memoryview(data)
        while view:
            view = view[self._do(partial(self._sock.send, view), until) :]

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def _do(self, operation: Callable[[], T], until: float) -> T:
        while True:
            # Before each step, for a peer that drips never lets a wait end by itself.
            left = until - time.monotonic()
            if left <= 0:
                self._lose(late=True)
            events = 0
            try:
                return operation()
            except ssl.SSLWantReadError:
                events = select.POLLIN
            except ssl.SSLWantWriteError:
                events = select.POLLOUT
            except OSError:
                pass
            if events == 0:
                self._lose(late=False)
            if not self._wait(self._sock, events, left):
                self._lose(late=True)

    def _lose(self, *, late: bool) -> NoReturn:
        self.close()
        raise LostError(late=late)
