"""The audit chains: one per tenant, and `system`.

An event is written in the transaction that it describes, under the lock of its
chain's row: if it can't be written, nothing else happens either.

    hash = SHA-256("byokeep/audit/v1\\n" ‖ previous hash ‖ body)

over the body's exact bytes, which are never serialized again.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from byokeep.keyvault.v1 import audit_pb2

from services.common.errors import ByokeepError
from services.keyvault.database import Connection, Row

GENESIS = bytes(32)
SYSTEM = "system"
#: What the names of tenants' chains begin with.
TENANTS = "tenants/"
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_PREFIX = b"byokeep/audit/v1\n"

_CREATE = "INSERT INTO chain (chain, hash) VALUES (%s, %s) ON CONFLICT DO NOTHING"
_LOCK = "SELECT sequence, hash, clock_timestamp() FROM chain WHERE chain = %s FOR UPDATE"
# What stands after a tenant's locked head already, keyvault did not write: it must not keep a key
# from being revoked. Where the head itself was set back, what was followed of the chain tells. Of
# the system chain, which an operator can put right, nothing is overwritten.
_INSTEAD = """
    ON CONFLICT (chain, sequence) DO UPDATE SET (key_id, body, previous_hash, hash)
        = (excluded.key_id, excluded.body, excluded.previous_hash, excluded.hash)
"""
_EVENTS = """
WITH event AS (
    INSERT INTO audit_event (chain, sequence, key_id, body, previous_hash, hash)
    SELECT %(chain)s, * FROM unnest(
        %(sequences)s::bigint[], %(keys)s::text[], %(bodies)s::bytea[],
        %(previous)s::bytea[], %(hashes)s::bytea[]
    )
"""
_HEAD = """
)
UPDATE chain SET sequence = %(sequence)s, hash = %(hash)s WHERE chain = %(chain)s
"""
_APPEND = _EVENTS + _INSTEAD + _HEAD
_APPEND_SYSTEM = _EVENTS + _HEAD

_ITEM_EVENTS = """
, event AS (
    INSERT INTO audit_event (chain, sequence, key_id, body, previous_hash, hash)
    SELECT chain, sequence, key_id, body, previous, hash FROM item
"""
_ITEM_HEADS = """
)
UPDATE chain SET sequence = newest.sequence, hash = newest.hash
FROM (SELECT DISTINCT ON (chain) chain, sequence, hash FROM item
      ORDER BY chain, sequence DESC) AS newest
WHERE chain.chain = newest.chain
"""
#: The end of a statement that writes events of many tenants' locked chains, and those chains' new
#: heads: its common table `item` has the fields of `Link.item`, as ITEM declares them.
RECORD = _ITEM_EVENTS + _INSTEAD + _ITEM_HEADS
ITEM = "chain text, sequence bigint, key_id text, body bytea, previous bytea, hash bytea"


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a chain whose row is locked, and the database's time."""

    chain: str
    sequence: int
    hash: bytes
    now: datetime.datetime


@dataclass(frozen=True, slots=True)
class Link:
    """One event, ready to be stored."""

    sequence: int
    key_id: str
    body: bytes
    previous_hash: bytes
    hash: bytes

    def item(self, chain: str) -> dict[str, object]:
        """Return the fields of a row of `item` (see RECORD), for JSON."""
        return {
            "chain": chain,
            "sequence": self.sequence,
            "key_id": self.key_id,
            "body": "\\x" + self.body.hex(),
            "previous": "\\x" + self.previous_hash.hex(),
            "hash": "\\x" + self.hash.hex(),
        }


def tenant_chain(tenant: str) -> str:
    """Return the name of a tenant's chain."""
    return TENANTS + tenant


def link_hash(previous: bytes, body: bytes) -> bytes:
    """Return the hash of a link."""
    return hashlib.sha256(_PREFIX + previous + body).digest()


def continues(sequence: int, digest: bytes, row: Row) -> bool:
    """Say whether a stored link (sequence, body, previous hash, hash) is the next one after a
    sequence number and its hash."""
    number, body, previous, stated = row
    return (
        number == sequence + 1
        and hmac.compare_digest(previous, digest)
        and hmac.compare_digest(stated, link_hash(previous, body))
    )


async def create(connection: Connection, chain: str) -> None:
    """Start a chain; nothing where it exists."""
    await connection.execute(_CREATE, (chain, GENESIS))


async def lock(connection: Connection, chain: str) -> Head:
    """Lock a chain for this transaction. Raises ByokeepError: TENANT_KEY_MISSING."""
    row = await (await connection.execute(_LOCK, (chain,))).fetchone()
    if row is None:
        raise tenant_key_missing(chain.rpartition("/")[2])
    return Head(chain, *row)


def tenant_key_missing(tenant: str) -> ByokeepError:
    """Return the error for a tenant that has no chain, or no key-encryption key (any more)."""
    return ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "TENANT_KEY_MISSING",
        f"tenant {tenant} has no key-encryption key; an operator creates it; a tenant that was"
        " deleted needs a new name",
        tenant=tenant,
    )


def stamp(time: datetime.datetime) -> tuple[int, int]:
    """Return seconds since 1970 and nanoseconds: the fields of a protobuf Timestamp."""
    # Timestamp.FromDatetime does the same, ten times as slowly.
    since = time - _EPOCH
    return since.days * 86_400 + since.seconds, since.microseconds * 1_000


def link(
    head: Head, deployment: str, events: Sequence[audit_pb2.AuditEvent]
) -> tuple[Head, list[Link]]:
    """Number, stamp and chain events; return the new head and the links to store."""
    sequence, previous, links = head.sequence, head.hash, []
    seconds, nanos = stamp(head.now)
    for event in events:
        sequence += 1
        event.deployment, event.chain, event.sequence = deployment, head.chain, sequence
        event.event_time.seconds, event.event_time.nanos = seconds, nanos
        body = event.SerializeToString(deterministic=True)
        digest = link_hash(previous, body)
        links.append(Link(sequence, event.key_id, body, previous, digest))
        previous = digest
    return Head(head.chain, sequence, previous, head.now), links


def append_parameters(head: Head, links: Sequence[Link]) -> dict[str, object]:
    """Return the parameters of the append statement."""
    return {
        "chain": head.chain,
        "sequence": head.sequence,
        "hash": head.hash,
        "sequences": [one.sequence for one in links],
        "keys": [one.key_id for one in links],
        "bodies": [one.body for one in links],
        "previous": [one.previous_hash for one in links],
        "hashes": [one.hash for one in links],
    }


async def append(
    connection: Connection, head: Head, deployment: str, events: Sequence[audit_pb2.AuditEvent]
) -> Head:
    """Write events to the end of a locked chain; return its new head."""
    if not events:
        return head
    head, links = link(head, deployment, events)
    statement = _APPEND_SYSTEM if head.chain == SYSTEM else _APPEND
    await connection.execute(statement, append_parameters(head, links))
    return head
