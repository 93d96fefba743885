"""Every statement that is more than a plain select, insert or update, by name.

Each is one round trip and, run alone, one transaction: what belongs together is one statement of
several `WITH` parts. An attempt's row is locked before its review's. Picking has statements of its
own: `sql_waits`.
"""

from __future__ import annotations

from typing import Final

# --- submitting

LOCK_TENANT: Final = "SELECT plan, state FROM tenant WHERE id = %(tenant)s FOR NO KEY UPDATE"

#: `{columns}`: those of the review, which is `rev` here.
# It counts no more than may wait, however many do.
ADMIT: Final = """
    SELECT state, (
        SELECT count(*) FROM (
            SELECT FROM attempt
            WHERE attempt.tenant = tenant.id AND attempt.state = 'QUEUED' AND kind = 'REVIEW'
            LIMIT %(most)s) one) AS waiting
    FROM tenant WHERE id = %(tenant)s FOR NO KEY UPDATE"""

SUBMIT: Final = """
    WITH req AS (
        INSERT INTO request (tenant, method, scope, digest, resource)
        VALUES (%(tenant)s, 'SubmitReview', %(scope)s, %(digest)s, %(id)s)
        ON CONFLICT DO NOTHING RETURNING 1),
    day AS (
        INSERT INTO rate_bucket (scope, hour, events)
        SELECT 'reviews:' || %(tenant)s, date_trunc('hour', now()), 1 FROM req
        ON CONFLICT (scope, hour) DO UPDATE SET events = rate_bucket.events + 1),
    rev AS (
        INSERT INTO review (id, tenant, repository, pull_request, head_commit, model, chosen_model,
            model_fallback, fallback_models, key_id, key_owner, named_key, owner, actor, max_calls,
            chunks_total, priority, trace_parent)
        SELECT %(id)s, %(tenant)s, %(repository)s, %(pull_request)s, %(head_commit)s,
            %(model)s, %(chosen_model)s, %(model_fallback)s,
            CAST(%(fallback_models)s AS text[]), %(key_id)s, %(key_owner)s, %(named_key)s,
            %(owner)s, %(actor)s, %(max_calls)s, %(chunks_total)s, %(priority)s, %(trace_parent)s
        FROM req
        RETURNING *),
    content AS (
        INSERT INTO review_content (review_id, input) SELECT id, %(input)s FROM rev),
    att AS (
        INSERT INTO attempt (id, kind, tenant, review_id, key_id, key_version, priority)
        SELECT %(attempt_id)s, 'REVIEW', %(tenant)s, id, %(key_id)s, %(key_version)s, %(priority)s
        FROM rev RETURNING pg_notify('byokeep_due', ''))
    SELECT {columns}, CAST(%(key_version)s AS int) AS used_version,
        CAST(%(key_hint)s AS text) AS used_hint, coalesce((
            SELECT sum(events) FROM rate_bucket
            WHERE scope = 'reviews:' || %(tenant)s AND hour > now() - interval '24 hours'
        ), 0) AS earlier_today, coalesce((
            SELECT sum(events) FROM rate_bucket
            WHERE scope = 'calls:' || %(tenant)s AND hour > now() - interval '24 hours'
        ), 0) AS calls_today
    FROM rev, att"""

KEEP_UNREAD: Final = """
    UPDATE review SET unread = %(unread)s, unread_count = %(unread_count)s,
        skipped_count = %(skipped_count)s
    WHERE id = %(id)s"""

# No line of text is changed: what was submitted is complete without an attempt.
NOTHING_TO_READ: Final = """
    WITH a AS (DELETE FROM attempt WHERE id = %(attempt_id)s),
    c AS (DELETE FROM review_content WHERE review_id = %(id)s)
    UPDATE review SET state = 'COMPLETED', attempts = 0, end_time = now() WHERE id = %(id)s"""

