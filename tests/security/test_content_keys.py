"""Content keys and epochs: who gets them, what they open, when they die."""

from __future__ import annotations

import datetime
from contextlib import asynccontextmanager

import grpc
import pytest
from byokeep import hpke
from byokeep.errors import error_info
from byokeep.ids import new_id
from byokeep.keyvault.v1 import admin_pb2, audit_pb2, content_pb2, content_pb2_grpc, custody_pb2
from byokeep.sealing import MAX_WINDOW

from services.common import server
from services.keyvault import content, epochs, kek
from services.keyvault import intake as intake_keys
from services.keyvault.server import App
from tests.harness import keyvault as kv
from tests.harness.keyvault import refusal, try_lease

DAY = datetime.timedelta(days=1)


def ask(keyvault, tenant="acme", epoch="", identity="orchestrator"):
    stub = content_pb2_grpc.ContentKeyServiceStub(keyvault.channel(identity))
    request = content_pb2.GetContentKeyRequest(tenant=f"tenants/{tenant}", epoch=epoch)
    return stub.GetContentKey(request)


def intake(keyvault):
    return keyvault.custody.GetIntakeKey(custody_pb2.GetIntakeKeyRequest(suite=hpke.HYBRID_V1))


@pytest.fixture(autouse=True)
def no_ticks(monkeypatch):
    """Epochs are made and destroyed when a test says so."""
    monkeypatch.setattr(epochs, "TICK_SECONDS", 3600.0)


@pytest.fixture
def clock(keyvault, monkeypatch):
    """The time of keyvault and its database, which a test may move on."""

    class Clock:
        later = datetime.timedelta()

    real = keyvault.app.ledger.now

    def now() -> datetime.datetime:
        return real() + Clock.later

    kv.move_clocks(monkeypatch, keyvault, now)
    monkeypatch.setattr(intake_keys, "clock", now)
    return Clock


async def keks(keyvault, kind: str) -> set[str]:
    rows = await keyvault.sql("SELECT name FROM local_kek WHERE name LIKE %s", f"{kind}/%")
    return {row[0] for row in rows}


async def test_a_key_per_tenant_and_epoch(keyvault, deployment, clock):
    """The same one on every replica; another for every tenant and day; earlier ones stay."""
    await keyvault.create_tenant("other")
    first = await ask(keyvault)
    assert len(first.key) == 32
    async with kv.running(deployment) as second:
        assert await ask(second) == first
    assert await ask(keyvault, epoch=first.epoch) == first
    assert (await ask(keyvault, "other")).key != first.key
    clock.later = DAY
    tomorrow = await ask(keyvault)
    assert tomorrow.epoch > first.epoch
    assert tomorrow.key != first.key
    assert await ask(keyvault, epoch=first.epoch) == first


async def test_only_the_orchestrator_gets_one(keyvault):
    """Shown to fail: with the runner among the callers of GetContentKey."""
    for identity in set(kv.IDENTITIES) - {"orchestrator"}:
        assert await refusal(ask(keyvault, identity=identity)) == "CALLER_NOT_ALLOWED"


async def test_a_past_epoch_is_never_made_again(keyvault):
    """Nor a future one, nor one of no calendar. Shown to fail: with `and not epoch` taken out of
    ContentKeys.get."""
    await ask(keyvault)
    for epoch in ("2020-02-01", "2999-01-01", "2026-99-99", "9999-12-31"):
        assert await refusal(ask(keyvault, epoch=epoch)) == "CONTENT_EXPIRED"
    assert await refusal(ask(keyvault, epoch="today")) == "INVALID_FIELD"
    today = await keyvault.sql("SELECT count(*) FROM content_key")
    assert today == [(1,)]


async def test_an_unknown_tenant_gets_none(keyvault):
    assert await refusal(ask(keyvault, "nobody")) == "TENANT_KEY_MISSING"


async def test_epochs_are_made_ahead(keyvault, clock):
    """The next hours and days are there, once, and the system chain says so."""
    hours, days = await keks(keyvault, "intake"), await keks(keyvault, "content")
    assert (len(hours), len(days)) == (epochs.INTAKE.ahead + 1, epochs.CONTENT.ahead + 1)
    await keyvault.app.epochs.tick()
    created = [
        event.kek
        for event in await keyvault.events("system")
        if event.type == audit_pb2.AUDIT_EVENT_TYPE_EPOCH_KEY_CREATED
    ]
    assert sorted(created) == sorted(hours | days)
    clock.later = datetime.timedelta(hours=epochs.INTAKE.ahead)
    assert await refusal(intake(keyvault)) == ""
    clock.later += datetime.timedelta(hours=1)
    await keyvault.app.epochs.tick()
    assert hours & await keks(keyvault, "intake") < hours


