"""What retention keeps of the events that it drops, and how keyvault knows it again.

A chain's links are hashes that anybody can compute: whoever writes the database can add
an event that states a retention of their own making. The digest over what was kept is
therefore a MAC of keyvault's own, which only its own retention can state.
"""

from __future__ import annotations

import hashlib
import hmac

from byokeep.encoding import fields

_LABEL = b"byokeep/carried/v1"


class Carried:
    """The MAC over where a chain's retention ends, and each event kept of those before."""

    def __init__(self, key: bytes, chain: str, sequence: int, digest: bytes) -> None:
        """Start with no event kept. The retention ends with the event of a number and hash."""
        key = hmac.digest(key, _LABEL, hashlib.sha256)
        self._mac = hmac.new(key, fields(chain, sequence, digest), hashlib.sha256)

    def add(self, sequence: int, body: bytes) -> None:
        """Take in the next event that is kept."""
        self._mac.update(fields(sequence, hashlib.sha256(body).digest()))

    def digest(self) -> bytes:
        """Return what RETENTION_PRUNED states as carried_hash."""
        return self._mac.digest()
