"""The HTTP of the Vault backend, against servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from services.keyvault.kek import KekUnavailableError
from services.keyvault.kek.vault.log import TransitSigner
from services.keyvault.kek.vault.pool import Pool
from services.keyvault.kek.vault.reply import Reply, WireError
from services.keyvault.kek.vault.wire import Wire

Serve = Callable[[socket.socket], None]


@contextmanager
def server(serve: Serve) -> Iterator[Wire]:
    """A TCP server that hands each connection to `serve`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stopped = threading.Event()

        def run() -> None:
            listener.settimeout(0.05)
            while not stopped.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                threading.Thread(target=_served, args=(serve, connection), daemon=True).start()

        thread = threading.Thread(target=run)
        thread.start()
        wire = Wire(f"http://127.0.0.1:{listener.getsockname()[1]}", None)
        try:
            yield wire
        finally:
            wire.close()
            stopped.set()
            thread.join()


def _served(serve: Serve, connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):  # the client had enough
        serve(connection)


def request_of(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return b""
        data += piece
    return data


def always(answer: bytes) -> Serve:
    def serve(connection: socket.socket) -> None:
        while request_of(connection):
            connection.sendall(answer)

    return serve


def send(wire: Wire, seconds: float = 10.0) -> Reply:
    return wire.send("POST", "/v1/x", {"X-Vault-Token": "t"}, b"", time.monotonic() + seconds)


def test_bodies_of_a_known_length_and_in_chunks():
    sized = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
    chunked = (
        b"HTTP/1.1 400 Bad Request\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3\r\nhel\r\n14000\r\n" + b"x" * 0x14000 + b"\r\n0\r\n\r\n"
    )
    with server(always(sized)) as wire:
        assert [bytes(send(wire).body) for _ in range(3)] == [b"hello"] * 3
    with server(always(chunked)) as wire:
        for _ in range(2):
            reply = send(wire)
            assert (reply.status, len(reply.body)) == (400, 3 + 0x14000)
            assert reply.body.startswith(b"helx")
    with server(always(b"HTTP/1.1 204 No Content\r\n\r\n")) as wire:
        assert [send(wire).status for _ in range(2)] == [204, 204]


def test_a_connection_is_kept_and_one_that_was_closed_is_not_used():
    connections = []

    def serve(connection: socket.socket) -> None:
        connections.append(connection)
        for _ in range(2):
            request_of(connection)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    with server(serve) as wire:
        for _ in range(4):
            assert send(wire).status == 200
            time.sleep(0.05)  # for the end of a connection to arrive
    assert len(connections) == 2


def test_an_answer_that_drips_ends_at_the_deadline():
    """Shown to fail with a time limit for each read instead of for the whole call."""

    def serve(connection: socket.socket) -> None:
        request_of(connection)
        for code in b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000:
            connection.sendall(bytes([code]))
            time.sleep(0.05)

    with server(serve) as wire:
        start = time.monotonic()
        with pytest.raises(WireError, match="slow"):
            send(wire, 0.5)
        assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nno length",
        b"HTTP/1.1 x OK\r\nContent-Length: 1\r\n\r\nx",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20000,
    ],
)
def test_what_is_no_whole_answer_is_said_to_be_broken(answer):
    def serve(connection: socket.socket) -> None:
        request_of(connection)
        connection.sendall(answer)

    with server(serve) as wire, pytest.raises(WireError, match="broken"):
        send(wire)


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(WireError, match="unreachable"):
        send(Wire(address, None))


def test_a_token_with_a_line_break_sends_nothing():
    served = []
    with server(served.append) as wire, pytest.raises(WireError, match="misconfigured"):
        wire.send("POST", "/v1/x", {"X-Vault-Token": "t\r\nX: y"}, b"", time.monotonic() + 5)


@pytest.mark.parametrize("seconds", [60.0, 0.5])
async def test_the_pool_turns_away_what_is_too_much(seconds):
    """At once, where nobody else ends; what waits for its turn ends at its own deadline. Shown to
    fail without the limit in `Pool.run`."""
    pool = Pool("test", 1, seconds)
    release = threading.Event()

    def work(deadline: float) -> Reply:
        release.wait(max(0.0, deadline - time.monotonic()))
        raise WireError("slow")

    calls = [asyncio.create_task(pool.run(work)) for _ in range(5)]
    await asyncio.sleep(0.05)
    start = time.monotonic()
    with pytest.raises(WireError, match="busy"):
        await pool.run(work)
    if seconds > 30:
        release.set()
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert time.monotonic() - start < 30
    assert {str(end) for end in ends} <= {"slow", "busy"}
    pool.close()


async def test_an_answer_that_nobody_waits_for_is_wiped():
    """Shown to fail without `_discard` on cancellation."""
    pool = Pool("test", 1, 10)
    reply = Reply(200, bytearray(b"secret"))
    started, release = threading.Event(), threading.Event()

    def work(deadline: float) -> Reply:
        started.set()
        release.wait(10)
        return reply

    call = asyncio.create_task(pool.run(work))
    await asyncio.to_thread(started.wait, 10)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    release.set()
    for _ in range(200):
        if bytes(reply.body) == bytes(6):
            break
        await asyncio.sleep(0.05)
    assert bytes(reply.body) == bytes(6)
    pool.close()


@pytest.mark.parametrize("odd", ['"vault:v1:€"', '"vault:v1:AA=A"', "null", "7", '"vault:v1:AAAA"'])
async def test_an_odd_signature_is_a_backend_that_is_away(odd):
    """What is no Ed25519 signature becomes KekUnavailableError, and nothing else.

    Shown to fail with binascii.Error alone caught: `€` is another ValueError.
    """

    class Session:
        async def ask(self, call: object) -> Reply:
            return Reply(200, bytearray(f'{{"data": {{"signature": {odd}}}}}'.encode()))

    signer = TransitSigner(Session(), "transit", "log", 1, bytes(32))
    with pytest.raises(KekUnavailableError):
        await signer.sign(b"a head")
