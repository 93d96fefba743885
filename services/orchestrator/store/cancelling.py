"""SQL that cancels reviews with their attempts."""

from __future__ import annotations

from typing import Final

from services.orchestrator.store.database import Session

_CANCEL_ATTEMPTS: Final = """
    WITH before AS (
        SELECT id, state FROM attempt
        WHERE review_id = %(review_id)s AND state IN ('QUEUED', 'RUNNING') FOR UPDATE)
    UPDATE attempt SET state = 'CANCELLED', end_time = now()
    FROM before WHERE attempt.id = before.id
    RETURNING attempt.id, before.state = 'RUNNING' AS ran, pg_notify('byokeep_cancel', attempt.id)
    """

_CANCEL_REVIEW: Final = """
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

# What runs before what waits.
_CANCEL_SOME: Final = """
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


async def cancel(session: Session, review_id: str, superseded_by: str = "") -> bool:
    """Cancel a review with its attempts; False if it had ended."""
    # The first waits for an end that is being stored, the second sees what follows it.
    for _ in range(2):
        await session.all(_CANCEL_ATTEMPTS, {"review_id": review_id})
    parameters = {"review_id": review_id, "superseded_by": superseded_by}
    return await session.one(_CANCEL_REVIEW, parameters) is not None


async def cancel_all(session: Session, tenant: str) -> None:
    """Cancel all that runs, then all that waits, for a tenant that is DELETED."""
    while (await session.one(_CANCEL_SOME, {"tenant": tenant})).attempts:
        pass