RETRY: Final = """
    WITH rev AS (
        UPDATE review SET state = 'QUEUED', failure = '', failure_message = '',
            end_time = NULL, key_id = %(key_id)s, key_owner = %(key_owner)s,
            fence = fence + 1, version = version + 1, attempts = attempts + 1,
            max_calls = calls_started + %(max_calls)s
        WHERE id = %(id)s AND tenant = %(tenant)s AND state = 'FAILED'
            AND EXISTS (SELECT FROM review_content WHERE review_id = %(id)s)
        RETURNING *, pg_notify('byokeep_review', id))
    INSERT INTO attempt (id, kind, tenant, review_id, key_id, key_version, number, fence, priority)
    SELECT %(attempt_id)s, 'REVIEW', %(tenant)s, id, %(key_id)s, %(key_version)s, attempts, fence,
        priority
    FROM rev RETURNING pg_notify('byokeep_due', '')"""

# --- running; each names attempt, fence and turn, and a RUNNING row must match

# Whether reviews wait for what a look at their key says.
_REVIEWS_WAIT: Final = """a.kind = 'CHECK' AND EXISTS (
            SELECT FROM pause p
            WHERE p.tenant = a.tenant AND p.key_id = a.key_id AND p.reason = 'KEY_REJECTED')"""

_WORK: Final = f"""SELECT
        a.id AS attempt_id, a.kind, a.tenant, coalesce(a.review_id, '') AS review_id,
        a.key_id, a.key_version, a.fence, a.tries, a.turn, a.runner_id,
        a.wait_reason, CAST(coalesce(extract(epoch FROM now() - a.wait_since), 0) AS float)
            AS waited_seconds,
        a.calls_started AS calls_made, coalesce(r.chunks_total, 0) AS chunks_total,
        coalesce(v.provider, split_part(r.model, '/', 1)) AS provider,
        coalesce(substr(r.model, strpos(r.model, '/') + 1), '') AS model,
        coalesce(substr(r.plan_model, strpos(r.plan_model, '/') + 1), '') AS plan_model,
        coalesce(r.fallback_models, '{{}}') AS fallback_models,
        coalesce(v.owner, r.key_owner) AS owner, coalesce(v.actor, r.actor) AS actor,
        coalesce(c.input, '') AS input,
        ARRAY(SELECT chunk_id FROM chunk_done WHERE review_id = r.id) AS done_chunks,
        coalesce(r.max_calls - r.calls_started, 0) AS calls_left,
        coalesce(v.attempts, 0) AS validations,
        CAST(coalesce(extract(epoch FROM now() - v.create_time) / 3600, 0) AS float)
            AS validation_hours,
        coalesce(v.destroy_previous, false) AS destroy_previous,
        {_REVIEWS_WAIT} AS reviews_wait,
        coalesce(r.trace_parent, '') AS trace_parent, t.retry_ambiguous
    FROM a JOIN tenant t ON t.id = a.tenant
        LEFT JOIN review r ON r.id = a.review_id
        LEFT JOIN review_content c ON c.review_id = r.id
        LEFT JOIN key_validation v
            ON a.kind <> 'REVIEW' AND v.tenant = a.tenant AND v.key_id = a.key_id
                AND v.version = a.key_version"""  # noqa: S608 - constants

LOAD: Final = f"""
    WITH a AS (SELECT * FROM attempt WHERE id = ANY(CAST(%(ids)s AS text[])))
    {_WORK}"""  # noqa: S608 - constants

# A call whose answer the runner may still hold. An attempt that silences its workers again and
# again is not handed on for ever.
_IN_CALL: Final = """kind = 'REVIEW' AND turn < 3 AND EXISTS (
                SELECT FROM provider_call c
                WHERE c.attempt_id = attempt.id AND c.finish_time IS NULL)"""
_ORPHANED: Final = f"""state = 'RUNNING'
            AND heartbeat_time < now() - make_interval(secs => %(seconds)s)
            AND {_IN_CALL}"""

# Its worker's writes raise Fenced from now on.
TAKE_OVER: Final = f"""
    UPDATE attempt SET turn = turn + 1, heartbeat_time = now()
    WHERE id IN (
        SELECT id FROM attempt WHERE {_ORPHANED}
        ORDER BY heartbeat_time LIMIT %(limit)s FOR UPDATE SKIP LOCKED)
    RETURNING id"""  # noqa: S608 - constants

