"""Every call leaves one line in the log and counts once, admitted or not.

The line has the method, the code, the time that it took, the caller's SPIFFE ID and the id of the
request: never a field of a message.
"""

from __future__ import annotations

import contextvars
import logging
import os
import re
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import grpc

from services.common import authz, logs, metrics, tracing
from services.common.handlers import Wrapping

log = logging.getLogger(__name__)
if TYPE_CHECKING:  # generic only in their stubs
    Handler = grpc.RpcMethodHandler[Any, Any]
    Context = grpc.aio.ServicerContext[Any, Any]

#: Metadata key of a request's id: the same in the logs of all services that it goes through.
REQUEST_ID: Final = "x-request-id"
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9_-]{8,64}")
_CANCELLED: Final = grpc.StatusCode.CANCELLED.name

_request: contextvars.ContextVar[str] = contextvars.ContextVar("byokeep_request", default="")


def outgoing() -> list[tuple[str, str]]:
    """Return the metadata that lets a service that is called log and trace with this one."""
    pairs = ((REQUEST_ID, _request.get()), (tracing.TRACEPARENT, tracing.traceparent()))
    return [(key, value) for key, value in pairs if value]


class Observe(Wrapping):
    """Stands before all other interceptors, so that what they refuse is seen as well."""

    def wrap(self, method: str, handler: Handler) -> Handler:
        """See Wrapping."""
        return _wrap(method.removeprefix("/byokeep."), handler)


def _wrap(method: str, handler: Handler) -> Handler:
    streams = (handler.request_streaming, handler.response_streaming)
    if streams == (False, False):
        inner, make = handler.unary_unary, grpc.unary_unary_rpc_method_handler
    elif streams == (False, True):
        inner, make = handler.unary_stream, grpc.unary_stream_rpc_method_handler
    elif streams == (True, False):
        inner, make = handler.stream_unary, grpc.stream_unary_rpc_method_handler
    else:
        inner, make = handler.stream_stream, grpc.stream_stream_rpc_method_handler
    seen: Any = inner
    seconds = metrics.RPC_SECONDS.labels(method)

    async def one(request: Any, context: Context) -> Any:
        with _Observed(method, seconds, context):
            return await seen(request, context)

    async def many(request: Any, context: Context) -> AsyncIterator[Any]:
        with _Observed(method, seconds, context):
            async for response in seen(request, context):
                yield response

    wrapped: Handler = make(
        many if handler.response_streaming else one,
        handler.request_deserializer,
        handler.response_serializer,
    )
    return wrapped


class _Observed:
    """One call, from its start to its end."""

    __slots__ = ("_caller", "_context", "_made", "_method", "_seconds", "_span", "_start")

    def __init__(self, method: str, seconds: Any, context: Context) -> None:
        self._method, self._seconds, self._context = method, seconds, context
        self._caller = authz.presented_id(context)
        self._start = time.perf_counter()

    def __enter__(self) -> None:
        told = dict(self._context.invocation_metadata() or ())
        request = told.get(REQUEST_ID, "")
        known = isinstance(request, str) and _REQUEST_ID.fullmatch(request)
        _request.set(str(request) if known else os.urandom(10).hex())
        self._span = tracing.span(self._method, parent=tracing.parent_in(told), server=True)
        self._made = self._span.__enter__()
        logs.correlate(request=_request.get(), trace=tracing.trace_id())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        took = time.perf_counter() - self._start
        # None where nothing was set, which is OK unless it was cut.
        code = (self._context.code() or grpc.StatusCode.OK).name
        if kind is not None and code == "OK":
            code = _CANCELLED  # the caller went away, or its time is over
        self._seconds.observe(took)
        metrics.RPCS.labels(self._method, code).inc()
        logs.event(
            log,
            "rpc",
            method=self._method,
            code=code,
            ms=round(took * 1000, 1),
            caller=self._caller[:256],
        )
        if code != "OK":
            tracing.fail(self._made, code)
        self._span.__exit__(None, None, None)
