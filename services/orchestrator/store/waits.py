"""Waits: whose attempts are held back, and for how long at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from byokeep import ids

from services.orchestrator.metrics import Waiting
from services.orchestrator.policy import failures
from services.orchestrator.policy.failures import Decision, Holds
from services.orchestrator.policy.keys import OPERATOR
from services.orchestrator.store import sql_waits
from services.orchestrator.store.database import Database, Session

if TYPE_CHECKING:
    from services.orchestrator.store.attempts import Work

#: What a key's promotion, or its end, is waited for with.
OF_KEYS: Final = tuple(
    name for name, row in failures.TABLE.items() if row.holds is Holds.KEY and row.until_told
)


@dataclass(frozen=True, slots=True)
class PausedKey:
    """A key whose reviews wait until they are told."""

    tenant: str
    key_id: str
    reason: str


class WaitStore:
    """Pauses, seen from outside of an attempt."""

    def __init__(self, database: Database, limit_seconds: int) -> None:
        """`limit_seconds` is the longest that a review may wait without a chunk done."""
        self._database = database
        self._limit = limit_seconds

    async def pause_all(self, reason: str, seconds: float) -> None:
        """Say why nothing of the whole deployment goes on, for some seconds from now; an empty
        reason: it goes on."""
        async with self._database.statement() as session:
            await session.run(sql_waits.PAUSE_ALL, {"reason": reason, "seconds": seconds})

    async def waiting(self) -> list[Waiting]:
        """Return how many reviews wait for what, and for how long."""
        async with self._database.statement() as session:
            return [Waiting(*row) for row in await session.all(sql_waits.WAITING)]

    async def paused_keys(self) -> list[PausedKey]:
        """Return the keys whose reviews wait until they are told."""
        async with self._database.statement() as session:
            found = await session.all(sql_waits.PAUSED_KEYS)
        return [PausedKey(*row) for row in found]

    async def is_checked(self, tenant: str, key_id: str) -> bool:
        """Whether a provider is being asked about a key that it rejected once."""
        parameters = {"tenant": tenant, "key_id": key_id}
        async with self._database.statement() as session:
            return await session.one(sql_waits.CHECK_OPEN, parameters) is not None

    async def resume_key(
        self, tenant: str, key_id: str, version: int, reasons: Sequence[str] = OF_KEYS
    ) -> None:
        """Let a key's reviews go on, on this version of it; 0: on theirs."""
        async with self._database.statement() as session:
            await resume(session, tenant, key_id, reasons, version)

    async def sweep(self) -> None:
        """End what has waited too long, and forget pauses that are over."""
        async with self._database.statement() as session:
            await session.run(sql_waits.STALLED)
            for row in await session.all(sql_waits.WAITED_TOO_LONG, {"seconds": self._limit}):
                message = failures.failed_sentence(
                    row.reason,
                    key=row.key_id,
                    model=row.model,
                    managed=row.key_owner == OPERATOR,
                )
                await session.run(
                    sql_waits.GIVE_UP,
                    {"attempt_id": row.attempt_id, "reason": row.reason, "message": message},
                )
            await session.run(sql_waits.DROP_PAUSES)


async def hold(session: Session, work: Work, decision: Decision | None) -> None:
    """Hold back who else waits, as was decided about an attempt that failed."""
    if decision is None or decision.holds is Holds.ATTEMPT:
        return
    key_id = work.key_id if decision.holds is Holds.KEY else ""
    await session.run(
        sql_waits.PAUSE,
        {
            "tenant": work.tenant,
            "key_id": key_id,
            "reason": decision.reason,
            "delay": decision.delay_seconds,
            "told": decision.told,
            "until_told": decision.until_told,
        },
    )
    if decision.checks:
        await _check(session, work)


async def pause(session: Session, tenant: str, key_id: str, reason: str) -> None:
    """Hold back a key's reviews, or a tenant's, until they are told."""
    await session.run(
        sql_waits.PAUSE,
        {
            "tenant": tenant,
            "key_id": key_id,
            "reason": reason,
            "delay": 0.0,
            "told": True,
            "until_told": True,
        },
    )


async def resume(
    session: Session, tenant: str, key_id: str, reasons: Sequence[str], version: int = 0
) -> None:
    """Let a key's reviews go on, or a tenant's."""
    await session.run(
        sql_waits.RESUME_KEY,
        {"tenant": tenant, "key_id": key_id, "reasons": list(reasons), "version": version},
    )
    await session.run(sql_waits.CALL_FOR_TURN, {"tenant": tenant})


async def _check(session: Session, work: Work) -> None:
    """Have the provider asked once whether it takes a version of a key."""
    parameters = {
        "tenant": work.tenant,
        "key_id": work.key_id,
        "version": work.key_version,
        "provider": work.provider,
        "owner": work.owner,
        "actor": work.actor,
        "check_id": ids.new_id("att"),
    }
    if await session.one(sql_waits.CHECK_OPEN, parameters) is None:
        await session.run(sql_waits.CHECK_KEY, parameters)
