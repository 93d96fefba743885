"""Channels that follow their identity's files: what was open on the one before ends in peace."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from byokeep import following

from deploy.local.processes import wait_for

WATCH = "/test.Service/Watch"
LAST = b"the last word"


class Identity:
    """An identity whose files change when a test says so."""

    value = b""
    changed = False

    def refresh(self) -> bool:
        changed, self.changed = self.changed, False
        return changed


class Server:
    """Streams that end when a test says so."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        handler = grpc.unary_stream_rpc_method_handler(self._watch)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("test.Service", {"Watch": handler}),)
        )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _watch(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield request
        self.go_on.wait(10)
        yield LAST

    def stop(self) -> None:
        self._server.stop(0).wait()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.go_on.set()
    running.stop()


@pytest.mark.timeout(30)
def test_last_stream_of_a_retired_channel_ends(server, monkeypatch):
    """gRPC hands out what is left of a stream on the thread that tells of its end: closing the
    channel there waits for itself. Shown to fail where the callback closes the channel."""
    monkeypatch.setattr(following, "CHECK_SECONDS", 0.0)
    dialled: list[grpc.Channel] = []
    closed: list[grpc.Channel] = []

    def dial(_: bytes) -> grpc.Channel:
        channel = grpc.insecure_channel(server.address)
        close = channel.close

        def told() -> None:
            close()
            closed.append(channel)

        channel.close = told
        dialled.append(channel)
        return channel

    identity = Identity()
    with following.SyncChannel(identity, dial) as channel:
        watch = channel.unary_stream(WATCH)
        for _ in range(10):
            server.go_on.clear()
            stream = watch(b"the first word", timeout=5)
            assert next(stream) == b"the first word"
            identity.changed = True
            other = watch(b"a call on the next channel", timeout=5)
            server.go_on.set()
            assert list(stream) == [LAST]
            assert list(other)[-1] == LAST
    assert wait_for(lambda: set(closed) == set(dialled), 60)
