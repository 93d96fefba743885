"""What an auditor holds: exports, checkpoints, and what they show."""

from __future__ import annotations

import base64

import pytest
from byokeep import auditlog
from byokeep.auditlog import VerificationError
from byokeep.checkpoint import open_checkpoint
from byokeep.keyvault.v1 import audit_pb2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tests.harness import keyvault as kv
from tests.harness import rows
from tests.harness.keyvault import try_lease


def pinned(keyvault) -> dict[str, Ed25519PublicKey]:
    return {
        key_id: Ed25519PublicKey.from_public_bytes(base64.b64decode(raw))
        for key_id, raw in keyvault.audit_keys.items()
    }


async def export(keyvault, since: int = 0, chain: str = "tenants/acme") -> list[str]:
    """The lines of an export, as the command writes them."""
    lines = []
    request = audit_pb2.ExportEventsRequest(parent=chain, since_size=since)
    async for item in keyvault.audit.ExportEvents(request):
        if item.HasField("event"):
            lines.append(auditlog.event_line(item.event))
        else:
            proof = item.proof if item.HasField("proof") else None
            lines.append(auditlog.head_line(item.head, proof))
    return lines


async def receipt(keyvault, chain: str = "tenants/acme") -> tuple[str, str]:
    """What `byokeep audit checkpoint` prints, and what it saves."""
    answer = await keyvault.audit.GetCheckpoint(audit_pb2.GetCheckpointRequest(parent=chain))
    return answer.checkpoint, auditlog.head_line(answer.head, answer.proof) + "\n"


def held(keyvault, text: str) -> auditlog.Older:
    return auditlog.read_older(text.splitlines(keepends=True), pinned(keyvault), kv.DEPLOYMENT)


def verify(keyvault, lines: list[str], older: auditlog.Older | None = None):
    older = older or auditlog.Older()
    return auditlog.verify(
        lines,
        pinned(keyvault),
        deployment=kv.DEPLOYMENT,
        against=older.head,
        since=older.checkpoint,
    )


async def test_audit_tamper_any_byte(keyvault):
    """35. Any byte of an export that is changed is found.

    Shown to fail: without the comparison of the head's line, a base64 padding bit and
    bytes of an unused field of the proof changed unseen.
    """
    await receipt(keyvault)
    older, _ = await receipt(keyvault)
    await keyvault.stage()
    text = "\n".join(await export(keyvault, held(keyvault, older).checkpoint.size)) + "\n"
    whole = text.encode()
    assert verify(keyvault, _split(whole)).checkpoint is not None
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 7)
        with pytest.raises(VerificationError):
            verify(keyvault, _split(bytes(changed)))


def _split(raw: bytes) -> list[str]:
    return [line.decode("utf-8", "replace") + "\n" for line in raw.split(b"\n") if line]


async def test_audit_tamper_a_chain_that_was_cut(keyvault, deployment):
    """35. A tail that keyvault itself no longer has is found by a saved checkpoint.

    Cut with full SQL, leaves and nodes included, and taken for the truth by an operator who was
    led astray. Shown to fail: with `against` not given to the verifier.
    """
    await keyvault.add_active()
    before = await rows.copied(keyvault.app.database, None)
    await keyvault.add_active(name="second")
    _, saved = await receipt(keyvault)
    older = held(keyvault, saved)
    await rows.put_back(keyvault.app.database, before)
    # Nobody else is led astray.
    assert await kv.refusal(_first(keyvault)) == "ROLLED_BACK"
    async with kv.running(deployment) as astray:
        await astray.admin.ResumeLeases(kv.admin_pb2.ResumeLeasesRequest(reason="a drill"))
        short = await export(astray)
        left = verify(astray, short).count
        with pytest.raises(VerificationError, match="older head counts") as caught:
            verify(astray, short, older)
    assert caught.value.sequence == left + 1


async def _first(keyvault, chain: str = "tenants/acme"):
    async for item in keyvault.audit.ExportEvents(audit_pb2.ExportEventsRequest(parent=chain)):
        return item


