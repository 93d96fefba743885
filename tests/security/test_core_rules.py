"""Each rule of the trust core on its own: what is stored is changed in one way, and the reason says
which rule saw it. `test_stateful_attacker.py` has them in any order."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from byokeep import merkle
from byokeep.encoding import fields
from byokeep.keyvault.v1 import audit_pb2, custody_pb2, state_pb2

from services.common.errors import ByokeepError
from services.keyvault import custody, kek, stage
from services.keyvault.anchor import Stored
from services.keyvault.event import SYSTEM, chain_of
from services.keyvault.ledger import ALL, part_of
from services.keyvault.lifecycle import State
from services.keyvault.limits import Caps
from tests.harness.parts import DEPLOYMENT, ORIGIN, RUNNER, Replica, Shared

KEY, OTHER, VALUE = "key_a", "key_b", "sk-value"
PART = part_of(KEY)
RELEASED = audit_pb2.AuditEvent().report


@pytest.fixture
async def shared(keyvault_database_url, tmp_path):
    made = Shared(keyvault_database_url, tmp_path)
    await Replica(made).create_system()
    return made


@pytest.fixture
async def start(shared):
    """Starts a replica; all of them end with the test."""
    async with AsyncExitStack() as stack:

        async def start(caps: Caps | None = None) -> Replica:
            replica = Replica(shared, caps)
            await replica.start()
            stack.push_async_callback(replica.close)
            return replica

        yield start


@pytest.fixture
async def one(start):
    """A replica, with tenants `acme` and `evil` of two keys each."""
    replica = await start()
    for tenant in ("acme", "evil"):
        await replica.create_tenant(tenant)
        for key in (KEY, OTHER):
            await replica.add(tenant, key, f"{VALUE}-{tenant}-{key}")
    return replica


async def sql(replica: Replica, statement: str, *parameters):
    async with replica.database.transaction() as connection:
        cursor = await connection.execute(statement, parameters)
        return await cursor.fetchall() if cursor.description else []


async def lease(replica: Replica, tenant: str = "acme", key: str = KEY, version: int = 1) -> str:
    """Return the key's value, or why there is none."""
    try:
        return (await replica.lease(replica.grant(tenant, key, version)))[1]
    except ByokeepError as error:
        return error.reason


async def ticking(replica: Replica, work) -> None:
    """Await what waits for the anchor."""
    waiting = asyncio.ensure_future(work)
    while not waiting.done():
        await replica.log.tick()
        await asyncio.sleep(0)
    await waiting


async def revoke(replica: Replica, tenant: str = "acme", key: str = KEY) -> None:
    def act(found) -> None:
        custody.finish(found, key, ORIGIN, replica.backends, State.REVOKED)

    _, head = await replica.ledger.change(tenant, act, {part_of(key)})
    await replica.anchored(tenant, head)


async def test_a_key_is_leased_as_it_was_put_in(one):
    assert await lease(one) == f"{VALUE}-acme-{KEY}"


