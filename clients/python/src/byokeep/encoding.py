"""Unambiguous encoding of several fields into one byte string.

Every field is preceded by its length as 4 bytes, big-endian, so that no two
different lists of fields have the same encoding. Used for HPKE `info`, AEAD
associated data and MACs.
"""

from __future__ import annotations


def fields(*values: str | bytes | int) -> bytes:
    """Return the length-prefixed concatenation; text as UTF-8, integers as 8 bytes (two's
    complement, so that no number that a database column can hold makes it fail)."""
    out = bytearray()
    for value in values:
        if isinstance(value, int):
            raw = value.to_bytes(8, "big", signed=value < 0)
        else:
            raw = value.encode() if isinstance(value, str) else value
        out += len(raw).to_bytes(4, "big") + raw
    return bytes(out)
