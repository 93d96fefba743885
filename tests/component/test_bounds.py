"""No answer is larger than gRPC's clients take by default, however much there is: each RPC that can
grow is asked at its largest, and what does not fit is cut where it says so."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from byokeep.errors import error_info
from byokeep.keyvault.v1 import custody_pb2
from byokeep.orchestrator.v1 import key_pb2, review_pb2, settings_pb2, tenant_pb2
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from services.orchestrator.policy import bounds
from services.orchestrator.policy.plans import Plan
from tests.harness.orchestrator import Conversation, Stack, finding, request_id, running

#: What gRPC's clients take where nobody raises it.
DEFAULT_BYTES: Final = 4 * 1024 * 1024
EXPORT_BYTES: Final = 9 * 1024 * 1024
#: More than one row of any list has.
ROW_BYTES: Final = 16 * 1024
CHUNKS: Final = 8
PARENT: Final = "tenants/acme"
SETTINGS: Final = f"{PARENT}/settings"
WIDE: Final = "\U0001f40d"


@pytest.fixture
async def stack(orchestrator_database_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(orchestrator_database_url, tmp_path) as started:
        await started.tenant()
        yield started


def largest(line: int, severity: int) -> review_pb2.Finding:
    """A finding as large as a runner lets through."""
    found = finding(line)
    found.severity = severity
    found.title, found.message, found.suggestion = WIDE * 200, WIDE * 4000, WIDE * 4000
    return found


async def reviewed(stack: Stack) -> review_pb2.Review:
    """Have a review that has more of everything than an answer holds."""

    async def script(talk: Conversation) -> None:
        names = [f"c{number}" for number in range(CHUNKS)]
        await talk.accept(*names)
        for number, name in enumerate(names):
            await talk.call(name, number + 1)
            # One in ten is bad, and they are not the first.
            found = [largest(line, 5 if line % 10 == 9 else 1) for line in range(1, 21)]
            await talk.result(name, *found)
        await talk.end()

    stack.keyvault.add("acme")
    stack.runner.scripts = [script]
    return await stack.submit(
        "acme", diff=b"".join(wide_diff()), repository="r" * 200, head_commit="a" * 64
    )


def wide_diff() -> Iterator[bytes]:
    yield b"--- a/app.py\n+++ b/app.py\n@@ -0,0 +1 @@\n+x\n"
    for number in range(350):
        path = f"{number:04}".ljust(1000, "x")
        yield f"diff --git a/y b/{path}\nrename from y\nrename to {path}\n".encode()
        yield f"diff --git a/r{path} b/r{path}\nnew file mode 100644\n".encode()
        yield f"Binary files /dev/null and b/r{path} differ\n".encode()


async def of_review(stack: Stack) -> list[Message]:
    """All pages of a review's findings are all that is kept: the worst of each chunk."""
    review = await reviewed(stack)
    client = stack.client("acme").reviews
    watched = [
        answer
        async for answer in client.WatchReview(review_pb2.WatchReviewRequest(name=review.name))
    ]
    assert [len(answer.review.findings) for answer in watched[:-1]] == [0] * (len(watched) - 1)
    answers: list[Any] = [watched[-1]]
    while token := answers[-1].next_page_token:
        request = review_pb2.GetReviewRequest(name=review.name, page_token=token)
        answers.append(await client.GetReview(request))
    whole = review_pb2.Review()
    for answer in answers:
        whole.MergeFrom(answer.review)
    assert (len(answers) > 1, len(whole.findings)) == (True, whole.finding_count)
    assert whole.finding_count + whole.dropped_findings == CHUNKS * 20
    assert [one.severity for one in whole.findings].count(5) == CHUNKS * 2
    assert (len(whole.skipped_files), len(whole.unread)) == (350, 350)
    first = await client.GetReview(review_pb2.GetReviewRequest(name=review.name))
    assert first.review == watched[-1].review
    return [*watched, *answers, first]


