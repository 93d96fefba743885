"""What attacked keyvault's core once, or would have: one test each, by its name."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from byokeep.ids import new_id
from byokeep.keyvault.v1 import admin_pb2, audit_pb2, state_pb2

from services.common.errors import ByokeepError
from services.keyvault import custody, kek, lifecycle
from services.keyvault.database import Database, unreachable
from services.keyvault.event import SYSTEM, Head, link_hash
from services.keyvault.ledger import ALL, part_of
from services.keyvault.lifecycle import State
from services.keyvault.limits import Caps
from services.keyvault.sql import events as event_sql
from services.keyvault.sql import log as log_sql
from services.keyvault.upkeep.retention import Retention
from tests.harness import keyvault as kv
from tests.harness import rows
from tests.harness.parts import ORIGIN, RUNNER, Replica, Shared

TENANT, OTHER, KEY = "acme", "other", "key_a"
VALUE, OTHERS = "sk-ours", "sk-theirs"
FEW = Caps(in_flight=2, per_minute=1000, per_day=1000)


@pytest.fixture
async def shared(keyvault_database_url, tmp_path):
    """A database with two tenants, a key each."""
    made = Shared(keyvault_database_url, tmp_path)
    await Replica(made).create_system()
    async with _started(made) as replica:
        for tenant, value in ((TENANT, VALUE), (OTHER, OTHERS)):
            await replica.create_tenant(tenant)
            await replica.add(tenant, KEY, value)
    return made


@asynccontextmanager
async def _started(shared: Shared, caps: Caps | None = None):
    replica = Replica(shared, caps)
    await replica.start()
    try:
        yield replica
    finally:
        await replica.close()


@pytest.fixture
async def replica(shared):
    async with _started(shared, FEW) as started:
        yield started


@pytest.fixture
async def second(shared):
    """Another process on the same database."""
    async with _started(shared) as started:
        yield started


async def _sql(one: Replica, statement: str, *parameters):
    async with one.database.transaction() as connection:
        cursor = await connection.execute(statement, parameters)
        return await cursor.fetchall() if cursor.description else []


async def _lease(one: Replica, grant=None, tenant: str = TENANT) -> str:
    """Return the key that is given, or the reason why none is."""
    try:
        return (await one.lease(grant or one.grant(tenant, KEY, 1)))[1]
    except ByokeepError as error:
        return error.reason


async def _end(one: Replica, after: State = State.REVOKED) -> None:
    def act(found) -> None:
        custody.finish(found, KEY, ORIGIN, one.backends, after)

    _, head = await one.ledger.change(TENANT, act, {part_of(KEY)})
    await one.anchored(TENANT, head)


async def _chain(one: Replica, name: str = TENANT) -> list[audit_pb2.AuditEvent]:
    """The chain of a name, whose links lead to its head."""
    found = await _sql(one, "SELECT body FROM event WHERE tenant = %s ORDER BY sequence", name)
    digest = bytes(32)
    for (body,) in found:
        digest = link_hash(digest, bytes(body))
    assert digest == (await one.ledger.read(name)).head.hash
    return [audit_pb2.AuditEvent.FromString(bytes(body)) for (body,) in found]


@pytest.mark.parametrize(
    "reset",
    [
        "UPDATE tenant SET usage = '' WHERE name = 'acme'",
        "UPDATE tenant_part SET usage = '' WHERE tenant = 'acme'",
        "UPDATE tenant t SET usage = o.usage FROM tenant o WHERE o.name = 'other'"
        " AND t.name = 'acme'",
    ],
)
async def test_usage_that_is_reset(replica, reset):
    """Caps and single use rest on the MAC. Shown to fail without the usage in Ledger._mac."""
    before = await rows.copied(replica.database)
    assert [await _lease(replica) for _ in range(3)] == [VALUE, VALUE, "LEASE_CAP"]
    full = await rows.copied(replica.database)
    await _sql(replica, reset)
    assert await _lease(replica) == "STATE_TAMPERED"
    await rows.put_back(replica.database, before, "tenant_part")
    assert await _lease(replica) == "STATE_TAMPERED"
    await rows.put_back(replica.database, full)
    assert await _lease(replica) == "LEASE_CAP"


async def test_usage_that_is_put_back(shared, replica):
    """A lease moves the head: the row of before it is old. A process that is started since knows
    so from the log. Shown to fail with heads that leases don't move."""
    before = await rows.copied(replica.database)
    grant = replica.grant(TENANT, KEY, 1)
    assert await _lease(replica, grant) == VALUE
    await replica.log.tick()
    await rows.put_back(replica.database, before)
    assert await _lease(replica, grant) == "ROLLED_BACK"
    async with _started(shared) as fresh:
        assert await _lease(fresh, grant) == "ROLLED_BACK"
        assert await _lease(fresh, tenant=OTHER) == OTHERS


async def test_a_lease_whose_index_row_is_gone(replica, second):
    """The grant stays redeemed, and the lease counts on. Shown to fail with single use by table
    `lease`."""
    grant = replica.grant(TENANT, KEY, 1)
    assert await _lease(replica, grant) == VALUE
    await _sql(replica, "DELETE FROM lease")
    assert await _lease(replica, grant) == "GRANT_REFUSED"
    assert await _lease(second, grant) == "GRANT_REFUSED"
    assert [await _lease(replica) for _ in range(2)] == [VALUE, "LEASE_CAP"]


