"""Who is next: picks attempts whose turn it is, and loads all that it takes to run them.

Attempts of reviews wait in lanes: a tenant's, a key's and a priority's, each in the order of
`due_time`. A pick looks at the tenants that were served longest ago, no more of them than it has
places for and some; and of each at the first of its lanes, never at the rest, however many wait
there. A row of `pause` closes the lanes of a key or of a tenant for a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from services.orchestrator.policy.plans import Plans
from services.orchestrator.policy.states import AttemptKind
from services.orchestrator.store.attempts import AnyAttempt, KeyAttempt, ReviewAttempt
from services.orchestrator.store.database import Database, Session

# Tenants that a pick looks at beside those that it has places for: some are held back, or have as
# many places as they may.
_LOOK: Final = 64

# One pick at a time, of all replicas: each counts what those before it have given.
_PICK_LOCK: Final = "SELECT pg_advisory_xact_lock(7089083)"

# Validations first: they are one short call, and somebody waits for each. Then the tenants in turn,
# by when each was served last; within a tenant, interactive before batch, then by time. A tenant of
# which there is nothing to pick is not looked at again for two seconds, unless something calls for
# it: see the trigger of `attempt`. NULL says that there are further tenants to look at.
PICK: Final = """
    WITH RECURSIVE candidate AS MATERIALIZED (
        SELECT tenant, served, called FROM turn
        WHERE due < 'infinity' AND due <= now() ORDER BY served, tenant LIMIT %(look)s),
    ready AS MATERIALIZED (
        SELECT candidate.tenant, candidate.served, plan.places - busy.attempts AS places
        FROM candidate
            -- OFFSET: no join, which would read all tenants.
            CROSS JOIN LATERAL (
                SELECT plan FROM tenant
                WHERE tenant.id = candidate.tenant AND state = 'ACTIVE' OFFSET 0) active
            CROSS JOIN LATERAL (SELECT coalesce((
                SELECT known.places
                FROM unnest(CAST(%(plans)s AS text[]), CAST(%(places)s AS int[]))
                    AS known (name, places)
                WHERE known.name = active.plan), %(otherwise)s) AS places) plan
            CROSS JOIN LATERAL (
                SELECT count(*) AS attempts FROM attempt
                WHERE attempt.tenant = candidate.tenant AND state = 'RUNNING'
                    AND kind = 'REVIEW') busy
        WHERE plan.places > busy.attempts AND NOT EXISTS (
            SELECT FROM pause
            WHERE pause.tenant = candidate.tenant AND pause.key_id = '' AND pause.until > now())),
    lane AS (
        SELECT ready.tenant, first.key_id, first.priority FROM ready, LATERAL (
            SELECT key_id, priority FROM attempt
            WHERE state = 'QUEUED' AND kind = 'REVIEW' AND tenant = ready.tenant
            ORDER BY key_id, priority LIMIT 1) first
        UNION ALL
        SELECT lane.tenant, following.key_id, following.priority FROM lane, LATERAL (
            SELECT key_id, priority FROM attempt
            WHERE state = 'QUEUED' AND kind = 'REVIEW' AND tenant = lane.tenant
                AND (key_id, priority) > (lane.key_id, lane.priority)
            ORDER BY key_id, priority LIMIT 1) following),
    open_lane AS (
        SELECT lane.*, ready.places, ready.served FROM lane JOIN ready USING (tenant)
        WHERE NOT EXISTS (
            SELECT FROM pause
            WHERE pause.tenant = lane.tenant AND pause.key_id = lane.key_id
                AND pause.until > now())),
    head AS (
        SELECT first.id, open_lane.tenant, open_lane.served, open_lane.places, row_number() OVER (
            PARTITION BY open_lane.tenant ORDER BY open_lane.priority, first.due_time, first.id
            ) AS place
        FROM open_lane, LATERAL (
            SELECT id, due_time FROM attempt
            WHERE state = 'QUEUED' AND kind = 'REVIEW' AND tenant = open_lane.tenant
                AND key_id = open_lane.key_id AND priority = open_lane.priority
                AND due_time <= now()
            ORDER BY due_time LIMIT least(%(room)s, open_lane.places)) first),
    key_check AS (
        -- No join: one that began with the tenants would read all that waits.
        SELECT id, due_time FROM attempt
        WHERE state = 'QUEUED' AND kind <> 'REVIEW' AND due_time <= now()
            AND (SELECT state FROM tenant WHERE tenant.id = attempt.tenant) = 'ACTIVE'
        ORDER BY due_time LIMIT %(room)s),
    chosen AS (
        SELECT id FROM (
            SELECT id, 0 AS place, due_time AS served FROM key_check
            UNION ALL
            SELECT id, place, served FROM head WHERE place <= places) one
        ORDER BY place, served, id LIMIT %(room)s),
    picked AS (
        UPDATE attempt SET state = 'RUNNING', start_time = now(), heartbeat_time = now()
        WHERE id IN (
            SELECT id FROM attempt
            WHERE id IN (SELECT id FROM chosen) AND state = 'QUEUED' FOR UPDATE SKIP LOCKED)
        RETURNING id, kind, tenant, review_id),
    served AS (
        INSERT INTO turn (tenant, served)
        SELECT tenant, max(clock_timestamp()) FROM picked WHERE kind = 'REVIEW' GROUP BY tenant
        ON CONFLICT (tenant) DO UPDATE SET served = excluded.served),
    later AS (
        UPDATE turn SET due = CASE WHEN EXISTS (
                SELECT FROM attempt
                WHERE attempt.tenant = turn.tenant AND state = 'QUEUED' AND kind = 'REVIEW')
            THEN now() + interval '2 seconds' ELSE 'infinity' END
        WHERE tenant = ANY(ARRAY(SELECT tenant FROM candidate EXCEPT SELECT tenant FROM head))
            AND called = (SELECT called FROM candidate WHERE candidate.tenant = turn.tenant)),
    running AS (
        -- Not notified: most reviews are done before a watcher could have looked, and who waits
        -- for one looks again by itself.
        UPDATE review SET state = 'RUNNING', start_time = now(), version = version + 1
        FROM picked WHERE review.id = picked.review_id)
    SELECT id, kind FROM picked
    UNION ALL
    SELECT NULL, NULL WHERE (SELECT count(*) FROM candidate) = %(look)s
        AND (SELECT count(*) FROM picked) < %(room)s"""

# A call whose answer the runner may still hold. An attempt that silences its workers again and
# again is not handed on for ever.
IN_CALL: Final = """kind = 'REVIEW' AND turn < 3 AND EXISTS (
                SELECT FROM provider_call c
                WHERE c.attempt_id = attempt.id AND c.finish_time IS NULL)"""

# Its worker's writes raise Fenced from now on.
_TAKE_OVER: Final = f"""
    UPDATE attempt SET turn = turn + 1, heartbeat_time = now()
    WHERE id IN (
        SELECT id FROM attempt
        WHERE state = 'RUNNING'
            AND heartbeat_time < now() - make_interval(secs => %(seconds)s)
            AND {IN_CALL}
        ORDER BY heartbeat_time LIMIT %(limit)s FOR UPDATE SKIP LOCKED)
    RETURNING id"""  # noqa: S608 - constants

_OF_ANY: Final = """a.id AS attempt_id, a.tenant, a.key_id, a.key_version, a.fence, a.tries, a.turn,
        a.runner_id"""
_REVIEWS: Final = f"""
    SELECT {_OF_ANY}, a.review_id,
        split_part(r.model, '/', 1) AS provider, r.key_owner AS owner, r.actor,
        a.wait_reason, CAST(coalesce(extract(epoch FROM now() - a.wait_since), 0) AS float)
            AS waited_seconds,
        a.calls_started AS calls_made, r.chunks_total,
        substr(r.model, strpos(r.model, '/') + 1) AS model,
        substr(r.plan_model, strpos(r.plan_model, '/') + 1) AS plan_model, r.fallback_models,
        coalesce(c.input, '') AS input,
        ARRAY(SELECT chunk_id FROM chunk_done WHERE review_id = r.id) AS done_chunks,
        r.max_calls - r.calls_started AS calls_left, r.trace_parent, t.retry_ambiguous
    FROM attempt a JOIN tenant t ON t.id = a.tenant JOIN review r ON r.id = a.review_id
        LEFT JOIN review_content c ON c.review_id = r.id
    WHERE a.id = ANY(CAST(%(ids)s AS text[]))"""  # noqa: S608 - constants
_KEYS: Final = f"""
    SELECT {_OF_ANY}, a.kind, v.provider, v.owner, v.actor, v.attempts AS validations,
        CAST(extract(epoch FROM now() - v.create_time) / 3600 AS float) AS validation_hours,
        v.destroy_previous,
        a.kind = 'CHECK' AND EXISTS (
            SELECT FROM pause p
            WHERE p.tenant = a.tenant AND p.key_id = a.key_id AND p.reason = 'KEY_REJECTED')
            AS reviews_wait
    FROM attempt a JOIN key_validation v
        ON v.tenant = a.tenant AND v.key_id = a.key_id AND v.version = a.key_version
    WHERE a.id = ANY(CAST(%(ids)s AS text[]))"""  # noqa: S608 - constants


class PickStore:
    """Gives attempts to workers."""

    def __init__(self, database: Database, plans: Plans) -> None:
        """Use a database, and the places that plans have."""
        self._database = database
        places, otherwise = plans.places()
        self._places = {
            "plans": list(places),
            "places": list(places.values()),
            "otherwise": otherwise,
        }

    async def pick(self, room: int) -> list[AnyAttempt]:
        """Make up to `room` attempts RUNNING whose turn it is, and return them."""
        reviews: list[str] = []
        keys: list[str] = []
        more = True
        while more and (left := room - len(reviews) - len(keys)) > 0:
            parameters = {"room": left, "look": left + _LOOK, **self._places}
            rows = await self._database.batch((_PICK_LOCK, {}), (PICK, parameters))
            more = any(row.id is None for row in rows)
            for row in rows:
                if row.id is not None:
                    (reviews if row.kind == AttemptKind.REVIEW else keys).append(row.id)
        if not reviews and not keys:
            return []
        async with self._database.statement() as session:
            # Keys first: somebody waits for each.
            return [*await load_keys(session, keys), *await load_reviews(session, reviews)]

    async def take_over(self, seconds: float, limit: int) -> list[ReviewAttempt]:
        """Return attempts whose workers fell silent in a provider call for so long, to go on
        with. Those workers' writes raise Fenced from now on."""
        async with self._database.statement() as session:
            taken = await session.all(_TAKE_OVER, {"seconds": seconds, "limit": limit})
            return await load_reviews(session, [row.id for row in taken])


async def load_reviews(session: Session, attempt_ids: Sequence[str]) -> list[ReviewAttempt]:
    """Return attempts of reviews, with all that it takes to run them."""
    found = await session.all(_REVIEWS, {"ids": attempt_ids}) if attempt_ids else []
    return [ReviewAttempt(**row._asdict()) for row in found]


async def load_keys(session: Session, attempt_ids: Sequence[str]) -> list[KeyAttempt]:
    """Return attempts of keys, with all that it takes to run them."""
    found = await session.all(_KEYS, {"ids": attempt_ids}) if attempt_ids else []
    return [KeyAttempt(**row._asdict() | {"kind": AttemptKind(row.kind)}) for row in found]
