"""The orchestrator: tenants, keys' metadata, reviews and their attempts; never a plaintext key."""

import services.common  # noqa: F401 before grpc is loaded
