"""The readable view is what protobuf's own JSON is."""

from __future__ import annotations

import json

import pytest
from byokeep.auditlog import view as auditview
from byokeep.keyvault.v1 import audit_pb2
from google.protobuf import descriptor_pb2, json_format
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st

_BY_TYPE = {
    FieldDescriptor.TYPE_STRING: st.text(max_size=20) | st.just('%s "\\\n%'),
    FieldDescriptor.TYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_ENUM: st.integers(0, 30),
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=40),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
}


def fill(draw, message) -> None:
    if message.DESCRIPTOR.full_name == "google.protobuf.Timestamp":
        message.seconds = draw(st.integers(-62_135_596_800, 253_402_300_799))
        message.nanos = draw(st.sampled_from([0, 1, 1_000, 1_000_000, 123_456_000, 999_999_999]))
        return
    for field in message.DESCRIPTOR.fields:
        if not draw(st.booleans()):
            continue
        if field.message_type is not None:
            getattr(message, field.name).SetInParent()
            fill(draw, getattr(message, field.name))
        else:
            setattr(message, field.name, draw(_BY_TYPE[field.type]))


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_view_is_that_of_protobuf(data):
    event = audit_pb2.AuditEvent()
    fill(data.draw, event)
    assert auditview.view(event) == json.dumps(json_format.MessageToDict(event))


@pytest.mark.parametrize(("seconds", "nanos"), [(10**15, 0), (-(10**15), 0), (0, -1), (0, 10**9)])
def test_a_time_that_no_calendar_has(seconds, nanos):
    event = audit_pb2.AuditEvent()
    event.event_time.seconds, event.event_time.nanos = seconds, nanos
    with pytest.raises(ValueError, match="time"):
        auditview.view(event)


def test_a_repeated_field_has_no_view():
    with pytest.raises(TypeError, match="no repeated fields"):
        auditview.view(descriptor_pb2.FileDescriptorProto(dependency=["a.proto"]))
