"""Channels: mutual TLS, one place for its options.

gRPC in Python checks a server's DNS name, not its SPIFFE ID, so every channel
names the DNS name that the server's certificate must have, whatever address is
dialled. byokeep's servers take no TLS below 1.3 (`services.common`). A channel follows
the files of its identity.
"""

from __future__ import annotations

import json

import grpc

from byokeep.following import AioChannel, SyncChannel
from byokeep.identity import Followed, Pem, TlsFiles

__all__ = [
    "MAX_MESSAGE_BYTES",
    "TlsFiles",
    "aio_channel",
    "following_aio_channel",
    "following_channel",
    "sync_channel",
]

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
                # A server that ends cuts what came in its last moment: CANCELLED, by nobody here.
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        },
    ],
    "loadBalancingConfig": [{"round_robin": {}}],
}


def channel_credentials(certificate: bytes, key: bytes, ca: bytes) -> grpc.ChannelCredentials:
    """Return credentials that present an identity and trust one CA alone."""
    return grpc.ssl_channel_credentials(ca, key, certificate)


def channel_options(server_name: str, proxy: str = "") -> list[tuple[str, str | int]]:
    """Return options: expected server name, keepalive, retry policy, message limits; no proxy
    but one that is given."""
    return [
        ("grpc.ssl_target_name_override", server_name),
        # gRPC would take one from the environment, for loopback too.
        ("grpc.http_proxy", proxy) if proxy else ("grpc.enable_http_proxy", 0),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.service_config", json.dumps(_RETRY)),
        # gRPC's own is half a minute: a rolling restart may have replaced every server by then.
        ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    ]


def aio_channel(address: str, server_name: str, files: TlsFiles) -> grpc.aio.Channel:
    """Open an asyncio channel that follows its files (`following_aio_channel`).

    Raises:
        IdentityError: the files are no usable identity.
    """
    return following_aio_channel(address, server_name, Followed(files.paths, files.load))


def following_aio_channel(
    address: str, server_name: str, identity: Followed[Pem], proxy: str = ""
) -> grpc.aio.Channel:
    """Open an asyncio channel as `following_channel` does. The retry policy repeats UNAVAILABLE
    and CANCELLED: every method that changes something carries a request id, or a one-time grant,
    which is not repeated."""
    options = channel_options(server_name, proxy)
    return AioChannel(
        identity, lambda pem: grpc.aio.secure_channel(address, _credentials(pem), options=options)
    )


def following_channel(
    address: str, server_name: str, identity: Followed[Pem], proxy: str = ""
) -> grpc.Channel:
    """Open a blocking channel that follows an identity's files; through an HTTP proxy
    (`http://host:port`) where one is given."""
    options = channel_options(server_name, proxy)
    return SyncChannel(
        identity, lambda pem: grpc.secure_channel(address, _credentials(pem), options=options)
    )


def sync_channel(
    address: str, server_name: str, certificate: bytes, key: bytes, ca: bytes
) -> grpc.Channel:
    """Open a blocking channel with this identity and no other."""
    return grpc.secure_channel(
        address, channel_credentials(certificate, key, ca), options=channel_options(server_name)
    )


def _credentials(pem: Pem) -> grpc.ChannelCredentials:
    return channel_credentials(pem.certificate, pem.key, pem.ca)
