"""What stands before every handler: identity, load, validation, rights; and behind it: errors.

gRPC hands a unary request over only once all of it is there. So every method is served as one that
takes a stream, of which a unary caller sends one message: who calls is known before that is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import protovalidate
from byokeep.common.v1 import options_pb2
from google.protobuf.message import DecodeError, Message

from services.common import authz, deadline, load, logs, metrics, wire
from services.common.errors import ByokeepError, internal
from services.common.handlers import Wrapping

log = logging.getLogger(__name__)
Authorize = Callable[[authz.Caller, options_pb2.Access, Any], Awaitable[None]]
if TYPE_CHECKING:  # generic only in their stubs
    Handler = grpc.RpcMethodHandler[Any, Any]
    Context = grpc.aio.ServicerContext[Any, Any]
_DENIALS = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
#: A unary request is read for so long, and the first message of a stream.
READ_SECONDS = 30.0


class Denied(Protocol):
    """Told of every call that was denied, with the reason that its caller got."""

    def __call__(self, spiffe_id: str, method: str, reason: str) -> None:
        """Take note; must not block."""


class Gate(Wrapping):
    """Admits a call or refuses it, and lets no error out that nobody meant to send."""

    def __init__(
        self, classes: authz.CallerClasses, authorize: Authorize | None, denied: Denied | None
    ) -> None:
        """Take the caller classes, and what a service adds of its own."""
        super().__init__()
        self._classes = classes
        self._authorize = authorize
        self._denied = denied
        self._load = load.Load()

    def wrap(self, method: str, handler: Handler) -> Handler:
        """See Wrapping."""
        call = _Call(self, method, handler)
        make: Any
        if handler.response_streaming:
            make = grpc.stream_stream_rpc_method_handler
            inner = handler.stream_stream or handler.unary_stream
            wrapped = call.many(inner)
        else:
            make = grpc.stream_unary_rpc_method_handler
            inner = handler.stream_unary or handler.unary_unary
            wrapped = call.one(inner)
        # Neither parsed nor serialized by gRPC: a caller's message is looked at first, and an
        # answer is counted until it is sent.
        wrapped_handler: Handler = make(wrapped, None, None)
        return wrapped_handler


class _Call:
    def __init__(self, gate: Gate, method: str, handler: Handler) -> None:
        self._gate, self._method = gate, method
        self._access, self._limits = authz.declared_access(method), load.declared(method)
        self._streams_in = bool(handler.request_streaming)
        self._streams_out = bool(handler.response_streaming)
        self._request = authz.descriptor_of(method).input_type
        self._parse: Any = handler.request_deserializer
        self._serialize: Any = handler.response_serializer

    def one(self, inner: Any) -> Any:
        """Wrap a handler with one answer."""

        async def handle(_: object, context: Context) -> Any:
            refusal = None
            try:
                with contextlib.ExitStack() as held:
                    request, tenant = await self._admitted(context, held)
                    answer: bytes = self._serialize(await inner(request, context))
                    _when_over(context, self._gate._load.hold(tenant, len(answer)))
                    return answer
            except Exception as error:
                refusal = self._refusal(error)
            await _abort(context, refusal)

        return handle

    def many(self, inner: Any) -> Any:
        """Wrap a handler with a stream of answers."""

        async def handle(_: object, context: Context) -> AsyncIterator[bytes]:
            refusal = None
            try:
                with contextlib.ExitStack() as held:
                    request, tenant = await self._admitted(context, held)
                    async for response in inner(request, context):
                        answer: bytes = self._serialize(response)
                        del response
                        sent = self._gate._load.hold(tenant, len(answer))
                        try:
                            yield answer
                        finally:
                            sent()
            except Exception as error:
                refusal = self._refusal(error)
            if refusal is not None:
                await _abort(context, refusal)

        return handle

    async def _admitted(self, context: Context, held: contextlib.ExitStack) -> tuple[Any, str]:
        """Return the request, or the stream of them, of a caller that may make it, and the tenant
        that it names, if any; `held` gets what is to be given back once there is an answer."""
        caller = self._identify(context)
        _when_over(context, self._gate._load.present(caller.spiffe_id, self._method, self._limits))
        if self._streams_in:
            return self._messages(context), ""
        admitted = await self._gate._load.admit(caller.spiffe_id, self._method)
        try:
            raw = await self._raw(context)
            request, size = self._read(raw), len(raw)
            del raw
            if self._access.roles and self._gate._authorize is not None:
                await self._gate._authorize(caller, self._access, request)
        finally:
            admitted()
        tenant = authz.named_tenant(request)
        if tenant:
            _when_over(context, self._gate._load.enter(tenant, self._method, self._limits, size))
            if self._streams_out:
                self._gate._load.stream(tenant)
            else:
                held.callback(await self._gate._load.run(tenant))
        return request, tenant

    async def _raw(self, context: Context) -> Any:
        # A caller that does not send what it began would keep others of its identity waiting.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READ_SECONDS):
                return await context.read()
        raise _no_request(f"not all of it came within {READ_SECONDS:g} seconds")

    async def _messages(self, context: Context) -> AsyncIterator[Message]:
        raw = await self._raw(context)
        while isinstance(raw, bytes):
            yield self._read(raw)
            raw = await context.read()

    def _read(self, raw: Any) -> Message:
        """Parse and check a message. Raises ByokeepError: INVALID_FIELD."""
        if not isinstance(raw, bytes):
            raise _no_request("no request came")
        if len(raw) > self._limits.request_bytes:
            raise _no_request(f"more than {self._limits.request_bytes} bytes")
        request: Message | None = None
        with contextlib.suppress(wire.WireError, DecodeError):
            wire.require_few(self._request, raw)
            request = self._parse(raw)
        if request is None:
            raise _no_request(f"no serialized message of at most {wire.MOST} elements")
        validate(request)
        return request

    def _identify(self, context: Context) -> authz.Caller:
        deadline.enter(context.time_remaining())
        caller = self._gate._classes.identify(authz.presented_id(context))
        authz.enter(caller)
        authz.check_class(caller, self._access, self._method)
        return caller

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


def _when_over(context: Any, act: Callable[[], None]) -> None:
    """Act once the call's last byte is sent, or given up."""
    context.add_done_callback(lambda _: act())


async def _abort(context: Context, error: ByokeepError) -> None:
    if error.reason == "OVERLOADED":
        # Whoever sends again at once would have the loop refuse and do nothing else. What was sent
        # hangs on the traceback.
        error.__traceback__ = None
        await asyncio.sleep(load.PAUSE_SECONDS)
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


def _no_request(what: str) -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        f"request: {what}",
        field="request",
        rule="request",
    )
