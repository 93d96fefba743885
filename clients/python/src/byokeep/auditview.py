"""The readable view of an audit event, as JSON text.

Written once for who exports and for who verifies, and fast enough to be compared for
each of a million events: the text is that of `json.dumps(MessageToDict(event))`.
"""

from __future__ import annotations

import base64
import datetime
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from json.encoder import encode_basestring_ascii as quoted
from operator import attrgetter
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

_Render = Callable[[Any], str]
_FIRST_SECOND = -62_135_596_800  # 0001-01-01
_LAST_SECOND = 253_402_300_799  # 9999-12-31T23:59:59


def view(message: Message) -> str:
    """Return the JSON text of a message. Raises ValueError for a time that no calendar has."""
    plan = _plan(message.DESCRIPTOR)
    values: list[Any] = [*plan.values(message)]
    for place, name in plan.messages:
        if not message.HasField(name):
            values[place] = None
    # A scalar field is shown where it is not its default, which is false.
    return (
        "{"
        + ", ".join(
            [
                start + render(value)
                for start, render, value in zip(plan.starts, plan.renders, values, strict=True)
                if value
            ]
        )
        + "}"
    )


class _Plan:
    """How a kind of message is rendered: everything that need not be looked up again."""

    def __init__(self, descriptor: Descriptor) -> None:
        fields = sorted(descriptor.fields, key=lambda field: field.number)
        self.values = attrgetter(*(field.name for field in fields))
        self.starts = [f"{quoted(field.json_name)}: " for field in fields]
        self.renders = [_renderer(field) for field in fields]
        self.messages = [
            (place, field.name)
            for place, field in enumerate(fields)
            if field.type == FieldDescriptor.TYPE_MESSAGE
        ]


class _Names(dict[int, str]):
    """Names of an enum's values; a number that it does not know stands for itself."""

    def __missing__(self, number: int) -> str:
        return str(number)


@cache
def _plan(descriptor: Descriptor) -> _Plan:
    return _Plan(descriptor)


def _renderer(field: FieldDescriptor) -> _Render:
    if field.is_repeated:
        raise TypeError(f"{field.full_name}: an event has no repeated fields")
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return _time if field.message_type is Timestamp.DESCRIPTOR else view
    if field.enum_type is not None:
        names = _Names({value.number: quoted(value.name) for value in field.enum_type.values})
        return names.__getitem__
    return _SCALARS[field.type]


def _time(value: Timestamp) -> str:
    nanos = value.nanos
    if not 0 <= nanos < 1_000_000_000:
        raise ValueError("a time has too many nanoseconds")
    if nanos % 1000:
        return f'"{_second(value.seconds)}.{nanos:09}Z"'
    if nanos % 1_000_000:
        return f'"{_second(value.seconds)}.{nanos // 1000:06}Z"'
    return f'"{_second(value.seconds)}.{nanos // 1_000_000:03}Z"' if nanos else _whole(value)


def _whole(value: Timestamp) -> str:
    return f'"{_second(value.seconds)}Z"'


@lru_cache(maxsize=4096)
def _second(seconds: int) -> str:
    if not _FIRST_SECOND <= seconds <= _LAST_SECOND:
        raise ValueError("no calendar has that time")
    epoch = datetime.datetime(1970, 1, 1)
    return (epoch + datetime.timedelta(seconds=seconds)).isoformat()


_SCALARS: Mapping[int, _Render] = {
    FieldDescriptor.TYPE_STRING: quoted,
    FieldDescriptor.TYPE_UINT32: str,
    FieldDescriptor.TYPE_UINT64: '"{}"'.format,
    FieldDescriptor.TYPE_BOOL: lambda value: "true" if value else "false",
    FieldDescriptor.TYPE_BYTES: lambda value: f'"{base64.b64encode(value).decode()}"',
}