@pytest.mark.parametrize("hours", [-48, 48])
async def test_postgresqls_clock_replaced(postgres, shared, replica, hours):
    """Whose time it is the process says. Shown to fail with times of the database's."""
    over = replica.grant(TENANT, KEY, 1)
    over.issue_time.seconds -= 120
    over.expire_time.seconds -= 120
    # Names are PostgreSQL's own first, whatever stands in the search path: not by this.
    await _sql(replica, _CLOCK.format("public", "now", "pg_catalog.now", hours))
    ((name,),) = await _sql(replica, "SELECT current_database()")
    with postgres.connect(name) as superuser:
        superuser.execute(f'ALTER DATABASE "{name}" SET search_path = public, pg_catalog')
        for function in ("now", "clock_timestamp", "statement_timestamp"):
            superuser.execute(f"ALTER FUNCTION pg_catalog.{function}() RENAME TO {function}_")
            clock = _CLOCK.format("pg_catalog", function, f"pg_catalog.{function}_", hours)
            superuser.execute(clock)
    async with _started(shared, FEW) as late:
        ((theirs,),) = await _sql(late, "SELECT extract(epoch FROM now())")
        ours = late.ledger.now().timestamp()
        assert abs(float(theirs) - ours) > 3600
        assert await _lease(late, over) == "GRANT_REFUSED"
        assert [await _lease(late) for _ in range(3)] == [VALUE, VALUE, "LEASE_CAP"]
        await late.releases.expire(TENANT)
        assert await _lease(late) == "LEASE_CAP"
        assert abs((await _chain(late))[-1].event_time.seconds - ours) < 120


_CLOCK = (
    "CREATE FUNCTION {}.{}() RETURNS timestamptz LANGUAGE sql AS"
    " $$ SELECT {}() + interval '{} hours' $$"
)


@pytest.mark.parametrize(
    "damage",
    [
        # Swapped between tenants.
        "UPDATE tenant_part m SET state = o.state, usage = o.usage FROM tenant_part o"
        " WHERE o.tenant <> m.tenant",
        "UPDATE tenant_part m SET state = o.state FROM tenant_part o WHERE o.tenant <> m.tenant",
        # Another tenant's.
        "DELETE FROM tenant_part WHERE tenant = 'acme'; UPDATE tenant_part SET tenant = 'acme'",
        # Gone.
        "DELETE FROM tenant_part WHERE tenant = 'acme'",
        # There twice.
        "ALTER TABLE tenant_part DROP CONSTRAINT tenant_part_pkey;"
        " INSERT INTO tenant_part SELECT * FROM tenant_part WHERE tenant = 'acme'",
        "ALTER TABLE tenant_part DROP CONSTRAINT tenant_part_pkey; INSERT INTO tenant_part"
        " SELECT tenant, part, '', '' FROM tenant_part WHERE tenant = 'acme'",
    ],
)
async def test_a_part_that_is_not_the_tenants_one(replica, damage):
    """Shown to fail without digests of parts, and with the first of two rows."""
    assert await _lease(replica) == VALUE
    for statement in damage.split("; "):
        await _sql(replica, statement)
    assert await _lease(replica) == "STATE_TAMPERED"
    with pytest.raises(ByokeepError) as caught:
        await replica.ledger.read(TENANT, ALL)
    assert caught.value.reason == "STATE_TAMPERED"


@pytest.mark.parametrize("old", [True, False])
async def test_two_rows_of_one_tenant(replica, old):
    """None of them is believed, be one genuine. Shown to fail with the first that is."""
    before = await rows.copied(replica.database)
    await _end(replica)
    await _sql(replica, "ALTER TABLE tenant DROP CONSTRAINT tenant_pkey CASCADE")
    places = ", ".join(["%s"] * len(before.rows["tenant"][0]))
    row = before.rows["tenant"][0]
    if not old:
        ((row),) = await _sql(replica, "SELECT * FROM tenant WHERE name = 'acme'")
    await _sql(replica, f"INSERT INTO tenant VALUES ({places})", *row)
    await rows.put_back(replica.database, before, "key_secret")
    assert await _lease(replica) == "STATE_TAMPERED"
    with pytest.raises(ByokeepError):
        await _end(replica)
    assert await _lease(replica, tenant=OTHER) == OTHERS


@pytest.mark.parametrize("what", ["wrapped_dek", "envelope", "wrapped_dek, envelope"])
async def test_ciphertext_of_another_version(replica, what):
    """Old ciphertext under the new version's number is given to no KEK. Shown to fail without
    secret_digest in Leasing._may_lease: the backend was asked."""
    asked = []
    backend = replica.backends.primary
    unwrap = backend.unwrap

    async def counted(*arguments):
        asked.append(arguments)
        return await unwrap(*arguments)

    backend.unwrap = counted
    assert await replica.add(TENANT, KEY, "sk-second") == 2
    old = ", ".join(f"o.{name}" for name in what.split(", "))
    await _sql(
        replica,
        f"UPDATE key_secret m SET ({what}) = ROW ({old}) FROM key_secret o"
        " WHERE m.version = 2 AND o.version = 1 AND o.tenant = 'other' AND m.tenant = 'acme'",
    )
    assert await _lease(replica, replica.grant(TENANT, KEY, 2)) == "ROW_TAMPERED"
    assert asked == []
    last = (await _chain(replica))[-1]
    assert (last.type, last.reason, last.key_version) == (
        audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED,
        "ROW_TAMPERED",
        2,
    )


async def test_a_recipient_that_is_no_public_key(replica):
    """Nothing is wrong with what is stored: the lease ends as released. Shown to fail where every
    seal that does not come about is told as a row that was changed."""
    grant = replica.grant(TENANT, KEY, 1, recipient_key_sha256=hashlib.sha256(b"no key").digest())
    request = replica.request(grant)
    request.recipient_public_key = b"no key"
    with pytest.raises(ByokeepError) as refused:
        await replica.leasing.lease(request, RUNNER)
    assert refused.value.reason == "INVALID_FIELD"
    assert (await _chain(replica))[-1].type == audit_pb2.AUDIT_EVENT_TYPE_RELEASED


