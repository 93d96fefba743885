"""The tables of keyvault's database. Alembic's migrations make them; a test holds both together."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    func,
    text,
)

metadata = MetaData()

#: Ordered by bytes, as Python orders it. All text is: an index in one collation serves no join with
#: a column of another.
_TEXT = Text(collation="C")


def _time(name: str, *, nullable: bool = False) -> Column[object]:
    default = None if nullable else func.now()
    return Column(name, DateTime(timezone=True), nullable=nullable, server_default=default)


#: A tenant each; '' is the deployment's own. All but `due_time` is under one MAC (see `ledger`).
tenant = Table(
    "tenant",
    metadata,
    Column("name", _TEXT, primary_key=True),
    Column("generation", BigInteger, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("head_hash", LargeBinary, nullable=False),
    Column("state", LargeBinary, nullable=False),
    Column("usage", LargeBinary, nullable=False),
    Column("mac_key_id", _TEXT, nullable=False),
    Column("mac", LargeBinary, nullable=False),
    # When it is to be looked at: a hint, derived anew by whoever looks.
    _time("due_time"),
    Index("tenant_due", "due_time"),
    # A lease writes the row anew: on the same page, where there is room.
    postgresql_with={"fillfactor": 50},
)

#: A tenant's keys, in parts by the first bits of SHA-256(key id); digests are in the tenant's row.
tenant_part = Table(
    "tenant_part",
    metadata,
    Column("tenant", _TEXT, primary_key=True),
    Column("part", Integer, primary_key=True, autoincrement=False),
    Column("state", LargeBinary, nullable=False),
    Column("usage", LargeBinary, nullable=False),
    postgresql_with={"fillfactor": 50},
)

#: Ciphertext of key versions; its digest is in the version's state.
key_secret = Table(
    "key_secret",
    metadata,
    Column("tenant", _TEXT, primary_key=True),
    Column("key_id", _TEXT, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("wrapped_dek", LargeBinary, nullable=False),
    Column("envelope", LargeBinary, nullable=False),
)

#: The audit chains.
event = Table(
    "event",
    metadata,
    Column("tenant", _TEXT, primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    # For queries alone; what counts is in the body, which the hash covers.
    Column("key_id", _TEXT, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Index("event_key", "tenant", "key_id", "sequence"),
)

#: Leaves of the Merkle log (RFC 6962) of blinded heads.
log_leaf = Table(
    "log_leaf",
    metadata,
    Column("index", BigInteger, primary_key=True, autoincrement=False),
    Column("generation", BigInteger, nullable=False),
    Column("tenant", _TEXT, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("head_hash", LargeBinary, nullable=False),
    Column("blind", LargeBinary, nullable=False),
    Column("leaf_hash", LargeBinary, nullable=False),
    Index("log_leaf_tenant", "tenant", "index"),
)

#: Inner nodes of complete subtrees: (level, index) covers the 2^level leaves from index·2^level.
log_node = Table(
    "log_node",
    metadata,
    Column("level", SmallInteger, primary_key=True, autoincrement=False),
    Column("index", BigInteger, primary_key=True, autoincrement=False),
    Column("hash", LargeBinary, nullable=False),
)

#: Signed notes of positions that were anchored.
log_checkpoint = Table(
    "log_checkpoint",
    metadata,
    Column("size", BigInteger, primary_key=True, autoincrement=False),
    Column("note", _TEXT, nullable=False),
    _time("create_time"),
)

#: What was known of the log, so that a start need not read it whole; part 0 authenticates the rest.
log_snapshot = Table(
    "log_snapshot",
    metadata,
    Column("part", Integer, primary_key=True, autoincrement=False),
    Column("data", LargeBinary, nullable=False),
)

#: KEKs of backend `local`, wrapped by a root key of the keyring.
local_kek = Table(
    "local_kek",
    metadata,
    Column("name", _TEXT, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("root_id", _TEXT, nullable=False),
    Column("wrapped", LargeBinary, nullable=False),
)

#: Keys of keyvault itself (state MAC, intake signing, audit log), wrapped by the KEK `system`.
#: Which of them are in use stands in the deployment's own row.
system_key = Table(
    "system_key",
    metadata,
    Column("kind", _TEXT, primary_key=True),
    Column("key_id", _TEXT, primary_key=True),
    Column("kek_backend", _TEXT, nullable=False),
    Column("kek_version", Integer, nullable=False),
    Column("wrapped_dek", LargeBinary, nullable=False),
    Column("envelope", LargeBinary, nullable=False),
    _time("create_time"),
)

#: Data keys that the orchestrator's content keys are derived from, wrapped by their epoch's KEK.
content_key = Table(
    "content_key",
    metadata,
    Column("tenant", _TEXT, primary_key=True),
    Column("epoch", _TEXT, primary_key=True),
    Column("kek_backend", _TEXT, nullable=False),
    Column("kek_version", Integer, nullable=False),
    Column("wrapped_dek", LargeBinary, nullable=False),
    _time("create_time"),
    Index("content_key_epoch", "epoch"),
)

intake_key = Table(
    "intake_key",
    metadata,
    Column("key_id", _TEXT, primary_key=True),
    Column("suite", SmallInteger, nullable=False),
    Column("public", LargeBinary, nullable=False),
    Column("kek_backend", _TEXT, nullable=False),
    Column("kek_version", Integer, nullable=False),
    Column("wrapped_dek", LargeBinary, nullable=False),
    Column("envelope", LargeBinary, nullable=False),
    _time("not_before"),
    Column("not_after", DateTime(timezone=True), nullable=False),
)

#: Sealed keys that came in, for idempotency and limits; never the ciphertext itself.
intake_request = Table(
    "intake_request",
    metadata,
    Column("tenant", _TEXT, primary_key=True),
    Column("request_id", _TEXT, primary_key=True),
    Column("digest", LargeBinary, nullable=False),
    Column("actor", _TEXT, nullable=False),
    Column("key_id", _TEXT, nullable=False),
    # How often it was opened: a repeat of what was refused counts too.
    Column("openings", Integer, nullable=False, server_default=text("1")),
    # Why it was refused for good, or NULL.
    Column("refusal", _TEXT),
    _time("create_time"),
    Index("intake_request_actor", "tenant", "actor", "create_time"),
)

#: Leases that were not closed: an index; what counts stands in their tenants' usage.
lease = Table(
    "lease",
    metadata,
    Column("lease_id", _TEXT, primary_key=True),
    Column("tenant", _TEXT, nullable=False),
    Column("key_id", _TEXT, nullable=False),
    Column("version", Integer, nullable=False),
    Column("holder", _TEXT, nullable=False),
    # Of its LEASED event.
    Column("sequence", BigInteger, nullable=False),
    Column("expire_time", DateTime(timezone=True), nullable=False),
    # A revocation ended it.
    _time("end_time", nullable=True),
    Index("lease_tenant", "tenant"),
    Index("lease_holder", "holder"),
)

#: Leases that ended by revocation, in the order that watchers are told.
revocation = Table(
    "revocation",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=True),
    Column("lease_id", _TEXT, nullable=False),
    Column("holder", _TEXT, nullable=False),
    _time("create_time"),
)
