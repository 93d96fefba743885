"""SQL of what is kept, and for how long."""

from __future__ import annotations

from typing import Final

from services.orchestrator.store.database import Database

_DROP_CONTENT: Final = """
    DELETE FROM review_content USING review
    WHERE review.id = review_content.review_id AND state = 'FAILED'
        AND end_time < now() - make_interval(hours => %(hours)s)"""

# A review that can be retried still needs to know what is done.
_KEPT_LONG_ENOUGH: Final = """end_time < now() - make_interval(days => %(days)s)
        AND NOT EXISTS (SELECT FROM review_content c WHERE c.review_id = review.id)"""

_DROP_FINDINGS: Final = f"""
    WITH u AS (
        UPDATE review SET unread = NULL WHERE unread IS NOT NULL AND {_KEPT_LONG_ENOUGH})
    DELETE FROM chunk_done USING review
    WHERE review.id = chunk_done.review_id AND {_KEPT_LONG_ENOUGH}"""  # noqa: S608 - constants

_DROP_REVIEWS: Final = """
    DELETE FROM review WHERE id IN (
        SELECT id FROM review WHERE end_time < now() - make_interval(days => %(days)s)
        ORDER BY end_time LIMIT 1000)"""

_DROP_KEY_CHECKS: Final = """
    DELETE FROM attempt
    WHERE kind <> 'REVIEW' AND end_time < now() - make_interval(days => %(days)s)"""

_DROP_REQUESTS: Final = "DELETE FROM request WHERE create_time < now() - interval '7 days'"

_DROP_BUCKETS: Final = "DELETE FROM rate_bucket WHERE hour < now() - interval '2 days'"


class RetentionStore:
    """Deletes what was kept long enough."""

    def __init__(
        self, database: Database, *, content_hours: int, findings_days: int, review_days: int
    ) -> None:
        """`content_hours` a failed review's diff is kept, `findings_days` findings, and
        `review_days` reviews that have ended."""
        self._database = database
        self._content = {"hours": content_hours}
        self._findings = {"days": findings_days}
        self._reviews = {"days": review_days}

    async def sweep(self) -> None:
        """Delete it."""
        async with self._database.statement() as session:
            await session.run(_DROP_CONTENT, self._content)
            await session.run(_DROP_FINDINGS, self._findings)
            while await session.run(_DROP_REVIEWS, self._reviews):
                pass
            await session.run(_DROP_KEY_CHECKS, self._reviews)
            await session.run(_DROP_REQUESTS)
            await session.run(_DROP_BUCKETS)
