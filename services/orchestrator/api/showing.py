"""A review as clients see it."""

from __future__ import annotations

from datetime import timedelta

from byokeep import names
from byokeep.orchestrator.v1 import review_pb2

from services.orchestrator.api.tenants import timestamp
from services.orchestrator.policy import failures
from services.orchestrator.policy.keys import OPERATOR
from services.orchestrator.policy.states import TERMINAL, Reason, ReviewState
from services.orchestrator.store.reviews import ReviewRow


def name_of(row: ReviewRow) -> str:
    """Return a review's resource name."""
    return names.review_name(row.tenant, row.id)


def message(row: ReviewRow, wait_seconds: int) -> review_pb2.Review:
    """Return a review without its findings; `wait_seconds`: the longest that it may wait."""
    return review_pb2.Review(
        name=name_of(row),
        state=review_pb2.ReviewState.Value(f"REVIEW_STATE_{row.state}"),
        repository=row.repository,
        pull_request=row.pull_request,
        head_commit=row.head_commit,
        model=row.model,
        chosen_model=row.chosen_model,
        model_fallback=review_pb2.ModelFallback.Value(
            f"MODEL_FALLBACK_{row.model_fallback or 'UNSPECIFIED'}"
        ),
        key_id=row.key_id,
        key_version=row.used_version,
        managed_key=row.key_owner == OPERATOR,
        key_hint=row.used_hint,
        finding_count=row.finding_count,
        dropped_findings=row.dropped_findings,
        unread_count=row.unread_count,
        skipped_count=row.skipped_count,
        failure=review_pb2.FailureReason.Value(f"FAILURE_REASON_{row.failure or 'UNSPECIFIED'}"),
        failure_message=row.failure_message,
        chunks_done=row.chunks_done,
        chunks_total=row.chunks_total,
        calls_started=row.calls_started,
        attempts=row.attempts,
        create_time=timestamp(row.create_time),
        start_time=timestamp(row.start_time),
        end_time=timestamp(row.end_time),
        ambiguous_calls=row.ambiguous_calls,
        etag=str(row.version),
        answer_bytes=row.answer_bytes,
        wait=_wait(row, wait_seconds),
        superseded_by=names.review_name(row.tenant, row.superseded_by) if row.superseded_by else "",
        progress=_progress(row),
        prompt_version=row.prompt_version,
    )


def _progress(row: ReviewRow) -> review_pb2.ReviewProgress | None:
    if row.progress_calls is None or row.state in TERMINAL:
        return None
    if row.wait_reason:
        return review_pb2.ReviewProgress(stage=review_pb2.REVIEW_STAGE_WAITING)
    if row.state is ReviewState.QUEUED:
        return review_pb2.ReviewProgress(
            stage=review_pb2.REVIEW_STAGE_QUEUED, place=row.progress_place or 0
        )
    if not row.progress_calls:
        return review_pb2.ReviewProgress(stage=review_pb2.REVIEW_STAGE_LEASING)
    chunk = min(row.chunks_done + 1, row.chunks_total)
    return review_pb2.ReviewProgress(stage=review_pb2.REVIEW_STAGE_CALLING, chunk=chunk)


def _wait(row: ReviewRow, wait_seconds: int) -> review_pb2.ReviewWait | None:
    if not row.wait_reason or row.wait_stalled is None:
        return None
    return review_pb2.ReviewWait(
        reason=review_pb2.FailureReason.Value(f"FAILURE_REASON_{row.wait_reason}"),
        message=failures.waiting_sentence(
            Reason(row.wait_reason),
            key=row.key_id,
            cause=row.wait_cause,
            managed=row.key_owner == OPERATOR,
        ),
        since=timestamp(row.wait_since),
        next_try_time=timestamp(row.wait_until),
        give_up_time=timestamp(row.wait_stalled + timedelta(seconds=wait_seconds)),
    )