@pytest.mark.parametrize(
    ("reason", "statement"),
    [
        ("STATE_TAMPERED", "UPDATE tenant SET mac = sha256(mac) WHERE name = 'acme'"),
        # No key makes no MAC: an empty one is nobody's.
        ("STATE_TAMPERED", "UPDATE tenant SET mac_key_id = 'x', mac = '' WHERE name = 'acme'"),
        ("STATE_TAMPERED", "UPDATE tenant SET state = state || '\\x5001' WHERE name = 'acme'"),
        ("STATE_TAMPERED", "UPDATE tenant SET usage = usage || '\\x2001' WHERE name = 'acme'"),
        ("STATE_TAMPERED", "UPDATE tenant SET sequence = sequence + 1 WHERE name = 'acme'"),
        ("STATE_TAMPERED", "UPDATE tenant SET generation = 1 WHERE name = 'acme'"),
        (
            "STATE_TAMPERED",
            "UPDATE tenant t SET (generation, sequence, head_hash, state, usage, mac_key_id, mac)"
            " = (o.generation, o.sequence, o.head_hash, o.state, o.usage, o.mac_key_id, o.mac)"
            " FROM tenant o WHERE t.name = 'acme' AND o.name = 'evil'",
        ),
        ("STATE_TAMPERED", "DELETE FROM tenant_part WHERE tenant = 'acme'"),
        ("STATE_TAMPERED", "UPDATE tenant_part SET state = '' WHERE tenant = 'acme'"),
        ("STATE_TAMPERED", "UPDATE tenant_part SET usage = '\\x0a00' WHERE tenant = 'acme'"),
        ("ROLLED_BACK", "DELETE FROM tenant WHERE name = 'acme'"),
        ("ROW_TAMPERED", "DELETE FROM key_secret WHERE tenant = 'acme'"),
        (
            "ROW_TAMPERED",
            "UPDATE key_secret m SET envelope = o.envelope, wrapped_dek = o.wrapped_dek"
            " FROM key_secret o WHERE m.tenant = 'acme' AND o.tenant = 'evil'"
            " AND m.key_id = o.key_id",
        ),
        ("ROW_TAMPERED", "UPDATE key_secret SET envelope = envelope || '\\x00'"),
        (
            "ROW_TAMPERED",
            "DO $$ BEGIN ALTER TABLE key_secret ALTER envelope DROP NOT NULL;"
            " UPDATE key_secret SET envelope = NULL; END $$",
        ),
        (
            "STATE_TAMPERED",
            "DO $$ BEGIN ALTER TABLE tenant_part ALTER usage DROP NOT NULL;"
            " UPDATE tenant_part SET usage = NULL WHERE tenant = 'acme'; END $$",
        ),
    ],
)
async def test_what_keyvault_did_not_write_is_refused_at_once(one, monkeypatch, reason, statement):
    """Shown to fail without the compare that each statement is against."""

    async def asked(*_):
        raise AssertionError("a KEK backend was asked to open it")

    kept = {table: await sql(one, f"SELECT * FROM {table}") for table in ("tenant", "tenant_part")}
    await sql(one, statement)
    with monkeypatch.context() as unopened:
        unopened.setattr(type(one.backends.primary), "unwrap", asked)
        assert await lease(one) == reason
    if reason == "ROW_TAMPERED":
        events = await sql(one, "SELECT body FROM event WHERE tenant = 'acme' ORDER BY sequence")
        last = audit_pb2.AuditEvent.FromString(bytes(events[-1][0]))
        assert (last.type, last.reason) == (audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED, reason)
        return
    # Nobody else notices, and it is over once the row is what it was.
    assert await lease(one, "evil") == f"{VALUE}-evil-{KEY}"
    for table, rows in kept.items():
        column = "name" if table == "tenant" else "tenant"
        await sql(one, f"DELETE FROM {table} WHERE {column} = 'acme'")
        for row in rows:
            if row[0] == "acme":
                marks = ", ".join(["%s"] * len(row))
                await sql(one, f"INSERT INTO {table} VALUES ({marks})", *row)
    assert await lease(one) == f"{VALUE}-acme-{KEY}"


@pytest.mark.parametrize("restarted", [False, True])
async def test_an_older_row_with_all_that_belongs_to_it_is_rolled_back(one, start, restarted):
    """The revoked key, the spent grant and the lifted cap are in the row that is put back."""
    tables = {"tenant": "name", "tenant_part": "tenant", "key_secret": "tenant", "event": "tenant"}
    old = {
        table: await sql(one, f"SELECT * FROM {table} WHERE {column} = 'acme'")
        for table, column in tables.items()
    }
    await revoke(one)
    for table, column in tables.items():
        await sql(one, f"DELETE FROM {table} WHERE {column} = 'acme'")
        for row in old[table]:
            await sql(one, f"INSERT INTO {table} VALUES ({', '.join(['%s'] * len(row))})", *row)
    asked = await start() if restarted else one
    assert await lease(asked) == "ROLLED_BACK"
    assert await lease(asked, "evil") == f"{VALUE}-evil-{KEY}"


