"""What a review has beside its row, opened: its findings, and what was not read."""

from __future__ import annotations

from services.orchestrator.custody import content
from services.orchestrator.policy.states import TERMINAL
from services.orchestrator.store.reviews import ReviewRow, ReviewStore, SealedFindings


class Findings:
    """Opens findings."""

    def __init__(self, reviews: ReviewStore, contents: content.ContentKeys) -> None:
        """Use the store, and the keys of contents."""
        self._reviews = reviews
        self._contents = contents

    async def opened(self, row: ReviewRow, after: int, most_bytes: int) -> tuple[list[bytes], int]:
        """Return what a review has beside its row: serialized Reviews that are parts of one; and
        where there are more findings, the place after which they are."""
        sealed = SealedFindings([])
        if row.finding_count:
            sealed = await self._reviews.findings(row.id, after, most_bytes)
        # Until it has ended, their number is enough: keyvault may be what the review waits for.
        has_unread = row.unread_count > 0 or row.skipped_count > 0
        says_unread = has_unread and row.state in TERMINAL and not after
        unread = await self._reviews.unread(row.id) if says_unread else None
        if (row.finding_count and not sealed.chunks) or (says_unread and unread is None):
            raise content.expired()
        if not sealed.chunks and unread is None:
            return [], 0
        # All of one review, so of one epoch.
        key = await self._contents.of(row.tenant, unread or sealed.chunks[0][1])
        parts = content.open_findings(key, row.id, sealed.chunks)
        if unread is not None:
            parts.append(content.open_unread(key, row.id, unread))
        return parts, sealed.after
