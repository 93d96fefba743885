"""The baseline of lease_cpu_ratio: a bare mTLS gRPC echo server, in a process of its own.

`python -m tests.bench.echo CERT KEY CA` prints its port. The same loop and the same
gRPC as the services, and nothing else: no interceptor, no validation, no database.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import grpc
import uvloop


async def _echo(request: bytes, context: Any) -> bytes:
    return request


async def _serve(certificate: str, key: str, ca: str) -> None:
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(_echo)
    generic = grpc.method_handlers_generic_handler("bench.Echo", {"Echo": handler})
    server.add_generic_rpc_handlers((generic,))
    pair = (Path(key).read_bytes(), Path(certificate).read_bytes())
    credentials = grpc.ssl_server_credentials([pair], Path(ca).read_bytes(), True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(_serve(*sys.argv[1:4]))