async def test_ends_that_are_owed_are_not_kept_without_bound(replica, monkeypatch):
    """Whoever asks for more while a row is damaged is told that it is not kept."""
    monkeypatch.setattr(custody, "_MOST_OWED", 1)
    await _sql(replica, "UPDATE tenant SET mac = '' WHERE name = 'acme'")
    said = []
    for key in ("key_1", "key_2", "key_1"):
        request = custody.Request("RevokeKey", new_id("req"), bytes(32), "")
        with pytest.raises(ByokeepError) as refused:
            async with _ticking(replica):
                await replica.custody.end(TENANT, key, ORIGIN, request, State.REVOKED)
        said.append(refused.value.reason)
    assert said == ["STATE_TAMPERED", "AUDIT_UNAVAILABLE", "STATE_TAMPERED"]
    assert len((await replica.ledger.read(SYSTEM)).state.owed) == 1


async def test_a_tenant_of_an_hour_ago_with_its_events(shared, replica, second):
    """Row, parts, ciphertext, events and index, all genuine. Shown to fail without heads."""
    before = await rows.copied(replica.database)
    await _end(replica)
    await rows.put_back(replica.database, before)
    assert await _lease(replica) == "ROLLED_BACK"
    # One that did not do it, from its next look at the log on.
    await second.log.tick()
    assert await _lease(second) == "ROLLED_BACK"
    async with _started(shared) as fresh:
        assert await _lease(fresh) == "ROLLED_BACK"
        assert fresh.log.refusal() is None
        assert await _lease(fresh, tenant=OTHER) == OTHERS


async def test_an_event_planted_past_the_head(replica):
    """It keeps nothing from being written, and is overwritten. Shown to fail without ON CONFLICT
    in the statement that writes a change."""
    await _sql(
        replica,
        "INSERT INTO event SELECT name, sequence + n, '', 'x', 'x' FROM tenant,"
        " generate_series(1, 3) n",
    )
    assert await _lease(replica) == VALUE
    await _end(replica)
    assert await _lease(replica) == "WRONG_STATE"
    kinds = [one.type for one in await _chain(replica)]
    assert kinds[-3:] == [
        audit_pb2.AUDIT_EVENT_TYPE_LEASED,
        audit_pb2.AUDIT_EVENT_TYPE_REVOKED,
        audit_pb2.AUDIT_EVENT_TYPE_REVOKED,
    ]


async def test_a_leaf_planted_past_the_end(shared, replica, second):
    """The log goes on over it, for whoever runs and whoever starts. Shown to fail with leaves
    that need no blind: the tenant's own head was not the newest any more."""
    await _sql(
        replica,
        "INSERT INTO log_leaf SELECT (SELECT max(index) FROM log_leaf) + n, 0, 'acme', 999,"
        " sha256('x'), sha256('x'), sha256('x') FROM generate_series(1, 3) n",
    )
    await _end(replica)
    for one in (replica, second):
        await one.log.tick()
        assert one.log.refusal() is None
        assert await _lease(one) == "WRONG_STATE"
    async with _started(shared) as fresh:
        assert fresh.log.refusal() is None
        assert await _lease(fresh) == "WRONG_STATE"
        assert await _lease(fresh, tenant=OTHER) == OTHERS


