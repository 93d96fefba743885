"""A TLS server that takes a provider's place."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from deploy.local.pki import Identity


@dataclass
class Seen:
    """Where it listens, and what it got: refusals of TLS, and requests."""

    port: int
    refusals: list[str] = field(default_factory=list)
    requests: list[bytes] = field(default_factory=list)


@contextmanager
def listening(leaf: Identity, port: int = 0, answer: bytes = b"") -> Iterator[Seen]:
    """Serve with a certificate until the block ends; whoever completes TLS gets the answer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(leaf.certificate, leaf.key)
    listener = socket.create_server(("127.0.0.1", port))
    seen = Seen(listener.getsockname()[1])

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            plain.settimeout(5)
            try:
                with context.wrap_socket(plain, server_side=True) as connection:
                    seen.requests.append(connection.recv(65536))
                    connection.sendall(answer)
            except ssl.SSLError as error:
                seen.refusals.append((error.reason or "alert").lower().replace("_", " "))
            except OSError:
                seen.refusals.append("connection closed")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
