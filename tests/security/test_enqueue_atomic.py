"""38. enqueue_atomic: rollback → no job; a repeated submission → one review."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from services.orchestrator.queue import Queue
from tests.harness.orchestrator import Stack, add_key_request, request_id, running

TABLES = ("review", "review_content", "attempt", "request", "procrastinate_jobs")


@pytest.fixture
async def stack(orchestrator_database_url, tmp_path):
    async with running(orchestrator_database_url, tmp_path) as started:
        await started.tenant()
        started.keyvault.add("acme")
        await started.sql("DELETE FROM request")
        yield started


async def rows(stack: Stack) -> dict[str, int]:
    return {table: len(await stack.table(table)) for table in TABLES}


def break_after_enqueue(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = stack.app.queue.enqueue

    async def enqueue(raw: Any, attempt_id: str, **values: Any) -> None:
        await inner(raw, attempt_id, **values)
        raise ConnectionResetError

    monkeypatch.setattr(Queue, "enqueue", lambda _, *args, **values: enqueue(*args, **values))


async def test_submission_that_breaks_off_leaves_nothing(stack: Stack, monkeypatch) -> None:
    """Shown by `_database.transaction()` replaced with `_database.statement()` in
    ReviewStore.submit: the review, its content and its job stay behind."""
    break_after_enqueue(stack, monkeypatch)
    with pytest.raises(grpc.aio.AioRpcError):
        await stack.submit()
    assert await rows(stack) == dict.fromkeys(TABLES, 0)


async def test_validation_that_breaks_off_leaves_no_job(stack: Stack, monkeypatch) -> None:
    """Shown by the same change in KeyStore.schedule: an attempt and its job stay behind."""
    break_after_enqueue(stack, monkeypatch)
    with pytest.raises(grpc.aio.AioRpcError):
        await stack.client("acme").keys.AddKey(add_key_request(display_name="second"))
    assert await rows(stack) == dict.fromkeys(TABLES, 0)
    assert await stack.sql("SELECT * FROM key_validation") == []


async def test_repeated_submission_is_one_review(stack: Stack) -> None:
    """Shown by a random `scope` in place of _scope(...) in reviews.py: eight reviews."""
    same = request_id()
    reviews = await asyncio.gather(*(stack.submit(request_id=same) for _ in range(8)))
    assert len({review.name for review in reviews}) == 1
    await stack.ended(reviews[0])
    left = await rows(stack)
    assert (left["review"], left["attempt"], left["request"]) == (1, 1, 1)
    assert len(stack.runner.talks) == 1
