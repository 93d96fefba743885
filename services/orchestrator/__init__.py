"""The orchestrator: tenants, keys' metadata, reviews and their attempts; never a plaintext key."""
