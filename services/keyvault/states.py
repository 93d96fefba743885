"""The last state of every key version, as the chains tell it, in 16 bytes each.

It stands in keyvault's own memory, where SQL can't reach. A version is found by a
keyed 64-bit fingerprint: nobody without the key can look for two that are alike, and
among 1,000,000 versions two are alike by chance once in 37 million deployments.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Iterator

from byokeep.encoding import fields

_BUCKETS = 1024
_SHIFT = 64 - 10
_FROZEN = 8
_STATE = 7
#: A state's event has a number below this: more than any chain reaches.
SEQUENCES = 1 << 60


class States:
    """A map from key versions to (state, sequence number of the event that set it, frozen)."""

    def __init__(self, key: bytes) -> None:
        """Start empty; fingerprints are keyed."""
        self._key = key
        self._prints = [array("Q") for _ in range(_BUCKETS)]
        self._values = [array("Q") for _ in range(_BUCKETS)]
        #: How many versions are frozen.
        self.frozen = 0

    def __len__(self) -> int:
        """Return the number of versions."""
        return sum(map(len, self._prints))

    def fingerprint(self, tenant: str, key_id: str, version: int) -> int:
        """Return what a version is found by."""
        raw = f"{tenant}\n{key_id}\n{version}".encode()
        return int.from_bytes(hashlib.blake2b(raw, digest_size=8, key=self._key).digest(), "big")

    def get(self, fingerprint: int) -> tuple[int, int, bool]:
        """Return (state, sequence, frozen); zeros for a version that no chain tells of."""
        value = self._get(fingerprint)
        return value & _STATE, value >> 4, bool(value & _FROZEN)

    def set(self, fingerprint: int, state: int, sequence: int) -> None:
        """Keep a state, unless a later event's is kept."""
        value = self._get(fingerprint)
        if sequence >= value >> 4:
            self._put(fingerprint, sequence << 4 | value & _FROZEN | state)

    def freeze(self, fingerprint: int) -> None:
        """Mark a version as frozen, for good."""
        value = self._get(fingerprint)
        self.frozen += not value & _FROZEN
        self._put(fingerprint, value | _FROZEN)

    def dump(self) -> Iterator[bytes]:
        """Yield everything, in parts of up to about a megabyte for a million versions."""
        for start in range(0, _BUCKETS, 64):
            part = bytearray()
            for bucket in range(start, start + 64):
                prints = self._prints[bucket]
                part += fields(len(prints), prints.tobytes(), self._values[bucket].tobytes())
            yield bytes(part)

    def restore(self, parts: Iterator[bytes]) -> None:
        """Take in what `dump` gave. The caller has authenticated it."""
        bucket = 0
        for part in parts:
            offset = 0
            while offset < len(part):
                count = int.from_bytes(part[offset + 4 : offset + 12], "big")
                begin, size = offset + 16, 8 * count
                self._prints[bucket] = array("Q", part[begin : begin + size])
                begin += size + 4
                self._values[bucket] = array("Q", part[begin : begin + size])
                offset, bucket = begin + size, bucket + 1
        self.frozen = sum(value & _FROZEN > 0 for values in self._values for value in values)

    def _get(self, fingerprint: int) -> int:
        prints = self._prints[fingerprint >> _SHIFT]
        place = bisect_left(prints, fingerprint)
        if place < len(prints) and prints[place] == fingerprint:
            return self._values[fingerprint >> _SHIFT][place]
        return 0

    def _put(self, fingerprint: int, value: int) -> None:
        bucket = fingerprint >> _SHIFT
        prints, values = self._prints[bucket], self._values[bucket]
        place = bisect_left(prints, fingerprint)
        if place < len(prints) and prints[place] == fingerprint:
            values[place] = value
        else:
            prints.insert(place, fingerprint)
            values.insert(place, value)