# A review's call is counted before it is stored, and not at all above the tenant's ceiling: the
# row of the hour orders all who count. The hours before it don't change any more.
CALL_STARTED: Final = """
    WITH due AS (
        SELECT attempt.kind, tenant.id AS tenant, tenant.max_calls_per_day AS ceiling,
            (SELECT coalesce(sum(events), 0) FROM rate_bucket
             WHERE scope = 'calls:' || tenant.id AND hour > now() - interval '24 hours'
                AND hour < date_trunc('hour', now())) AS earlier
        FROM attempt JOIN tenant ON tenant.id = attempt.tenant
        WHERE attempt.id = %(id)s AND fence = %(fence)s AND turn = %(turn)s
            AND attempt.state = 'RUNNING'
        FOR UPDATE OF attempt),
    day AS (
        INSERT INTO rate_bucket (scope, hour, events)
        SELECT 'calls:' || tenant, date_trunc('hour', now()), 1 FROM due
        WHERE kind = 'REVIEW' AND (ceiling = 0 OR earlier < ceiling)
        ON CONFLICT (scope, hour) DO UPDATE SET events = rate_bucket.events + 1
            WHERE (SELECT ceiling = 0 OR earlier + rate_bucket.events < ceiling FROM due)
        RETURNING 1),
    a AS (
        UPDATE attempt SET calls_started = calls_started + 1,
            runner_id = coalesce(nullif(%(runner_id)s, ''), runner_id),
            lease_id = coalesce(nullif(%(lease_id)s, ''), lease_id),
            process_id = greatest(%(process_id)s, process_id),
            prompt_version = %(prompt_version)s
        FROM due
        WHERE attempt.id = %(id)s AND (due.kind <> 'REVIEW' OR EXISTS (SELECT FROM day))
        RETURNING review_id),
    f AS (
        UPDATE provider_call SET finish_time = now()
        WHERE attempt_id = %(id)s AND finish_time IS NULL AND EXISTS (SELECT FROM a)),
    c AS (
        INSERT INTO provider_call (attempt_id, call_number, chunk_id)
        SELECT %(id)s, %(call_number)s, %(chunk_id)s FROM a),
    r AS (
        UPDATE review SET calls_started = calls_started + 1, chunks_total = %(chunks_total)s,
            version = version + 1
        FROM a WHERE review.id = a.review_id)
    SELECT EXISTS (SELECT FROM a) AS stored FROM due"""

# The beat makes a TAKE_OVER that waited for this row look at it again.
CHUNK_DONE: Final = """
    WITH a AS (
        UPDATE attempt SET heartbeat_time = now(), answer_bytes = 0, stalled_since = NULL
        WHERE id = %(id)s AND fence = %(fence)s AND turn = %(turn)s AND state = 'RUNNING'
        RETURNING review_id),
    f AS (
        UPDATE provider_call SET finish_time = now()
        WHERE attempt_id = %(id)s AND finish_time IS NULL AND EXISTS (SELECT FROM a)),
    d AS (
        INSERT INTO chunk_done (review_id, chunk_id, attempt_id, findings, position)
        SELECT review_id, %(chunk_id)s, %(id)s, CAST(%(findings)s AS bytea), chunks_done + 1
        FROM a JOIN review ON review.id = a.review_id
        ON CONFLICT DO NOTHING RETURNING review_id),
    r AS (
        UPDATE review SET chunks_done = chunks_done + 1, version = version + 1,
            finding_count = finding_count + %(finding_count)s,
            dropped_findings = dropped_findings + %(dropped)s
        FROM d WHERE review.id = d.review_id
        RETURNING review.id, chunks_done < chunks_total AS more)
    -- After the last chunk the end of the attempt follows at once, and tells of both.
    SELECT (SELECT pg_notify('byokeep_review', r.id) FROM r WHERE more) FROM a"""

# What takes the place of a chunk that the provider found too long. The call has its answer.
CHUNK_SPLIT: Final = """
    WITH a AS (
        UPDATE attempt SET heartbeat_time = now(), answer_bytes = 0, stalled_since = NULL
        WHERE id = %(id)s AND fence = %(fence)s AND turn = %(turn)s AND state = 'RUNNING'
        RETURNING review_id),
    f AS (
        UPDATE provider_call SET finish_time = now()
        WHERE attempt_id = %(id)s AND finish_time IS NULL AND EXISTS (SELECT FROM a)),
    r AS (
        UPDATE review SET chunks_total = %(chunks_total)s, version = version + 1
        FROM a WHERE review.id = a.review_id
        RETURNING pg_notify('byokeep_review', id))
    SELECT (SELECT count(*) FROM r) FROM a"""