async def test_a_newer_row_is_believed_only_where_the_events_lead_to_it(one, start):
    """Shown to fail where a sequence above the known one is enough."""
    other = await start()
    assert await lease(one) == f"{VALUE}-acme-{KEY}"
    assert await lease(other) == f"{VALUE}-acme-{KEY}"
    (last,) = await sql(other, "SELECT max(sequence) FROM event WHERE tenant = 'acme'")
    await sql(other, "UPDATE event SET body = body || '\\x00' WHERE sequence = %s", *last)
    # It knows nothing of what the other one committed last.
    assert await lease(one) == "ROLLED_BACK"
    await sql(other, "DELETE FROM event WHERE tenant = 'acme' AND sequence = %s", *last)
    assert await lease(one) == "ROLLED_BACK"


async def test_a_verified_leaf_needs_no_events(one, start):
    """Shown to fail where every newer head is looked for in the events: retention drops them."""
    other = await start()
    await lease(other)
    await other.log.tick()
    await one.log.tick()
    await sql(one, "DELETE FROM event WHERE tenant = 'acme'")
    assert await lease(one) == f"{VALUE}-acme-{KEY}"


async def test_a_name_is_not_created_again(one):
    """Shown to fail where a row that is gone frees its name."""
    await sql(one, "DELETE FROM tenant WHERE name = 'acme'")
    event = audit_pb2.AuditEvent(type=audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_CREATED)
    with pytest.raises(ByokeepError) as refused:
        await one.ledger.create(
            "acme", state_pb2.TenantState(), lambda made: made.events.append(event)
        )
    assert refused.value.reason == "ROLLED_BACK"
    assert await sql(one, "SELECT 1 FROM tenant WHERE name = 'acme'") == []


async def test_a_grant_is_redeemed_once_whoever_is_asked(one, start):
    other, grant = await start(), one.grant("acme", KEY, 1)
    await one.lease(grant)
    for asked in (one, other, await start()):
        with pytest.raises(ByokeepError) as refused:
            await asked.lease(grant)
        assert refused.value.reason == "GRANT_REFUSED"


async def test_a_process_remembers_what_it_redeemed_whatever_branch_counts(one):
    """Shown to fail without the process's own list: the tenant's is lost with its branch."""
    grant = one.grant("acme", KEY, 1)
    await one.log.tick()
    copied = await sql(one, "SELECT * FROM tenant WHERE name = 'acme'")
    part = await sql(one, "SELECT * FROM tenant_part WHERE tenant = 'acme'")
    await one.lease(grant)
    for table, rows in (("tenant", copied), ("tenant_part", part)):
        column = "name" if table == "tenant" else "tenant"
        await sql(one, f"DELETE FROM {table} WHERE {column} = 'acme'")
        for row in rows:
            await sql(one, f"INSERT INTO {table} VALUES ({', '.join(['%s'] * len(row))})", *row)
    one.heads.lose("acme")
    assert await lease(one) == f"{VALUE}-acme-{KEY}"
    with pytest.raises(ByokeepError) as refused:
        await one.lease(grant)
    assert refused.value.reason == "GRANT_REFUSED"


async def test_what_one_replica_ends_the_other_does_not_give(one, start):
    other = await start()
    await revoke(one)
    assert await lease(other) == "WRONG_STATE"


@pytest.mark.parametrize("what", ["held", "shredded", "owed"])
async def test_the_deployments_own_row_holds_a_tenant_by_name(one, what):
    """Shown to fail where only the tenant's own row is asked."""

    def hold(system) -> None:
        if what == "owed":
            system.edit().owed.add(tenant="acme", key_id=OTHER, state=State.REVOKED.value)
        else:
            getattr(system.edit(), what).append("acme")
        system.events.append(audit_pb2.AuditEvent(type=audit_pb2.AUDIT_EVENT_TYPE_TENANT_REVOKED))

    await one.ledger.change(SYSTEM, hold)
    await one.log.tick()
    assert await lease(one) == "TENANT_NOT_ACTIVE"


async def test_no_lease_on_a_tick_that_is_too_old(one):
    """Shown to fail without the age in Log.refusal."""
    before = await sql(one, "SELECT count(*) FROM event")
    one.log.fresh -= 11
    assert await lease(one) == "AUDIT_UNAVAILABLE"
    # Nothing was redeemed either.
    assert await sql(one, "SELECT count(*) FROM event") == before


