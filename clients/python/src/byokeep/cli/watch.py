"""Following a server's stream past a lost connection."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import grpc

_Message = TypeVar("_Message")

_FAILURES_IN_A_ROW = 6


def until_done(
    open_stream: Callable[[float], Iterator[_Message]], seconds: float
) -> Iterator[_Message]:
    """Yield a stream's messages for at most so many seconds; reopen it where it is lost.

    `open_stream` gets the seconds left. The stream is one that begins with the present
    state, so that nothing is missed by opening it again. Ends quietly when the time is over.

    Raises:
        grpc.RpcError: any other end, or the service stays away.
    """
    import grpc

    end = time.monotonic() + seconds
    failures = 0
    while (left := end - time.monotonic()) > 0:
        try:
            for message in open_stream(left):
                failures = 0
                yield message
            return
        except grpc.RpcError as error:
            if _is(error, grpc.StatusCode.DEADLINE_EXCEEDED):
                return
            failures += 1
            if not _is(error, grpc.StatusCode.UNAVAILABLE) or failures == _FAILURES_IN_A_ROW:
                raise
        time.sleep(min(0.1 * 2**failures, 2.0))


def _is(error: grpc.RpcError, code: grpc.StatusCode) -> bool:
    return bool(error.code() == code)
