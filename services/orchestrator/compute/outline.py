"""How a diff would be divided: what of a dry run follows from the diff alone."""

from __future__ import annotations

from typing import Final

from byokeep.orchestrator.v1 import review_pb2

from services.common import chunks, diff

#: Most unread parts, and most skipped files, that an answer names and a review keeps.
MAX_NAMED: Final = 1000


def outline(raw: bytes, budget: int) -> review_pb2.DryRunReviewResponse:
    """Divide a diff into calls of at most `budget` tokens. Raises DiffError."""
    parsed = diff.parse(raw)
    planned = chunks.plan(parsed, budget, salt="")
    unread = {(file.path, file.unread) for file in parsed.files if file.unread is not None}
    skipped = [file.path for file in parsed.files if not file.hunks and file.unread is None]
    return review_pb2.DryRunReviewResponse(
        calls=len(planned),
        chunks=[
            review_pb2.DryRunReviewResponse.Chunk(
                files=chunk.files, estimated_tokens=chunk.estimated_tokens
            )
            for chunk in planned
        ],
        skipped_files=skipped[:MAX_NAMED],
        skipped_count=len(skipped),
        unread=[
            review_pb2.UnreadPart(
                path=path, reason=review_pb2.UnreadReason.Value(f"UNREAD_REASON_{why}")
            )
            for path, why in sorted(unread)[:MAX_NAMED]
        ],
        unread_count=len(unread),
    )
