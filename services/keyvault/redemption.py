"""Redemption: grants become leases, many in one transaction.

Under the locks of the tenants' chains: the grant's time, the key's state and MAC, the
tenant's hold, whether the grant was used, and the caps. A grant that is refused takes no
other down. What is redeemed is told to nobody before its row, its count and its audit
event are committed together.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
from byokeep.ids import new_id
from byokeep.keyvault.v1 import audit_pb2, grant_pb2
from byokeep.names import provider_value

from services.common.errors import ByokeepError
from services.keyvault import chain, domain, kek, limits
from services.keyvault.custody import Custody
from services.keyvault.database import Database, DuplicateError
from services.keyvault.domain import Key, State
from services.keyvault.grants import GrantRefusedError, check_time
from services.keyvault.group import GroupCommit
from services.keyvault.holds import Holds
from services.keyvault.limits import Caps, Meter
from services.keyvault.store import leases as store
from services.keyvault.store.leases import Lease, Locked

LIFE = datetime.timedelta(minutes=15)
_STATES = {
    grant_pb2.LEASE_PURPOSE_VALIDATION: (State.PENDING, State.ACTIVE),
    grant_pb2.LEASE_PURPOSE_REVIEW: (State.ACTIVE,),
}


@dataclass(frozen=True, slots=True)
class Redeemed:
    """A lease that is on the record, and what it opens."""

    lease: Lease
    locked: Locked


@dataclass(frozen=True, slots=True)
class _Order:
    grant: grant_pb2.Grant
    holder: str

    @property
    def version(self) -> store.VersionName:
        return self.grant.tenant, self.grant.key_id, self.grant.key_version

    def lease(self, expire_time: datetime.datetime) -> Lease:
        grant = self.grant
        return Lease(
            new_id("lea"),
            grant.grant_id,
            grant.tenant,
            grant.key_id,
            grant.key_version,
            self.holder,
            grant.attempt_id,
            grant.review_id,
            grant.fence,
            grant.purpose,
            expire_time,
        )


class Redemption:
    """Redeems grants (see the module)."""

    def __init__(
        self,
        database: Database,
        custody: Custody,
        backends: kek.Backends,
        holds: Holds,
        deployment: str,
        caps: tuple[Caps, Caps],
        refusal: Callable[[Locked], ByokeepError | None],
    ) -> None:
        """`caps` are a tenant's and a key's; `refusal` says why no lease may be given."""
        self._database = database
        self._custody = custody
        self._backends = backends
        self._holds = holds
        self._deployment = deployment
        self._caps = caps
        self._refusal = refusal
        self._group: GroupCommit[_Order, Redeemed] = GroupCommit(
            self._redeem, lambda order: order.grant.tenant
        )

    async def redeem(self, grant: grant_pb2.Grant, holder: str) -> Redeemed:
        """Redeem a verified grant, once.

        Raises:
            GrantRefusedError: unknown key, other binding, out of time, or used before.
            ByokeepError: why this key can't be leased now.
        """
        try:
            return await self._group.do(_Order(grant, holder))
        except DuplicateError:
            # Used in another transaction, under another tenant's lock.
            raise GrantRefusedError("redeemed before") from None

    async def _redeem(self, orders: Sequence[_Order]) -> list[Redeemed | Exception]:
        versions = {order.version for order in orders}
        grants = {order.grant.grant_id for order in orders}
        async with self._database.pipelined() as connection:
            group = _Group(*await store.lock(connection, versions, grants))
            outcomes = [self._outcome(order, group) for order in orders]
            if group.leases:
                await store.redeem(connection, group.leases, group.now)
        return outcomes

    def _outcome(self, order: _Order, group: _Group) -> Redeemed | Exception:
        try:
            return self._lease(order, group)
        except (GrantRefusedError, ByokeepError) as error:
            return error

    def _lease(self, order: _Order, group: _Group) -> Redeemed:
        """Give a lease, and note it in the group. Raises why there is none."""
        grant = order.grant
        one = group.locked.get(order.version)
        if one is None:
            raise GrantRefusedError("no such key version")
        if grant.grant_id in group.used:
            raise GrantRefusedError("redeemed before")
        now = one.head.now
        check_time(grant, now)
        refused = self._refusal(one)
        if refused is not None:
            raise refused
        self._check_key(grant, one.key)
        self._holds.check(grant.tenant, one.hold)
        tenant = group.meter(grant.tenant, "", one.tenant_meter)
        key = group.meter(grant.tenant, grant.key_id, one.key_meter)
        limits.check("tenant", self._caps[0], tenant, now)
        limits.check("key", self._caps[1], key, now)
        lease = order.lease(now + LIFE)
        event = lease_event(
            lease, one.key.provider, one.key.owner, audit_pb2.AUDIT_EVENT_TYPE_LEASED
        )
        event.actor = grant.actor
        head = group.heads.get(grant.tenant, one.head)
        group.heads[grant.tenant], (link,) = chain.link(head, self._deployment, [event])
        group.leases.append((lease, link))
        group.used.add(grant.grant_id)
        tenant.add()
        key.add()
        return Redeemed(lease, one)

    def _check_key(self, grant: grant_pb2.Grant, key: Key) -> None:
        version = key.versions[0]
        self._custody.check(key)
        unavailable = self._backends.refusal_of(version.kek_backend)
        if unavailable is not None:
            # Before the grant is spent on a backend that is known not to answer.
            raise unavailable
        if (provider_value(key.provider), key.owner) != (grant.provider, grant.owner):
            raise GrantRefusedError("key binding")
        if version.state in _STATES[grant.purpose]:
            return
        if version.state is State.NEEDS_REKEY:
            raise ByokeepError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "KEY_NEEDS_REKEY",
                "the provider rejected this key: it needs a new version",
                key=key.key_id,
            )
        raise domain.wrong_state(version.state, "it can't be leased for this purpose")


class _Group:
    """One transaction's redemptions: each is decided on what those before it left."""

    def __init__(self, locked: dict[store.VersionName, Locked], used: set[str]) -> None:
        self.locked = locked
        self.used = used
        self.now = max((one.head.now for one in locked.values()), default=datetime.datetime.min)
        self.heads: dict[str, chain.Head] = {}
        self.leases: list[tuple[Lease, chain.Link]] = []
        self._meters: dict[tuple[str, str], Meter] = {}

    def meter(self, tenant: str, key_id: str, read: Meter) -> Meter:
        return self._meters.setdefault((tenant, key_id), read.at(self.now))


def lease_event(
    lease: Lease, provider: str, owner: str, kind: audit_pb2.AuditEventType.ValueType
) -> audit_pb2.AuditEvent:
    """Return an event about a lease, not yet linked."""
    return audit_pb2.AuditEvent(
        type=kind,
        key_id=lease.key_id,
        key_version=lease.version,
        provider=domain.provider_of(provider),
        owner=owner,
        lease_id=lease.lease_id,
        grant_id=lease.grant_id,
        review_id=lease.review_id,
        attempt_id=lease.attempt_id,
        fence=lease.fence,
        purpose=grant_pb2.LeasePurpose.ValueType(lease.purpose),
        caller=lease.holder,
    )
