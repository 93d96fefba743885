"""Reviews from submission to end, over real gRPC and a real database."""

from __future__ import annotations

import pytest

from tests.component.orchestrator_stack import Stack, running


@pytest.fixture
async def stack(orchestrator_database_url, tmp_path):
    async with running(orchestrator_database_url, tmp_path) as started:
        yield started


async def test_review_completes_with_findings(stack: Stack) -> None:
    await stack.tenant()
    stack.keyvault.add("acme")
    review = await stack.ended(await stack.submit())
    assert review.state == 3
    assert review.finding_count == 1
