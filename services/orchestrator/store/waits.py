"""Waits: whose attempts are held back, and for how long at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from services.orchestrator.metrics import Waiting
from services.orchestrator.policy import failures
from services.orchestrator.policy.failures import Decision, Holds
from services.orchestrator.policy.keys import OPERATOR
from services.orchestrator.policy.states import Reason
from services.orchestrator.store import checks
from services.orchestrator.store.database import Database, Session

if TYPE_CHECKING:
    from services.orchestrator.store.attempts import ReviewAttempt

#: What a key's promotion, or its end, is waited for with.
OF_KEYS: Final = tuple(
    name for name, row in failures.TABLE.items() if row.holds is Holds.KEY and row.until_told
)

# It goes on where it began unless it was over for two minutes. Where nobody said for how long: a
# quarter of what it has lasted already, at most a minute.
_PAUSE: Final = """
    INSERT INTO pause (tenant, key_id, reason, until)
    VALUES (%(tenant)s, %(key_id)s, %(reason)s, CASE WHEN %(until_told)s
        THEN 'infinity' ELSE now() + make_interval(secs => %(delay)s) END)
    ON CONFLICT (tenant, key_id, reason) DO UPDATE SET
        since = CASE WHEN pause.until > now() - interval '2 minutes'
            THEN pause.since ELSE now() END,
        until = greatest(pause.until, excluded.until, CASE WHEN NOT %(told)s THEN
            now() + least(interval '1 minute', (now() - pause.since) / 4) END)"""

# What waited goes on, on the version that is ACTIVE now.
_RESUME_KEY: Final = """
    WITH over AS (
        DELETE FROM pause WHERE tenant = %(tenant)s AND key_id = %(key_id)s
            AND reason = ANY(CAST(%(reasons)s AS text[]))),
    moved AS (
        UPDATE attempt SET key_version = %(version)s
        WHERE tenant = %(tenant)s AND key_id = %(key_id)s AND kind = 'REVIEW' AND state = 'QUEUED'
            AND %(version)s > 0 AND key_version <> %(version)s)
    SELECT"""

# What a pause held back is looked at now.
_CALL_FOR_TURN: Final = """
    UPDATE turn SET due = least(due, now()), called = pg_current_xact_id()::text::bigint
    WHERE tenant = %(tenant)s
    RETURNING pg_notify('byokeep_due', '')"""

_PAUSED_KEYS: Final = """
    SELECT tenant, key_id, reason FROM pause
    WHERE key_id <> '' AND until = 'infinity' ORDER BY tenant, key_id LIMIT 1000"""

# The whole deployment: nothing is picked then anyway, but who waits is told why.
_PAUSE_ALL: Final = """
    WITH others AS (
        DELETE FROM pause WHERE tenant = '' AND reason <> %(reason)s)
    INSERT INTO pause (tenant, key_id, reason, until)
    SELECT '', '', %(reason)s, now() + make_interval(secs => %(seconds)s) WHERE %(reason)s <> ''
    ON CONFLICT (tenant, key_id, reason) DO UPDATE SET until = excluded.until"""

# Lanes are few where reviews are many: pauses are looked up for those.
_WAITING: Final = """
    WITH lane AS (
        SELECT tenant, key_id, CASE WHEN due_time > now() THEN wait_reason ELSE '' END AS reason,
            count(*) AS attempts,
            min(CASE WHEN due_time > now() THEN wait_since ELSE due_time END) AS since
        FROM attempt WHERE state = 'QUEUED' AND kind = 'REVIEW' GROUP BY 1, 2, 3)
    SELECT coalesce(nullif(lane.reason, ''), held.reason, 'TURN') AS reason,
        sum(lane.attempts)::bigint AS attempts,
        extract(epoch FROM now() - min(lane.since))::float8 AS seconds
    FROM lane LEFT JOIN LATERAL (
        SELECT reason FROM pause WHERE until > now()
            AND (tenant, key_id) IN (('', ''), (lane.tenant, ''), (lane.tenant, lane.key_id))
        ORDER BY until DESC LIMIT 1) held ON true
    GROUP BY 1"""

_DROP_PAUSES: Final = "DELETE FROM pause WHERE until < now() - interval '2 minutes'"

#: Joins to a row `review` what it waits for, as `wait`: the reason that lasts longest.
WAIT: Final = """
    LEFT JOIN LATERAL (
        SELECT one.reason, one.cause, one.since, one.until,
            least(a.stalled_since, one.since) AS stalled FROM attempt a, LATERAL (
            SELECT a.wait_reason AS reason, a.wait_cause AS cause, a.wait_since AS since,
                a.due_time AS until
            WHERE a.wait_reason <> '' AND a.due_time > now()
            UNION ALL
            SELECT pause.reason, '', greatest(pause.since, a.create_time), pause.until FROM pause
            WHERE pause.until > now() AND (pause.tenant, pause.key_id) IN (
                ('', ''), (a.tenant, ''), (a.tenant, a.key_id))) one
        WHERE a.review_id = review.id AND a.state = 'QUEUED' AND review.state = 'QUEUED'
        ORDER BY one.until DESC LIMIT 1) wait ON true"""

# Who is held back with others counts from when that began. A pause that is soon over is no wait.
_STALLED: Final = """
    UPDATE attempt a SET stalled_since = greatest(pause.since, a.create_time)
    FROM pause
    WHERE a.state = 'QUEUED' AND a.kind = 'REVIEW' AND a.stalled_since IS NULL
        AND (pause.tenant = '' OR pause.tenant = a.tenant)
        AND (pause.key_id = '' OR pause.key_id = a.key_id)
        AND pause.until > now() AND pause.since < now() - interval '1 minute'"""

# What has waited for as long as anything may, for one reason after the other, and waits now.
_WAITED_TOO_LONG: Final = f"""
    SELECT a.id AS attempt_id, wait.reason, review.id AS review_id, review.key_id, review.model,
        review.key_owner
    FROM attempt a JOIN review ON review.id = a.review_id {WAIT}
    WHERE a.state = 'QUEUED' AND a.kind = 'REVIEW' AND wait.reason IS NOT NULL
        AND a.stalled_since < now() - make_interval(secs => %(seconds)s)
    LIMIT 100"""  # noqa: S608 - constants

_GIVE_UP: Final = """
    WITH a AS (
        UPDATE attempt SET state = 'FAILED', failure = %(reason)s, end_time = now()
        WHERE id = %(attempt_id)s AND state = 'QUEUED'
        RETURNING review_id)
    UPDATE review SET state = 'FAILED', failure = %(reason)s, failure_message = %(message)s,
        end_time = now(), version = version + 1
    FROM a WHERE review.id = a.review_id
    RETURNING pg_notify('byokeep_review', review.id)"""


@dataclass(frozen=True, slots=True)
class PausedKey:
    """A key whose reviews wait until they are told."""

    tenant: str
    key_id: str
    reason: Reason


class WaitStore:
    """Pauses, seen from outside of an attempt."""

    def __init__(self, database: Database, limit_seconds: int) -> None:
        """`limit_seconds` is the longest that a review may wait without a chunk done."""
        self._database = database
        self._limit = limit_seconds

    async def pause_all(self, reason: Reason | None, seconds: float) -> None:
        """Say why nothing of the whole deployment goes on, for some seconds from now; None: it
        goes on."""
        async with self._database.statement() as session:
            await session.run(_PAUSE_ALL, {"reason": reason or "", "seconds": seconds})

    async def waiting(self) -> list[Waiting]:
        """Return how many reviews wait for what, and for how long."""
        async with self._database.statement() as session:
            return [Waiting(*row) for row in await session.all(_WAITING)]

    async def paused_keys(self) -> list[PausedKey]:
        """Return the keys whose reviews wait until they are told."""
        async with self._database.statement() as session:
            found = await session.all(_PAUSED_KEYS)
        return [PausedKey(row.tenant, row.key_id, Reason(row.reason)) for row in found]

    async def is_checked(self, tenant: str, key_id: str) -> bool:
        """Whether a provider is being asked about a key that it rejected once."""
        async with self._database.statement() as session:
            return await checks.is_open(session, tenant, key_id)

    async def resume_key(
        self, tenant: str, key_id: str, version: int, reasons: Sequence[Reason] = OF_KEYS
    ) -> None:
        """Let a key's reviews go on, on this version of it; 0: on theirs."""
        async with self._database.statement() as session:
            await resume(session, tenant, key_id, reasons, version)

    async def sweep(self) -> None:
        """End what has waited too long, and forget pauses that are over."""
        async with self._database.statement() as session:
            await session.run(_STALLED)
            for row in await session.all(_WAITED_TOO_LONG, {"seconds": self._limit}):
                message = failures.failed_sentence(
                    Reason(row.reason),
                    key=row.key_id,
                    model=row.model,
                    managed=row.key_owner == OPERATOR,
                )
                await session.run(
                    _GIVE_UP,
                    {"attempt_id": row.attempt_id, "reason": row.reason, "message": message},
                )
            await session.run(_DROP_PAUSES)


