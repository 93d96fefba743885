"""keyvault's trust core without its wire: replicas that share a database, an anchor and KEKs, and
can be stopped, restarted and ticked one by one."""

from __future__ import annotations

import datetime
import hashlib
from pathlib import Path

from byokeep import dsse, hpke
from byokeep.common.v1 import options_pb2
from byokeep.ids import new_id, public_key_id
from byokeep.keyvault.v1 import audit_pb2, custody_pb2, grant_pb2, lease_pb2, state_pb2
from byokeep.leasing import lease_info
from byokeep.names import provider_value
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.keyvault import kek, stage
from services.keyvault.anchor import FileAnchor
from services.keyvault.custody import Custody, Origin
from services.keyvault.database import Database
from services.keyvault.envelope import Context, encrypt
from services.keyvault.event import SYSTEM
from services.keyvault.heads import Heads
from services.keyvault.kek import Backends
from services.keyvault.kek.keyring import load_keyring, new_keyring
from services.keyvault.kek.local import LocalBackend
from services.keyvault.lease import Leasing
from services.keyvault.ledger import ALL, Ledger, Macs
from services.keyvault.lifecycle import stale
from services.keyvault.limits import Caps
from services.keyvault.log import Log
from services.keyvault.release import Releases

DEPLOYMENT = "test"
RUNNER = "spiffe://byokeep.test/runner/default"
ORIGIN = Origin("test", "test")
CHILD = hpke.PrivateKey.generate(hpke.HYBRID_V1)


class Shared:
    """What replicas share: a database, an anchor, a keyring, the key that signs grants."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.anchor = FileAnchor(folder / "anchor.json")
        keyring = folder / "keyring.json"
        keyring.touch(mode=0o600)
        keyring.write_text(new_keyring())
        self.keyring = load_keyring(keyring)
        self.signer = Ed25519PrivateKey.generate()
        self.signer_id = public_key_id("gsk", self.signer.public_key().public_bytes_raw())
        self.mac_key = hashlib.sha256(self.signer.private_bytes_raw()).digest()


class Replica:
    """One keyvault process's trust core. Its log ticks only when it is told to, but for answers."""

    def __init__(self, shared: Shared, caps: Caps | None = None) -> None:
        self.shared = shared
        self.database = Database(shared.url, 4)
        self.heads = Heads()
        self.macs = Macs("1", {"1": shared.mac_key})
        self.ledger = Ledger(self.database, self.heads, self.macs, DEPLOYMENT)
        self.log = Log(self.database, shared.anchor, self.heads, self.ledger, self.macs, DEPLOYMENT)
        self.backends = Backends(LocalBackend(self.database, shared.keyring, DEPLOYMENT))
        self.custody = Custody(self.ledger, self.log, self.backends)
        self.releases = Releases(self.database, self.ledger, self.backends)
        caps = caps or Caps(in_flight=64, per_minute=1_000_000, per_day=1_000_000)
        self.leasing = Leasing(
            self.ledger,
            self.log,
            self.backends,
            {shared.signer_id: shared.signer.public_key()},
            DEPLOYMENT,
            (caps, caps),
            lambda *_: None,
        )

    async def start(self) -> None:
        await self.database.open()
        await self.log.start()

    async def close(self) -> None:
        await self.database.close()

    async def create_system(self) -> None:
        """What `migrate` does once: the deployment's own row."""
        await self.database.open()
        event = audit_pb2.AuditEvent(type=audit_pb2.AUDIT_EVENT_TYPE_EPOCH_KEY_CREATED)
        await self.ledger.create(
            SYSTEM, state_pb2.SystemState(), lambda system: system.events.append(event)
        )
        await self.database.close()

    async def create_tenant(self, tenant: str) -> None:
        await self.backends.primary.create(kek.tenant_kek(tenant))
        event = audit_pb2.AuditEvent(type=audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_CREATED)
        state = state_pb2.TenantState()
        state.keks.add(backend="local", version=1)
        head = await self.ledger.create(tenant, state, lambda made: made.events.append(event))
        await self.anchored(tenant, head)

    async def anchored(self, tenant: str, head) -> None:
        """Tick until the anchor covers a head. Raises ByokeepError where another branch won, or
        the database is not what the anchor says."""
        for _ in range(5):
            if self.heads.logged(tenant).covers(head):
                return
            await self.log.tick()
            if self.log.rolled_back or not self.heads.get(tenant).covers(head):
                break
        if not self.heads.logged(tenant).covers(head):
            raise stale("anchored")

    async def add(self, tenant: str, key_id: str, value: str) -> int:
        """Store a version as staging does once its one-shot process has answered, and make it
        ACTIVE; return its number once it is anchored."""
        found = await self.ledger.read(tenant, ALL)
        key = found.key(key_id)
        order = stage.Order(
            tenant,
            key_id,
            "openai",
            "",
            key_id,
            "rotate" if key is not None else "add",
            new_id("req"),
            custody_pb2.SealedKey(),
            "",
        )
        number = stage._next_version(found, order)
        context = Context(DEPLOYMENT, tenant, "", "openai", key_id, number)
        made = await self.backends.primary.generate_data_key(kek.tenant_kek(tenant))
        with made.plaintext as clear:
            envelope = encrypt(clear.reveal(), value.encode(), context)
        secret = stage._Secret("sk-...", "local", made.kek_version, made.wrapped, envelope)

        def decide(changed) -> None:
            assert stage._next_version(changed, order) == number
            stage._add(changed, order, ORIGIN, number, secret, self.backends)

        _, head = await self.ledger.change(tenant, decide, ALL)
        await self.anchored(tenant, head)
        return number

    def grant(self, tenant: str, key_id: str, version: int, **changes) -> grant_pb2.Grant:
        grant = grant_pb2.Grant(
            grant_id=new_id("gra"),
            deployment=DEPLOYMENT,
            tenant=tenant,
            provider=provider_value("openai"),
            key_id=key_id,
            key_version=version,
            attempt_id=new_id("att"),
            purpose=grant_pb2.LEASE_PURPOSE_VALIDATION,
            runner_class="default",
            **{"recipient_key_sha256": hashlib.sha256(CHILD.public_bytes).digest()} | changes,
        )
        now = datetime.datetime.now(datetime.UTC)
        grant.issue_time.FromDatetime(now)
        grant.expire_time.FromDatetime(now + datetime.timedelta(seconds=55))
        return grant

    def request(self, grant: grant_pb2.Grant) -> lease_pb2.LeaseKeyRequest:
        """Return what a runner asks with: the grant, signed, and its child's public key."""
        payload = grant.SerializeToString()
        return lease_pb2.LeaseKeyRequest(
            grant=dsse.sign(dsse.GRANT, payload, self.shared.signer_id, self.shared.signer),
            recipient_public_key=CHILD.public_bytes,
            suite=options_pb2.HpkeSuite.ValueType(CHILD.suite),
        )

    async def lease(self, grant: grant_pb2.Grant) -> tuple[str, str]:
        """Redeem a grant; return the lease's id and the key."""
        request = self.request(grant)
        answer = await self.leasing.lease(request, RUNNER)
        info = lease_info(request.grant.payload, answer.lease_id)
        return answer.lease_id, CHILD.open(answer.sealed_key, info).decode()
