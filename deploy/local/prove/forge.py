"""Grants and children as an attacker makes them who holds the orchestrator's signing key."""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass, field
from typing import Any

from byokeep import dsse, hpke
from byokeep.ids import new_id, public_key_id
from byokeep.keyvault.v1 import grant_pb2, lease_pb2
from byokeep.leasing import lease_info
from byokeep.names import key_name, provider_value
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deploy.local.material import DEPLOYMENT

_LIFE = datetime.timedelta(seconds=30)


@dataclass(frozen=True, slots=True)
class Victim:
    """One version of a provider key that somebody else owns."""

    tenant: str
    key_id: str
    version: int
    provider: str
    plaintext: str = field(repr=False)

    @property
    def name(self) -> str:
        """Resource name of the key."""
        return key_name(self.tenant, self.key_id)


class Child:
    """Stands for a runner's child: a fresh HPKE key, and the opening of a lease."""

    def __init__(self) -> None:
        """Make the key."""
        self._private = hpke.PrivateKey.generate(hpke.HYBRID_V1)
        self.public_key = self._private.public_bytes

    def open(self, request: lease_pb2.LeaseKeyRequest, lease: lease_pb2.LeaseKeyResponse) -> str:
        """Return the leased key. Raises hpke.SealError."""
        info = lease_info(request.grant.payload, lease.lease_id)
        return self._private.open(lease.sealed_key, info).decode()


def grant_for(
    victim: Victim,
    child: Child,
    *,
    issued: datetime.timedelta = datetime.timedelta(),
    **fields: Any,
) -> grant_pb2.Grant:
    """A grant for a victim's key, valid for 30 seconds from now, or from then; ``fields``
    replaces what it says."""
    grant = grant_pb2.Grant(
        grant_id=new_id("gra"),
        deployment=DEPLOYMENT,
        tenant=victim.tenant,
        actor="make prove",
        provider=provider_value(victim.provider),
        key_id=victim.key_id,
        key_version=victim.version,
        review_id=new_id("rev"),
        attempt_id=new_id("att"),
        fence=1,
        purpose=grant_pb2.LEASE_PURPOSE_REVIEW,
        runner_class="default",
        recipient_key_sha256=hashlib.sha256(child.public_key).digest(),
    )
    now = datetime.datetime.now(datetime.UTC) + issued
    grant.issue_time.FromDatetime(now)
    grant.expire_time.FromDatetime(now + _LIFE)
    for name, value in fields.items():
        setattr(grant, name, value)
    return grant


def signed(
    grant: grant_pb2.Grant, child: Child, signer: Ed25519PrivateKey, key_id: str = ""
) -> lease_pb2.LeaseKeyRequest:
    """The request that redeems a grant; ``key_id`` claims another signer's name."""
    signer_id = key_id or public_key_id("gsk", signer.public_key().public_bytes_raw())
    return lease_pb2.LeaseKeyRequest(
        grant=dsse.sign(dsse.GRANT, grant.SerializeToString(), signer_id, signer),
        recipient_public_key=child.public_key,
        suite=hpke.HYBRID_V1,
    )
