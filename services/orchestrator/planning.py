"""What a review would do: files, chunks, calls. The runner plans again by the same rules."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import grpc
from byokeep.orchestrator.v1 import review_pb2

from services.common import chunks, diff
from services.common.errors import ByokeepError
from services.common.models import Catalog, ModelRef

_THREAD_FROM_BYTES: Final = 64 * 1024
# A parsed diff takes up to 30 MB. A caller that goes away does not end the thread that works for
# it, so that the threads are what must be few.
_THREADS: Final = 2
# The runner's prompt around the diff, rounded up: never fewer calls are planned than it makes.
_FRAME_TOKENS: Final = 3_000


@dataclass(frozen=True, slots=True)
class Plan:
    """The chunks of a review, one call each, and the files that have nothing to review."""

    chunks: Sequence[chunks.Chunk]
    skipped_files: Sequence[str]


class Planner:
    """Plans reviews; few large ones at once."""

    def __init__(self, catalog: Catalog) -> None:
        """Use the models that are known."""
        self._catalog = catalog
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="planning")

    async def plan(self, request: review_pb2.ReviewInput, model: ModelRef) -> Plan:
        """Divide a review's diff for a model. Raises ByokeepError: DIFF_*, INVALID_FIELD."""
        if len(request.diff) > _THREAD_FROM_BYTES:
            # Parsing 2 MiB takes a fifth of a second: others must not wait for it.
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, _plan, request, model, self._catalog
            )
        return _plan(request, model, self._catalog)


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


def require_calls(found: Plan, max_calls: int) -> None:
    """Refuse a review of too many calls. Raises ByokeepError: TOO_MANY_CALLS."""
    calls = len(found.chunks)
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


def _plan(request: review_pb2.ReviewInput, model: ModelRef, catalog: Catalog) -> Plan:
    refused: ByokeepError
    try:
        parsed = diff.parse(request.diff)
    except diff.DiffError as error:
        refused = ByokeepError(
            grpc.StatusCode.INVALID_ARGUMENT,
            error.reason,
            str(error),
            field="input.diff",
        )
        refused.metadata |= {name: str(value) for name, value in error.figures.items()}
    else:
        budget = _budget(request, model, catalog)
        return Plan(
            chunks.plan(parsed, budget, salt=""),
            [file.path for file in parsed.files if not file.hunks],
        )
    raise refused


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