async def test_an_ended_epoch_dies(keyvault, clock):
    """Its KEK and its rows are destroyed when its retention ends, and the system chain says so.

    Shown to fail: with Epochs._destroy not destroying; with content_close without the retention.
    """
    key = await ask(keyvault)
    name = kek.content_kek(key.epoch)
    clock.later = DAY * 90
    await keyvault.app.epochs.tick()
    assert await ask(keyvault, epoch=key.epoch) == key
    clock.later = DAY * 91
    await keyvault.app.epochs.tick()
    assert await refusal(ask(keyvault, epoch=key.epoch)) == "CONTENT_EXPIRED"
    assert name not in await keks(keyvault, "content")
    assert await keyvault.sql("SELECT * FROM content_key WHERE epoch = %s", key.epoch) == []
    (event,) = [
        one
        for one in await keyvault.events("system")
        if one.type == audit_pb2.AUDIT_EVENT_TYPE_EPOCH_KEY_DESTROYED and one.kek == name
    ]
    assert event.shred == "none"


async def test_a_clock_that_runs_ahead_destroys_nothing(keyvault, monkeypatch, caplog):
    """keyvault's tells a day of a quarter later, the database's does not: no KEK is destroyed, no
    event is dropped, and what is wrong is logged.

    Shown to fail: with clocks.agree taken out of Epochs.tick; out of Retention.tick.
    """
    key, app = await ask(keyvault), keyvault.app
    await keyvault.add_active()
    await keyvault.tick()
    app.retention._age = DAY
    before, chain = await keks(keyvault, "content"), await keyvault.events()
    ahead = app.ledger.now() + DAY * 92
    monkeypatch.setattr(app.ledger, "now", lambda: ahead)
    await app.epochs.tick()
    await app.retention.tick()
    assert before <= await keks(keyvault, "content")
    assert await keyvault.events() == chain
    assert "clocks_differ" in {record.message for record in caplog.records}
    monkeypatch.undo()
    assert await ask(keyvault, epoch=key.epoch) == key


async def test_an_ended_epoch_is_refused_by_time_alone(keyvault, clock):
    """Though the admin role did not come to destroy it, or an old database brought it back.

    Shown to fail: with the look at the time taken out of ContentKeys.get.
    """
    key = await ask(keyvault)
    clock.later = DAY * 91
    assert await refusal(ask(keyvault, epoch=key.epoch)) == "CONTENT_EXPIRED"


async def test_a_restored_row_of_a_destroyed_epoch(keyvault, clock):
    """The row of an older backup opens nothing where the backend shredded its KEK."""
    key = await ask(keyvault)
    ((tenant, epoch, *row),) = await keyvault.sql("SELECT * FROM content_key")
    await keyvault.sql("DELETE FROM local_kek WHERE name = %s", kek.content_kek(epoch))
    keyvault.app.backends.primary._cache.clear()
    assert (tenant, epoch, row[0]) == ("acme", key.epoch, "local")
    assert await refusal(ask(keyvault, epoch=epoch)) == "CONTENT_EXPIRED"


async def test_an_epoch_that_is_not_there(keyvault, deployment):
    """With the admin role away too long, the data role says what is missing, and never makes it.

    Shown to fail: with a `backend.create` before generate_data_key.
    """
    await keyvault.sql("DELETE FROM local_kek WHERE name <> 'system'")
    assert await refusal(ask(keyvault)) == "EPOCH_MISSING"
    with pytest.raises(grpc.RpcError) as refused:
        await intake(keyvault)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert error_info(refused.value).reason == "EPOCH_MISSING"
    assert await keks(keyvault, "intake") == set()
    async with kv.running(deployment):
        assert (await ask(keyvault)).epoch
    assert await refusal(intake(keyvault)) == ""


@asynccontextmanager
async def in_role(deployment, role, name):
    app = App(deployment.settings(anchor_file=deployment.folder / name), role)
    await app.start()
    grpc_server, port = await server.build(deployment.settings(), app)
    await grpc_server.start()
    running = kv.Keyvault(deployment, app, port, {"intake_signing_keys": {}, "audit_log_keys": {}})
    try:
        yield running
    finally:
        await running.close_channels()
        await grpc_server.stop(None)
        await app.stop()


