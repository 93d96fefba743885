"""The ledger: each tenant is one object under one MAC, and changes as a whole.

A tenant's row has its head, the digests of its state and its usage, and a MAC over all of them;
its keys stand in parts, by the first bits of SHA-256(key id), whose digests are in the row.
Whoever reads a tenant checks the MAC, every digest, and that the head is the newest (`heads`).
Whoever changes one holds this process's lock and PostgreSQL's, writes the events with the change,
and leads from the head that was read to the next one.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import hmac
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, Generic, TypeVar, cast
from weakref import WeakValueDictionary

from byokeep.encoding import fields
from byokeep.keyvault.v1 import audit_pb2, state_pb2
from google.protobuf.message import Message

from services.common import logs
from services.common.errors import ByokeepError
from services.keyvault import event, lifecycle
from services.keyvault.database import Connection, Database, Row
from services.keyvault.event import Head
from services.keyvault.heads import Heads, leads
from services.keyvault.sql import index
from services.keyvault.sql import ledger as sql
from services.keyvault.sql.ledger import SecretName

log = logging.getLogger(__name__)
T = TypeVar("T")
M = TypeVar("M", bound=Message)
S = TypeVar("S", bound=Message)
U = TypeVar("U", bound=Message)
_MAC: Final = "byokeep/tenant/v1"
_CACHED_BYTES: Final = 16 * 1024 * 1024
_BATCH: Final = 500
#: Every part of a tenant.
ALL: Final = range(64)
#: Which parts are to be read of each tenant.
Wanted = Mapping[str, Collection[int]]


def part_of(key_id: str) -> int:
    """Return the number of the part that a key is in: 0 to 63."""
    return hashlib.sha256(key_id.encode()).digest()[0] >> 2


def secret_digest(wrapped: bytes, envelope: bytes) -> bytes:
    """Return what a version's state says of its ciphertext."""
    return hashlib.sha256(fields(wrapped, envelope)).digest()


def clock() -> datetime.datetime:
    """Return this process's time: whoever writes the database may set the database's."""
    return datetime.datetime.now(datetime.UTC)


@dataclass(slots=True)
class Macs:
    """The keys that rows are authenticated with, by id, and the id of the one in use."""

    current: str
    keys: dict[str, bytes]
    #: Every one that the deployment's own row names was looked at: what none of them made is not
    #: keyvault's.
    complete: bool = True


@dataclass(slots=True)
class _Read(Generic[S, U]):
    """State and usage as they were read: they are shared, and whoever edits one gets a copy."""

    state: S
    usage: U
    state_changed: bool = field(default=False, init=False)
    usage_changed: bool = field(default=False, init=False)

    def edit(self) -> S:
        """Return the state, to be changed."""
        if not self.state_changed:
            self.state, self.state_changed = _copy(self.state), True
        return self.state

    def edit_usage(self) -> U:
        """Return the usage, to be changed."""
        if not self.usage_changed:
            self.usage, self.usage_changed = _copy(self.usage), True
        return self.usage


@dataclass(slots=True)
class Part(_Read[state_pb2.PartState, state_pb2.PartUsage]):
    """A part of a tenant's keys."""

    raw_state: bytes = b""
    raw_usage: bytes = b""