@pytest.mark.parametrize(
    ("table", "reason"),
    [("tenant", "ROLLED_BACK"), ("tenant_part", "STATE_TAMPERED"), ("key_secret", "ROW_TAMPERED")],
)
async def test_rows_put_back_between_two_statements(replica, table, reason):
    """For a moment, while a lease waits for its tenant's lock: what it reads then is held against
    the row, and that against what is known. Shown to fail without heads, and without digests."""
    before = await rows.copied(replica.database)
    await _wrap_again(replica)
    after = await rows.copied(replica.database)
    own = Database(replica.shared.url, 1)
    await own.open()
    try:
        async with own.transaction() as connection:
            await connection.execute("SELECT 1 FROM tenant WHERE name = 'acme' FOR UPDATE")
            waiting = asyncio.create_task(_lease(replica))
            while not await _sql(replica, "SELECT 1 FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.01)
            await before.put_back(connection, table)
        assert await waiting == reason
        await rows.put_back(own, after, table)
        assert await _lease(replica) == VALUE
    finally:
        await own.close()


async def _wrap_again(replica: Replica) -> None:
    place = TENANT, KEY, 1
    wrapped, envelope = (await replica.ledger.read(TENANT, (), [place])).secrets[place]
    (result,) = await replica.backends.primary.rewrap(kek.tenant_kek(TENANT), [wrapped])
    await rows.store(replica.ledger, place, result.wrapped, envelope)


@pytest.mark.parametrize(
    ("table", "column"),
    [("tenant", "state"), ("tenant", "usage"), ("tenant_part", "state"), ("tenant_part", "usage")],
)
async def test_a_state_that_is_truncated_or_of_a_future_format(replica, table, column):
    """By SQL neither counts. Shown to fail with a MAC over what was parsed."""
    assert await _lease(replica) == VALUE
    name = "name" if table == "tenant" else "tenant"
    whole = await rows.copied(replica.database)
    for value in (
        f"substr({column}, 1, length({column}) - 1)",
        f"substr({column}, 1, 1)",
        # Field 4000, which no message here has.
        f"{column} || '\\x80fa0101'",
        "decode('ff', 'hex')",
    ):
        await _sql(replica, f"UPDATE {table} SET {column} = {value} WHERE {name} = 'acme'")
        assert await _lease(replica) == "STATE_TAMPERED", value
        await rows.put_back(replica.database, whole)


async def test_what_a_newer_keyvault_wrote_is_kept(replica, second):
    """A field that this one does not know, under the MAC, outlives its changes: two versions run
    side by side while one is rolled out."""
    future = bytes.fromhex("80fa0107")

    def write(found) -> None:
        for message in (found.edit(), found.edit_usage(), found.parts[part_of(KEY)].edit()):
            message.MergeFromString(future)
        found.edit_key(KEY).MergeFromString(future)
        found.events.append(audit_pb2.AuditEvent(type=audit_pb2.AUDIT_EVENT_TYPE_STATE_RESEALED))

    await second.ledger.change(TENANT, write, ALL)
    assert await _lease(replica) == VALUE
    await _end(replica)
    found = await second.ledger.read(TENANT, ALL)
    part = found.parts[part_of(KEY)]
    for message in (found.state, found.usage, part.state, part.state.keys[0]):
        assert future in message.SerializeToString()


async def test_a_tenant_that_was_deleted_is_not_made_again(keyvault, deployment):
    """With its row gone, its name is known; by whoever starts too. Shown to fail with Heads.knows
    false: a tenant of no history took its place."""
    key = await keyvault.add_active()
    whole = await rows.copied(keyvault.app.database)
    await keyvault.sql("DELETE FROM tenant WHERE name = 'acme'")
    made = "SELECT 1 FROM tenant WHERE name = 'acme'"
    assert await kv.refusal(keyvault.create_tenant()) == "ROLLED_BACK"
    assert await keyvault.sql(made) == []
    async with kv.running(deployment) as fresh:
        assert await kv.refusal(fresh.create_tenant()) == "ROLLED_BACK"
        assert await fresh.sql(made) == []
        assert await kv.try_lease(fresh, key) == "ROLLED_BACK"
    await rows.put_back(keyvault.app.database, whole)
    assert await kv.try_lease(keyvault, key) == ""


async def test_a_damaged_tenant_is_stopped_by_name(keyvault, deployment):
    """A revocation that meets a damaged row is kept and carried out; a hold and a shred need no
    row. Shown to fail without what the deployment's own row holds by name."""
    key = await keyvault.add_active()
    assert await kv.try_lease(keyvault, key) == ""
    whole = await rows.copied(keyvault.app.database)
    await keyvault.sql("UPDATE tenant SET mac = '' WHERE name = 'acme'")
    assert await kv.refusal(keyvault.change("RevokeKey", key.name)) == "STATE_TAMPERED"
    word = {"tenant": "tenants/acme", "reason": "incident 7"}
    await keyvault.admin.RevokeTenant(admin_pb2.RevokeTenantRequest(**word))
    assert await keyvault.sql("SELECT 1 FROM lease WHERE end_time IS NULL") == []
    # Whole again it is held; the revocation comes before the end of that.
    await rows.put_back(keyvault.app.database, whole)
    async with kv.running(deployment) as fresh:
        assert await kv.try_lease(fresh, key) == "TENANT_NOT_ACTIVE"
        await fresh.admin.ResumeTenant(admin_pb2.ResumeTenantRequest(**word))
        await fresh.tick()
        assert await kv.try_lease(fresh, key) == "WRONG_STATE"
        shown = await fresh.custody.GetKey(kv.custody_pb2.GetKeyRequest(name=key.name))
        assert [one.state for one in shown.key.versions] == [State.REVOKED]
        whole = await rows.copied(fresh.app.database)
        await fresh.sql("UPDATE tenant SET mac = '' WHERE name = 'acme'")
        shred = admin_pb2.ShredTenantRequest(tenant="tenants/acme", request_id=new_id("req"))
        await fresh.admin.ShredTenant(shred)
        assert await fresh.sql("SELECT 1 FROM local_kek WHERE name = 'tenant/acme'") == []
        await rows.put_back(fresh.app.database, whole)
        await fresh.tick()
        assert await kv.try_lease(fresh, key) == "TENANT_NOT_ACTIVE"
        await fresh.app.upkeep.scan()
        state = (await fresh.app.ledger.read("acme")).state
        assert isinstance(state, state_pb2.TenantState)
        assert state.shredded
        assert await kv.refusal(fresh.create_tenant()) == "TENANT_KEY_MISSING"


async def test_a_forked_row(replica, second):
    """Two processes on two copies of a row: the anchored branch counts, what is lost is told in
    the deployment's own chain, and no process redeems a grant twice. Shown to fail without what
    Heads.learn returns, and without what Leasing redeemed itself."""
    before = await rows.copied(replica.database)
    mine = replica.grant(TENANT, KEY, 1)
    assert await _lease(replica, mine) == VALUE
    lost = (await _chain(replica))[-1]
    await rows.put_back(replica.database, before)
    theirs = second.grant(TENANT, KEY, 1)
    assert await _lease(second, theirs) == VALUE
    assert await _lease(replica, mine) == "ROLLED_BACK"
    await second.log.tick()
    # The first tick finds out, and the next ones have it on record.
    await replica.log.tick()
    await replica.log.tick()
    told = [(name, event.lease_id) for name, event in await _lost(replica)]
    assert told == [(TENANT, lost.lease_id)]
    assert await _lease(replica, mine) == "GRANT_REFUSED"
    assert await _lease(replica, theirs) == "GRANT_REFUSED"
    assert [await _lease(replica) for _ in range(2)] == [VALUE, "LEASE_CAP"]
    assert lost.lease_id not in [one.lease_id for one in await _chain(replica)]


async def test_a_longer_branch_beside_a_leaf_that_is_not_anchored(replica, second, monkeypatch):
    """A failover lost two commits of one process; another went on, and died between its leaf and
    the anchor. Its branch is the one that stands. Shown to fail where the number alone says that
    what is owed goes on from that leaf: the tenant was refused to all."""

    async def gone(*_):
        raise OSError("the process dies here")

    before = await rows.copied(replica.database)
    for _ in range(2):
        await _record(replica)
    await rows.put_back(replica.database, before)
    head = await _record(second)
    with monkeypatch.context() as dies:
        dies.setattr(second.shared.anchor, "write", gone)
        with pytest.raises(OSError, match="dies here"):
            await second.log.tick()
    await replica.log.tick()
    assert replica.heads.logged(TENANT) == head
    assert await _lease(replica) == VALUE
    assert len(await _lost(replica)) == 2


async def test_a_lease_of_a_dead_runner_is_looked_at_once_it_is_over(replica):
    """The only one that lives sets the time; the next changes no indexed column. Shown to fail with
    the times the other way round: the lease's end was on no record before the tenant's next."""
    times = []
    for _ in range(2):
        assert await _lease(replica) == VALUE
        times += await _sql(replica, "SELECT due_time FROM tenant WHERE name = 'acme'")
    first = (await replica.ledger.read(TENANT)).usage.leases[0]
    over = first.expire_millis / 1_000 + lifecycle.OVERDUE_SECONDS
    assert [due.timestamp() for (due,) in times] == pytest.approx([over, over], abs=0.01)


async def _lost(one: Replica) -> list[tuple[str, audit_pb2.AuditEvent]]:
    """Return which events were told to be lost, and of which tenants."""
    return [
        (told.detail, audit_pb2.AuditEvent.FromString(told.lost))
        for told in await _chain(one, SYSTEM)
        if told.type == audit_pb2.AUDIT_EVENT_TYPE_EVENT_LOST
    ]


async def test_an_operators_word_that_a_replica_has_not_heard(replica, second):
    """Between the word and a replica's next tick that one changes nothing: what it wrote of before
    would be of another past. Shown to fail where rows keep their generation until they change."""
    async with _ticking(replica):
        await replica.log.resume("operator", "a test")
    with pytest.raises(ByokeepError) as refused:
        await _end(second)
    assert refused.value.reason == "AUDIT_UNAVAILABLE"
    assert await _lease(second) == "AUDIT_UNAVAILABLE"
    await second.log.tick()
    await _end(second)
    await replica.log.tick()
    assert await _lease(replica) == await _lease(second) == "WRONG_STATE"


@asynccontextmanager
async def _ticking(one: Replica):
    """Let a process's log tick as it does in service."""
    running = asyncio.create_task(one.log.run())
    try:
        yield
    finally:
        running.cancel()


_REVOKE = custody.Request("RevokeKey", "req_1", b"revoked" * 4, "")


async def _revoke(one: Replica) -> None:
    """As the RPC does it: answered once it can't be forgotten any more."""

    def decide(key, found):
        return lifecycle.end(key, State.REVOKED)

    await one.custody.change(TENANT, KEY, ORIGIN, decide, _REVOKE)


def _once(function, error: Exception):
    """A function that fails once, before it works again."""
    left = [error]

    async def failing(*arguments, **named):
        if left:
            raise left.pop()
        return await function(*arguments, **named)

    return failing


async def test_a_repeated_request_is_answered_by_another_process(replica, second):
    """Whoever wrote it died before it was anchored: the repetition changes nothing, and waits for
    that all the same. Shown to fail with what is known, in the place of what was read, as the head
    that Ledger.change returns: the answered revocation was gone with an old row."""
    before = await rows.copied(replica.database)
    dies = asyncio.create_task(_revoke(second))
    while not second.heads.owed:
        await asyncio.sleep(0.01)
    dies.cancel()
    async with _ticking(replica):
        await _revoke(replica)
    await rows.put_back(replica.database, before)
    assert await _lease(replica) == "ROLLED_BACK"


async def test_a_change_of_a_branch_that_lost_is_not_answered(replica, second):
    """The other branch is longer, so that its head covers by its number. Shown to fail without
    Log._has: the revocation was answered, and leases went on."""
    before = await rows.copied(replica.database)
    revoked = asyncio.create_task(_revoke(replica))
    while not replica.heads.owed:
        await asyncio.sleep(0.01)
    await rows.put_back(replica.database, before)
    assert [await _lease(second) for _ in range(3)] == [VALUE] * 3
    await second.log.tick()
    async with _ticking(replica):
        with pytest.raises(ByokeepError) as refused:
            await revoked
    assert refused.value.reason == "AUDIT_UNAVAILABLE"


@pytest.mark.parametrize("branch", [True, False])
async def test_a_leaf_that_was_kept(shared, replica, second, branch):
    """Of a tick whose anchor was not written, at an index that another one left free: genuine, and
    of a branch that lost, or old. Shown to fail without Log._follows: it was anchored over a
    revocation that was answered, and nobody said that one is lost."""
    before = await rows.copied(replica.database, None)
    # The other tenant's leaf comes first.
    assert await _lease(second, tenant=OTHER) == OTHERS
    assert [await _lease(second) for _ in range(4)] == [VALUE] * 4

    async def lost(*_) -> bool:
        return False

    second.log._store = _Store(shared.anchor, lost)
    await second.log.tick()
    second.log._store = shared.anchor
    kept = await rows.copied(replica.database, None)
    await rows.put_back(replica.database, before if branch else kept)
    if not branch:
        await _sql(replica, "DELETE FROM log_leaf WHERE index >= %s", len(before.rows["log_leaf"]))
    await _end(replica)
    ((end,),) = await _sql(replica, "SELECT max(index) + 1 FROM log_leaf")
    leaf = next(row for row in kept.rows["log_leaf"] if row[0] == end and row[2] == TENANT)
    places = ", ".join(["%s"] * len(leaf))
    await _sql(replica, f"INSERT INTO log_leaf VALUES ({places})", *leaf)
    await replica.log.tick()
    old = rows.Copy(TENANT)
    old.rows = {
        table: [row for row in kept.rows[table] if row[0] == TENANT] for table in rows.OF_TENANT
    }
    await rows.put_back(replica.database, old)
    await second.log.tick()
    async with _started(shared) as fresh:
        assert [await _lease(one) for one in (replica, second, fresh)] == ["ROLLED_BACK"] * 3
        assert fresh.log.refusal() is None


class _Store:
    """An anchor's store with another `write`."""

    def __init__(self, store, write) -> None:
        self.read, self.write = store.read, write


async def test_a_log_whose_reading_is_cut_short(shared, replica, monkeypatch):
    """A connection that ends between two batches, by an attacker or by chance: nothing of the first
    one is passed over. Shown to fail with a frontier that is ahead of what was learned: every row
    of the tenants in it was believed."""
    before = await rows.copied(replica.database)
    await _end(replica)
    ((size,),) = await _sql(replica, "SELECT max(index) + 1 FROM log_leaf")
    await replica.create_tenant("third")
    await rows.put_back(replica.database, before)
    monkeypatch.setattr(log_sql, "_BATCH", size)
    reads, leaves = [], log_sql.leaves

    async def cut(connection, start, end):
        reads.append(start)
        if len(reads) == 2:
            raise unreachable()
        return await leaves(connection, start, end)

    monkeypatch.setattr(log_sql, "leaves", cut)
    fresh = Replica(shared)
    with pytest.raises(ByokeepError):
        await fresh.start()
    try:
        await fresh.log.start()
        assert fresh.log.refusal() is None
        assert await _lease(fresh) == "ROLLED_BACK"
    finally:
        await fresh.close()


async def test_a_tick_that_ends_once_the_anchor_is_written(replica, second):
    """It took another process's leaf, and learns of it by the next one. Shown to fail with the
    frontier of what was anchored: the revocation was never learned."""
    before = await rows.copied(replica.database)
    revoked = asyncio.create_task(_revoke(second))
    while not second.heads.owed:
        await asyncio.sleep(0.01)

    async def too_late(*_) -> bool:
        return False

    second.log._store = _Store(second.shared.anchor, too_late)
    await second.log.tick()
    revoked.cancel()
    transaction = replica.database.transaction

    async def write(text, after) -> bool:
        def ended():
            replica.database.transaction = transaction
            raise unreachable()

        replica.database.transaction = ended
        return await replica.shared.anchor.write(text, after)

    replica.log._store = _Store(replica.shared.anchor, write)
    with pytest.raises(ByokeepError):
        await replica.log.tick()
    replica.log._store = replica.shared.anchor
    await replica.log.tick()
    await rows.put_back(replica.database, before)
    assert await _lease(replica) == "ROLLED_BACK"


async def test_a_tick_that_ends_while_it_learns_of_a_fork(replica, second, monkeypatch):
    """The anchored branch counts all the same, and what is lost is told. Shown to fail with heads
    that are learned before they are compared: the next tick anchored the branch that had lost, over
    a revocation that was answered."""
    before = await rows.copied(replica.database)
    assert [await _lease(second) for _ in range(4)] == [VALUE] * 4
    branch = await rows.copied(replica.database)
    await rows.put_back(replica.database, before)
    await _end(replica)
    monkeypatch.setattr(event_sql, "bodies", _once(event_sql.bodies, unreachable()))
    with pytest.raises(ByokeepError):
        await second.log.tick()
    for one in (second, second, replica):
        await one.log.tick()
    assert [await _lease(one) for one in (replica, second)] == ["WRONG_STATE"] * 2
    await rows.put_back(replica.database, branch)
    assert [await _lease(one) for one in (replica, second)] == ["ROLLED_BACK"] * 2
    told = [one.detail for one in await _chain(replica, SYSTEM) if one.lost]
    assert told == [TENANT] * 4


async def test_a_lease_while_a_leaf_is_learned(replica, second, monkeypatch):
    """What is committed while a tick compares an older head stays owed, and known. Shown to fail
    where all that is owed goes with it: the row of before could be put back for an hour."""
    assert await _lease(replica) == VALUE
    assert await _lease(second) == VALUE
    await second.log.tick()
    bodies = event_sql.bodies

    async def slow(*arguments):
        monkeypatch.setattr(event_sql, "bodies", bodies)
        before.append(await rows.copied(replica.database))
        given.append(await _record(replica))
        return await bodies(*arguments)

    before, given = [], []
    monkeypatch.setattr(event_sql, "bodies", slow)
    await replica.log.tick()
    assert replica.heads.get(TENANT) == given[0]
    await rows.put_back(replica.database, before[0])
    with pytest.raises(ByokeepError) as refused:
        await replica.ledger.read(TENANT)
    assert refused.value.reason == "ROLLED_BACK"


async def _record(one: Replica):
    event = audit_pb2.AuditEvent(type=audit_pb2.AUDIT_EVENT_TYPE_STATE_RESEALED)
    _, head = await one.ledger.change(TENANT, lambda found: found.events.append(event))
    return head


async def test_a_process_that_begins_beside_another_serves_at_once(shared, replica):
    """The other has added leaves, and writes the anchor between its look and its write. Shown to
    fail with one tick in Log.start: no lease was given until the next."""
    await _record(replica)
    write, lost = shared.anchor.write, list[str]()

    async def late(text, before) -> bool:
        if len(lost) == 2:
            return await write(text, before)
        lost.append(text)
        return False

    shared.anchor.write = late
    await replica.log.tick()
    async with _started(shared) as begun:
        assert len(lost) == 2
        assert await _lease(begun) == VALUE


async def test_two_processes_that_cut_a_chain_off(replica, second):
    """Each planned another cut, as their clocks have it: what is dropped is what the state says.
    Shown to fail where each drops what it planned: links were missing, and no export of that chain
    verified any more."""
    links = [row async for row in event_sql.links(replica.database, TENANT)]
    cuts = [(row[0], bytes(row[2])) for row in links[:2]]

    def retains(one: Replica, cut) -> Retention:
        made = Retention(one.database, one.ledger, one.heads, one.log, 1)

        async def plan(_):
            if one is second:
                await first._chain(TENANT)
            return cut

        made._plan = plan
        return made

    first, late = retains(replica, cuts[0]), retains(second, cuts[1])
    async with _ticking(replica), _ticking(second):
        await late._chain(TENANT)
    found = await second.ledger.read(TENANT)
    left = await _sql(replica, "SELECT min(sequence) FROM event WHERE tenant = 'acme'")
    assert left == [(found.state.pruned_sequence + 1,)]


async def test_no_event_is_cut_off_that_no_leaf_covers(replica):
    """However old it is: it may still have to lead on from what is anchored. Shown to fail where
    its age alone decides."""
    old = Retention(replica.database, replica.ledger, replica.heads, replica.log, -1)
    logged = replica.heads.logged(TENANT)
    await _record(replica)
    cut = await old._plan(await replica.ledger.read(TENANT))
    assert cut == (logged.sequence, logged.hash)


async def test_a_mac_key_that_is_activated_at_once(keyvault, deployment):
    """A replica that has not opened it yet reads nothing that it authenticates. Shown to fail
    without the wait in Rotation.activate: the replica found leaves that were not keyvault's, and no
    lease was given anywhere before an operator's word."""
    key = await keyvault.add_active()
    kind = admin_pb2.SYSTEM_KEY_KIND_STATE_MAC
    async with kv.running(deployment) as replica:
        made = await keyvault.admin.PrepareSystemKey(admin_pb2.PrepareSystemKeyRequest(kind=kind))
        activate = admin_pb2.ActivateSystemKeyRequest(kind=kind, key_id=made.key_id)
        await keyvault.admin.ActivateSystemKey(activate)
        await keyvault.app.rotation.refresh()
        assert keyvault.app.keys.macs.current == made.key_id
        assert await kv.try_lease(keyvault, key) == ""
        for one in (keyvault, replica):
            await one.app.log.tick()
            assert not one.app.log.rolled_back
            assert await kv.try_lease(one, key) == ""


async def test_a_mac_key_that_a_replica_can_not_open_yet(keyvault, deployment, monkeypatch):
    """Its KEK backend is away while the key is made and taken up elsewhere. The leaves are of
    nobody that it knows, until it can look. Shown to fail without Macs.complete: it found the
    database rolled back, and no lease was given anywhere before an operator's word."""
    key = await keyvault.add_active()
    kind = admin_pb2.SYSTEM_KEY_KIND_STATE_MAC
    async with kv.running(deployment) as replica:

        async def away(*_):
            raise kek.KekUnavailableError("local", "unreachable", "gone")

        with monkeypatch.context() as gone:
            gone.setattr(replica.app.backends.primary, "unwrap", away)
            made = await keyvault.admin.PrepareSystemKey(
                admin_pb2.PrepareSystemKeyRequest(kind=kind)
            )
            with pytest.raises(kek.KekUnavailableError):
                await replica.app.rotation.refresh()
            activate = admin_pb2.ActivateSystemKeyRequest(kind=kind, key_id=made.key_id)
            await keyvault.admin.ActivateSystemKey(activate)
            await keyvault.app.rotation.refresh()
            assert await kv.try_lease(keyvault, key) == ""
            await keyvault.app.log.tick()
            with pytest.raises(ByokeepError, match="authenticated"):
                await replica.app.log.tick()
        await replica.app.rotation.refresh()
        await replica.app.log.tick()
        assert not replica.app.log.rolled_back
        assert await kv.try_lease(replica, key) == ""


async def test_a_mac_key_that_somebody_plants(keyvault, monkeypatch):
    """What the deployment's own row does not name excuses no leaf. Shown to fail where every stored
    key does, and where a row with a NULL is opened."""

    async def away(*_):
        raise kek.KekUnavailableError("local", "unreachable", "gone")

    columns = "(kind, key_id, kek_backend, kek_version, wrapped_dek, envelope)"
    row = f"INSERT INTO system_key {columns} VALUES ('state_mac', %s, 'local', 1, %s, 'x')"
    await keyvault.sql("ALTER TABLE system_key ALTER wrapped_dek DROP NOT NULL")
    await keyvault.sql(row, "smk_1", None)
    await keyvault.app.rotation.refresh()
    await keyvault.sql(row, "smk_2", b"x")
    with monkeypatch.context() as gone:
        gone.setattr(keyvault.app.backends.primary, "unwrap", away)
        with pytest.raises(kek.KekUnavailableError):
            await keyvault.app.rotation.refresh()
        assert keyvault.app.keys.macs.complete


async def test_an_operators_word_beside_what_another_replica_owes(replica, second):
    """The word takes in what that replica committed: nothing is lost. Shown to fail where what is
    owed at a new generation is told as lost: EVENT_LOST was said of what the chain has."""
    head = await _record(second)
    async with _ticking(replica):
        await replica.log.resume("operator", "restored")
    await second.log.tick()
    assert second.heads.generation == 1
    assert second.heads.logged(TENANT).sequence == head.sequence
    assert await _lost(replica) == []


async def test_an_operators_word_that_another_replica_crosses(replica, second, monkeypatch):
    """That one read its database before, and writes the anchor while the rows are sealed: the word
    is written over it. Shown to fail with one try alone: ETAG_MISMATCH, and no row can be read."""
    write = replica.shared.anchor.write
    reached, let = asyncio.Event(), asyncio.Event()

    async def held(text, after):
        if not reached.is_set():
            reached.set()
            await let.wait()
            return await write(text, after)
        let.set()
        await crossing
        monkeypatch.undo()
        return await write(text, after)

    await _record(second)
    monkeypatch.setattr(replica.shared.anchor, "write", held)
    crossing = asyncio.create_task(second.log.tick())
    await reached.wait()
    async with _ticking(replica):
        await replica.log.resume("operator", "restored")
    await second.log.tick()
    assert await _lease(replica) == await _lease(second) == VALUE


@pytest.mark.parametrize("put_back", [False, True])
async def test_an_operators_word_after_the_anchor_was_lost(shared, replica, second, put_back):
    """It is a new one to a replica that heard the one before. Shown to fail without the numbers of
    the leaves (said to a process that has just begun), and without that which the process knows
    (its database was put back, too): the other replica goes on from what it knew."""
    before = await rows.copied(replica.database, None)
    async with _ticking(replica):
        await replica.log.resume("operator", "the first word")
    await second.log.tick()
    (shared.folder / "anchor.json").unlink()
    if put_back:
        await rows.put_back(replica.database, before)
    async with _started(shared) as fresh:
        one = replica if put_back else fresh
        async with _ticking(one):
            await one.log.resume("operator", "the second word")
    await second.log.tick()
    assert second.heads.generation == 2
    assert await _lease(second) == VALUE


async def test_a_row_of_before_an_operators_word_that_goes_on_from_it(replica):
    """The operator restored a backup; somebody puts back what came after it, with its events. Shown
    to fail where a higher number is enough: what the operator took back was there again."""
    backup = await rows.copied(replica.database)
    await _end(replica)
    later = await rows.copied(replica.database)
    await rows.put_back(replica.database, backup)
    assert await _lease(replica) == "ROLLED_BACK"
    async with _ticking(replica):
        await replica.log.resume("operator", "restored a backup")
    await rows.put_back(replica.database, later)
    assert await _lease(replica) == "ROLLED_BACK"


async def test_a_commit_that_is_noted_after_an_operators_word(replica):
    """It was made before: its row was sealed anew meanwhile, which a leaf says. Shown to fail where
    it stays owed: the tenant was refused to this process until it ended."""
    sealed = Head(1, 5, bytes(32))
    replica.heads.forget(1)
    replica.heads.remember(TENANT, replace(sealed, generation=0), [b"event"])
    async with replica.database.transaction() as connection:
        lost = await replica.heads.learn(connection, TENANT, sealed)
    assert lost == [(replace(sealed, generation=0), [b"event"])]
    assert replica.heads.get(TENANT) == sealed
    assert not replica.heads.owed


async def test_a_leaf_of_the_first_of_two_commits(replica):
    """The second stays owed. Shown to fail where all that is owed is given up with it."""
    first, second = Head(0, 50, b"1" * 32), Head(0, 51, b"2" * 32)
    for head in (first, second):
        replica.heads.remember(TENANT, head, [b"event"])
    async with replica.database.transaction() as connection:
        assert await replica.heads.learn(connection, TENANT, first) == []
    assert replica.heads.owed[TENANT].commits == [(second, [b"event"])]


async def test_a_commit_whose_answer_is_late(replica, second):
    """Another process went on from it, and the log has that already: nothing was put back. Shown
    to fail without that case in Ledger._committed: ROLLED_BACK was said of a change that stands."""
    transaction = replica.database.transaction

    @asynccontextmanager
    async def late():
        async with transaction() as connection:
            yield connection
        replica.database.transaction = transaction
        await _record(second)
        for one in (second, replica):
            await one.log.tick()

    replica.database.transaction = late
    await _record(replica)
    assert replica.heads.get(TENANT) == (await second.ledger.read(TENANT)).head
    assert await _lease(replica) == VALUE


@pytest.mark.parametrize("column", ["sequence", "mac", "state", "head_hash"])
async def test_a_row_that_is_null_stops_its_tenant_alone(shared, replica, column):
    """No start, and no operator's word, fails of it. Shown to fail with a row that is compared as
    it comes: TypeError, for all."""
    await _sql(replica, f"ALTER TABLE tenant ALTER {column} DROP NOT NULL")
    await _sql(replica, f"UPDATE tenant SET {column} = NULL WHERE name = 'acme'")
    async with _started(shared) as fresh:
        assert await _lease(fresh) == "STATE_TAMPERED"
        assert await _lease(fresh, tenant=OTHER) == OTHERS
        async with _ticking(fresh):
            await fresh.log.resume("operator", "a test")
        assert await _lease(fresh, tenant=OTHER) == OTHERS
