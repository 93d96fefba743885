"""Channels that follow their identity's files.

gRPC in Python can't give a channel another certificate. So a channel here is a line of them:
a new one is opened when the files changed, new calls go to it, and the one before is closed
when the last of its calls has ended.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import grpc

from byokeep.identity import Followed, Pem

C = TypeVar("C")

CHECK_SECONDS: Final = 2.0
"""How often the files are looked at, while calls are made."""


class _Link(Generic[C]):
    """One channel of the line."""

    def __init__(self, channel: C) -> None:
        self.channel = channel
        self.calls = 0
        self._methods: dict[tuple[str, str], Any] = {}

    def method(self, kind: str, path: str, arguments: tuple[Any, ...], words: Any) -> Any:
        """Return gRPC's own callable, made once."""
        found = self._methods.get((kind, path))
        if found is None:
            found = getattr(self.channel, kind)(path, *arguments, **words)
            self._methods[kind, path] = found
        return found


class _Line(Generic[C]):
    """The newest link, and those before it that still have calls."""

    def __init__(
        self, identity: Followed[Pem], dial: Callable[[Pem], C], close: Callable[[C], None]
    ) -> None:
        self._identity = identity
        self._dial = dial
        self._close = close
        self._lock = threading.Lock()
        self._newest: _Link[C] = _Link(dial(identity.value))
        self._retired: list[_Link[C]] = []
        self._next_check = time.monotonic() + CHECK_SECONDS

    def begin(self) -> _Link[C]:
        """Return the link for a call, which is counted until `end`."""
        with self._lock:
            self._follow()
            self._newest.calls += 1
            return self._newest

    def end(self, link: _Link[C]) -> None:
        """Count a call no more; close a link that nobody needs."""
        with self._lock:
            link.calls -= 1
            idle = link.calls == 0 and link in self._retired
            if idle:
                self._retired.remove(link)
        if idle:
            self._close(link.channel)

    def newest(self) -> C:
        """Return the newest channel."""
        with self._lock:
            self._follow()
            return self._newest.channel

    def drain(self) -> list[C]:
        """Return every channel that is open, to be closed."""
        with self._lock:
            links = [*self._retired, self._newest]
            self._retired.clear()
            return [link.channel for link in links]

    def _follow(self) -> None:
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + CHECK_SECONDS
        if not self._identity.refresh():
            return
        before, self._newest = self._newest, _Link(self._dial(self._identity.value))
        if before.calls:
            self._retired.append(before)
        else:
            self._close(before.channel)


class AioChannel(grpc.aio.Channel):
    """An asyncio channel that follows its identity's files. Use it within one event loop."""

    def __init__(self, identity: Followed[Pem], dial: Callable[[Pem], grpc.aio.Channel]) -> None:
        """`dial` opens a channel with an identity; it is called again when that changed."""
        self._closing: set[asyncio.Task[None]] = set()
        self._line = _Line(identity, dial, self._close_soon)

    def unary_unary(self, method: str, *arguments: Any, **words: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._method("unary_unary", method, arguments, words)

    def unary_stream(self, method: str, *arguments: Any, **words: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._method("unary_stream", method, arguments, words)

    def stream_unary(self, method: str, *arguments: Any, **words: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._method("stream_unary", method, arguments, words)

    def stream_stream(self, method: str, *arguments: Any, **words: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._method("stream_stream", method, arguments, words)

    async def close(self, grace: float | None = None) -> None:
        """Close every channel of the line."""
        for channel in self._line.drain():
            await channel.close(grace)
        if self._closing:
            await asyncio.wait(self._closing)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Return the newest channel's state."""
        return self._line.newest().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait until the newest channel has another state."""
        await self._line.newest().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Wait until the newest channel is connected."""
        await self._line.newest().channel_ready()

    async def __aenter__(self) -> AioChannel:
        """Use as a block."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self.close()

    def _method(self, kind: str, path: str, arguments: tuple[Any, ...], words: Any) -> Any:
        line = self._line

        def start(*request: Any, **options: Any) -> Any:
            link = line.begin()
            try:
                call = link.method(kind, path, arguments, words)(*request, **options)
            except BaseException:
                line.end(link)
                raise
            call.add_done_callback(lambda _: line.end(link))
            return call

        return start

    def _close_soon(self, channel: grpc.aio.Channel) -> None:
        task = asyncio.get_running_loop().create_task(channel.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


class SyncChannel(grpc.Channel):
    """A blocking channel that follows its identity's files."""

    def __init__(self, identity: Followed[Pem], dial: Callable[[Pem], grpc.Channel]) -> None:
        """`dial` opens a channel with an identity; it is called again when that changed."""
        self._line = _Line(identity, dial, self._close_soon)

    def unary_unary(self, method: str, *arguments: Any, **words: Any) -> Any:
        """See grpc.Channel."""
        return _Unary(self._line, "unary_unary", method, arguments, words)

    def unary_stream(self, method: str, *arguments: Any, **words: Any) -> Any:
        """See grpc.Channel."""
        return _Streaming(self._line, "unary_stream", method, arguments, words)

    def stream_unary(self, method: str, *arguments: Any, **words: Any) -> Any:
        """See grpc.Channel."""
        return _Unary(self._line, "stream_unary", method, arguments, words)

    def stream_stream(self, method: str, *arguments: Any, **words: Any) -> Any:
        """See grpc.Channel."""
        return _Streaming(self._line, "stream_stream", method, arguments, words)

    def subscribe(
        self, callback: Callable[[grpc.ChannelConnectivity], None], try_to_connect: bool = False
    ) -> None:
        """Tell of the newest channel's states."""
        self._line.newest().subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        """Tell no more."""
        self._line.newest().unsubscribe(callback)

    def close(self) -> None:
        """Close every channel of the line."""
        for channel in self._line.drain():
            channel.close()

    def __enter__(self) -> SyncChannel:
        """Use as a block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    @staticmethod
    def _close_soon(channel: grpc.Channel) -> None:
        # gRPC tells of a call's end on the thread that still has its last message to hand out,
        # and a channel's `close` waits for that: there it would wait for itself, for ever.
        threading.Thread(target=channel.close, name="close a channel", daemon=True).start()


class _Streaming:
    """A method of a blocking channel whose answer is a stream."""

    def __init__(
        self,
        line: _Line[grpc.Channel],
        kind: str,
        path: str,
        arguments: tuple[Any, ...],
        words: Any,
    ) -> None:
        self._line = line
        self._method = (kind, path, arguments, words)

    def __call__(self, *request: Any, **options: Any) -> Any:
        return self._open("__call__", request, options)

    def _open(self, way: str, request: tuple[Any, ...], options: Any) -> Any:
        """Start a call that ends later."""
        link = self._line.begin()
        try:
            call = getattr(link.method(*self._method), way)(*request, **options)
        except BaseException:
            self._line.end(link)
            raise
        if not call.add_callback(lambda: self._line.end(link)):
            self._line.end(link)
        return call


class _Unary(_Streaming):
    """A method of a blocking channel whose answer is one message."""

    def __call__(self, *request: Any, **options: Any) -> Any:
        return self._wait("__call__", request, options)

    def with_call(self, *request: Any, **options: Any) -> Any:
        return self._wait("with_call", request, options)

    def future(self, *request: Any, **options: Any) -> Any:
        return self._open("future", request, options)

    def _wait(self, way: str, request: tuple[Any, ...], options: Any) -> Any:
        link = self._line.begin()
        try:
            return getattr(link.method(*self._method), way)(*request, **options)
        finally:
            self._line.end(link)
