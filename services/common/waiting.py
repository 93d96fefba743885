"""Waiting, at start, for what may still come: a database, its schema, Vault."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from services.common import logs

log = logging.getLogger(__name__)
T = TypeVar("T")
_AGAIN_SECONDS: Final = 0.5


class NotYetError(Exception):
    """Something that the service needs is not there, and may still come."""

    def __init__(self, what: str, why: str) -> None:
        """`what` is one word, such as "database"; `why` is a sentence for an operator."""
        super().__init__(f"{what}: {why}")
        self.what = what
        self.why = why


async def until_there(attempt: Callable[[], Awaitable[T]], seconds: float = math.inf) -> T:
    """Try until it does not raise NotYetError; why it waits is logged once, and again when that
    changes. Raises the last NotYetError after so many seconds."""
    told, end = "", time.monotonic() + seconds
    while True:
        try:
            return await attempt()
        except NotYetError as error:
            why = error
        if time.monotonic() > end:
            raise why
        if str(why) != told:
            told = str(why)
            logs.event(log, "waiting", level=logging.WARNING, what=why.what, why=why.why)
        await asyncio.sleep(_AGAIN_SECONDS)
