"""The readable view of an audit event, as JSON text.

Written once for who exports and for who verifies, and fast enough to be compared for
each of a million events: the text is that of `json.dumps(MessageToDict(event))`.
"""

from __future__ import annotations

import base64
import datetime
from collections.abc import Callable, Mapping
from functools import lru_cache
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

_Render = Callable[[Any], str]
_SECOND = 1_000_000_000
_FIRST_SECOND = -62_135_596_800  # 0001-01-01
_LAST_SECOND = 253_402_300_799  # 9999-12-31T23:59:59


def view(message: Message) -> str:
    """Return the JSON text of a message. Raises ValueError for a time that no calendar has."""
    # In the order of their numbers; a field that has its default is not among them.
    return "{" + ", ".join([_MEMBERS[field](value) for field, value in message.ListFields()]) + "}"


class _Members(dict[FieldDescriptor, _Render]):
    """What renders a field with its name, found out once for each."""

    def __missing__(self, field: FieldDescriptor) -> _Render:
        render = self[field] = _member(field, f"{quoted(field.json_name)}: ")
        return render


_MEMBERS = _Members()


class _Names(dict[int, str]):
    """Names of an enum's values; a number that it does not know stands for itself."""

    def __init__(self, start: str, enum: EnumDescriptor) -> None:
        values = enum.values
        super().__init__({value.number: start + quoted(value.name) for value in values})
        self._start = start

    def __missing__(self, number: int) -> str:
        return self._start + str(number)


def _member(field: FieldDescriptor, start: str) -> _Render:
    # `is_repeated` came with protobuf 6.31, and what there was before warns since.
    if isinstance(field.default_value, list):
        raise TypeError(f"{field.full_name}: an event has no repeated fields")
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        inner = _time if field.message_type is Timestamp.DESCRIPTOR else view
        return lambda value: start + inner(value)
    if field.enum_type is not None:
        return _Names(start, field.enum_type).__getitem__
    if field.type == FieldDescriptor.TYPE_STRING:
        return lambda value: start + quoted(value)
    return _SCALARS[field.type](start)


def _time(value: Timestamp) -> str:
    nanos = value.nanos
    if nanos % 1000 == 0 and nanos % 1_000_000 and 0 < nanos < _SECOND:
        return f'"{_second(value.seconds)}.{nanos // 1000:06}Z"'
    if not 0 <= nanos < _SECOND:
        raise ValueError("a time has too many nanoseconds")
    if nanos % 1000:
        return f'"{_second(value.seconds)}.{nanos:09}Z"'
    fraction = f".{nanos // 1_000_000:03}" if nanos else ""
    return f'"{_second(value.seconds)}{fraction}Z"'


@lru_cache(maxsize=4096)
def _second(seconds: int) -> str:
    if not _FIRST_SECOND <= seconds <= _LAST_SECOND:
        raise ValueError("no calendar has that time")
    epoch = datetime.datetime(1970, 1, 1)
    return (epoch + datetime.timedelta(seconds=seconds)).isoformat()


#: Of what is shown of a field, what comes after its name.
_SCALARS: Mapping[int, Callable[[str], _Render]] = {
    FieldDescriptor.TYPE_UINT32: lambda start: (start + "%d").__mod__,
    FieldDescriptor.TYPE_UINT64: lambda start: (start + '"%d"').__mod__,
    FieldDescriptor.TYPE_BOOL: lambda start: lambda value: start + "true",
    FieldDescriptor.TYPE_BYTES: lambda start: (
        lambda value: f'{start}"{base64.b64encode(value).decode()}"'
    ),
}
