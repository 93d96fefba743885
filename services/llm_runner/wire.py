"""The child's way to its provider: TLS over a connected socket that the parent handed it.

The child can't dial. It asks its parent, and then verifies that the other end has the
certificate of its provider, so that a wrong socket is of no use to anybody.
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final, TypeVar

import certifi
import httpcore
import httpx

from services.llm_runner.channel import ChildEnd, Kind

T = TypeVar("T")

_ERRORS: Final = {
    "connect": (httpcore.ConnectError, httpcore.ConnectTimeout),
    "read": (httpcore.ReadError, httpcore.ReadTimeout),
    "write": (httpcore.WriteError, httpcore.WriteTimeout),
}


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


def transport(tls: ssl.SSLContext, network: httpcore.NetworkBackend) -> httpx.HTTPTransport:
    """Return a transport over a network of its own, with a new connection for each request."""
    made = httpx.HTTPTransport(verify=tls, trust_env=False)
    made._pool.close()
    # A kept connection that the provider closes meanwhile would lose an answer, and so make a
    # call ambiguous that was never taken; against an LLM's seconds a handshake is nothing.
    made._pool = httpcore.ConnectionPool(
        ssl_context=tls, max_keepalive_connections=0, network_backend=network
    )
    return made


class Network(httpcore.NetworkBackend):
    """A network with one way out: the parent."""

    def __init__(self, channel: ChildEnd) -> None:
        """Ask over this channel."""
        self._channel = channel

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Ask the parent for a connection; it has a limit of its own."""
        self._channel.send(Kind.DIAL, f"{host}:{port}".encode())
        sock = self._channel.receive_dialled()
        if isinstance(sock, int):
            raise httpcore.ConnectError("no connection")
        sock.setblocking(False)
        return _Stream(sock, self._channel)


class _Stream(httpcore.NetworkStream):
    def __init__(self, sock: socket.socket, channel: ChildEnd) -> None:
        self._sock = sock
        self._channel = channel

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._do(partial(self._sock.recv, max_bytes), "read", timeout)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        view = memoryview(buffer)
        while view:
            view = view[self._do(partial(self._sock.send, view), "write", timeout) :]

    def close(self) -> None:
        self._sock.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        tls = ssl_context.wrap_socket(
            self._sock,
            server_hostname=server_hostname,
            do_handshake_on_connect=False,
            suppress_ragged_eofs=False,
        )
        self._sock = tls
        self._do(tls.do_handshake, "connect", timeout)
        return self

    def get_extra_info(self, info: str) -> Any:
        return self._sock if info in ("ssl_object", "socket") else None

    def _do(self, operation: Callable[[], T], phase: str, timeout: float | None) -> T:
        failed, timed_out = _ERRORS[phase]
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                return operation()
            except ssl.SSLWantReadError:
                events = select.POLLIN
            except ssl.SSLWantWriteError:
                events = select.POLLOUT
            except OSError:
                events = 0
            if events == 0:
                self._sock.close()
                raise failed("the connection failed")
            left = None if deadline is None else deadline - time.monotonic()
            if not self._channel.wait(self._sock, events, left):
                self._sock.close()
                raise timed_out("the connection is too slow")
