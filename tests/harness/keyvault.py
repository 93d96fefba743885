"""A keyvault in the test's process: real PostgreSQL, real mTLS, the real wiring."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import datetime
import hashlib
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import psycopg
import pytest
from byokeep import dsse, hpke, sealing, transport
from byokeep.common.v1 import options_pb2
from byokeep.errors import error_info
from byokeep.ids import new_id, public_key_id
from byokeep.keyvault.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    audit_pb2,
    audit_pb2_grpc,
    custody_pb2,
    custody_pb2_grpc,
    grant_pb2,
    lease_pb2,
    lease_pb2_grpc,
)
from byokeep.leasing import lease_info
from byokeep.names import key_name, provider_value, tenant_name
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from deploy.local.pki import CertificateAuthority
from services.common import server
from services.keyvault import clocks, lifecycle, migrate
from services.keyvault.config import Settings
from services.keyvault.event import link_hash, name_of
from services.keyvault.kek.keyring import new_keyring
from services.keyvault.server import App

TRUST_DOMAIN = "byokeep.test"
DEPLOYMENT = "test"
NAME = "keyvault.byokeep.internal"
CALLERS = " ".join(
    f"{name}=spiffe://{TRUST_DOMAIN}/{path}"
    for name, path in {
        "orchestrator": "orchestrator",
        "runner": "runner/*",
        "auditor": "client/auditor",
        "operator": "client/operator",
        "client": "client/*",
    }.items()
)
IDENTITIES = {
    "orchestrator": "orchestrator",
    "runner": "runner/default",
    "sibling": "runner/sibling",
    "auditor": "client/auditor",
    "operator": "client/operator",
    "client": "client/shop",
}
PROVIDER_KEY = "sk-proj-" + "a1B2c3D4" * 6


class Deployment:
    """One deployment's files: CA, identities, keyring, grant key. Replicas share it."""

    def __init__(self, folder: Path, database_url: str) -> None:
        self.folder = folder
        self.ca = CertificateAuthority.new(TRUST_DOMAIN)
        (folder / "ca.pem").write_text(self.ca.pem)
        self.ca.issue(folder / "server", spiffe_id="keyvault", dns=[NAME])
        for name, path in IDENTITIES.items():
            self.ca.issue(folder / name, spiffe_id=path)
        self.grant_key = Ed25519PrivateKey.generate()
        (folder / "grants").mkdir()
        self._write_secret("keyring.json", new_keyring())
        self._write_secret("database", database_url)
        self.trust_grant_key(self.grant_key)
        self.database_url = database_url

    def _write_secret(self, name: str, text: str) -> None:
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_text(text)

    def trust_grant_key(self, key: Ed25519PrivateKey) -> str:
        public = key.public_key()
        key_id = public_key_id("gsk", public.public_bytes_raw())
        pem = public.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (self.folder / "grants" / f"{key_id}.pem").write_bytes(pem)
        return key_id

    def settings(self, **changes) -> Settings:
        return dataclasses.replace(
            Settings(
                deployment=DEPLOYMENT,
                trust_domain=TRUST_DOMAIN,
                listen="127.0.0.1:0",
                health_listen="127.0.0.1:0",
                tls_cert=self.folder / "server.pem",
                tls_key=self.folder / "server.key",
                tls_ca=self.folder / "ca.pem",
                callers=CALLERS,
                mode="development",
                database_url_file=self.folder / "database",
                anchor_file=self.folder / "anchor.json",
                grant_keys_dir=self.folder / "grants",
                keyring_file=self.folder / "keyring.json",
            ),
            **changes,
        )

    def files(self, name: str) -> transport.TlsFiles:
        return transport.TlsFiles(
            self.folder / f"{name}.pem", self.folder / f"{name}.key", self.folder / "ca.pem"
        )