_END_ATTEMPT: Final = """
    WITH a AS (
        UPDATE attempt SET state = %(attempt_state)s, failure = %(failure)s, cause = %(cause)s,
            end_time = now(),
            runner_id = coalesce(nullif(%(runner_id)s, ''), runner_id),
            lease_id = coalesce(nullif(%(lease_id)s, ''), lease_id),
            process_id = greatest(%(process_id)s, process_id),
            open_time = coalesce(CAST(%(open_time)s AS timestamptz), open_time),
            close_time = coalesce(CAST(%(close_time)s AS timestamptz), close_time)
        WHERE id = %(id)s AND fence = %(fence)s AND turn = %(turn)s AND state = 'RUNNING'
        RETURNING *),
    c AS (
        UPDATE provider_call SET finish_time = now(), ambiguous = %(ambiguous)s
        WHERE attempt_id = %(id)s AND finish_time IS NULL AND EXISTS (SELECT FROM a)
        RETURNING ambiguous),"""

END_REVIEW: Final = (
    _END_ATTEMPT  # noqa: S608 - constants
    + """
    r AS (
        UPDATE review SET state = %(review_state)s, failure = %(review_failure)s,
            failure_message = %(failure_message)s, version = version + 1,
            end_time = CASE WHEN %(review_state)s = 'QUEUED' THEN NULL ELSE now() END,
            ambiguous_calls = ambiguous_calls + (SELECT count(*) FROM c WHERE ambiguous),
            fence = review.fence + %(successors)s, attempts = attempts + %(successors)s,
            max_calls = max_calls + %(refund)s,
            model = coalesce(nullif(%(next_model)s, ''), model),
            fallback_models = CASE WHEN %(next_model)s = '' THEN fallback_models
                ELSE array_remove(fallback_models, %(next_model)s) END,
            chosen_model = CASE WHEN %(next_model)s = '' OR chosen_model <> '' THEN chosen_model
                ELSE model END,
            model_fallback = CASE WHEN %(next_model)s = '' THEN model_fallback
                ELSE 'NOT_FOUND' END,
            plan_model = CASE WHEN %(next_model)s <> '' AND plan_model = '' AND EXISTS (
                    SELECT FROM chunk_done WHERE review_id = review.id)
                THEN model ELSE plan_model END
        FROM a WHERE review.id = a.review_id
        RETURNING review.*),
    x AS (
        DELETE FROM review_content USING r
        WHERE review_content.review_id = r.id AND %(review_state)s = 'COMPLETED'),
    n AS (
        INSERT INTO attempt (id, kind, tenant, review_id, key_id, key_version, number, fence, tries,
            priority, due_time, wait_reason, wait_cause, wait_since, stalled_since)
        SELECT %(next_id)s, a.kind, a.tenant, r.id, a.key_id, %(next_version)s, r.attempts, r.fence,
            a.tries + %(counted)s, a.priority, now() + make_interval(secs => %(delay)s),
            %(wait_reason)s, %(wait_cause)s,
            CASE WHEN a.wait_reason = %(wait_reason)s THEN a.wait_since ELSE now() END,
            coalesce(a.stalled_since, now())
        FROM a, r WHERE %(successors)s = 1
        RETURNING pg_notify('byokeep_due', ''))
    SELECT pg_notify('byokeep_review', r.id), (SELECT count(*) FROM n) AS following FROM r"""
)

END_VALIDATION: Final = (
    _END_ATTEMPT  # noqa: S608 - constants
    + """
    v AS (
        -- An ACTIVE version that could not be asked again is what it was.
        UPDATE key_validation SET
            verdict = coalesce(nullif(%(verdict)s, ''), verdict), cause = %(cause)s,
            models = CASE WHEN cardinality(CAST(%(models)s AS text[])) > 0
                THEN CAST(%(models)s AS text[]) ELSE models END,
            attempts = attempts + 1,
            check_time = CASE WHEN %(verdict)s <> '' THEN now() ELSE check_time END,
            action = %(action)s,
            retry_time = CASE WHEN %(successors)s = 1
                THEN now() + make_interval(secs => %(delay)s) END,
            fence = key_validation.fence + %(successors)s
        FROM a WHERE key_validation.tenant = a.tenant AND key_validation.key_id = a.key_id
            AND version = a.key_version
        RETURNING key_validation.key_id, key_validation.fence),
    n AS (
        INSERT INTO attempt (id, kind, tenant, key_id, key_version, number, fence, tries, due_time)
        SELECT %(next_id)s, a.kind, a.tenant, a.key_id, %(next_version)s, v.fence, v.fence,
            a.tries + 1, now() + make_interval(secs => %(delay)s)
        FROM a, v WHERE %(successors)s = 1)
    SELECT pg_notify('byokeep_key', v.key_id) FROM v"""
)

