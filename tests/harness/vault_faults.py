"""A proxy in front of a real Vault that answers what an open-source Vault can't, or is slow,
hangs, resets or lies. A real TLS server; a rule decides for each request."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.harness.vault import VaultServer


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer this instead of asking Vault."""

    status: int
    body: bytes = b'{"errors":["made by the fault proxy"]}'


@dataclass(frozen=True, slots=True)
class Delay:
    """Ask Vault, but only after so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Hang:
    """Answer nothing, and keep the connection."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Reset the connection."""


@dataclass(frozen=True, slots=True)
class Drip:
    """Ask Vault, and send its answer a byte at a time, with a pause after each."""

    pause: float


Fault = Answer | Delay | Hang | Reset | Drip | None
Rule = Callable[[str, str], Fault]


class FaultProxy:
    """`rule(method, path)` says what happens to a request; None passes it on."""

    def __init__(self, vault: VaultServer, folder: Path) -> None:
        self.rule: Rule = lambda method, path: None
        self.seen: list[tuple[str, str]] = []
        #: The tokens that requests came with.
        self.tokens: set[str] = set()
        self._vault = vault
        self._released = threading.Event()
        vault.authority.issue(folder / "proxy", spiffe_id="proxy", dns=["localhost"])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "proxy.pem", folder / "proxy.key")
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                self.request = context.wrap_socket(self.request, server_side=True)
                super().setup()

            def finish(self) -> None:
                with contextlib.suppress(OSError):
                    super().finish()
                # The server closes the plain socket, which TLS has taken over.
                self.request.close()

            def handle_any(self) -> None:
                proxy._handle(self)

            do_GET = do_POST = do_PUT = do_DELETE = do_LIST = handle_any

            def log_message(self, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client that gives up is what many of these tests are about

        self._server = Server(("127.0.0.1", 0), Handler)
        self.address = f"https://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def all(self, fault: Fault) -> None:
        """Let one fault happen to every request."""
        self.rule = lambda method, path: fault

    def heal(self) -> None:
        """Pass everything on, and let go of what hangs."""
        self.all(None)
        self._released.set()
        self._released = threading.Event()

    def calls(self, part: str) -> int:
        """Return how many requests had this in their path."""
        return sum(part in path for _, path in self.seen)

    def close(self) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        self.seen.append((handler.command, handler.path))
        self.tokens |= {handler.headers["X-Vault-Token"]} - {None}
        fault = self.rule(handler.command, handler.path)
        if isinstance(fault, Hang):
            self._released.wait(60)
            handler.close_connection = True
        elif isinstance(fault, Reset):
            linger = struct.pack("ii", 1, 0)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            handler.connection.close()
            handler.close_connection = True
        elif isinstance(fault, Answer):
            self._send(handler, fault.status, fault.body)
        else:
            if isinstance(fault, Delay):
                self._released.wait(fault.seconds)
            self._send(handler, *self._forward(handler, body), fault)

    def _forward(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPSConnection(
            "localhost", self._vault.port, context=self._vault.client_context, timeout=30
        )
        try:
            headers = {
                name: value for name, value in handler.headers.items() if name.lower() != "host"
            }
            connection.request(handler.command, handler.path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except OSError:
            return 502, b'{"errors":["Vault does not answer the proxy"]}'
        finally:
            connection.close()

    def _send(
        self, handler: BaseHTTPRequestHandler, status: int, body: bytes, fault: Fault = None
    ) -> None:
        handler.send_response(status)
        if status == 307:
            handler.send_header("Location", "https://elsewhere.invalid/")
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if isinstance(fault, Drip):
            for code in body:
                handler.wfile.write(bytes([code]))
                time.sleep(fault.pause)
        else:
            handler.wfile.write(body)