async def test_the_data_role_makes_no_epoch(keyvault, deployment):
    """The admin role makes them, a data role beside it only uses them."""
    await keyvault.sql("DELETE FROM local_kek WHERE name <> 'system'")
    async with in_role(deployment, "data", "anchor.json") as data:
        assert await refusal(ask(data)) == "EPOCH_MISSING"
        async with in_role(deployment, "admin", "anchor.json"):
            assert (await ask(data)).epoch


async def test_a_kek_that_is_over_dies_though_its_backend_fails_at_first(
    keyvault, clock, monkeypatch
):
    """No row says which KEKs there are: what is over is looked for by its name, also where the
    backend fails at first, until it is found, and destroyed.

    Shown to fail: with epochs that are over not looked for; with a KEK that could not be looked
    for taken as looked for.
    """
    day = min(await keks(keyvault, "content"))
    clock.later = DAY * 92
    backend, failed = keyvault.app.backends.primary, []
    real = backend.newest

    async def fails_once(name):
        if name == day and not failed:
            failed.append(name)
            raise kek.KekUnavailableError("local", "slow", "the backend is slow")
        return await real(name)

    monkeypatch.setattr(backend, "newest", fails_once)
    for _ in range(40):
        await keyvault.app.epochs.tick()
        if day not in await keks(keyvault, "content"):
            break
    assert failed
    assert day in [
        one.kek
        for one in await keyvault.events("system")
        if one.type == audit_pb2.AUDIT_EVENT_TYPE_EPOCH_KEY_DESTROYED
    ]


def test_no_statement_outlives_its_epoch():
    """The seal's window ends before the KEK of its epoch does, whenever it begins."""
    start = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)
    for second in range(0, 7200, 7):
        moment = start + datetime.timedelta(seconds=second)
        close = epochs.intake_close(epochs.INTAKE.at(moment))
        assert moment + MAX_WINDOW + epochs.INTAKE_GRACE <= close


async def test_a_shredded_tenants_content_is_unreadable(keyvault):
    """Shown to fail: with ContentKeys._check left out."""
    await keyvault.create_tenant("other")
    key, other = await ask(keyvault), await ask(keyvault, "other")
    await keyvault.admin.ShredTenant(
        admin_pb2.ShredTenantRequest(tenant="tenants/acme", request_id=new_id("req"))
    )
    for table in ("content_key", "local_kek"):
        assert not await keyvault.sql(
            f"SELECT 1 FROM {table} WHERE position('acme' in {table}::text) > 0"
        )
    assert await refusal(ask(keyvault, epoch=key.epoch)) == "CONTENT_EXPIRED"
    assert await ask(keyvault, "other", other.epoch) == other
    assert await refusal(ask(keyvault)) == "TENANT_KEY_MISSING"


async def test_no_way_from_a_provider_key_to_a_content_key(keyvault):
    """A provider key's wrapped data key, put by SQL where a content key's stands.

    Shown to fail: with kek.tenant_kek in place of kek.content_kek, and without the HKDF it is
    the data key itself that is handed out.
    """
    await keyvault.add_active()
    key = await ask(keyvault)
    await keyvault.sql("UPDATE content_key SET wrapped_dek = (SELECT wrapped_dek FROM key_secret)")
    assert await refusal(ask(keyvault, epoch=key.epoch)) == "ROW_TAMPERED"


async def test_no_way_from_a_content_key_to_a_provider_key(keyvault):
    """And the other way round: the lease finds no key that opens."""
    provider_key = await keyvault.add_active()
    await ask(keyvault)
    await keyvault.sql("UPDATE key_secret SET wrapped_dek = (SELECT wrapped_dek FROM content_key)")
    assert await try_lease(keyvault, provider_key) == "ROW_TAMPERED"
    assert provider_key.state == custody_pb2.KEY_VERSION_STATE_ACTIVE


def test_what_is_handed_out_is_no_data_key():
    """Derived under its own label, for this deployment, tenant and epoch."""
    raw = bytes(range(32))
    made = {
        content.derive(bytearray(raw), *where)
        for where in (
            ("prod", "acme", "2026-11-23"),
            ("test", "acme", "2026-11-23"),
            ("prod", "acm", "e2026-11-23"),
            ("prod", "other", "2026-11-23"),
            ("prod", "acme", "2026-11-24"),
        )
    }
    assert len(made) == 5
    assert raw not in made


async def test_a_row_moved_to_another_tenant_gives_another_key(keyvault):
    await keyvault.create_tenant("other")
    key = await ask(keyvault)
    await keyvault.sql("UPDATE content_key SET tenant = 'other'")
    assert (await ask(keyvault, "other", key.epoch)).key != key.key