async def hold(session: Session, attempt: ReviewAttempt, decision: Decision) -> None:
    """Hold back who else waits, as was decided about an attempt that failed."""
    if decision.holds is Holds.ATTEMPT:
        return
    await session.run(
        _PAUSE,
        {
            "tenant": attempt.tenant,
            "key_id": attempt.key_id if decision.holds is Holds.KEY else "",
            "reason": decision.reason,
            "delay": decision.delay_seconds,
            "told": decision.told,
            "until_told": decision.until_told,
        },
    )
    if decision.checks:
        await checks.ask(
            session,
            checks.Asked(
                attempt.tenant,
                attempt.key_id,
                attempt.key_version,
                attempt.provider,
                attempt.owner,
                attempt.actor,
            ),
        )


async def pause(session: Session, tenant: str, key_id: str, reason: Reason) -> None:
    """Hold back a key's reviews, or a tenant's, until they are told."""
    await session.run(
        _PAUSE,
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
    session: Session, tenant: str, key_id: str, reasons: Sequence[Reason], version: int = 0
) -> None:
    """Let a key's reviews go on, or a tenant's."""
    await session.run(
        _RESUME_KEY,
        {"tenant": tenant, "key_id": key_id, "reasons": list(reasons), "version": version},
    )
    await session.run(_CALL_FOR_TURN, {"tenant": tenant})
