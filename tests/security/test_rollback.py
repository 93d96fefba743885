"""An older database, and keyvaults that start on one or share one."""

from __future__ import annotations

import asyncio
import json

import pytest
import sqlalchemy
from byokeep.auditlog import VerificationError
from byokeep.keyvault.v1 import audit_pb2

from services.keyvault.anchor import FileAnchor
from services.keyvault.log import Log
from tests.harness import keyvault as kv
from tests.harness import rows
from tests.harness.keyvault import try_lease
from tests.security.test_audit import export, verify


class Backup:
    """A copy of a whole database, taken and put back by PostgreSQL itself."""

    def __init__(self, postgres, url: str) -> None:
        self._postgres = postgres
        self._url = sqlalchemy.make_url(url)
        self._name = f"{self._url.database}_backup"

    def take(self) -> None:
        self._copy(self._url.database, self._name)

    def put_back(self) -> None:
        with self._postgres.connect() as connection:
            connection.execute(f'DROP DATABASE "{self._url.database}" WITH (FORCE)')
        self._copy(self._name, self._url.database)

    def drop(self) -> None:
        with self._postgres.connect() as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{self._name}"')

    def _copy(self, source: str, target: str) -> None:
        with self._postgres.connect() as connection:
            connection.execute(
                f'CREATE DATABASE "{target}" TEMPLATE "{source}" OWNER "{self._url.username}"'
            )


async def test_rollback_row_whole_database_from_a_backup(postgres, deployment):
    """2. The whole database is restored from a backup: noticed at the start, said with its
    reason, given again on an operator's word; and that word stays on the record.

    Shown to fail: without the comparison of roots in Log._tick, the revoked key was leased.
    """
    backup = Backup(postgres, deployment.database_url)
    async with kv.running(deployment) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
    try:
        backup.take()
        async with kv.running(deployment) as keyvault:
            await keyvault.change("RevokeKey", key.name)
            assert await try_lease(keyvault, key) == "WRONG_STATE"
        backup.put_back()
        async with kv.running(deployment) as keyvault:
            assert await try_lease(keyvault, key) == "DATABASE_ROLLED_BACK"
            await keyvault.admin.ResumeLeases(kv.admin_pb2.ResumeLeasesRequest(reason="a drill"))
            assert await try_lease(keyvault, key) == ""
            said = [
                event.detail
                for event in await keyvault.events("system")
                if event.type == audit_pb2.AUDIT_EVENT_TYPE_LEASES_RESUMED
            ]
            assert said == ["a drill"]
        async with kv.running(deployment) as keyvault:
            assert await try_lease(keyvault, key) == ""
    finally:
        backup.drop()


def _contradict(deployment) -> None:
    """Let the anchor say what the database never was."""
    file = deployment.folder / "anchor.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"root": "00" * 32}))


async def test_a_resume_reaches_every_replica(keyvault, deployment):
    """An operator's word to one replica is enough: the others learn of it through the anchor.

    Shown to fail: with a verdict that stands whatever the anchor says.
    """
    key = await keyvault.add_active()
    await keyvault.tick()
    async with kv.running(deployment) as other:
        _contradict(deployment)
        await keyvault.tick()
        await other.tick()
        assert await try_lease(other, key) == "DATABASE_ROLLED_BACK"
        assert await try_lease(keyvault, key) == "DATABASE_ROLLED_BACK"
        await keyvault.admin.ResumeLeases(kv.admin_pb2.ResumeLeasesRequest(reason="a drill"))
        await other.tick()
        assert await try_lease(other, key) == ""
        assert await try_lease(keyvault, key) == ""
        # Heads that were in the log before are in the resumed one, too.
        await other.tick()
        sealed = await keyvault.sql("SELECT DISTINCT tenant FROM log_leaf WHERE generation = 1")
        assert {row[0] for row in sealed} == {"", "acme"}


async def test_two_replicas_extend_one_log(keyvault, deployment):
    """Both tick at once, all the time; the log has no fork and the anchor never goes back.

    Shown to fail: with FileAnchor._write not comparing versions.
    """
    sizes = []

    async def watch(until: asyncio.Event) -> None:
        while not until.is_set():
            sizes.append(json.loads((deployment.folder / "anchor.json").read_text())["size"])
            await asyncio.sleep(0.005)

    async with kv.running(deployment) as other:
        done = asyncio.Event()
        watcher = asyncio.create_task(watch(done))
        for number in range(6):
            await keyvault.stage(name=f"key-{number}")
            await asyncio.gather(*(one.tick() for one in (keyvault, other) for _ in range(3)))
        done.set()
        await watcher
        assert sizes == sorted(sizes)
        for one in (keyvault, other):
            await one.tick()
            assert not one.app.log.rolled_back
        indexes = await keyvault.sql("SELECT index FROM log_leaf ORDER BY index")
        assert [row[0] for row in indexes] == list(range(len(indexes)))


async def test_an_older_position_does_not_overwrite_a_newer_one(tmp_path):
    """Compare-and-set: what was read before somebody else wrote is not written over."""
    first, second = FileAnchor(tmp_path / "anchor"), FileAnchor(tmp_path / "anchor")
    assert await first.write("1", await first.read())
    slow = await first.read()
    assert await second.write("2", await second.read())
    assert not await first.write("1 and a half", slow)
    assert (await first.read()).text == "2"


