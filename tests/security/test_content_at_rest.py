"""50. content_at_rest: what customers write and models answer is nowhere in clear, and dies."""

from __future__ import annotations

import datetime
import logging
import secrets
import subprocess
from collections.abc import Iterator

import psycopg
import pytest
from byokeep.ids import new_id
from byokeep.keyvault.v1 import admin_pb2, content_pb2, content_pb2_grpc
from byokeep.orchestrator.v1 import review_pb2
from byokeep.testing.canary import files_with, forms, found_in
from psycopg.types.string import TextLoader

from deploy.local import binaries
from services.common.errors import ByokeepError
from services.keyvault import content as content_keys
from services.keyvault import epochs, kek
from services.orchestrator.custody import content
from services.orchestrator.custody.keyvault import Keyvault
from tests.harness import keyvault as kv
from tests.harness.orchestrator import Conversation, running
from tests.security.test_canary import add_key, fresh_key

FIELDS = ("diff", "path", "title", "description", "guidance", "context", "message", "suggestion")
COMPLETED = review_pb2.REVIEW_STATE_COMPLETED
FAILED = review_pb2.REVIEW_STATE_FAILED


def canaries() -> dict[str, str]:
    """A text of its own for every field that holds content; no part of it can be hexadecimal."""
    return {
        field: f"canary{field}" + "".join(secrets.choice("ghjkmnpqrstuvwxyz") for _ in range(24))
        for field in FIELDS
    }


def wanted(words: dict[str, str]) -> dict[str, bytes]:
    """Every form of every canary; fragments past the part that says which it is."""
    return {
        f"{field}, {form}": raw
        for field, word in words.items()
        for form, raw in forms(word, f"canary{field}").items()
    }


def written_by(words: dict[str, str], **values: object) -> review_pb2.ReviewInput:
    """A review with a canary wherever a customer can write; the emulator finds the eval."""
    path = f"{words['path']}.py"
    diff = f"""diff --git a/{path} b/{path}
--- a/{path}
+++ b/{path}
@@ -1,2 +1,4 @@
 def load(query, name):
+    # {words["diff"]}
+    return eval(query)
     return None
"""
    return review_pb2.ReviewInput(
        repository="acme/shop",
        diff=diff.encode(),
        title=words["title"],
        description=words["description"],
        guidance=words["guidance"],
        context_files=[review_pb2.ContextFile(path="a.py", content=f"# {words['context']}")],
        **values,
    )


def dump(url: str) -> bytes:
    """The database as a backup would have it."""
    program = binaries.reachable("") / "bin" / "pg_dump"
    return subprocess.run([program, url], capture_output=True, check=True, timeout=120).stdout


def rows(url: str) -> bytes:
    """Every row of every table, decompressed and as the driver gives it."""
    found = bytearray()
    with psycopg.connect(url) as session:
        # PostgreSQL has times that Python has not: infinity.
        session.adapters.register_loader("timestamptz", TextLoader)
        names = session.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        for (name,) in names.fetchall():
            for row in session.execute(f"SELECT * FROM {name}").fetchall():
                for value in row:
                    found += bytes(value) if isinstance(value, bytes) else str(value).encode()
                    found += b"\n"
    return bytes(found)


async def test_content_at_rest_with_findings(
    orchestrator_database_url, postgres, tmp_path, caplog
) -> None:
    """Waiting, failed, cancelled and completed reviews, and what a model answers: the database's
    files with the write-ahead log, its tables, a dump and the log have none of it.

    Shown to fail with AESGCM replaced by a cipher that does nothing: tests/mutants.
    """
    caplog.set_level(logging.DEBUG)
    words = canaries()

    async def answers(talk: Conversation) -> None:
        await talk.accept("c1")
        await talk.call("c1")
        await talk.result(
            "c1",
            review_pb2.Finding(
                path=f"{words['path']}.py",
                start_line=2,
                end_line=2,
                severity=review_pb2.SEVERITY_HIGH,
                category=review_pb2.CATEGORY_SECURITY,
                title=words["title"],
                message=words["message"],
                suggestion=words["suggestion"],
            ),
        )
        await talk.end()

    async def breaks(talk: Conversation) -> None:
        await talk.accept("c1")
        await talk.call("c1")
        await talk.end(review_pb2.FAILURE_REASON_REFUSED)

    async def waits(talk: Conversation) -> None:
        await talk.accept("c1")
        await talk.cancelled.wait()

    async with running(orchestrator_database_url, tmp_path) as stack:
        await stack.tenant()
        stack.keyvault.add("acme")
        stack.runner.scripts = [answers, breaks]
        stack.runner.default = waits
        sent = {field.name: value for field, value in written_by(words).ListFields()}
        done = await stack.ended(await stack.submit(**sent))
        failed = await stack.ended(await stack.submit(**sent))
        for _ in range(20):
            await stack.submit(**sent)
        assert (done.state, failed.state) == (COMPLETED, FAILED)
        assert words["suggestion"] in str(done)
        kept = await stack.sql("SELECT count(*) FROM review_content")
        assert kept == [(21,)]
        raw = rows(orchestrator_database_url) + dump(orchestrator_database_url)
    with postgres.connect() as session:
        session.execute("CHECKPOINT")
    assert found_in(raw, wanted(words)) == []
    assert list(files_with(postgres.directory, wanted(words))) == []
    assert found_in(caplog.text.encode(), wanted(words)) == []


