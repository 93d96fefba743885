"""The readable view of an audit event, as JSON text.

Written once for who exports and for who verifies, and fast enough to be compared for
each of a million events: the text is that of `json.dumps(MessageToDict(event))`.
"""

from __future__ import annotations

import base64
import datetime
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from json.encoder import encode_basestring_ascii as quoted
from operator import attrgetter
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

_Render = Callable[[Any], str]
_SECOND = 1_000_000_000
_FIRST_SECOND = -62_135_596_800  # 0001-01-01
_LAST_SECOND = 253_402_300_799  # 9999-12-31T23:59:59


#: Fields that differ from event to event; the text of all others is made once and remembered.
_VARIED = frozenset(
    (
        "sequence",
        "event_time",
        "key_id",
        "lease_id",
        "grant_id",
        "review_id",
        "attempt_id",
        "fence",
        "count",
        "report",
        "pruned_sequence",
        "pruned_hash",
        "carried_hash",
        "process_id",
        "open_time",
        "close_time",
    )
)
_REMEMBERED = 4096


def view(message: Message) -> str:
    """Return the JSON text of a message. Raises ValueError for a time that no calendar has."""
    plan = _plan(message.DESCRIPTOR)
    varied: list[Any] = [*plan.varied(message)]
    for place, name in plan.messages:
        if not message.HasField(name):
            varied[place] = None
    # A scalar field is shown where it is not its default, which is false.
    shape = (plan.fixed(message), tuple(map(bool, varied)))
    form = plan.forms.get(shape) or plan.form(shape)
    return form[0] % tuple(
        [render(value) for render, value in zip(form[1], filter(None, varied), strict=True)]
    )


_Form = tuple[str, list[_Render]]


class _Plan:
    """How a kind of message is rendered: everything that need not be looked up again."""

    def __init__(self, descriptor: Descriptor) -> None:
        self._fields = sorted(descriptor.fields, key=lambda field: field.number)
        self._varied = [field for field in self._fields if field.name in _VARIED]
        self._fixed = [field for field in self._fields if field.name not in _VARIED]
        self.varied = _values(self._varied)
        self.fixed = _values(self._fixed)
        self.messages = [
            (place, field.name)
            for place, field in enumerate(self._varied)
            if field.message_type is not None
        ]
        self.forms: dict[tuple[Any, ...], _Form] = {}

    def form(self, shape: tuple[Any, ...]) -> _Form:
        """Return the text around the varied values of a shape, and what renders those."""
        fixed = dict(zip((field.name for field in self._fixed), shape[0], strict=True))
        shown = dict(zip((field.name for field in self._varied), shape[1], strict=True))
        parts, renders = [], []
        for field in self._fields:
            start, render = f"{quoted(field.json_name)}: ", _renderer(field)
            if shown.get(field.name):
                parts.append(start + "%s")
                renders.append(render)
            elif fixed.get(field.name):
                parts.append(start + render(fixed[field.name]).replace("%", "%%"))
        if len(self.forms) >= _REMEMBERED:
            self.forms.clear()
        self.forms[shape] = form = ("{" + ", ".join(parts) + "}", renders)
        return form


def _values(fields: Sequence[FieldDescriptor]) -> Callable[[Message], tuple[Any, ...]]:
    if not fields:
        return lambda message: ()
    names = [field.name for field in fields]
    # attrgetter of one name gives no tuple: the first is read twice, and left out.
    get = attrgetter(names[0], *names)
    return lambda message: get(message)[1:]


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


_SCALARS: Mapping[int, _Render] = {
    FieldDescriptor.TYPE_STRING: quoted,
    FieldDescriptor.TYPE_UINT32: str,
    FieldDescriptor.TYPE_UINT64: '"{}"'.format,
    FieldDescriptor.TYPE_BOOL: lambda value: "true" if value else "false",
    FieldDescriptor.TYPE_BYTES: lambda value: f'"{base64.b64encode(value).decode()}"',
}
