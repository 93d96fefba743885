"""An older database, and keyvaults that start on one or share one."""

from __future__ import annotations

import asyncio
import json

import sqlalchemy
from byokeep import merkle
from byokeep.encoding import fields
from byokeep.keyvault.v1 import audit_pb2

from services.keyvault.anchor_store import FileAnchor
from services.keyvault.following import Following
from tests.harness import keyvault as kv
from tests.harness.keyvault import try_lease


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
    reason, given again on an operator's word; and what the backup revived stays on the record.

    Shown to fail: with Anchor._holds returning True, the revoked key was leased.
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
            kinds = [event.type for event in await keyvault.events("system")]
            assert audit_pb2.AUDIT_EVENT_TYPE_ROLLBACK_DETECTED in kinds
        async with kv.running(deployment) as keyvault:
            assert await try_lease(keyvault, key) == ""
    finally:
        backup.drop()


async def test_a_resume_reaches_every_replica(keyvault, deployment):
    """An operator's word to one replica is enough: the others learn of it through the anchor.

    Shown to fail: with a verdict that stands whatever the anchor says.
    """
    key = await keyvault.add_active()
    await keyvault.app._anchor.tick()
    async with kv.running(deployment) as other:
        await keyvault.app._anchor.distrust()
        await other.app._anchor.distrust()
        assert await try_lease(other, key) == "DATABASE_ROLLED_BACK"
        await keyvault.admin.ResumeLeases(kv.admin_pb2.ResumeLeasesRequest(reason="a drill"))
        await other.tick()
        assert await try_lease(other, key) == ""
        assert await try_lease(keyvault, key) == ""
        # Heads that were in the log before are in the resumed one, too.
        chains = await keyvault.sql("SELECT count(*) FROM chain WHERE logged_sequence = 0")
        await other.app._anchor.tick()
        assert chains == [(0,)]


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
            await asyncio.gather(
                *(one.app._anchor.tick() for one in (keyvault, other) for _ in range(3))
            )
        done.set()
        await watcher
        assert sizes == sorted(sizes)
        for one in (keyvault, other):
            await one.tick()
            assert not one.app._anchor.rolled_back
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


async def test_frozen_on_every_replica_and_after_a_restart(keyvault, deployment):
    """2. What one replica froze is frozen on the others within a pass, and after a restart,
    from the snapshot and without it.

    Shown to fail: without the reading of RECONCILE_MISMATCH events in Following._state.
    """
    key, columns = await keyvault.add_active(), "state, state_sequence, state_mac"
    before = (await keyvault.sql(f"SELECT {columns} FROM key_version"))[0]
    await keyvault.change("RevokeKey", key.name)
    now = (await keyvault.sql(f"SELECT {columns} FROM key_version"))[0]
    async with kv.running(deployment) as other:
        await keyvault.sql(f"UPDATE key_version SET ({columns}) = (%s, %s, %s)", *before)
        await keyvault.app._reconcile.once()
        # Even where the row is put right again: it was altered.
        await keyvault.sql(f"UPDATE key_version SET ({columns}) = (%s, %s, %s)", *now)
        await keyvault.app._anchor.tick()
        await other.tick()
        asked = await other.app._custody.get(*key.name.split("/")[1::2])
        refusal = other.app._reconcile._differences.refusal(asked, None, 0)
        assert refusal.reason == "RECONCILE_MISMATCH"
        frozen = [e for e in await other.events() if e.reason == "RECONCILE_MISMATCH"]
        assert len(frozen) == 1
    for statement in ("SELECT 1", "DELETE FROM reconcile_part"):
        await keyvault.sql(statement)
        async with kv.running(deployment) as restarted:
            refusal = restarted.app._reconcile._differences.refusal(asked, None, 0)
            assert refusal.reason == "RECONCILE_MISMATCH"


async def _links_read(monkeypatch, deployment) -> int:
    """Start a keyvault; return how many links it had to follow."""
    read = 0
    take = Following._take

    def counted(self, *arguments):
        nonlocal read
        read += 1
        return take(self, *arguments)

    monkeypatch.setattr(Following, "_take", counted)
    async with kv.running(deployment):
        pass
    monkeypatch.setattr(Following, "_take", take)
    return read


async def test_a_start_does_not_follow_everything_again(deployment, monkeypatch):
    """What was verified is kept under a MAC; a start reads only what came after.

    Forged, or mixed from two snapshots, it counts for nothing: everything is followed again.
    Shown to fail: with the MAC not compared in Following._restore.
    """
    async with kv.running(deployment) as keyvault:
        await keyvault.create_tenant()
        for number in range(4):
            await keyvault.add_active(name=f"key-{number}")
        old = await keyvault.sql("SELECT data FROM reconcile_part WHERE part = 2")
        assert old == []
    assert await _links_read(monkeypatch, deployment) == 0
    for damage in (
        "UPDATE reconcile_part SET data = set_byte(data, 40, 255 - get_byte(data, 40))"
        " WHERE part = 0",
        "UPDATE reconcile_part SET data = data || '\\x00' WHERE part = 3",
        "DELETE FROM reconcile_part WHERE part = 17",
        "DELETE FROM reconcile_part",
    ):
        async with kv.running(deployment) as keyvault:
            keyvault.app._reconcile.save = _nothing
            await keyvault.sql(damage)
        assert await _links_read(monkeypatch, deployment) >= 9


