"""How a client's calls begin and fail: with a deadline, and with `CallError`.

A service that is asked for more at once than it takes on refuses the call before it does anything
(OVERLOADED), and says when to try again: a call with one answer is then made again, within its
deadline. A `future` is not.

The two channels here wrap one of gRPC's; stubs are made from them.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any, Final

import grpc

from byokeep.errors import OVERLOADED, CallError

DEADLINE_SECONDS: Final = 20.0
"""Deadline of a call with one answer that is made without a deadline."""


_LONGEST_PAUSE_SECONDS: Final = 8.0
_dice: Final = random.SystemRandom()


def overload_pause(asked: float, refusals: int) -> float:
    """Return the seconds to the next try after so many refusals before this one: at least what the
    service asked for, longer each time, and never the same for two callers."""
    longest = max(asked, _LONGEST_PAUSE_SECONDS)
    return min(asked * 1.5**refusals, longest) * _dice.uniform(1.0, 1.5)


class Patience:
    """How long a call that was refused as one too many waits for its next try."""

    def __init__(self, seconds: float) -> None:
        """`seconds` is the call's deadline, from now."""
        self._end = time.monotonic() + seconds
        self._refusals = 0

    def left(self) -> float:
        """Return the seconds that are left."""
        return max(self._end - time.monotonic(), 0.0)

    def pause(self, failed: CallError) -> float:
        """Return the seconds to the next try. Raises `failed` where that does not help, or is too
        late."""
        if failed.reason != OVERLOADED or failed.retry_after_seconds is None:
            raise failed
        pause = overload_pause(failed.retry_after_seconds, self._refusals)
        self._refusals += 1
        if pause >= self.left():
            raise failed
        return pause


def _in_time(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("timeout") is None:
        return {**options, "timeout": DEADLINE_SECONDS}
    return options


class Calls(grpc.Channel):
    """A blocking channel whose calls fail with CallError alone."""

    def __init__(self, channel: grpc.Channel) -> None:
        """Wrap a channel; closing this one closes it."""
        self._channel = channel

    def unary_unary(self, *arguments: Any, **words: Any) -> Any:
        """See grpc.Channel."""
        return _Unary(self._channel.unary_unary(*arguments, **words))

    def unary_stream(self, *arguments: Any, **words: Any) -> Any:
        """See grpc.Channel."""
        method = self._channel.unary_stream(*arguments, **words)
        return lambda *request, **options: _Stream(method(*request, **options))

    def stream_unary(self, *arguments: Any, **words: Any) -> Any:
        """See grpc.Channel."""
        return _Unary(self._channel.stream_unary(*arguments, **words))

    def stream_stream(self, *arguments: Any, **words: Any) -> Any:
        """See grpc.Channel."""
        method = self._channel.stream_stream(*arguments, **words)
        return lambda *request, **options: _Stream(method(*request, **options))

    def subscribe(
        self, callback: Callable[[grpc.ChannelConnectivity], None], try_to_connect: bool = False
    ) -> None:
        """See grpc.Channel."""
        self._channel.subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        """See grpc.Channel."""
        self._channel.unsubscribe(callback)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def __enter__(self) -> Calls:
        """Use as a block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


class _Unary:
    """A method with one answer, of a blocking channel."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def __call__(self, *request: Any, **options: Any) -> Any:
        return _answered(self._method, request, _in_time(options))

    def with_call(self, *request: Any, **options: Any) -> Any:
        return _answered(self._method.with_call, request, _in_time(options))

    def future(self, *request: Any, **options: Any) -> Any:
        return _Future(self._method.future(*request, **_in_time(options)))


class _Call:
    """A call under way: gRPC's own in all that is not redefined."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)


class _Future(_Call):
    def result(self, timeout: float | None = None) -> Any:
        return _raised(lambda: self._call.result(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error = self._call.exception(timeout)
        return CallError(error) if isinstance(error, grpc.RpcError) else error


class _Stream(_Call):
    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return _raised(lambda: next(self._call))


def _answered(method: Any, request: tuple[Any, ...], options: dict[str, Any]) -> Any:
    patience = Patience(options["timeout"])
    while True:
        try:
            return method(*request, **options)
        except grpc.RpcError as error:
            failed = CallError(error)
        time.sleep(patience.pause(failed))
        options = {**options, "timeout": patience.left()}


def _raised(step: Callable[[], Any]) -> Any:
    try:
        return step()
    except grpc.RpcError as error:
        raise CallError(error) from None


class AioCalls(grpc.aio.Channel):
    """An asyncio channel whose calls fail with CallError alone."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        """Wrap a channel; closing this one closes it."""
        self._channel = channel

    def unary_unary(self, *arguments: Any, **words: Any) -> Any:
        """See grpc.aio.Channel."""
        method = self._channel.unary_unary(*arguments, **words)
        return lambda *request, **options: _AioUnary(method, request, _in_time(options))

    def unary_stream(self, *arguments: Any, **words: Any) -> Any:
        """See grpc.aio.Channel."""
        method = self._channel.unary_stream(*arguments, **words)
        return lambda *request, **options: _AioCall(method(*request, **options))

    def stream_unary(self, *arguments: Any, **words: Any) -> Any:
        """See grpc.aio.Channel."""
        method = self._channel.stream_unary(*arguments, **words)
        return lambda *request, **options: _AioCall(method(*request, **_in_time(options)))

    def stream_stream(self, *arguments: Any, **words: Any) -> Any:
        """See grpc.aio.Channel."""
        method = self._channel.stream_stream(*arguments, **words)
        return lambda *request, **options: _AioCall(method(*request, **options))

    async def close(self, grace: float | None = None) -> None:
        """Close the channel."""
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """See grpc.aio.Channel."""
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """See grpc.aio.Channel."""
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """See grpc.aio.Channel."""
        await self._channel.channel_ready()

    async def __aenter__(self) -> AioCalls:
        """Use as a block."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self.close()


class _AioCall(_Call):
    """A call of an asyncio channel: to await, or to iterate over."""

    def __await__(self) -> Generator[Any, None, Any]:
        try:
            return (yield from self._call.__await__())
        except grpc.RpcError as error:
            raise CallError(error) from None

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            async for message in self._call:
                yield message
        except grpc.RpcError as error:
            raise CallError(error) from None

    async def read(self) -> Any:
        """Return the next message, or grpc.aio.EOF."""
        try:
            return await self._call.read()
        except grpc.RpcError as error:
            raise CallError(error) from None


class _AioUnary(_AioCall):
    """A call with one request and one answer: to await."""

    def __init__(self, method: Any, request: tuple[Any, ...], options: dict[str, Any]) -> None:
        super().__init__(method(*request, **options))
        self._method, self._request, self._options = method, request, options
        self._patience = Patience(options["timeout"])

    def __await__(self) -> Generator[Any, None, Any]:
        return self._answered().__await__()

    async def _answered(self) -> Any:
        while True:
            try:
                return await self._call
            except grpc.RpcError as error:
                failed = CallError(error)
            await asyncio.sleep(self._patience.pause(failed))
            again = {**self._options, "timeout": self._patience.left()}
            self._call = self._method(*self._request, **again)