@pytest.mark.parametrize("late", ["ended", "stopped"])
async def test_nothing_is_opened_after_an_end_or_a_long_pause(one, monkeypatch, late):
    """Between commit and unwrap. Shown to fail without each part of `_check_fresh`."""
    seal = one.leasing._check_fresh

    def meanwhile(tenant, redeemed):
        if late == "ended":
            one.ledger.ends[tenant] += 1
        else:
            one.log.fresh -= 11
        seal(tenant, redeemed)

    monkeypatch.setattr(one.leasing, "_check_fresh", meanwhile)
    assert await lease(one) == "AUDIT_UNAVAILABLE"
    last = await sql(one, "SELECT body FROM event WHERE tenant = 'acme' ORDER BY sequence")
    assert audit_pb2.AuditEvent.FromString(bytes(last[-1][0])).type == (
        audit_pb2.AUDIT_EVENT_TYPE_RELEASED
    )


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE log_leaf SET head_hash = sha256(head_hash) WHERE index = 1",
        "UPDATE log_leaf SET tenant = 'evil' WHERE tenant = 'acme'",
        "UPDATE log_leaf SET blind = sha256(blind) WHERE index = 1",
        "DO $$ BEGIN ALTER TABLE log_leaf ALTER blind DROP NOT NULL;"
        " UPDATE log_leaf SET blind = NULL WHERE index = 1; END $$",
        "DELETE FROM log_leaf WHERE index = (SELECT max(index) FROM log_leaf)",
        "DELETE FROM log_leaf",
    ],
)
async def test_a_log_that_is_not_what_was_anchored_stops_every_lease(one, start, statement):
    """Shown to fail where leaves are taken for what they say."""
    await one.log.tick()
    await sql(one, statement)
    asked = await start()
    assert await lease(asked) == "DATABASE_ROLLED_BACK"
    assert await lease(await start()) == "DATABASE_ROLLED_BACK"


async def test_a_verdict_stands_though_the_anchor_could_not_be_told(one, start, monkeypatch):
    """The database is put right before the anchor can be written. Shown to fail where the next look
    counts alone: leases went on, and no restart knew."""

    async def lost(text: str, over: Stored) -> bool:
        return False

    other = await start()
    await lease(one)
    await one.log.tick()
    kept = await sql(one, "SELECT * FROM log_leaf WHERE index = (SELECT max(index) FROM log_leaf)")
    await sql(one, "DELETE FROM log_leaf WHERE index = %s", kept[0][0])
    with monkeypatch.context() as away:
        away.setattr(one.shared.anchor, "write", lost)
        await other.log.tick()
    assert other.log.rolled_back
    await sql(one, f"INSERT INTO log_leaf VALUES ({', '.join(['%s'] * len(kept[0]))})", *kept[0])
    await other.log.tick()
    for replica in (other, await start()):
        assert await lease(replica) == "DATABASE_ROLLED_BACK"
    await ticking(other, other.log.resume("operator", "looked at it"))
    assert await lease(other) == f"{VALUE}-acme-{KEY}"


async def test_a_log_without_its_anchor_is_no_new_one(one, start):
    """To a process that knows nothing yet: all its leaves are keyvault's, and lead on."""
    await one.log.tick()
    one.shared.folder.joinpath("anchor.json").unlink()
    assert await lease(await start()) == "DATABASE_ROLLED_BACK"


async def test_an_anchor_that_is_there_again_needs_no_operator(one):
    """It was away, and the database does not contradict it."""
    await one.log.tick()
    there = await one.shared.anchor.read()
    file = one.shared.folder / "anchor.json"
    file.unlink()
    await one.log.tick()
    assert await lease(one) == "DATABASE_ROLLED_BACK"
    file.write_text(there.text)
    await one.log.tick()
    assert await lease(one) == f"{VALUE}-acme-{KEY}"


