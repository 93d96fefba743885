"""HTTP to Vault: kept-alive connections, and a deadline for the whole call.

hvac builds requests; this sends them. hvac's own transport (`requests`) costs several times
the CPU, can't bound a call as a whole, follows redirects with the token in hand, and puts
an answer's text into exceptions.
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from services.keyvault import metrics
from services.keyvault.kek.vault.reply import Reader, Reply, WireError, remaining

# SSL_OP_CLEANSE_PLAINTEXT of OpenSSL 3 (openssl/ssl.h), for which Python's ssl module has no
# name: OpenSSL wipes the record that it has handed over.
_CLEANSE_PLAINTEXT = 0x2
# Vault closes a connection after five idle minutes; ours end well before.
_IDLE_SECONDS = 60.0


@dataclass(slots=True)
class _Connection:
    socket: socket.socket
    reader: Reader
    since: float = 0.0

    def usable(self) -> bool:
        # What can be read before a request was sent is the end of the connection.
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return time.monotonic() - self.since < _IDLE_SECONDS and not poll.poll(0)


class Wire:
    """Connections to one Vault address. Used by threads; a connection serves one call at a time."""

    def __init__(self, address: str, ca: Path | None) -> None:
        """`address`: `https://host:port`; `ca`: PEM file, None for the system's."""
        parts = urlsplit(address)
        self._tls = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._tls else 80)
        self._authority = parts.netloc
        self._ca = ca
        self._idle: deque[_Connection] = deque()
        self._closed = False
        self._context: tuple[float, ssl.SSLContext] | None = None

    def send(
        self, method: str, path: str, headers: dict[str, str], body: bytes, deadline: float
    ) -> Reply:
        """Send a request and read the whole answer, until `deadline` (monotonic seconds).

        Redirects are not followed, and nothing is sent twice. Raises WireError.
        """
        with metrics.kek_call("vault"):
            return self._send(method, path, headers, body, deadline)

    def _send(
        self, method: str, path: str, headers: dict[str, str], body: bytes, deadline: float
    ) -> Reply:
        connection: _Connection | None = None
        state = ""
        try:
            connection = self._take(deadline)
            connection.socket.settimeout(remaining(deadline))
            connection.socket.sendall(self._head(method, path, headers, len(body)) + body)
            reply, again = connection.reader.answer(deadline)
        except WireError as error:
            state = error.state
        except TimeoutError:
            state = "slow"
        except ssl.SSLError:
            state = "tls"
        except OSError:
            state = "unreachable" if connection is None else "broken"
        if connection is not None and (state or not again or self._closed):
            connection.socket.close()
        elif connection is not None:
            connection.since = time.monotonic()
            self._idle.append(connection)
        if state:
            raise WireError(state)
        return reply

    def close(self) -> None:
        """Close what is idle now, and whatever is in use after its call."""
        self._closed = True
        while self._idle:
            self._idle.pop().socket.close()

    def _head(self, method: str, path: str, headers: dict[str, str], length: int) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._authority}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += [f"Content-Length: {length}"]
        if not all(line.isascii() and line.isprintable() for line in lines):
            # A token or a name with a line break would add headers of its own.
            raise WireError("misconfigured")
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    def _take(self, deadline: float) -> _Connection:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return self._connect(deadline)
            if connection.usable():
                return connection
            connection.socket.close()

    def _connect(self, deadline: float) -> _Connection:
        plain = socket.create_connection((self._host, self._port), remaining(deadline))
        try:
            # A request is one segment: waiting to fill another would only delay it.
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not self._tls:
                return _Connection(plain, Reader(plain))
            plain.settimeout(remaining(deadline))
            secured = self._tls_context().wrap_socket(plain, server_hostname=self._host)
        except BaseException:
            plain.close()
            raise
        return _Connection(secured, Reader(secured))

    def _tls_context(self) -> ssl.SSLContext:
        # The CA file may be replaced while we run.
        stamp = self._ca.stat().st_mtime if self._ca else 0.0
        if self._context is None or self._context[0] != stamp:
            context = ssl.create_default_context(cafile=self._ca)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.options |= _CLEANSE_PLAINTEXT
            self._context = (stamp, context)
        return self._context[1]
