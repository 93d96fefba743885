"""What stands before every handler: identity, validation, rights; and behind it: errors."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import protovalidate
from byokeep.common.v1 import options_pb2
from google.protobuf.message import Message

from services.common import authz, deadline, logs, metrics
from services.common.errors import ByokeepError, internal

log = logging.getLogger(__name__)
Requests = AsyncIterator[Message]
Authorize = Callable[[authz.Caller, options_pb2.Access, Any], Awaitable[None]]
if TYPE_CHECKING:  # generic only in their stubs
    Handler = grpc.RpcMethodHandler[Any, Any]
    Context = grpc.aio.ServicerContext[Any, Any]
_KINDS = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}
_DENIALS = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)


class Denied(Protocol):
    """Told of every call that was denied, with the reason that its caller got."""

    def __call__(self, spiffe_id: str, method: str, reason: str) -> None:
        """Take note; must not block."""


class Gate(grpc.aio.ServerInterceptor):
    """Admits a call or refuses it, and lets no error out that nobody meant to send."""

    def __init__(
        self, classes: authz.CallerClasses, authorize: Authorize | None, denied: Denied | None
    ) -> None:
        """Take the caller classes, and what a service adds of its own."""
        self._classes = classes
        self._authorize = authorize
        self._denied = denied
        self._wrapped: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the wrapped handler of a method."""
        method = handler_call_details.method
        if method not in self._wrapped:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None  # gRPC answers UNIMPLEMENTED by itself
            self._wrapped[method] = self._wrap(method, handler)
        return self._wrapped[method]

    def _wrap(self, method: str, handler: Handler) -> Handler:
        call = _Call(self, method, authz.declared_access(method))
        kind = _KINDS[bool(handler.request_streaming), bool(handler.response_streaming)]
        make: Callable[..., Handler] = getattr(grpc, f"{kind}_rpc_method_handler")
        wrapped = getattr(call, kind)(getattr(handler, kind))
        return make(wrapped, handler.request_deserializer, handler.response_serializer)


class _Call:
    def __init__(self, gate: Gate, method: str, access: options_pb2.Access) -> None:
        self._gate, self._method, self._access = gate, method, access

    def unary_unary(self, inner: Any) -> Any:
        async def handle(request: Message, context: Context) -> Any:
            refusal = None
            try:
                await self._admit(request, context)
                return await inner(request, context)
            except Exception as error:
                refusal = self._refusal(error)
            await _abort(context, refusal)

        return handle

    def stream_unary(self, inner: Any) -> Any:
        async def handle(requests: Requests, context: Context) -> Any:
            refusal = None
            try:
                self._identify(context)
                return await inner(_validated(requests), context)
            except Exception as error:
                refusal = self._refusal(error)
            await _abort(context, refusal)

        return handle

    def unary_stream(self, inner: Any) -> Any:
        async def handle(request: Message, context: Context) -> AsyncIterator[Message]:
            refusal = None
            try:
                await self._admit(request, context)
                async for response in inner(request, context):
                    yield response
            except Exception as error:
                refusal = self._refusal(error)
            if refusal is not None:
                await _abort(context, refusal)

        return handle

    def stream_stream(self, inner: Any) -> Any:
        async def handle(requests: Requests, context: Context) -> AsyncIterator[Message]:
            refusal = None
            try:
                self._identify(context)
                async for response in inner(_validated(requests), context):
                    yield response
            except Exception as error:
                refusal = self._refusal(error)
            if refusal is not None:
                await _abort(context, refusal)

        return handle

    def _identify(self, context: Context) -> authz.Caller:
        deadline.enter(context.time_remaining())
        caller = self._gate._classes.identify(authz.presented_id(context))
        authz.enter(caller)
        authz.check_class(caller, self._access, self._method)
        return caller

    async def _admit(self, request: Message, context: Context) -> None:
        caller = self._identify(context)
        validate(request)
        if self._access.roles and self._gate._authorize is not None:
            await self._gate._authorize(caller, self._access, request)

    def _refusal(self, error: Exception) -> ByokeepError:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if not isinstance(error, ByokeepError):
            logs.failure(log, "unforeseen_error", error, method=self._method)
            return internal()
        metrics.REFUSALS.labels(self._method.removeprefix("/byokeep."), error.reason).inc()
        if deadline.spent():
            # Tried again by its own gRPC, the caller would see its deadline pass, and never why.
            error.retried = False
        if self._gate._denied is not None and error.code in _DENIALS:
            self._gate._denied(authz.presented(), self._method, error.reason)
        return error


async def _abort(context: Context, error: ByokeepError) -> None:
    await context.abort(error.code, error.message, error.trailing_metadata())


def validate(message: Message) -> None:
    """Check a message against the rules in its proto.

    A violation holds the offending value; only the field and the rule are told.

    Raises:
        ByokeepError: INVALID_FIELD.
    """
    violations = protovalidate.collect_violations(message)
    if not violations:
        return
    first = violations[0].proto
    field = ".".join(element.field_name for element in first.field.elements) if first.field else ""
    raise ByokeepError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        f"{field or 'request'}: {first.message or first.rule_id}",
        field=field,
        rule=first.rule_id,
    )


async def _validated(requests: Requests) -> AsyncIterator[Message]:
    async for request in requests:
        validate(request)
        yield request
