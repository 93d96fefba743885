"""Whoever can run any SQL on keyvault's database, and has keyvault itself write the next state.

An old row has a genuine MAC of its own past. Each test is an attack that worked.
"""

from __future__ import annotations

import pytest
from byokeep.keyvault.v1 import admin_pb2, audit_pb2, lease_pb2

from services.keyvault.store import reconcile as store
from tests.harness import keyvault as kv
from tests.harness.keyvault import refusal, try_lease

_STATE = "state, state_sequence, state_mac"
_ROW = f"{_STATE}, wrapped_dek, wrap_mac, envelope, kek_backend, kek_version"
_FROZEN = "RECONCILE_MISMATCH"


async def _row(keyvault, columns: str = _ROW, version: int = 1):
    found = await keyvault.sql(f"SELECT {columns} FROM key_version WHERE version = %s", version)
    return found[0]


async def _put_back(keyvault, row, columns: str = _ROW) -> None:
    marks = ", ".join(["%s"] * len(row))
    await keyvault.sql(f"UPDATE key_version SET ({columns}) = ({marks}) WHERE version = 1", *row)


async def _ended(keyvault, end: str):
    """A key that was PENDING, then ACTIVE, then ended; and its row from when it was PENDING."""
    staged = await keyvault.stage()
    pending = await _row(keyvault)
    key = await keyvault.promote(staged.name, 1)
    if end == "NEEDS_REKEY":
        await try_lease(keyvault, key, purpose=kv.grant_pb2.LEASE_PURPOSE_VALIDATION)
        ((lease,),) = await keyvault.sql("SELECT lease_id FROM lease")
        await kv.released(keyvault, lease, lease_pb2.LEASE_OUTCOME_KEY_REJECTED)
        return key, pending
    await keyvault.change("RevokeKey", key.name)
    if end == "DESTROYED":
        await keyvault.change("DestroyKey", key.name)
    return key, pending


@pytest.mark.parametrize("end", ["REVOKED", "DESTROYED", "NEEDS_REKEY"])
async def test_an_old_pending_row_is_not_promoted_again(keyvault, end):
    """A rogue orchestrator promotes what SQL put back: keyvault itself would have written that
    the key is ACTIVE, and row and chain would agree.

    Shown to fail with rows believed that are older than what was followed of their chain.
    """
    key, pending = await _ended(keyvault, end)
    await keyvault.tick()
    await _put_back(keyvault, pending)

    assert await refusal(keyvault.promote(key.name, 1)) == _FROZEN
    await keyvault.tick()
    assert await try_lease(keyvault, key) == _FROZEN


async def test_a_revoked_version_that_was_promoted_again_is_frozen(keyvault):
    """The same before the revocation was followed: the promotion goes through, and the chain
    itself then tells of a life after the end.

    Shown to fail with chains that may tell of any state after any other.
    """
    key, pending = await _ended(keyvault, "REVOKED")
    await _put_back(keyvault, pending)
    await keyvault.promote(key.name, 1)

    for _ in range(3):
        await keyvault.tick()
    assert await try_lease(keyvault, key) == _FROZEN
    events = [one.type for one in await keyvault.events()]
    assert events.count(audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED) == 1


async def test_a_destroyed_version_that_was_rolled_back_to_is_frozen(keyvault):
    """The same with one version of a key that lives on."""
    key = await keyvault.add_active()
    await keyvault.add_active(key_id=key.name.rpartition("/")[2], operation="rotate")
    superseded = await _row(keyvault)
    await keyvault.change("DestroyKeyVersion", key.name, version=1)
    await _put_back(keyvault, superseded)
    await keyvault.change("RollBackKey", key.name)

    for _ in range(2):
        await keyvault.tick()
    assert await try_lease(keyvault, key) == _FROZEN


async def test_the_sweep_destroys_no_living_version(keyvault):
    """Version 1 was superseded once, and lives again; its row of then, with an old time, would
    have had it destroyed by the sweep, and its data key's KEK by the shred sweep after it.

    Shown to fail with the row alone deciding that its grace is over.
    """
    key = await keyvault.add_active()
    await keyvault.stage(key_id=key.name.rpartition("/")[2], operation="rotate")
    await keyvault.promote(key.name, 2)
    superseded = await _row(keyvault, _STATE)
    await keyvault.change("RollBackKey", key.name)
    living = await _row(keyvault, _STATE)
    await _put_back(keyvault, superseded, _STATE)
    await keyvault.sql("UPDATE key_version SET state_time = now() - interval '2 days'")

    await keyvault.app._custody.sweep()
    assert await _row(keyvault, _STATE) == superseded
    await _put_back(keyvault, living, _STATE)
    assert await try_lease(keyvault, key) == ""


async def test_what_another_replica_resumed_is_followed_before_it_is_leased(deployment):
    """A replica that saw the contradiction has forgotten what was frozen; an operator resumes at
    another one. Shown to fail with a pass from before that still counting."""
    async with kv.running(deployment) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        active = await _row(keyvault, _STATE)
        await keyvault.change("RevokeKey", key.name)
        await keyvault.tick()
        await _put_back(keyvault, active, _STATE)
        await keyvault.tick()
        assert await try_lease(keyvault, key) == _FROZEN
        await keyvault.tick()
        back = "UPDATE chain SET sequence = sequence - 1 WHERE chain = 'system'"
        await keyvault.sql(back)
        await keyvault.app._reconcile.once()
        assert await try_lease(keyvault, key) == "DATABASE_ROLLED_BACK"
        await keyvault.sql(back.replace("- 1", "+ 1"))
        async with kv.running(deployment) as other:
            await other.admin.ResumeLeases(admin_pb2.ResumeLeasesRequest(reason="looked"))
            await keyvault.app._anchor.tick()
            assert await try_lease(keyvault, key) != ""
            await keyvault.app._reconcile.once()
            assert await try_lease(keyvault, key) == _FROZEN


def test_no_two_tables_have_one_digest():
    """Names with blanks and line ends in them: with names as they are, both would render alike,
    and a row that was put back between them would not be found."""
    revoked, active = "acme key 1 5 3", "acme key 1 2 2"
    before = [
        ("aaa", "k", 1, 1, 1),
        ("acme", "key", 1, 5, 3),
        ("b", f"k 1 1 1\n{active}\nz k", 1, 1, 1),
    ]
    after = [
        ("aaa", f"k 1 1 1\n{revoked}\nb k", 1, 1, 1),
        ("acme", "key", 1, 2, 2),
        ("z", "k", 1, 1, 1),
    ]
    assert store.digest_of(before) != store.digest_of(after)
