"""The two clocks, of this process and of the database: what can't be undone waits until they agree.

A clock that runs ahead would cost what customers can't get back. Whoever sets the database's can
delay such work by this, but not have it done.
"""

from __future__ import annotations

import datetime
import logging
from typing import Final

from services.common import logs
from services.keyvault.database import Database

log = logging.getLogger(__name__)
#: The clocks may differ by so much.
_APART: Final = datetime.timedelta(minutes=5)


async def agree(database: Database, now: datetime.datetime) -> bool:
    """Say whether the database's clock tells about the time `now`; log it where it does not."""
    row = await database.one("SELECT now()")
    assert row is not None  # noqa: S101 a SELECT without FROM
    theirs: datetime.datetime = row[0].astimezone(datetime.UTC)
    if abs(theirs - now) <= _APART:
        return True
    logs.event(log, "clocks_differ", level=logging.CRITICAL, database=theirs.isoformat())
    return False
