"""A tenant's settings, as several commands read and change them."""

from __future__ import annotations

from typing import Any

from google.protobuf import field_mask_pb2

from byokeep.cli.base.session import Session, request_id
from byokeep.orchestrator.v1 import settings_pb2


def read(session: Session) -> settings_pb2.Settings:
    """Return the tenant's settings."""
    connection = session.connection
    request = settings_pb2.GetSettingsRequest(name=f"{connection.parent}/settings")
    settings: settings_pb2.Settings = connection.settings.GetSettings(request).settings
    return settings


def change(session: Session, **values: Any) -> settings_pb2.Settings:
    """Set these fields of the tenant's settings, and no others; return how all are now."""
    connection = session.connection
    request = settings_pb2.UpdateSettingsRequest(
        settings=settings_pb2.Settings(name=f"{connection.parent}/settings", **values),
        update_mask=field_mask_pb2.FieldMask(paths=list(values)),
        request_id=request_id(),
    )
    settings: settings_pb2.Settings = connection.settings.UpdateSettings(request).settings
    return settings