async def test_a_part_that_is_there_twice_once_with_nothing_in_it(one):
    """Shown to fail where a row with a NULL is read like any other: a TypeError, and the answer was
    INTERNAL."""
    await sql(one, "ALTER TABLE tenant_part DROP CONSTRAINT tenant_part_pkey")
    await sql(one, "ALTER TABLE tenant_part ALTER state DROP NOT NULL")
    await sql(one, "INSERT INTO tenant_part SELECT tenant, part, NULL, usage FROM tenant_part")
    await sql(one, "ALTER TABLE tenant_part ALTER usage DROP NOT NULL")
    await sql(one, "INSERT INTO tenant_part SELECT tenant, part, NULL, NULL FROM tenant_part")
    assert (await one.ledger.read("acme", {PART})).key(KEY) is not None
    # Which of the two is to be written PostgreSQL does not know.
    assert await lease(one) == "AUDIT_UNAVAILABLE"


async def test_a_root_that_is_not_the_anchors_stops_every_lease(one, start):
    """Shown to fail where leaves need only be keyvault's own, of whatever branch."""
    await one.log.tick()
    before = await one.shared.anchor.read()
    other = replace(one.log.position, root=bytes(32)).text(DEPLOYMENT)
    assert await one.shared.anchor.write(other, before)
    assert await lease(await start()) == "DATABASE_ROLLED_BACK"


@pytest.mark.parametrize("generation", [0, 7])
async def test_a_leaf_that_somebody_plants_is_none(one, start, generation):
    """Shown to fail where any leaf beyond the anchor is another keyvault's; one of an operator's
    word that nobody said is led to by no events."""
    blind = digest = bytes(32)
    leaf = merkle.leaf_hash(fields(blind, chain_of("acme"), 9999, digest))
    await sql(
        one,
        "INSERT INTO log_leaf (index, generation, tenant, sequence, head_hash, blind, leaf_hash)"
        " SELECT max(index) + 1, %s, 'acme', 9999, %s, %s, %s FROM log_leaf",
        generation,
        digest,
        blind,
        leaf,
    )
    await lease(one)
    await one.log.tick()
    assert await sql(one, "SELECT 1 FROM log_leaf WHERE sequence = 9999") == []
    assert await lease(one) == f"{VALUE}-acme-{KEY}"
    assert await lease(await start()) == f"{VALUE}-acme-{KEY}"


async def test_a_start_owes_to_the_log_what_no_leaf_names(one, start):
    """As a process that died between commit and tick leaves it. Shown to fail without the scan."""
    await lease(one)
    head = one.heads.get("acme")
    one.heads.lose("acme")
    again = await start()
    await again.log.tick()
    assert again.heads.logged("acme").covers(head)


async def test_a_change_is_answered_once_the_anchor_covers_it_and_not_before(one, monkeypatch):
    """Shown to fail where a tick that did not write the anchor settles what is owed."""

    async def lost(text: str, over: Stored) -> bool:
        return False

    await lease(one)
    head = one.heads.get("acme")
    with monkeypatch.context() as away:
        away.setattr(one.shared.anchor, "write", lost)
        await one.log.tick()
        assert not one.heads.logged("acme").covers(head)
    await one.log.tick()
    assert one.heads.logged("acme").covers(head)


async def test_an_operators_word_seals_rows_as_they_are_and_forgets_the_rest(one, start):
    """A row of before counts at exactly its sealed head; other replicas forget what they knew."""
    other = await start()
    assert await lease(other) == f"{VALUE}-acme-{KEY}"
    await sql(one, "UPDATE tenant SET mac = sha256(mac) WHERE name = 'evil'")
    await ticking(one, one.log.resume("operator", "restored"))
    assert one.heads.generation == 1
    assert one.log.quiet
    assert await lease(one) == f"{VALUE}-acme-{KEY}"
    assert await lease(one, "evil") == "STATE_TAMPERED"
    await other.log.tick()
    assert other.heads.generation == 1
    assert await lease(other) == f"{VALUE}-acme-{KEY}"


async def test_a_cap_holds_over_replicas_and_restarts(one, start):
    caps = Caps(in_flight=2)
    asked, other = await start(caps), await start(caps)
    given = [await asked.lease(asked.grant("acme", KEY, 1)), None]
    assert await lease(other) == f"{VALUE}-acme-{KEY}"
    assert await lease(await start(caps)) == "LEASE_CAP"
    await asked.releases.release(given[0][0], 1, RELEASED, RUNNER)
    assert await lease(other) == f"{VALUE}-acme-{KEY}"


