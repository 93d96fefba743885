"""Identifiers: a prefix and a ULID (github.com/ulid/spec) in lower case."""

from __future__ import annotations

import hashlib
import secrets
import time

_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"


def new_id(prefix: str) -> str:
    """Return a new id such as ``key_01k...``: sortable by time, 80 random bits."""
    value = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    digits = [_CROCKFORD[(value >> shift) & 31] for shift in range(125, -1, -5)]
    return f"{prefix}_{''.join(digits)}"


def public_key_id(prefix: str, raw_public_key: bytes) -> str:
    """Return the id of a signing key: the prefix and 16 hex digits of its SHA-256."""
    return f"{prefix}_{hashlib.sha256(raw_public_key).hexdigest()[:16]}"