@dataclass(slots=True)
class Tenant(_Read[Any, state_pb2.TenantUsage]):
    """One tenant as it was read and authenticated, and what is changed of it. Its state is a
    TenantState, that of the deployment's own row a SystemState."""

    name: str
    head: Head
    now: datetime.datetime
    parts: dict[int, Part] = field(default_factory=dict)
    #: (wrapped data key, envelope) of the versions that were asked for, as they are stored: their
    #: digests are in the versions' state.
    secrets: dict[SecretName, tuple[bytes, bytes]] = field(default_factory=dict)
    _raw_usage: bytes = b""
    _state_digest: bytes = b""
    #: Id of the key that the row was authenticated with.
    mac_key: str = ""
    #: What is written with the change.
    events: list[audit_pb2.AuditEvent] = field(default_factory=list)
    put: dict[SecretName, tuple[bytes, bytes]] = field(default_factory=dict)
    dropped: set[SecretName] = field(default_factory=set)
    leased: list[state_pb2.LiveLease] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    #: The change takes something away from whoever has a lease.
    ends: bool = False

    def secret(self, name: SecretName, digest: bytes) -> tuple[bytes, bytes] | None:
        """Return the ciphertext of a version that was asked for; None where what is stored is not
        what its state names by a digest."""
        stored = self.secrets.get(name)
        if stored is None or not hmac.compare_digest(secret_digest(*stored), digest):
            return None
        return stored

    def key(self, key_id: str) -> state_pb2.KeyState | None:
        """Return a key; its part was read."""
        return lifecycle.find(self.parts[part_of(key_id)].state.keys, key_id)

    def edit_key(self, key_id: str) -> state_pb2.KeyState:
        """Return a key that there is, to be changed."""
        key = lifecycle.find(self.parts[part_of(key_id)].edit().keys, key_id)
        if key is None:
            raise lifecycle.not_found("provider key")
        return key

    def every_key(self) -> list[state_pb2.KeyState]:
        """Return the keys of every part that was read, by id."""
        found = (key for part in self.parts.values() for key in part.state.keys)
        return sorted(found, key=lambda key: key.key_id)

    def living(self) -> Iterator[tuple[state_pb2.KeyState, state_pb2.VersionState]]:
        """Yield each version that is not destroyed, with its key, of every part that was read."""
        for key in self.every_key():
            for version in key.versions:
                if lifecycle.state_of(version) is not lifecycle.State.DESTROYED:
                    yield key, version

    @property
    def next_sequence(self) -> int:
        """The number of the next event."""
        return self.head.sequence + len(self.events) + 1