async def _nothing() -> None:
    pass


async def test_an_older_snapshot_put_back_revives_nothing(deployment):
    """2. Rows, chain and snapshot of before a revocation, put back together, are refused: the
    log has more than they.

    Shown to fail: with the end of a chain not held against its leaves.
    """
    tables = ("chain", "audit_event", "key_version", "reconcile_part")
    async with kv.running(deployment) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        await keyvault.tick()
        await keyvault.app._reconcile.save()
        for table in tables:
            await keyvault.sql(f"CREATE TABLE backup_{table} AS SELECT * FROM {table}")
        await keyvault.change("RevokeKey", key.name)
    async with kv.database(deployment) as connection:
        for table in reversed(tables):
            await connection.execute(f"DELETE FROM {table}")
        for table in tables:
            await connection.execute(f"INSERT INTO {table} SELECT * FROM backup_{table}")
    async with kv.running(deployment) as keyvault:
        assert await try_lease(keyvault, key) == "RECONCILE_MISMATCH"


async def test_a_cut_chain_is_noticed_while_keyvault_runs(keyvault):
    """2. The end of a chain that was followed is gone, and no row with it: noticed in a pass.

    Shown to fail: with Reconcile._check_heads returning early.
    """
    key = await keyvault.add_active()
    await keyvault.tick()
    await keyvault.sql("UPDATE chain SET sequence = sequence - 1 WHERE chain = 'tenants/acme'")
    await keyvault.app._reconcile.once()
    assert await try_lease(keyvault, key) == "RECONCILE_MISMATCH"


async def test_leaves_that_are_gone_are_noticed_at_a_start(keyvault, deployment):
    """2. Leaves deleted by SQL, with the log's nodes left: a start holds leaves against the anchor.

    Caught twice, by the gap and by the root: see the next test for the root alone.
    """
    key = await keyvault.add_active()
    await keyvault.app._anchor.tick()
    await keyvault.create_tenant("other")
    await keyvault.app._anchor.tick()
    await keyvault.sql("DELETE FROM log_leaf WHERE index = 0")
    async with kv.running(deployment) as restarted:
        assert await try_lease(restarted, key) == "DATABASE_ROLLED_BACK"


async def test_leaves_that_were_altered_are_noticed_at_a_start(keyvault, deployment):
    """2. A leaf that names the same head under another blind is not what was anchored.

    Shown to fail: without the comparison of roots in Following.log.
    """
    key = await keyvault.add_active()
    await keyvault.app._anchor.tick()
    await keyvault.create_tenant("other")
    await keyvault.app._anchor.tick()
    found = await keyvault.sql(
        "SELECT index, sequence, head_hash FROM log_leaf WHERE chain = 'tenants/acme'"
    )
    index, sequence, digest = found[0]
    blind = b"another".ljust(32)
    # An even size: every leaf is under a node, which stays as it is.
    while (await keyvault.sql("SELECT count(*) FROM log_leaf"))[0][0] % 2:
        await keyvault.create_tenant("another")
        await keyvault.app._anchor.tick()
    forged = merkle.leaf_hash(fields(blind, "tenants/acme", sequence, digest))
    await keyvault.sql(
        "UPDATE log_leaf SET blind = %s, leaf_hash = %s WHERE index = %s",
        blind,
        forged,
        index,
    )
    async with kv.running(deployment) as restarted:
        assert await try_lease(restarted, key) == "DATABASE_ROLLED_BACK"


async def test_nodes_that_were_altered_are_noticed_at_a_start(keyvault, deployment):
    """2. The frontier is read from nodes: altered ones do not give the anchored root.

    Shown to fail: with Anchor._holds not comparing roots.
    """
    key = await keyvault.add_active()
    await keyvault.change("RevokeKey", (await keyvault.add_active(name="other")).name)
    while (await keyvault.sql("SELECT count(*) FROM log_leaf"))[0][0] < 2:
        await keyvault.create_tenant("other")
        await keyvault.app._anchor.tick()
    await keyvault.sql("UPDATE log_node SET hash = sha256(hash)")
    await keyvault.sql("UPDATE log_leaf SET leaf_hash = sha256(leaf_hash)")
    async with kv.running(deployment) as restarted:
        assert await try_lease(restarted, key) == "DATABASE_ROLLED_BACK"


async def test_a_row_restored_between_two_looks_is_found(keyvault):
    """2. A row that is what it was when last compared, although its chain says otherwise.

    Shown to fail: with Pages.touch doing nothing.
    """
    key, columns = await keyvault.add_active(), "state, state_sequence, state_mac"
    await keyvault.tick()
    before = (await keyvault.sql(f"SELECT {columns} FROM key_version"))[0]
    await keyvault.change("RevokeKey", key.name)
    await keyvault.sql(f"UPDATE key_version SET ({columns}) = (%s, %s, %s)", *before)
    await keyvault.tick()
    assert await try_lease(keyvault, key) == "RECONCILE_MISMATCH"
