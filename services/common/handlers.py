"""What wraps the handlers of methods, each once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:  # generic only in their stubs
    Handler = grpc.RpcMethodHandler[Any, Any]


class Wrapping(grpc.aio.ServerInterceptor, ABC):
    """Wraps each method's handler when the method is called first."""

    def __init__(self) -> None:
        """Start with none."""
        self._wrapped: dict[str, Handler] = {}

    @abstractmethod
    def wrap(self, method: str, handler: Handler) -> Handler:
        """Return the handler of `/package.Service/Method`, wrapped."""

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
            self._wrapped[method] = self.wrap(method, handler)
        return self._wrapped[method]