class Ledger:
    """Reads and changes tenants (see the module)."""

    def __init__(
        self,
        database: Database,
        heads: Heads,
        macs: Macs,
        deployment: str,
        shred_after_seconds: int = 0,
        now: Callable[[], datetime.datetime] = clock,
    ) -> None:
        """Keep tenants in a database. `now` is this process's time."""
        self._database = database
        self._heads = heads
        self._macs = macs
        self._deployment = deployment
        self._shred_after = shred_after_seconds
        self.now = now
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._cache: OrderedDict[bytes, tuple[Message, int]] = OrderedDict()
        self._cached = 0
        #: How often this process took something away from a tenant's leases.
        self.ends: Counter[str] = Counter()

    async def read(
        self,
        name: str,
        parts: Collection[int] = (),
        secrets: Collection[SecretName] = (),
    ) -> Tenant:
        """Return a tenant, with some of its parts and ciphertexts.

        Raises:
            ByokeepError: TENANT_KEY_MISSING, STATE_TAMPERED, ROLLED_BACK.
        """
        for lock in (False, True):
            try:
                async with self._database.transaction() as connection:
                    found = await self._load(connection, {name: parts}, secrets, lock=lock)
                    return _whole(found[name])
            except ByokeepError as error:
                # Between two statements without a lock somebody may have changed it honestly.
                if lock or error.reason == "TENANT_KEY_MISSING":
                    raise
        raise AssertionError  # the loop returns or raises

    async def stored(self, name: str) -> Tenant:
        """Return a tenant as its row tells: authentic, but not known to be the newest. For a start,
        before the log was looked at.

        Raises:
            ByokeepError: TENANT_KEY_MISSING, STATE_TAMPERED.
        """
        async with self._database.transaction() as connection:
            return self._tenant(name, await sql.rows(connection, [name], lock=False))

    async def reseal(
        self, connection: Connection, generation: int
    ) -> AsyncIterator[tuple[str, Head]]:
        """Write every authentic row anew as one of a generation, locked; yield its head. A process
        that has not heard of the operator's word can't read, and so not change, one from then
        on."""
        after: str | None = None
        while names := await sql.names(connection, after, _BATCH):
            rows = await sql.rows(connection, names, lock=True)
            sealed: list[tuple[str, bytes]] = []
            for name in names:
                own = [row for row in rows if row[0] == name]
                try:
                    tenant = self._tenant(name, own)
                except ByokeepError as error:
                    logs.failure(log, "row_not_sealed", error, tenant=name)
                    continue
                head = replace(tenant.head, generation=generation)
                digests = [hashlib.sha256(raw).digest() for raw in own[0][4:6]]
                sealed.append((name, self._mac(self._macs.current, name, head, *digests)))
                yield name, head
            await sql.reseal(connection, generation, self._macs.current, sealed)
            *_, after = names

    async def change(
        self,
        name: str,
        decide: Callable[[Tenant], T],
        parts: Collection[int] = (),
        secrets: Collection[SecretName] = (),
    ) -> tuple[T, Head]:
        """Change a tenant as `decide` does; return what that returned, and the head after it.
        Nothing is written where it adds no event.

        Raises:
            ByokeepError: as `read`, or as `decide`; then nothing is changed.
        """

        async with self._held([name]):
            async with self._database.transaction() as connection:
                found = await self._load(connection, {name: parts}, secrets, lock=True)
                result = decide(_whole(found[name]))
                done = await self._write(connection, found.values())
            await self._committed(done)
        # Where nothing was written, what was read: somebody else may have, and is not anchored yet.
        return result, done[0].head if done else _whole(found[name]).head

    async def group(
        self,
        wanted: Wanted,
        secrets: Collection[SecretName],
        decide: Callable[[Mapping[str, Tenant | ByokeepError]], T],
    ) -> T:
        """Change many tenants in one transaction and two round trips; one that can't be read is an
        error in its place."""
        async with self._held(wanted):
            async with self._database.pipelined() as connection:
                found = await self._load(connection, wanted, secrets, lock=True)
                result = decide(found)
                done = await self._write(connection, found.values())
            await self._committed(done)
        return result

    async def create(self, name: str, state: Message, decide: Callable[[Tenant], None]) -> Head:
        """Create a tenant with a state, as `decide` changes it. Raises DuplicateError;
        ByokeepError: ROLLED_BACK where there was one of that name."""
        async with self._held([name]):
            if self._heads.knows(name):
                raise lifecycle.rolled_back(name)
            head = Head(self._heads.generation)
            tenant = Tenant(state, state_pb2.TenantUsage(), name, head, self.now())
            tenant.edit()
            async with self._database.transaction() as connection:
                await sql.create(connection, name)
                decide(tenant)
                done = await self._write(connection, [tenant])
            await self._committed(done)
        return done[0].head

    @asynccontextmanager
    async def _held(self, names: Iterable[str]) -> AsyncIterator[None]:
        """Hold this process's own locks of tenants: whatever a database says of its locks, one
        process changes a tenant once at a time."""
        async with AsyncExitStack() as stack:
            for name in sorted(names):
                lock = self._locks.setdefault(name, asyncio.Lock())
                await stack.enter_async_context(lock)
            yield

    async def _load(
        self,
        connection: Connection,
        wanted: Wanted,
        secrets: Collection[SecretName],
        *,
        lock: bool,
    ) -> dict[str, Tenant | ByokeepError]:
        places = [(name, part) for name, parts in wanted.items() for part in parts]
        rows, parts, stored = await sql.load(connection, wanted, places, secrets, lock=lock)
        found: dict[str, Tenant | ByokeepError] = {}
        for name, asked in wanted.items():
            own = [row for row in rows if row[0] == name]
            try:
                tenant = self._tenant(name, own)
                await self._heads.admit(connection, name, tenant.head)
                self._add_parts(tenant, asked, [row[1:] for row in parts if row[0] == name])
            except ByokeepError as error:
                found[name] = error
                continue
            for row in stored:
                if row[0] == name:
                    tenant.secrets[row[0], row[1], row[2]] = (row[3], row[4])
            found[name] = tenant
        return found

    def _tenant(self, name: str, rows: list[Row]) -> Tenant:
        """Return a tenant from its one row. Raises ByokeepError."""
        if not rows:
            if self._heads.knows(name):
                raise lifecycle.rolled_back(name)
            raise lifecycle.tenant_key_missing(name)
        if len(rows) > 1 or None in rows[0]:
            raise lifecycle.tampered(name)
        _, generation, sequence, digest, state, usage, mac_key, mac = rows[0]
        head = Head(generation, sequence, digest)
        state_digest = hashlib.sha256(state).digest()
        usage_digest = hashlib.sha256(usage).digest()
        expected = self._mac(mac_key, name, head, state_digest, usage_digest)
        # Of a key that there is not there is no MAC: an empty one is nobody's.
        if not expected or not hmac.compare_digest(mac, expected):
            raise lifecycle.tampered(name)
        kind = state_pb2.TenantState if name else state_pb2.SystemState
        return Tenant(
            self._parsed(kind, state, state_digest),
            self._parsed(state_pb2.TenantUsage, usage, usage_digest),
            name,
            head,
            self.now(),
            _raw_usage=usage,
            _state_digest=state_digest,
            mac_key=mac_key,
        )

    def _add_parts(self, tenant: Tenant, asked: Collection[int], rows: Collection[Row]) -> None:
        if not asked:
            return
        states = {one.part: one.digest for one in tenant.state.parts}
        usages = {one.part: one.digest for one in tenant.usage.parts}
        stored = {row[0]: row[1:] for row in rows}
        for number in asked:
            digest = states.get(number)
            if digest is None:
                tenant.parts[number] = Part(state_pb2.PartState(), state_pb2.PartUsage())
                continue
            if sum(row[0] == number for row in rows) != 1:
                raise lifecycle.tampered(tenant.name)
            state, usage = stored[number]
            usage_digest = hashlib.sha256(usage).digest()
            if not (
                hmac.compare_digest(hashlib.sha256(state).digest(), digest)
                and hmac.compare_digest(usage_digest, usages.get(number, b""))
            ):
                raise lifecycle.tampered(tenant.name)
            tenant.parts[number] = Part(
                self._parsed(state_pb2.PartState, state, digest),
                self._parsed(state_pb2.PartUsage, usage, usage_digest),
                state,
                usage,
            )

    def _mac(
        self, key_id: str, name: str, head: Head, state_digest: bytes, usage_digest: bytes
    ) -> bytes:
        message = fields(
            _MAC,
            self._deployment,
            name,
            head.generation,
            head.sequence,
            head.hash,
            state_digest,
            usage_digest,
        )
        key = self._macs.keys.get(key_id)
        return hmac.digest(key, message, "sha256") if key is not None else b""

    def _parsed(self, kind: type[M], raw: bytes, digest: bytes) -> M:
        """Return the message of authenticated bytes; those of the same digest are parsed once."""
        place = kind.DESCRIPTOR.name.encode() + digest
        cached = self._cache.get(place)
        if cached is not None:
            self._cache.move_to_end(place)
            return cast(M, cached[0])  # its place says its kind
        message = kind.FromString(raw)
        self._keep(place, message, len(raw))
        return message

    def _keep(self, place: bytes, message: Message, size: int) -> None:
        if place in self._cache:
            return
        self._cache[place] = message, size
        self._cached += size + 500
        while self._cached > _CACHED_BYTES:
            self._cached -= self._cache.popitem(last=False)[1][1] + 500

    async def _write(
        self, connection: Connection, tenants: Iterable[Tenant | ByokeepError]
    ) -> list[_Done]:
        """Write what was changed of tenants that are locked, with its ciphertexts, and what the
        index of leases is to say; return the heads after it."""
        change, done, closed = sql.Write(), list[_Done](), list[str]()
        for tenant in tenants:
            if not isinstance(tenant, Tenant) or not tenant.events:
                continue
            done.append(self._add(change, tenant))
            closed += tenant.closed
            if tenant.put:
                await sql.put_secrets(connection, tenant.put)
            if tenant.dropped:
                await sql.drop_secrets(connection, tenant.dropped)
            if tenant.ended:
                await index.end(connection, tenant.ended)
        if closed:
            await index.close(connection, closed)
        if done:
            await sql.write(connection, change)
        return done

    def _add(self, change: sql.Write, tenant: Tenant) -> _Done:
        name = tenant.name
        for number, part in tenant.parts.items():
            if part.state_changed or part.usage_changed:
                self._add_part(change, tenant, number, part)
        state_digest, state = tenant._state_digest, None
        if tenant.state_changed:
            state, state_digest = self._serialized(tenant.state)
        usage, usage_digest = tenant._raw_usage, hashlib.sha256(tenant._raw_usage).digest()
        if tenant.usage_changed:
            usage, usage_digest = self._serialized(tenant.usage)
        tenant.events[-1].state_digest = hashlib.sha256(state_digest + usage_digest).digest()
        links = event.links(name, tenant.head, self._deployment, tenant.now, tenant.events)
        head = Head(self._heads.generation, links[-1].sequence, links[-1].hash)
        mac_key = self._macs.current
        mac = self._mac(mac_key, name, head, state_digest, usage_digest)
        own = (state, usage, mac_key, mac, self._due(tenant))
        place = (name, tenant.head.sequence, head.generation, head.sequence, head.hash)
        change.tenants.append((*place, *own))
        change.events += [(name, one.sequence, one.key_id, one.body, one.hash) for one in links]
        for lease in tenant.leased:
            end = datetime.datetime.fromtimestamp(lease.expire_millis / 1_000, datetime.UTC)
            row = (lease.key_id, lease.version, lease.holder, lease.sequence, end)
            change.leases.append((lease.lease_id, name, *row))
        return _Done(tenant, tenant.head, head, [one.body for one in links])

    def _add_part(self, change: sql.Write, tenant: Tenant, number: int, part: Part) -> None:
        """Add a part, and put its digests into the tenant's own state and usage."""
        if part.usage_changed or not part.raw_state:
            part.raw_usage, digest = self._serialized(part.usage)
            own = tenant.edit_usage().parts
            named = next((one for one in own if one.part == number), None) or own.add(part=number)
            named.digest = digest
        if not part.state_changed:
            change.used.append((tenant.name, number, part.raw_usage))
            return
        part.raw_state, digest = self._serialized(part.state)
        kept = [one for one in tenant.edit().parts if one.part != number]
        kept.append(lifecycle.summary(number, part.state, digest))
        del tenant.state.parts[:]
        tenant.state.parts.extend(sorted(kept, key=lambda one: one.part))
        change.parts.append((tenant.name, number, part.raw_state, part.raw_usage))

    def _serialized(self, message: Message) -> tuple[bytes, bytes]:
        raw = message.SerializeToString(deterministic=True)
        digest = hashlib.sha256(raw).digest()
        self._keep(message.DESCRIPTOR.name.encode() + digest, message, len(raw))
        return raw, digest

    def _due(self, tenant: Tenant) -> datetime.datetime | None:
        """Return when the tenant is to be looked at; None where its row says so already: a lease
        changes no indexed column but where it is the only one that lives."""
        first_lease = tenant.leased and len(tenant.usage.leases) == len(tenant.leased)
        if not tenant.name or not (tenant.state_changed or first_lease):
            return None
        return lifecycle.due(tenant.state, tenant.usage, tenant.now, self._shred_after)

    async def _committed(self, done: Iterable[_Done]) -> None:
        """Remember heads that are durable. What is known is looked at again: a database that lied
        about its locks may have let another branch come first."""
        for one in done:
            name = one.tenant.name
            if one.tenant.ends:
                self.ends[name] += 1
            known = self._heads.get(name)
            if (known.sequence, known.hash) != (one.before.sequence, one.before.hash):
                async with self._database.transaction() as connection:
                    if known.covers(one.head) and await leads(connection, name, one.head, known):
                        continue  # the log was faster than the commit's answer
                    await self._heads.admit(connection, name, one.before)
            self._heads.remember(name, one.head, one.bodies)


@dataclass(frozen=True, slots=True)
class _Done:
    """A tenant's change that was written: the heads before and after it, its events."""

    tenant: Tenant
    before: Head
    head: Head
    bodies: list[bytes]


def _copy(message: M) -> M:
    copied = type(message)()
    copied.CopyFrom(message)
    return copied


def _whole(found: Tenant | ByokeepError) -> Tenant:
    if isinstance(found, ByokeepError):
        raise found
    return found


def end_leases(
    tenant: Tenant, key_id: str | None = None, versions: Collection[int] | None = None
) -> int:
    """End a tenant's live leases, or those of a key, or of versions of it; return how many."""
    tenant.ends = True
    ended = 0
    for lease in tenant.edit_usage().leases:
        if lease.ended or (key_id is not None and lease.key_id != key_id):
            continue
        if versions is None or lease.version in versions:
            lease.ended = True
            tenant.ended.append(lease.lease_id)
            ended += 1
    return ended