async def test_refused_on_every_replica_and_after_a_restart(keyvault, deployment):
    """2. What was put back is refused on every replica, and after a restart, with the snapshot of
    the log and without it; for as long as it is there.

    Shown to fail: with heads of what this process wrote alone.
    """
    key = await keyvault.add_active()
    before = await rows.copied(keyvault.app.database)
    await keyvault.change("RevokeKey", key.name)
    now = await rows.copied(keyvault.app.database)
    async with kv.running(deployment) as other:
        await rows.put_back(keyvault.app.database, before)
        assert await try_lease(keyvault, key) == "ROLLED_BACK"
        assert await try_lease(other, key) == "ROLLED_BACK"
        await keyvault.app.log.save()
    for statement in ("SELECT 1", "DELETE FROM log_snapshot"):
        await keyvault.sql(statement)
        async with kv.running(deployment) as restarted:
            assert await try_lease(restarted, key) == "ROLLED_BACK"
    await rows.put_back(keyvault.app.database, now)
    assert await try_lease(keyvault, key) == "WRONG_STATE"


async def _leaves_read(monkeypatch, deployment) -> int:
    """Start a keyvault; return how many leaves of the log it had to read."""
    read = set()
    wrote = Log.wrote

    def counted(self, leaf):
        read.add(leaf.index)
        return wrote(self, leaf)

    with monkeypatch.context() as patched:
        patched.setattr(Log, "wrote", counted)
        async with kv.running(deployment):
            return len(read)


async def test_a_start_does_not_follow_everything_again(deployment, monkeypatch):
    """What was verified is kept under a MAC; a start reads only what came after.

    Forged, or mixed from two snapshots, it counts for nothing: everything is read again.
    Shown to fail: with the MAC not compared in snapshot.opened.
    """
    async with kv.running(deployment) as keyvault:
        await keyvault.create_tenant()
        for number in range(4):
            await keyvault.add_active(name=f"key-{number}")
        assert await keyvault.sql("SELECT part FROM log_snapshot") == []
    assert await _leaves_read(monkeypatch, deployment) == 0
    for damage in (
        "UPDATE log_snapshot SET data = set_byte(data, 40, 255 - get_byte(data, 40))"
        " WHERE part = 0",
        "UPDATE log_snapshot SET data = data || '\\x00' WHERE part = 1",
        "DELETE FROM log_snapshot WHERE part = 1",
        "DELETE FROM log_snapshot",
    ):
        async with kv.database(deployment) as connection:
            await connection.execute(damage)
        assert await _leaves_read(monkeypatch, deployment) >= 5


async def test_an_older_snapshot_put_back_revives_nothing(deployment):
    """2. Rows, chain and snapshot of before a revocation, put back together, are refused: the
    log has more than they.

    Shown to fail: with a start that reads no leaf after its snapshot.
    """
    async with kv.running(deployment) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        await keyvault.tick()
        await keyvault.app.log.save()
        before = await rows.copied(keyvault.app.database, None)
        await keyvault.change("RevokeKey", key.name)
    async with kv.database(deployment) as connection, connection.transaction():
        tables = ("tenant", "tenant_part", "key_secret", "event", "log_snapshot")
        await before.put_back(connection, *tables)
    async with kv.running(deployment) as keyvault:
        assert await try_lease(keyvault, key) == "ROLLED_BACK"


async def test_a_cut_chain_is_noticed_while_keyvault_runs(keyvault):
    """2. A head that was moved back is no head that keyvault wrote: refused at once.

    Shown to fail: with the head not in Ledger._mac.
    """
    key = await keyvault.add_active()
    await keyvault.sql("UPDATE tenant SET sequence = sequence - 1 WHERE name = 'acme'")
    assert await try_lease(keyvault, key) == "STATE_TAMPERED"


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM log_leaf WHERE index = 0",
        "DELETE FROM log_leaf WHERE index = (SELECT max(index) FROM log_leaf)",
        "UPDATE log_leaf SET blind = sha256(blind) WHERE tenant = 'acme'",
        "UPDATE log_leaf SET leaf_hash = sha256(leaf_hash) WHERE tenant = 'acme'",
        "UPDATE log_leaf SET head_hash = sha256(head_hash) WHERE tenant = 'acme'",
        "UPDATE log_leaf SET sequence = sequence + 1 WHERE tenant = 'acme'",
        "UPDATE log_leaf SET generation = 1 WHERE tenant = 'acme'",
        "UPDATE log_leaf SET tenant = 'other' WHERE tenant = 'acme'",
        "UPDATE log_leaf SET index = -1 - index",
    ],
)
async def test_altered_leaves_are_noticed_at_a_start(keyvault, deployment, damage):
    """2. Leaves that are gone, or say something else: a start holds them against the anchor.

    Shown to fail: without the blind in Log.wrote, and without the comparison of roots.
    """
    key = await keyvault.add_active()
    await keyvault.create_tenant("other")
    await keyvault.tick()
    await keyvault.sql(damage)
    async with kv.running(deployment) as restarted:
        assert await try_lease(restarted, key) == "DATABASE_ROLLED_BACK"


async def test_altered_nodes_prove_nothing(keyvault, deployment):
    """35. The log's nodes serve proofs alone: altered ones make none that is believed, and stop
    nothing.

    Shown to fail: with a frontier that is read from nodes.
    """
    key = await keyvault.add_active()
    while (await keyvault.sql("SELECT count(*) FROM log_leaf"))[0][0] < 4:
        await keyvault.add_active(name="another")
    verify(keyvault, await export(keyvault))
    await keyvault.sql("UPDATE log_node SET hash = sha256(hash)")
    with pytest.raises(VerificationError):
        verify(keyvault, await export(keyvault))
    async with kv.running(deployment) as restarted:
        assert await try_lease(restarted, key) == ""