class Keyvault:
    """A running keyvault and channels to it, one per identity."""

    def __init__(self, deployment: Deployment, app: App, port: int, trust: dict) -> None:
        self.deployment = deployment
        self.app = app
        self.port = port
        self.pinned = {
            key_id: Ed25519PublicKey.from_public_bytes(base64.b64decode(raw))
            for key_id, raw in trust["intake_signing_keys"].items()
        }
        self.audit_keys = trust["audit_log_keys"]
        self._channels: dict[str, grpc.aio.Channel] = {}

    def channel(self, name: str) -> grpc.aio.Channel:
        if name not in self._channels:
            self._channels[name] = transport.aio_channel(
                self.target(), NAME, self.deployment.files(name)
            )
        return self._channels[name]

    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def close_channels(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    @property
    def custody(self) -> custody_pb2_grpc.CustodyServiceAsyncStub:
        return custody_pb2_grpc.CustodyServiceStub(self.channel("orchestrator"))

    def leases(self, runner: str = "runner") -> lease_pb2_grpc.LeaseServiceAsyncStub:
        return lease_pb2_grpc.LeaseServiceStub(self.channel(runner))

    @property
    def audit(self) -> audit_pb2_grpc.AuditServiceAsyncStub:
        return audit_pb2_grpc.AuditServiceStub(self.channel("auditor"))

    @property
    def admin(self) -> admin_pb2_grpc.AdminServiceAsyncStub:
        return admin_pb2_grpc.AdminServiceStub(self.channel("operator"))

    async def create_tenant(self, tenant: str = "acme") -> admin_pb2.CreateTenantKeyResponse:
        return await self.admin.CreateTenantKey(
            admin_pb2.CreateTenantKeyRequest(tenant=tenant_name(tenant), request_id=new_id("req"))
        )

    async def statement(self, suite: int = hpke.HYBRID_V1) -> custody_pb2.IntakeStatement:
        answer = await self.custody.GetIntakeKey(custody_pb2.GetIntakeKeyRequest(suite=suite))
        return sealing.verify_statement(
            answer.statement,
            deployment=DEPLOYMENT,
            pinned=self.pinned,
            now=datetime.datetime.now(datetime.UTC),
        )

    async def stage_request(
        self,
        key: str = PROVIDER_KEY,
        *,
        tenant: str = "acme",
        provider: str = "openai",
        owner: str = "",
        key_id: str | None = None,
        operation: str = "add",
        name: str = "default",
        actor: str = "spiffe://byokeep.test/client/shop",
        seal=None,
    ) -> custody_pb2.StageKeyRequest:
        context = sealing.SealContext(
            tenant, owner, provider, key_id or new_id("key"), operation, new_id("req")
        )
        sealed = (seal or sealing.seal_key)(key, context, await self.statement())
        return custody_pb2.StageKeyRequest(
            name=key_name(tenant, context.key_id),
            provider=provider_value(provider),
            owner=owner,
            display_name=name,
            operation=custody_pb2.IntakeOperation.Value(f"INTAKE_OPERATION_{operation.upper()}"),
            sealed_key=sealed,
            request_id=context.request_id,
            actor=actor,
        )

    async def stage(self, *args, **kwargs) -> custody_pb2.ProviderKey:
        answer = await self.custody.StageKey(await self.stage_request(*args, **kwargs))
        return answer.key

    async def add_active(
        self, *args, destroy_previous: bool = False, **kwargs
    ) -> custody_pb2.ProviderKey:
        key = await self.stage(*args, **kwargs)
        return await self.promote(
            key.name, key.versions[-1].version, destroy_previous=destroy_previous
        )

    async def promote(self, name: str, version: int, **extra) -> custody_pb2.ProviderKey:
        answer = await self.custody.PromoteKeyVersion(
            custody_pb2.PromoteKeyVersionRequest(
                name=name, version=version, request_id=new_id("req"), actor="test", **extra
            )
        )
        return answer.key

    async def change(self, method: str, name: str, **extra) -> custody_pb2.ProviderKey:
        request = getattr(custody_pb2, f"{method}Request")(
            name=name, request_id=new_id("req"), actor="test", **extra
        )
        return (await getattr(self.custody, method)(request)).key

    async def events(self, chain: str = "tenants/acme") -> list[audit_pb2.AuditEvent]:
        answer = await self.audit.ListEvents(
            audit_pb2.ListEventsRequest(parent=chain, page_size=1000)
        )
        return list(answer.events)

    async def tick(self) -> None:
        """Hold the database against its anchor, learn and anchor: what runs beside, done now."""
        await self.app.log.tick()

    async def tend(self) -> None:
        """Do what is due of tenants now."""
        await self.app.upkeep.tick()

    async def sql(self, statement: str, *parameters):
        """Run a statement as somebody with the database's password would."""
        async with self.app.database.transaction() as connection:
            cursor = await connection.execute(statement, parameters)
            return await cursor.fetchall() if cursor.description else cursor.rowcount


class Child:
    """Stands for a runner's child: a fresh HPKE key, and the opening of a lease."""

    def __init__(self, suite: int = hpke.HYBRID_V1) -> None:
        self.suite = suite
        self.private = hpke.PrivateKey.generate(suite)
        self.public_key = self.private.public_bytes

    def open(self, request: lease_pb2.LeaseKeyRequest, lease: lease_pb2.LeaseKeyResponse) -> str:
        info = lease_info(request.grant.payload, lease.lease_id)
        return self.private.open(lease.sealed_key, info).decode()


async def released(
    keyvault: Keyvault, lease_id: str, outcome: int = lease_pb2.LEASE_OUTCOME_COMPLETED
) -> str:
    """Release a lease as its runner would; return "" or the reason of the refusal."""
    request = lease_pb2.ReleaseLeaseRequest(
        lease_id=lease_id, outcome=lease_pb2.LeaseOutcome.ValueType(outcome)
    )
    return await refusal(keyvault.leases().ReleaseLease(request))


def move_clocks(
    patch: pytest.MonkeyPatch, keyvault: Keyvault, now: Callable[[], datetime.datetime]
) -> None:
    """Have keyvault's clock tell another time, and the database's with it."""

    async def agree(*_: object) -> bool:
        return True

    patch.setattr(keyvault.app.ledger, "now", now)
    patch.setattr(clocks, "agree", agree)


async def prune(keyvault: Keyvault) -> None:
    """Drop all that retention may drop now, as if it were old."""
    await keyvault.tick()
    retention = keyvault.app.retention
    retention._age = datetime.timedelta(days=-1)
    await retention.tick()


async def plant(keyvault: Keyvault, name: str = "tenants/acme", **event) -> None:
    """Append an event to a chain by SQL, well linked: anybody can compute its hash."""
    query = "SELECT sequence, head_hash FROM tenant WHERE name = %s"
    ((sequence, previous),) = await keyvault.sql(query, name_of(name))
    made = audit_pb2.AuditEvent(deployment=DEPLOYMENT, chain=name, sequence=sequence + 1, **event)
    if not made.HasField("event_time"):
        made.event_time.GetCurrentTime()
    body = made.SerializeToString()
    digest = link_hash(bytes(previous), body)
    await keyvault.sql(
        "INSERT INTO event (tenant, sequence, key_id, body, hash) VALUES (%s, %s, %s, %s, %s)",
        *(name_of(name), sequence + 1, made.key_id, body, digest),
    )
    await keyvault.sql(
        "UPDATE tenant SET sequence = %s, head_hash = %s WHERE name = %s",
        *(sequence + 1, digest, name_of(name)),
    )


async def swept(keyvault: Keyvault, tenant: str = "acme", seconds: float = 60) -> bool:
    """Wait until nothing that was destroyed of a tenant can be opened any more, as far as its
    backend can; False where that does not come."""
    for _ in range(int(seconds * 4)):
        state = (await keyvault.app.ledger.read(tenant)).state
        if not lifecycle.owed(state) and not lifecycle.untrimmed(state):
            return True
        await keyvault.tend()
        await asyncio.sleep(0.25)
    return False


def grant_for(key: custody_pb2.ProviderKey, child: Child, **changes) -> grant_pb2.Grant:
    """A grant for the newest version of a key, valid for 30 seconds."""
    _, tenant, _, key_id = key.name.split("/")
    grant = grant_pb2.Grant(
        grant_id=new_id("gra"),
        deployment=DEPLOYMENT,
        tenant=tenant,
        owner=key.owner,
        actor="test",
        provider=key.provider,
        key_id=key_id,
        key_version=key.active_version or key.versions[-1].version,
        review_id="rev_1",
        attempt_id=new_id("att"),
        fence=1,
        purpose=grant_pb2.LEASE_PURPOSE_REVIEW,
        runner_class="default",
        recipient_key_sha256=hashlib.sha256(child.public_key).digest(),
    )
    now = datetime.datetime.now(datetime.UTC)
    grant.issue_time.FromDatetime(now)
    grant.expire_time.FromDatetime(now + datetime.timedelta(seconds=30))
    for field, value in changes.items():
        if isinstance(value, datetime.datetime):
            getattr(grant, field).FromDatetime(value)
        else:
            setattr(grant, field, value)
    return grant


def lease_request(
    deployment: Deployment,
    grant: grant_pb2.Grant,
    child: Child,
    *,
    signer: Ed25519PrivateKey | None = None,
    payload_type: str = dsse.GRANT,
    key_id: str | None = None,
) -> lease_pb2.LeaseKeyRequest:
    """Sign a grant as the orchestrator would."""
    private = signer or deployment.grant_key
    signer_id = key_id or public_key_id("gsk", private.public_key().public_bytes_raw())
    envelope = dsse.sign(payload_type, grant.SerializeToString(), signer_id, private)
    return lease_pb2.LeaseKeyRequest(
        grant=envelope,
        recipient_public_key=child.public_key,
        suite=options_pb2.HpkeSuite.ValueType(child.suite),
    )


@asynccontextmanager
async def running(deployment: Deployment, **changes):
    """A keyvault that serves until the block ends."""
    settings = deployment.settings(**changes)

    trust = await migrate.bootstrap(settings)
    app = App(settings, "all")
    await app.start()
    grpc_server, port = await server.build(settings, app)
    await grpc_server.start()
    keyvault = Keyvault(deployment, app, port, trust)
    try:
        yield keyvault
    finally:
        await keyvault.close_channels()
        await grpc_server.stop(None)
        await app.stop()


@asynccontextmanager
async def database(deployment: Deployment):
    """The database as somebody with its password has it, also while no keyvault runs."""
    connection = await psycopg.AsyncConnection.connect(deployment.database_url, autocommit=True)
    async with connection:
        yield connection


async def try_lease(keyvault: Keyvault, key: custody_pb2.ProviderKey, **changes) -> str:
    """Lease a key as its runner would; return "" or the reason of the refusal."""
    child = Child()
    request = lease_request(keyvault.deployment, grant_for(key, child, **changes), child)
    return await refusal(keyvault.leases().LeaseKey(request))


async def refusal(call) -> str:
    """Return the reason with which a call is refused, or "" where it is not."""
    try:
        await call
    except grpc.RpcError as error:
        return error_info(error).reason
    return ""
