"""What a review would do: files, chunks, calls. The runner plans again by the same rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import grpc
from byokeep.orchestrator.v1 import review_pb2, settings_pb2

from services.common import chunks
from services.common.diff import DiffError
from services.common.errors import ByokeepError
from services.common.models import Catalog, ModelRef
from services.orchestrator.compute.child import BUDGET, Job
from services.orchestrator.compute.outline import model as model_of
from services.orchestrator.compute.outline import outline
from services.orchestrator.compute.pool import Compute
from services.orchestrator.policy.overrides import Override, override_of

# A line takes 2.5 µs, however short it is: planned at once, this much takes 5 ms at most.
_AT_ONCE_BYTES: Final = 4 * 1024
_AT_ONCE_OVERRIDES: Final = 10
# The runner's prompt around the diff, rounded up: never fewer calls are planned than it makes.
_FRAME_TOKENS: Final = 3_000


class Planner:
    """Plans reviews, and all but the smallest of them beside the event loop."""

    def __init__(self, catalog: Catalog, compute: Compute) -> None:
        """Use the models that are known."""
        self._catalog = catalog
        self._compute = compute

    async def plan(
        self, tenant: str, request: review_pb2.ReviewInput, model: ModelRef
    ) -> review_pb2.DryRunReviewResponse:
        """Divide a review's diff for a model; return what follows from the diff of a dry run's
        answer. Raises ByokeepError: DIFF_*, INVALID_FIELD."""
        budget = _budget(request, model, self._catalog)
        refused: DiffError
        try:
            if len(request.diff) <= _AT_ONCE_BYTES:
                return outline(request.diff, budget)
            job = BUDGET.pack(budget) + request.diff
            answer = await self._compute.run(tenant, Job.OUTLINE, job)
            return review_pb2.DryRunReviewResponse.FromString(answer)
        except DiffError as error:
            refused = error
        raise _refusal(refused)

    async def override(self, tenant: str, raw: bytes, overrides: Sequence[Override]) -> str:
        """Return the model of the first of a repository's overrides that counts for a diff, or an
        empty text. Raises ByokeepError: DIFF_*."""
        if not overrides or not overrides[0].path:
            return override_of(overrides, ())
        settings = settings_pb2.Settings(
            model_overrides=[
                settings_pb2.ModelOverride(path_pattern=one.path, model=one.model)
                for one in overrides
            ]
        )
        refused: DiffError
        try:
            if len(raw) <= _AT_ONCE_BYTES and len(overrides) <= _AT_ONCE_OVERRIDES:
                return model_of(raw, settings).default_model
            sent = settings.SerializeToString()
            job = BUDGET.pack(len(sent)) + sent + raw
            answer = await self._compute.run(tenant, Job.MODEL, job)
            return settings_pb2.Settings.FromString(answer).default_model
        except DiffError as error:
            refused = error
        raise _refusal(refused)


def _refusal(error: DiffError) -> ByokeepError:
    refused = ByokeepError(
        grpc.StatusCode.INVALID_ARGUMENT, error.reason, str(error), field="input.diff"
    )
    refused.metadata |= {name: str(value) for name, value in error.figures.items()}
    return refused


def require_size(request: review_pb2.ReviewInput, max_diff_bytes: int) -> None:
    """Refuse a diff that is too large. Raises ByokeepError: DIFF_TOO_LARGE."""
    size = len(request.diff)
    if size > max_diff_bytes:
        raise ByokeepError(
            grpc.StatusCode.INVALID_ARGUMENT,
            "DIFF_TOO_LARGE",
            f"the diff has {size} bytes and at most {max_diff_bytes} are taken;"
            " review it in parts, or leave generated files out",
            field="input.diff",
            bytes=str(size),
            max_diff_bytes=str(max_diff_bytes),
        )


def require_calls(calls: int, max_calls: int) -> None:
    """Refuse a review of too many calls. Raises ByokeepError: TOO_MANY_CALLS."""
    if calls > max_calls:
        raise ByokeepError(
            grpc.StatusCode.INVALID_ARGUMENT,
            "TOO_MANY_CALLS",
            f"the review would take {calls} provider calls and at most {max_calls} are made;"
            " review it in parts, choose a model with a larger window, or raise"
            " max_calls_per_review",
            calls=str(calls),
            max_calls_per_review=str(max_calls),
        )


def _budget(request: review_pb2.ReviewInput, model: ModelRef, catalog: Catalog) -> int:
    """Tokens of diff that one call has room for: the runner's rule, with its prompt rounded up."""
    texts = [request.repository, request.title, request.description, request.guidance]
    texts += [text for file in request.context_files for text in (file.path, file.content)]
    frame = sum(chunks.estimate_tokens(text) for text in texts) + _FRAME_TOKENS
    no_room = ""
    try:
        return chunks.room(catalog.window(model.provider, model.model), frame)
    except chunks.NoRoomError as error:
        no_room = str(error)
    raise ByokeepError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        no_room,
        field="input.context_files",
        rule="model.context",
    )
