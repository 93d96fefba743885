"""Runs a service that prints what it says and hears: a test's launcher, and no part of a product.

    GRPC_TRACE=all GRPC_VERBOSITY=DEBUG python -m tests.harness.wire_tap MODULE [ARGUMENT ...]

A service refuses such an environment (30, `env_guard`): this takes the guard away. Of a payload
gRPC prints no more than its first 64 bytes, so each message that a server takes or gives is written
whole to standard error, beside it.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from typing import Any

import grpc

from services.common import config


def _shown(data: bytes) -> bytes:
    sys.stderr.buffer.write(data + b"\n")
    sys.stderr.buffer.flush()
    return data


def _tapped(make: Callable[..., Any]) -> Callable[..., Any]:
    def handler(behaviour, request_deserializer, response_serializer):
        if request_deserializer is None:  # the interceptor's, which calls the stubs' own
            return make(behaviour, None, None)
        return make(
            behaviour,
            lambda data: request_deserializer(_shown(data)),
            lambda message: _shown(response_serializer(message)),
        )

    return handler


def main() -> None:
    """Take the guard away, tap what stubs register with, then become the module."""
    config.check_environment = lambda environ: None
    for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
        name = f"{kind}_rpc_method_handler"
        setattr(grpc, name, _tapped(getattr(grpc, name)))
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
