"""Statements that say who is next, and why others wait.

Attempts of reviews wait in lanes: a tenant's, a key's and a priority's, each in the order of
`due_time`. A pick looks at the tenants that were served longest ago, no more of them than it has
places for and some; and of each at the first of its lanes, never at the rest, however many wait
there. A row of `pause` closes the lanes of a key or of a tenant for a time.
"""

from __future__ import annotations

from typing import Final

# One pick at a time, of all replicas: each counts what those before it have given.
PICK_LOCK: Final = "SELECT pg_advisory_xact_lock(7089083)"

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
    SELECT id FROM picked
    UNION ALL
    SELECT NULL WHERE (SELECT count(*) FROM candidate) = %(look)s
        AND (SELECT count(*) FROM picked) < %(room)s"""

# What a pause held back is looked at now.
CALL_FOR_TURN: Final = """
    UPDATE turn SET due = least(due, now()), called = pg_current_xact_id()::text::bigint
    WHERE tenant = %(tenant)s
    RETURNING pg_notify('byokeep_due', '')"""

# What used no key goes back as it was, under another fence; its place in the lane stays.
PUT_BACK: Final = """
    WITH held AS (
        SELECT id, review_id FROM attempt
        WHERE id = %(id)s AND fence = %(fence)s AND turn = %(turn)s AND state = 'RUNNING'
        FOR UPDATE),
    r AS (
        UPDATE review SET state = 'QUEUED', fence = fence + 1, version = version + 1
        FROM held WHERE review.id = held.review_id
        RETURNING review.id, review.fence, pg_notify('byokeep_review', review.id))
    UPDATE attempt SET state = 'QUEUED', fence = r.fence, key_version = %(next_version)s,
        tries = tries + %(counted)s,
        due_time = CASE WHEN %(delay)s > 0
            THEN now() + make_interval(secs => %(delay)s) ELSE due_time END,
        wait_since = CASE WHEN wait_reason = %(wait_reason)s THEN wait_since ELSE now() END,
        wait_reason = %(wait_reason)s, wait_cause = %(wait_cause)s,
        stalled_since = coalesce(stalled_since, now())
    FROM held, r WHERE attempt.id = held.id
    RETURNING pg_notify('byokeep_due', '')"""

# It goes on where it began unless it was over for two minutes. Where nobody said for how long: a
# quarter of what it has lasted already, at most a minute.
PAUSE: Final = """
    INSERT INTO pause (tenant, key_id, reason, until)
    VALUES (%(tenant)s, %(key_id)s, %(reason)s, CASE WHEN %(until_told)s
        THEN 'infinity' ELSE now() + make_interval(secs => %(delay)s) END)
    ON CONFLICT (tenant, key_id, reason) DO UPDATE SET
        since = CASE WHEN pause.until > now() - interval '2 minutes'
            THEN pause.since ELSE now() END,
        until = greatest(pause.until, excluded.until, CASE WHEN NOT %(told)s THEN
            now() + least(interval '1 minute', (now() - pause.since) / 4) END)"""

# Nobody runs it while one is open; the pause's row, locked before, orders who asks.
CHECK_KEY: Final = """
    WITH known AS (
        INSERT INTO key_validation (key_id, version, tenant, provider, owner, actor)
        VALUES (%(key_id)s, %(version)s, %(tenant)s, %(provider)s, %(owner)s, %(actor)s)
        ON CONFLICT (tenant, key_id, version) DO UPDATE SET fence = key_validation.fence + 1
        RETURNING fence)
    INSERT INTO attempt (id, kind, tenant, key_id, key_version, number, fence)
    SELECT %(check_id)s, 'CHECK', %(tenant)s, %(key_id)s, %(version)s, fence, fence FROM known
    RETURNING pg_notify('byokeep_due', '')"""

CHECK_OPEN: Final = """
    SELECT FROM attempt WHERE tenant = %(tenant)s AND key_id = %(key_id)s AND kind = 'CHECK'
        AND state IN ('QUEUED', 'RUNNING')"""

# What waited goes on, on the version that is ACTIVE now.
RESUME_KEY: Final = """
    WITH over AS (
        DELETE FROM pause WHERE tenant = %(tenant)s AND key_id = %(key_id)s
            AND reason = ANY(CAST(%(reasons)s AS text[]))),
    moved AS (
        UPDATE attempt SET key_version = %(version)s
        WHERE tenant = %(tenant)s AND key_id = %(key_id)s AND kind = 'REVIEW' AND state = 'QUEUED'
            AND %(version)s > 0 AND key_version <> %(version)s)
    SELECT"""

PAUSED_KEYS: Final = """
    SELECT tenant, key_id, reason FROM pause
    WHERE key_id <> '' AND until = 'infinity' ORDER BY tenant, key_id LIMIT 1000"""

# The whole deployment: nothing is picked then anyway, but who waits is told why.
PAUSE_ALL: Final = """
    WITH others AS (
        DELETE FROM pause WHERE tenant = '' AND reason <> %(reason)s)
    INSERT INTO pause (tenant, key_id, reason, until)
    SELECT '', '', %(reason)s, now() + make_interval(secs => %(seconds)s) WHERE %(reason)s <> ''
    ON CONFLICT (tenant, key_id, reason) DO UPDATE SET until = excluded.until"""

# Lanes are few where reviews are many: pauses are looked up for those.
WAITING: Final = """
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

DROP_PAUSES: Final = "DELETE FROM pause WHERE until < now() - interval '2 minutes'"

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
STALLED: Final = """
    UPDATE attempt a SET stalled_since = greatest(pause.since, a.create_time)
    FROM pause
    WHERE a.state = 'QUEUED' AND a.kind = 'REVIEW' AND a.stalled_since IS NULL
        AND (pause.tenant = '' OR pause.tenant = a.tenant)
        AND (pause.key_id = '' OR pause.key_id = a.key_id)
        AND pause.until > now() AND pause.since < now() - interval '1 minute'"""

# What has waited for as long as anything may, for one reason after the other, and waits now.
WAITED_TOO_LONG: Final = f"""
    SELECT a.id AS attempt_id, wait.reason, review.id AS review_id, review.key_id, review.model,
        review.key_owner
    FROM attempt a JOIN review ON review.id = a.review_id {WAIT}
    WHERE a.state = 'QUEUED' AND a.kind = 'REVIEW' AND wait.reason IS NOT NULL
        AND a.stalled_since < now() - make_interval(secs => %(seconds)s)
    LIMIT 100"""  # noqa: S608 - constants

GIVE_UP: Final = """
    WITH a AS (
        UPDATE attempt SET state = 'FAILED', failure = %(reason)s, end_time = now()
        WHERE id = %(attempt_id)s AND state = 'QUEUED'
        RETURNING review_id)
    UPDATE review SET state = 'FAILED', failure = %(reason)s, failure_message = %(message)s,
        end_time = now(), version = version + 1
    FROM a WHERE review.id = a.review_id
    RETURNING pg_notify('byokeep_review', review.id)"""
