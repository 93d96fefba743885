"""Channels and servers' credentials: mutual TLS, one place for its options.

gRPC in Python checks a server's DNS name, not its SPIFFE ID, so every channel
names the DNS name that the server's certificate must have, whatever address is
dialled. Both ends of byokeep negotiate TLS 1.3; gRPC in Python has no option that
refuses a peer which offers no more than 1.2.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import grpc

# Above the largest diff (4 MiB) with its context files, below what hurts.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024


_RETRY = {
    "methodConfig": [
        # A grant is redeemed once: a repeat whose first answer was lost would be refused
        # and look like an attack. The orchestrator makes a new grant instead.
        {"name": [{"service": "byokeep.keyvault.v1.LeaseService", "method": "LeaseKey"}]},
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        },
    ],
    "loadBalancingConfig": [{"round_robin": {}}],
}


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of one identity."""

    certificate: Path
    key: Path
    ca: Path

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Return the contents: certificate chain, private key, CA certificates."""
        return self.certificate.read_bytes(), self.key.read_bytes(), self.ca.read_bytes()


def channel_credentials(certificate: bytes, key: bytes, ca: bytes) -> grpc.ChannelCredentials:
    """Return credentials that present an identity and trust one CA alone."""
    return grpc.ssl_channel_credentials(ca, key, certificate)


def channel_options(server_name: str) -> list[tuple[str, str | int]]:
    """Return options: expected server name, keepalive, retry policy, message limits."""
    return [
        ("grpc.ssl_target_name_override", server_name),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.service_config", json.dumps(_RETRY)),
    ]


def aio_channel(address: str, server_name: str, files: TlsFiles) -> grpc.aio.Channel:
    """Open an asyncio channel. The retry policy repeats UNAVAILABLE only: every
    method that changes something carries a request id or a one-time grant."""
    return grpc.aio.secure_channel(
        address, channel_credentials(*files.read()), options=channel_options(server_name)
    )


def sync_channel(
    address: str, server_name: str, certificate: bytes, key: bytes, ca: bytes
) -> grpc.Channel:
    """Open a blocking channel."""
    return grpc.secure_channel(
        address, channel_credentials(certificate, key, ca), options=channel_options(server_name)
    )