async def of_dry_run(stack: Stack) -> list[Message]:
    stack.keyvault.add("acme")
    wanted = review_pb2.ReviewInput(repository="a/b", diff=b"".join(wide_diff()))
    request = review_pb2.DryRunReviewRequest(parent=PARENT, input=wanted)
    return [await stack.client("acme").reviews.DryRunReview(request)]


async def of_export(stack: Stack) -> list[Message]:
    review = await stack.ended(await reviewed(stack))
    return [
        await stack.client("acme").reviews.ExportReview(
            review_pb2.ExportReviewRequest(name=review.name, format=form)
        )
        for form in review_pb2.ExportFormat.values()
        if form
    ]


async def of_reviews(stack: Stack) -> list[Message]:
    await stack.sql(
        """INSERT INTO review (id, tenant, state, repository, head_commit, model, key_id, actor,
                failure, failure_message)
            SELECT 'rev_' || lpad(n::text, 26, '0'), 'acme', 'FAILED', repeat('r', 200),
                repeat('a', 64), 'openai/' || repeat('m', 100), 'key_' || repeat('k', 26), 'a',
                'CONTEXT_TOO_LONG', repeat('s', 4000)
            FROM generate_series(1, 700) n"""
    )
    client = stack.client("acme").reviews
    return await pages(
        client.ListReviews, review_pb2.ListReviewsRequest(parent=PARENT), "reviews", 700
    )


async def of_retries(stack: Stack) -> list[Message]:
    stack.keyvault.add("acme")
    await stack.sql(
        """INSERT INTO review (id, tenant, state, repository, model, key_id, actor)
            SELECT 'rev_' || lpad(n::text, 26, '0'), 'acme', 'FAILED', 'acme/shop', 'openai/m',
                'key_' || repeat('k', 26), 'a'
            FROM generate_series(1, 700) n"""
    )
    request = review_pb2.RetryReviewsRequest(
        parent=PARENT,
        filter=review_pb2.ReviewFilter(repository="acme/shop"),
        request_id=request_id(),
    )
    return [await stack.client("acme").reviews.RetryReviews(request)]


async def of_uses(stack: Stack) -> list[Message]:
    key_id = stack.keyvault.add("acme")
    await stack.sql(
        """WITH r AS (INSERT INTO review (id, tenant, repository, model, key_id, actor)
            SELECT 'rev_' || lpad(n::text, 26, '0'), 'acme', repeat('r', 200), 'openai/m', 'k', 'a'
            FROM generate_series(1, 700) n)
        INSERT INTO attempt (id, kind, tenant, review_id, key_id, key_version, state, lease_id)
        SELECT 'att_' || lpad(n::text, 26, '0'), 'REVIEW', 'acme',
            'rev_' || lpad(n::text, 26, '0'), %s, 1, 'COMPLETED', 'lea_' || repeat('l', 26)
        FROM generate_series(1, 700) n""",
        key_id,
    )
    request = key_pb2.ListKeyUsesRequest(name=f"{PARENT}/providerKeys/{key_id}")
    return await pages(stack.client("acme").keys.ListKeyUses, request, "uses", 700)


async def many_keys(stack: Stack, keys: int) -> str:
    """Give a tenant keys, each of many versions and models; return one."""
    for number in range(keys):
        key_id = stack.keyvault.add("acme", display_name=f"{number:064}", owner="o" * 128)
        key = stack.keyvault.keys[f"{PARENT}/providerKeys/{key_id}"]
        for version in range(2, 70):
            key.versions.add(
                version=version, state=custody_pb2.KEY_VERSION_STATE_DESTROYED, hint="h" * 16
            )
    await stack.sql(
        """INSERT INTO key_validation (key_id, version, tenant, provider, actor, verdict, models)
        SELECT id, version, 'acme', 'openai', 'a', 'VALID', ARRAY(
            SELECT rpad(chr(97 + (n %% 26)::int) || n, 100, 'm') FROM generate_series(1, 1001) n)
        FROM unnest(%s::text[]) id, unnest(ARRAY[1, 69]) version""",
        [name.rsplit("/", 1)[1] for name in stack.keyvault.keys],
    )
    return key_id


