"""What the seal of a lease is bound to; keyvault seals with it, the runner's child opens."""

from __future__ import annotations

import hashlib

from byokeep.encoding import fields

LABEL = "byokeep/lease/v1"


def lease_info(grant_payload: bytes, lease_id: str) -> bytes:
    """Return HPKE's `info` of a leased key.

    `grant_payload` is the serialized Grant exactly as it was signed: a key that is sealed for
    one grant does not open with another, so that the child's provider is the grant's.
    """
    return fields(LABEL, hashlib.sha256(grant_payload).digest(), lease_id)