async def test_audit_tamper_events_that_were_deleted(keyvault):
    """35. Events gone by SQL are missing in the export, whose head counts them.

    Shown to fail: with a head of the last event that is stored in AuditService._head.
    """
    await keyvault.add_active()
    lines = await export(keyvault)
    for where in ("sequence = 2", "sequence <= 2", "sequence >= 3"):
        whole = await rows.copied(keyvault.app.database)
        await keyvault.sql(f"DELETE FROM event WHERE tenant = 'acme' AND {where}")
        with pytest.raises(VerificationError):
            verify(keyvault, await export(keyvault))
        await rows.put_back(keyvault.app.database, whole)
    assert len(await export(keyvault)) == len(lines)


async def test_audit_tamper_an_old_export_for_a_new_one(keyvault):
    """35. An export that is older than a checkpoint does not pass: its tail may be missing.

    The checkpoint alone shows it. Shown to fail: without the comparison of sizes in
    auditlog._since.
    """
    await keyvault.add_active()
    old = await export(keyvault)
    await keyvault.change("RevokeKey", (await keyvault.add_active(name="other")).name)
    note, _ = await receipt(keyvault)
    with pytest.raises(VerificationError, match="may be missing") as caught:
        verify(keyvault, old, held(keyvault, note))
    assert caught.value.sequence == len(old)
    newer = await export(keyvault, held(keyvault, note).checkpoint.size)
    assert verify(keyvault, newer, held(keyvault, note)).since


async def test_a_log_that_grew_is_proven_from_an_older_checkpoint(keyvault):
    """35. Consistency, from a bare note and from a saved one; another log is found."""
    await keyvault.add_active()
    note, saved = await receipt(keyvault)
    await keyvault.create_tenant("other")
    await keyvault.add_active(name="second")
    size = held(keyvault, note).checkpoint.size
    lines = await export(keyvault, size)
    assert verify(keyvault, lines, held(keyvault, note)).since == size
    assert verify(keyvault, lines, held(keyvault, saved)).since == size
    without = await export(keyvault)
    assert verify(keyvault, without, held(keyvault, saved)).since == 0
    with pytest.raises(VerificationError, match="export again"):
        verify(keyvault, without, held(keyvault, note))
    fork = auditlog.Checkpoint(f"byokeep/{kv.DEPLOYMENT}/audit", size, bytes(32))
    with pytest.raises(VerificationError, match="rewritten, or restored"):
        verify(keyvault, lines, auditlog.Older(None, fork))


async def test_a_head_without_its_proof(keyvault):
    """35. The proof can't be taken out: the signed head says that there is one."""
    await keyvault.add_active()
    *links, last = await export(keyvault)
    bare = last[: last.index(', "proof"')] + "}"
    with pytest.raises(VerificationError, match="taken out"):
        verify(keyvault, [*links, bare])


async def test_checkpoints_are_kept_once_a_minute(keyvault):
    """A log that grows gets a checkpoint; all of them are of one log, and on demand a new one."""
    trusted = pinned(keyvault)
    await keyvault.tick()
    await keyvault.app._checkpoints.tick()
    await keyvault.add_active()
    await keyvault.tick()
    await keyvault.app._checkpoints.tick()
    first = await keyvault.audit.ListCheckpoints(audit_pb2.ListCheckpointsRequest())
    assert len(first.checkpoints) == 1
    await receipt(keyvault)
    answer = await keyvault.audit.ListCheckpoints(audit_pb2.ListCheckpointsRequest(page_size=1))
    newest = open_checkpoint(answer.checkpoints[0], kv.DEPLOYMENT, trusted)
    assert newest.size > open_checkpoint(first.checkpoints[0], kv.DEPLOYMENT, trusted).size
    rest = await keyvault.audit.ListCheckpoints(
        audit_pb2.ListCheckpointsRequest(page_token=answer.next_page_token)
    )
    assert list(rest.checkpoints) == list(first.checkpoints)