TRAIL_OF_CANCELLED: Final = """
    UPDATE attempt SET lease_id = coalesce(nullif(%(lease_id)s, ''), lease_id),
        process_id = greatest(%(process_id)s, process_id),
        open_time = coalesce(CAST(%(open_time)s AS timestamptz), open_time),
        close_time = coalesce(CAST(%(close_time)s AS timestamptz), close_time)
    WHERE id = %(id)s AND fence = %(fence)s AND state = 'CANCELLED'"""

TAKEN_OVER: Final = """
    SELECT 1 FROM attempt
    WHERE id = %(id)s AND fence = %(fence)s AND turn > %(turn)s AND state = 'RUNNING'"""

HEARTBEAT: Final = """
    UPDATE attempt SET heartbeat_time = now(), answer_bytes = told.bytes
    FROM unnest(CAST(%(ids)s AS text[]), CAST(%(answer_bytes)s AS bigint[])) AS told (id, bytes)
    WHERE attempt.id = told.id AND state = 'RUNNING' RETURNING attempt.id"""

# --- cancelling

CANCEL_ATTEMPTS: Final = """
    WITH before AS (
        SELECT id, state FROM attempt
        WHERE review_id = %(review_id)s AND state IN ('QUEUED', 'RUNNING') FOR UPDATE)
    UPDATE attempt SET state = 'CANCELLED', end_time = now()
    FROM before WHERE attempt.id = before.id
    RETURNING attempt.id, before.state = 'RUNNING' AS ran, pg_notify('byokeep_cancel', attempt.id)
    """

CANCEL_REVIEW: Final = """
    WITH c AS (
        UPDATE provider_call SET finish_time = now(), ambiguous = true
        WHERE finish_time IS NULL
            AND attempt_id IN (SELECT id FROM attempt WHERE review_id = %(review_id)s)
        RETURNING 1),
    x AS (DELETE FROM review_content WHERE review_id = %(review_id)s)
    UPDATE review SET state = 'CANCELLED', end_time = now(), version = version + 1,
        superseded_by = %(superseded_by)s,
        ambiguous_calls = ambiguous_calls + (SELECT count(*) FROM c)
    WHERE id = %(review_id)s AND state IN ('QUEUED', 'RUNNING')
    RETURNING pg_notify('byokeep_review', id)"""

# Of the same user: nobody ends what runs on another's key.
OLDER: Final = """
    SELECT id FROM review
    WHERE tenant = %(tenant)s AND repository = %(repository)s AND pull_request = %(pull_request)s
        AND owner = %(owner)s AND state IN ('QUEUED', 'RUNNING') AND id <> %(id)s
        AND head_commit NOT IN ('', %(head_commit)s)
    ORDER BY id"""

# What runs before what waits.
CANCEL_SOME: Final = """
    WITH batch AS (
        SELECT id, review_id FROM attempt
        WHERE tenant = %(tenant)s AND state IN ('QUEUED', 'RUNNING')
        ORDER BY state DESC, id LIMIT 1000 FOR UPDATE),
    a AS (
        UPDATE attempt SET state = 'CANCELLED', end_time = now() FROM batch
        WHERE attempt.id = batch.id
        RETURNING pg_notify('byokeep_cancel', attempt.id)),
    c AS (
        UPDATE provider_call SET finish_time = now(), ambiguous = true FROM batch
        WHERE attempt_id = batch.id AND finish_time IS NULL
        RETURNING review_id),
    r AS (
        UPDATE review SET state = 'CANCELLED', end_time = now(), version = version + 1,
            ambiguous_calls = ambiguous_calls
                + (SELECT count(*) FROM c WHERE c.review_id = review.id)
        FROM batch WHERE review.id = batch.review_id AND review.state IN ('QUEUED', 'RUNNING')
        RETURNING pg_notify('byokeep_review', review.id))
    SELECT (SELECT count(*) FROM a) AS attempts, (SELECT count(*) FROM r) AS reviews"""

