"""What follows from a diff: how it would be divided, and which model its paths have."""

from __future__ import annotations

from typing import Final

from byokeep.orchestrator.v1 import review_pb2, settings_pb2

from services.common import chunks, diff
from services.orchestrator.policy.overrides import Override, override_of

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


def model(raw: bytes, settings: settings_pb2.Settings) -> settings_pb2.Settings:
    """Return, as `default_model`, the model of the first of some overrides that counts for a diff.
    Raises DiffError."""
    parsed = diff.parse(raw)
    paths = {path for file in parsed.files for path in (file.old_path, file.new_path) if path}
    overrides = [
        Override(one.repository_pattern, one.path_pattern, one.model)
        for one in settings.model_overrides
    ]
    return settings_pb2.Settings(default_model=override_of(overrides, paths))