async def of_key(stack: Stack) -> list[Message]:
    name = f"{PARENT}/providerKeys/{await many_keys(stack, 1)}"
    client = stack.client("acme").keys
    answer = await client.GetKey(key_pb2.GetKeyRequest(name=name))
    shown = [one.version for one in answer.key.provider_key.versions]
    # The newest, and the one that serves.
    assert shown == [1, *range(20, 70)]
    assert answer.key.version_count == 69
    assert (len(answer.key.validation.models), answer.key.validation.models_cut) == (1000, True)
    return [answer, *[one async for one in client.WatchKey(key_pb2.WatchKeyRequest(name=name))]]


async def of_keys(stack: Stack) -> list[Message]:
    await many_keys(stack, 600)
    client = stack.client("acme").keys
    return await pages(client.ListKeys, key_pb2.ListKeysRequest(parent=PARENT), "keys", 600)


async def of_models(stack: Stack) -> list[Message]:
    await many_keys(stack, 60)
    client = stack.client("acme").settings
    answers: list[Any] = await pages(
        client.ListModels, settings_pb2.ListModelsRequest(parent=PARENT), "models", 1000, size=1000
    )
    assert all(answer.cut for answer in answers)
    listed = [(one.key_count, len(one.key_ids)) for answer in answers for one in answer.models]
    assert set(listed) == {(60, bounds.KEYS_OF_MODEL)}
    return answers


async def of_settings(stack: Stack) -> list[Message]:
    await stack.sql(
        """INSERT INTO model_override (tenant, pattern, model)
        SELECT 'acme', rpad(n || '/', 200, 'p'), 'openai/' || repeat('m', 100)
        FROM generate_series(1, 1000) n"""
    )
    await stack.sql(
        """UPDATE model_override SET path_pattern = repeat('p', 200)
        WHERE pattern IN (SELECT pattern FROM model_override LIMIT 100)"""
    )
    await stack.sql(
        """INSERT INTO repository_key (tenant, pattern, provider, key_id)
        SELECT 'acme', rpad(n || '/', 200, 'p'), 'anthropic', 'key_' || repeat('k', 26)
        FROM generate_series(1, 1000) n"""
    )
    client = stack.client("acme").settings
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.SetModelOverride(
            settings_pb2.SetModelOverrideRequest(
                parent=PARENT,
                repository_pattern="one/more",
                model="openai/gpt-6.1-terra",
                request_id=request_id(),
            )
        )
    assert error_info(refused.value).metadata["limit"] == "1000"
    return [await client.GetSettings(settings_pb2.GetSettingsRequest(name=SETTINGS))]


async def of_tenants(stack: Stack) -> list[Message]:
    await stack.sql(
        """INSERT INTO tenant (id, plan) SELECT rpad('t' || n || '-', 63, 'x'), 'team'
        FROM generate_series(1, 699) n"""
    )
    client = stack.client("operator").tenants
    return await pages(client.ListTenants, tenant_pb2.ListTenantsRequest(), "tenants", 700)


async def of_plans(stack: Stack) -> list[Message]:
    known: dict[str, Plan] = stack.app._plans._plans  # type: ignore[assignment]
    known |= {
        name: replace(known["enterprise"], name=name)
        for name in (f"{number:z>32}" for number in range(697))
    }
    client = stack.client("acme").tenants
    return await pages(client.ListPlans, tenant_pb2.ListPlansRequest(), "plans", 700)