# --- sweeping

STALE_IDS: Final = f"""
    SELECT id FROM attempt
    WHERE state = 'RUNNING' AND heartbeat_time < now() - make_interval(secs => %(seconds)s)
        AND (heartbeat_time < now() - make_interval(secs => %(held)s) OR NOT ({_IN_CALL}))
    ORDER BY heartbeat_time LIMIT 100"""  # noqa: S608 - constants

STALE: Final = f"""
    SELECT a.id AS attempt_id, a.kind, a.tenant, coalesce(a.review_id, '') AS review_id,
        a.key_id, a.key_version, a.fence, a.tries, a.turn, a.runner_id,
        split_part(coalesce(r.model, ''), '/', 1) AS provider,
        coalesce(substr(r.model, strpos(r.model, '/') + 1), '') AS model,
        coalesce(r.key_owner, '') AS owner,
        EXISTS (
            SELECT FROM provider_call c WHERE c.attempt_id = a.id AND c.finish_time IS NULL
        ) AS unfinished_call,
        coalesce(r.max_calls - r.calls_started, 0) AS calls_left, t.retry_ambiguous,
        {_REVIEWS_WAIT} AS reviews_wait
    FROM attempt a JOIN tenant t ON t.id = a.tenant LEFT JOIN review r ON r.id = a.review_id
    WHERE a.id = %(id)s AND a.state = 'RUNNING'
        AND a.heartbeat_time < now() - make_interval(secs => %(seconds)s)
    FOR UPDATE OF a SKIP LOCKED"""  # noqa: S608 - constants

DROP_CONTENT: Final = """
    DELETE FROM review_content USING review
    WHERE review.id = review_content.review_id AND state = 'FAILED'
        AND end_time < now() - make_interval(hours => %(hours)s)"""

# A review that can be retried still needs to know what is done.
_KEPT_LONG_ENOUGH: Final = """end_time < now() - make_interval(days => %(days)s)
        AND NOT EXISTS (SELECT FROM review_content c WHERE c.review_id = review.id)"""

DROP_FINDINGS: Final = f"""
    WITH u AS (
        UPDATE review SET unread = NULL WHERE unread IS NOT NULL AND {_KEPT_LONG_ENOUGH})
    DELETE FROM chunk_done USING review
    WHERE review.id = chunk_done.review_id AND {_KEPT_LONG_ENOUGH}"""  # noqa: S608 - constants

DROP_REVIEWS: Final = """
    DELETE FROM review WHERE id IN (
        SELECT id FROM review WHERE end_time < now() - make_interval(days => %(days)s)
        ORDER BY end_time LIMIT 1000)"""

DROP_KEY_CHECKS: Final = """
    DELETE FROM attempt
    WHERE kind <> 'REVIEW' AND end_time < now() - make_interval(days => %(days)s)"""

DROP_REQUESTS: Final = "DELETE FROM request WHERE create_time < now() - interval '7 days'"

DROP_BUCKETS: Final = "DELETE FROM rate_bucket WHERE hour < now() - interval '2 days'"

# --- keys

COUNT_INTAKE: Final = """
    WITH now_hour AS (
        INSERT INTO rate_bucket (scope, hour, events)
        VALUES (%(scope)s, date_trunc('hour', now()), 1)
        ON CONFLICT (scope, hour) DO UPDATE SET events = rate_bucket.events + 1
        RETURNING events)
    SELECT now_hour.events + coalesce((
        -- The hour before counts by the part of it that lies within the last 60 minutes.
        SELECT events * extract(epoch FROM hour + interval '2 hours' - now()) / 3600
        FROM rate_bucket
        WHERE scope = %(scope)s AND hour = date_trunc('hour', now()) - interval '1 hour'), 0)
    FROM now_hour"""

NOTIFY_KEY: Final = "SELECT pg_notify('byokeep_key', %(key_id)s)"
