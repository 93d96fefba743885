"""38. enqueue_atomic: rollback → no attempt; a repeated submission → one review."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from tests.harness.orchestrator import Stack, add_key_request, request_id, running

TABLES = ("review", "review_content", "attempt", "request", "rate_bucket")
BREAKS = """
CREATE FUNCTION breaks() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'it breaks off'; END $$;
CREATE CONSTRAINT TRIGGER breaks AFTER INSERT ON attempt DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION breaks()
"""


@pytest.fixture
async def stack(orchestrator_database_url, tmp_path):
    async with running(orchestrator_database_url, tmp_path) as started:
        await started.tenant()
        started.keyvault.add("acme")
        await started.sql("DELETE FROM request")
        await started.sql("DELETE FROM rate_bucket")
        yield started


async def rows(stack: Stack) -> dict[str, int]:
    return {table: len(await stack.table(table)) for table in TABLES}


async def test_submission_that_breaks_off_leaves_nothing(stack: Stack) -> None:
    """At its very end, when its commit is refused."""
    await stack.sql(BREAKS)
    with pytest.raises(grpc.aio.AioRpcError):
        await stack.submit()
    assert await rows(stack) == dict.fromkeys(TABLES, 0)


async def test_validation_that_breaks_off_leaves_nothing(stack: Stack) -> None:
    """Shown to fail by `_database.transaction()` replaced with `_database.statement()` in
    KeyStore.schedule: a validation stays behind that nobody carries out."""
    await stack.sql(BREAKS)
    with pytest.raises(grpc.aio.AioRpcError):
        await stack.client("acme").keys.AddKey(add_key_request(display_name="second"))
    assert await stack.sql("SELECT * FROM key_validation") == []
    assert await stack.sql("SELECT * FROM attempt") == []


async def test_repeated_submission_is_one_review(stack: Stack) -> None:
    """Shown by a random `scope` in place of _scope(...) in reviews.py: eight reviews."""
    same = request_id()
    reviews = await asyncio.gather(*(stack.submit(request_id=same) for _ in range(8)))
    assert len({review.name for review in reviews}) == 1
    await stack.ended(reviews[0])
    left = await rows(stack)
    assert (left["review"], left["attempt"], left["request"]) == (1, 1, 1)
    assert len(stack.runner.talks) == 1
