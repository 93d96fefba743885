"""How many elements a serialized message has, before it is parsed.

Two bytes are enough for an element of a repeated field: a message of some megabytes may become
gigabytes of objects, which are all looked at when it is validated. The format is that of
https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from typing import Any, Final

#: Most fields of a request, those of the messages in it included.
MOST: Final = 2_000
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES: Final = {_FIXED64: 8, _FIXED32: 4}


class WireError(ValueError):
    """Too many elements, or no serialized message."""


def require_few(descriptor: Any, raw: bytes) -> None:
    """Refuse a message with more than `MOST` elements. Raises WireError."""
    _count(descriptor, raw, 0, len(raw), MOST)


def _count(descriptor: Any, raw: bytes, at: int, end: int, left: int) -> int:
    fields = descriptor.fields_by_number
    while at < end:
        left -= 1
        tag, at = _varint(raw, at, end)
        field, kind = fields.get(tag >> 3), tag & 7
        if kind == _VARINT:
            _, at = _varint(raw, at, end)
        elif kind == _BYTES:
            size, at = _varint(raw, at, end)
            if at + size > end:
                raise WireError
            if field is not None and field.message_type is not None:
                left = _count(field.message_type, raw, at, at + size, left)
            elif field is not None and field.cpp_type != field.CPPTYPE_STRING:
                left -= size  # packed: a byte or more each
            at += size
        else:
            at += _FIXED_SIZES.get(kind, end)
        if left < 0 or at > end:
            raise WireError
    return left


def _varint(raw: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise WireError