async def test_every_change_names_its_state_and_usage_in_its_last_event(one):
    """Shown to fail where one head may stand for two states."""
    await lease(one)
    ((state, usage),) = await sql(one, "SELECT state, usage FROM tenant WHERE name = 'acme'")
    bodies = await sql(one, "SELECT body FROM event WHERE tenant = 'acme' ORDER BY sequence")
    said = audit_pb2.AuditEvent.FromString(bytes(bodies[-1][0])).state_digest
    digests = hashlib.sha256(bytes(state)).digest() + hashlib.sha256(bytes(usage)).digest()
    assert said == hashlib.sha256(digests).digest()


@pytest.mark.parametrize(
    "other", [{"owner": "someone"}, {"provider": "gemini"}, {"key_id": "key_none"}]
)
async def test_a_rotation_is_of_a_key_of_that_provider_and_owner(one, other):
    """Shown to fail where a key is found by its id alone."""
    order = stage.Order(
        "acme", KEY, "openai", "", KEY, "rotate", "req_1", custody_pb2.SealedKey(), ""
    )
    tenant = await one.ledger.read("acme", ALL)
    assert stage._next_version(tenant, order) == 2
    with pytest.raises(ByokeepError) as refused:
        stage._next_version(tenant, replace(order, **other))
    assert refused.value.reason == "NOT_FOUND"


async def test_the_same_request_is_carried_out_once(one):
    tenant = await one.ledger.read("acme", ALL)
    before = tenant.key(KEY).revision
    request = custody.Request("RevokeKey", "req_00000001", b"d" * 32, "")
    for _ in range(2):
        await _ended(one, request)
    assert (await one.ledger.read("acme", ALL)).key(KEY).revision == before + 1
    with pytest.raises(ByokeepError) as refused:
        await _ended(one, custody.Request("RevokeKey", "req_00000001", b"e" * 32, ""))
    assert refused.value.reason == "REQUEST_ID_CONFLICT"


async def _ended(one: Replica, request: custody.Request) -> None:
    await ticking(one, one.custody.end("acme", KEY, ORIGIN, request, State.REVOKED))


async def test_an_end_asked_of_a_damaged_tenant_is_kept_and_holds_it(one):
    """Shown to fail where the end is lost with the refusal."""
    await sql(one, "UPDATE tenant SET mac = sha256(mac) WHERE name = 'acme'")
    with pytest.raises(ByokeepError) as refused:
        await _ended(one, custody.Request("RevokeKey", "req_00000002", b"d" * 32, ""))
    assert refused.value.reason == "STATE_TAMPERED"
    system = (await one.ledger.read(SYSTEM)).state
    assert [(owed.tenant, owed.key_id) for owed in system.owed] == [("acme", KEY)]
    assert one.log.held("acme")


async def test_time_is_the_processs_own(one):
    """Shown to fail where a statement's now() decides: whoever writes the database may set it."""
    late = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=2)
    one.ledger.now = lambda: late
    assert await lease(one) == "GRANT_REFUSED"


async def test_names_mean_postgresqls_own(one, start):
    """A function and a role's own search_path don't stand in for PostgreSQL's.

    Shown to fail: with the search_path left to the role.
    """
    await sql(
        one,
        "CREATE FUNCTION public.now() RETURNS timestamptz LANGUAGE sql"
        " RETURN pg_catalog.now() + interval '200 days'",
    )
    ((database, role),) = await sql(one, "SELECT current_database(), current_user")
    await sql(
        one, f'ALTER ROLE "{role}" IN DATABASE "{database}" SET search_path = public, pg_catalog'
    )
    ((now,),) = await sql(await start(), "SELECT now()")
    assert now < one.ledger.now() + datetime.timedelta(days=1)


async def test_a_lost_kek_is_no_other_key(one):
    await one.backends.primary.destroy(kek.tenant_kek("acme"))
    assert await lease(one) == "UNDECRYPTABLE"
    tenant = await one.ledger.read("acme", {PART})
    assert tenant.key(KEY).versions[0].unopened_reason == "UNDECRYPTABLE"