async def of_callers(stack: Stack) -> list[Message]:
    await stack.sql(
        """INSERT INTO caller (tenant, spiffe_id, roles)
        SELECT 'acme', rpad('spiffe://byokeep.test/z/' || n || '/', 512, 'x'), ARRAY[1, 2, 3]
        FROM generate_series(1, 699) n"""
    )
    client = stack.client("operator").callers
    return await pages(
        client.ListCallers, tenant_pb2.ListCallersRequest(parent=PARENT), "callers", 700
    )


async def pages(
    call: Callable[[Any], Awaitable[Any]], request: Any, field: str, number: int, size: int = 500
) -> list[Message]:
    """Read every page, each as large as may be asked for; each row is there, and once."""
    request.page_size = size
    answers, rows = [], []
    while not answers or request.page_token:
        answers.append(await call(request))
        rows += getattr(answers[-1], field)
        request.page_token = answers[-1].next_page_token
    assert len(rows) == len({row.SerializeToString() for row in rows}) == number
    return answers


LARGEST: Final = {
    "GetReview": of_review,
    "DryRunReview": of_dry_run,
    "ExportReview": of_export,
    "ListReviews": of_reviews,
    "RetryReviews": of_retries,
    "ListKeyUses": of_uses,
    "GetKey": of_key,
    "ListKeys": of_keys,
    "ListModels": of_models,
    "GetSettings": of_settings,
    "ListTenants": of_tenants,
    "ListPlans": of_plans,
    "ListCallers": of_callers,
}
#: Answers that have what another one has, and not more of it.
LIKE: Final = {
    "WatchReview": "GetReview",
    "CancelReviews": "RetryReviews",
    "SubmitReview": "ListReviews",
    "CancelReview": "ListReviews",
    "RetryReview": "ListReviews",
    "AllowCaller": "ListCallers",
    **dict.fromkeys(
        ("SetPlan", "SetKeyCustody", "UpdateSettings", "SetModelOverride", "SetRepositoryKey"),
        "GetSettings",
    ),
    **dict.fromkeys(
        ("AddKey", "RotateKey", "CheckKey", "WatchKey", "RevokeKey", "DestroyKey", "RollBackKey"),
        "GetKey",
    ),
}


def grows(message: Descriptor, seen: frozenset[str] = frozenset()) -> bool:
    """Whether an answer has a list or a document in it."""
    if message.full_name in seen:
        return False
    seen |= {message.full_name}
    return any(
        field.is_repeated
        or field.name == "content"
        or (field.message_type is not None and grows(field.message_type, seen))
        for field in message.fields
    )


def test_every_answer_that_can_grow_is_measured() -> None:
    modules = key_pb2, review_pb2, settings_pb2, tenant_pb2
    growing = {
        method.name
        for module in modules
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if grows(method.output_type)
    }
    assert growing == LARGEST.keys() | LIKE.keys()


@pytest.mark.parametrize("method", LARGEST)
async def test_largest_answer_fits(stack: Stack, method: str) -> None:
    """Shown to fail without the bytes in `paging.cut`, and with the findings of a review in one
    answer."""
    answers = await LARGEST[method](stack)
    most = EXPORT_BYTES if method == "ExportReview" else DEFAULT_BYTES
    if method.startswith("List"):
        most = bounds.PAGE_BYTES + ROW_BYTES
    assert max(answer.ByteSize() for answer in answers) <= most


def test_the_worst_findings_are_kept_however_many_chunks_there_are() -> None:
    found = [largest(line, line % 6) for line in range(100)]
    for chunks in (1, 20, 1000, 10_000):
        kept = bounds.worst(found, chunks)
        assert kept
        assert {one.severity for one in kept} == {5}
        assert [one.start_line for one in kept] == sorted(one.start_line for one in kept)
        assert sum(one.ByteSize() for one in kept) * min(chunks, 1000) <= bounds.ALL_BYTES
    small = [finding(line) for line in range(100)]
    assert bounds.worst(small, 20) == small