@pytest.mark.timeout(300)
def test_content_at_rest_in_a_whole_stack(stack) -> None:
    """And with real processes: nothing in any file or log of any of them, and in no dump."""
    words = canaries()
    with stack.connect() as connection:
        add_key(connection, "openai", fresh_key("openai"), f"content-{secrets.token_hex(4)}")
        done = _review(connection, words)
        stack.emulator.fault("refusal", provider="openai", path="chat", times=10)
        failed = _review(connection, words)
    assert (done.state, failed.state) == (COMPLETED, FAILED)
    assert done.findings[0].path == f"{words['path']}.py"
    url = stack.database_url("orchestrator")
    assert found_in(rows(url) + dump(url), wanted(words)) == []
    url = stack.database_url("keyvault")
    assert found_in(rows(url) + dump(url), wanted(words)) == []
    assert list(files_with(stack.root, wanted(words))) == []


def _review(connection, words: dict[str, str]) -> review_pb2.Review:
    answer = connection.reviews.SubmitReview(
        review_pb2.SubmitReviewRequest(
            parent="tenants/demo",
            input=written_by(words, model="openai/gpt-6.1-terra"),
            request_id=new_id("req"),
        )
    )
    return list(_watched(connection, answer.review.name))[-1]


def _watched(connection, name: str) -> Iterator[review_pb2.Review]:
    for message in connection.reviews.WatchReview(
        review_pb2.WatchReviewRequest(name=name), timeout=90
    ):
        yield message.review


async def test_content_at_rest_after_its_epoch(keyvault, monkeypatch) -> None:
    """When an epoch's retention is over, what was sealed in it opens no more: not with the
    databases as they are, nor with older backups of both, once the backend has shredded the KEK.

    Backend `local` shreds nothing, and says so: whoever has the keyring and a backup with the
    KEK's row still opens it. keyvault itself does not, since the epoch is over by the clock.

    Shown to fail: with Epochs._destroy not destroying; without the clock in ContentKeys.get.
    """
    monkeypatch.setattr(epochs, "TICK_SECONDS", 3600.0)
    orchestrator = Keyvault(keyvault.channel("orchestrator"))
    key = await content.ContentKeys(orchestrator.content_key).current("acme")
    backup_of_content = key.seal("rev_1", content.INPUT, b"a diff")
    backup_of_rows = await keyvault.sql("SELECT * FROM content_key")
    name = kek.content_kek(key.epoch)
    backup_of_kek = await keyvault.sql("SELECT * FROM local_kek WHERE name = %s", name)

    async def opened() -> bytes | str:
        keys = content.ContentKeys(orchestrator.content_key)
        try:
            found = await keys.of("acme", backup_of_content)
        except ByokeepError as error:
            return error.reason
        return found.open("rev_1", content.INPUT, backup_of_content)

    async def restore(table: str, saved: list[tuple]) -> None:
        for row in saved:
            places = ", ".join(["%s"] * len(row))
            await keyvault.sql(f"INSERT INTO {table} VALUES ({places})", *row)

    assert await opened() == b"a diff"
    now = epochs.content_close(key.epoch, datetime.timedelta(days=90))

    with monkeypatch.context() as clock:
        kv.move_clocks(clock, keyvault, lambda: now)
        await keyvault.app.epochs.tick()
        assert await opened() == "CONTENT_EXPIRED"
    # The databases as they are, were the clock turned back.
    assert await opened() == "CONTENT_EXPIRED"
    # An older backup, where destroying a KEK is final.
    await restore("content_key", backup_of_rows)
    assert await opened() == "CONTENT_EXPIRED"
    # And where it is not: backend local, a backup with the KEK, the keyring.
    await restore("local_kek", backup_of_kek)
    with monkeypatch.context() as clock:
        kv.move_clocks(clock, keyvault, lambda: now)
        assert await opened() == "CONTENT_EXPIRED"
    backend = keyvault.app.backends.primary
    assert backend.shred == "none"
    ((wrapped,),) = await keyvault.sql("SELECT wrapped_dek FROM content_key")
    with await backend.unwrap(name, wrapped) as data_key:
        raw = content_keys.derive(data_key.reveal(), "test", "acme", key.epoch)
    offline = content.ContentKey.derive("acme", key.epoch, raw)
    assert offline.open("rev_1", content.INPUT, backup_of_content) == b"a diff"


async def test_content_of_a_shredded_tenant(keyvault) -> None:
    """A destroyed tenant's content dies at once, the others' stays.

    Shown to fail: without forget_tenant in ShredTenant.
    """
    await keyvault.create_tenant("other")
    stub = content_pb2_grpc.ContentKeyServiceStub(keyvault.channel("orchestrator"))

    async def fetch(tenant: str, epoch: str) -> content_pb2.GetContentKeyResponse:
        return await stub.GetContentKey(
            content_pb2.GetContentKeyRequest(tenant=f"tenants/{tenant}", epoch=epoch)
        )

    sealed = {
        tenant: (await content.ContentKeys(fetch).current(tenant)).seal("rev_1", "input", b"text")
        for tenant in ("acme", "other")
    }
    await keyvault.admin.ShredTenant(
        admin_pb2.ShredTenantRequest(tenant="tenants/acme", request_id=new_id("req"))
    )
    keys = content.ContentKeys(Keyvault(keyvault.channel("orchestrator")).content_key)
    other = await keys.of("other", sealed["other"])
    assert other.open("rev_1", "input", sealed["other"]) == b"text"
    with pytest.raises(ByokeepError) as refused:
        await keys.of("acme", sealed["acme"])
    assert refused.value.reason == "CONTENT_EXPIRED"
