"""Runs attempts: a gRPC parent without keys, and one-shot children that hold one each."""

import services.common  # noqa: F401 before grpc is loaded