async def test_no_checkpoint_of_a_log_that_contradicts_its_anchor(keyvault, deployment):
    """A position is signed only once it is anchored.

    Shown to fail: without the look at `rolled_back` in Checkpoints.now.
    """
    await keyvault.add_active()
    deployment.folder.joinpath("anchor.json").unlink()
    answer = keyvault.audit.GetCheckpoint(audit_pb2.GetCheckpointRequest())
    assert await kv.refusal(answer) == "DATABASE_ROLLED_BACK"
    lines = await export(keyvault)
    assert verify(keyvault, lines).checkpoint is None


async def test_audit_fail_closed_disk_full(keyvault):
    """35. PostgreSQL has no room for the event: no key is released, and nothing is half-done.

    Shown to fail: with events written in a statement of their own after the commit.
    """
    key = await keyvault.add_active()
    await keyvault.sql(
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE disk_full; END $$"
    )
    await keyvault.sql(
        "CREATE TRIGGER full_disk BEFORE INSERT ON event FOR EACH ROW EXECUTE FUNCTION full_disk()"
    )
    assert await try_lease(keyvault, key) in ("AUDIT_UNAVAILABLE", "DEPENDENCY_UNAVAILABLE")
    assert await keyvault.sql("SELECT count(*) FROM lease") == [(0,)]
    await keyvault.sql("DROP TRIGGER full_disk ON event")
    assert await try_lease(keyvault, key) == ""


async def test_retention_is_stated_by_the_chain(keyvault):
    """Events are dropped, an export starts after them, and is believed because the chain says so.

    Shown to fail: without `_check_dropped`, an export without the statement passed.
    """
    await keyvault.add_active()
    _, saved = await receipt(keyvault)
    await kv.prune(keyvault)
    lines = await export(keyvault)
    result = verify(keyvault, lines)
    assert (result.dropped, result.count) == (3, 1)
    older = held(keyvault, saved)
    assert verify(keyvault, lines, older).dropped == older.head.sequence
    await keyvault.add_active(name="second")
    longer = await export(keyvault)
    with pytest.raises(VerificationError, match="retention") as caught:
        verify(keyvault, longer[1:])
    assert caught.value.sequence == 1


async def test_what_is_put_back_is_refused_after_retention(keyvault, deployment):
    """2. What retention keeps is enough: a revoked key restored by SQL is refused, by a process
    that never saw the dropped events; once the tenant is whole again it goes on.

    Shown to fail: with a process that knows no head before it read an event.
    """
    key, other = await keyvault.add_active(), await keyvault.add_active(name="second")
    before = await rows.copied(keyvault.app.database)
    await keyvault.change("RevokeKey", key.name)
    await kv.prune(keyvault)
    ((left,),) = await keyvault.sql("SELECT count(*) FROM event WHERE tenant = 'acme'")
    assert left < 3
    after = await rows.copied(keyvault.app.database)
    await keyvault.sql("DELETE FROM log_snapshot")
    await rows.put_back(keyvault.app.database, before)
    async with kv.running(deployment) as fresh:
        assert await try_lease(fresh, key) == "ROLLED_BACK"
        assert await try_lease(fresh, other) == "ROLLED_BACK"
        await rows.put_back(fresh.app.database, after)
        assert await try_lease(fresh, key) == "WRONG_STATE"
        assert await try_lease(fresh, other) == ""


async def test_retention_that_the_chain_does_not_state(keyvault, deployment):
    """2. Events deleted by SQL make no export that is believed; keyvault needs none of them.

    Shown to fail: with an export that starts at the first event there is.
    """
    key = await keyvault.add_active()
    await keyvault.tick()
    await keyvault.sql("DELETE FROM event WHERE tenant = 'acme' AND sequence <= 2")
    async with kv.running(deployment) as fresh:
        assert await try_lease(fresh, key) == ""
        with pytest.raises(VerificationError):
            verify(fresh, await export(fresh))
