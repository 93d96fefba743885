"""`python -m services.common.probe`: exit 0 where this machine's service serves, for Compose.

Kubernetes asks the health port by itself.
"""

from __future__ import annotations

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_SECONDS = 3.0


def main() -> int:
    """Ask the health port of BYOKEEP_HEALTH_LISTEN."""
    with grpc.insecure_channel(os.environ["BYOKEEP_HEALTH_LISTEN"]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_SECONDS
            )
        except grpc.RpcError:
            return 1
    return int(answer.status != health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(main())
