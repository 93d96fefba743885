"""The tables of keyvault's database. Alembic's migrations make them; a test holds both together."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)

metadata = MetaData()

#: Ordered by bytes, as Python orders it: the reconcile pass cuts tables into ranges. All text is:
#: an index in one collation serves no join with a column of another.
_TEXT = Text(collation="C")


def _time(name: str, *, nullable: bool = False) -> Column[object]:
    default = None if nullable else func.now()
    return Column(name, DateTime(timezone=True), nullable=nullable, server_default=default)


#: Heads of the audit chains; the row is also the lock under which a tenant changes.
chain = Table(
    "chain",
    metadata,
    Column("chain", _TEXT, primary_key=True),
    Column("sequence", BigInteger, nullable=False, server_default=text("0")),
    Column("hash", LargeBinary, nullable=False),
    # How far the Merkle log has taken it in.
    Column("logged_sequence", BigInteger, nullable=False, server_default=text("0")),
    # Where its retention ends: events up to this one were dropped, and its hash.
    Column("pruned_sequence", BigInteger, nullable=False, server_default=text("0")),
    Column("pruned_hash", LargeBinary),
    # What the log has to look at, without a look at every chain.
    Index("chain_unlogged", "chain", postgresql_where=text("sequence <> logged_sequence")),
)

audit_event = Table(
    "audit_event",
    metadata,
    Column("chain", _TEXT, primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    # For queries alone; what counts is in the body, which the hash covers.
    Column("key_id", _TEXT, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("previous_hash", LargeBinary, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Index("audit_event_key", "chain", "key_id", "sequence"),
)

#: What retention keeps of dropped events: the last state of each key version.
audit_carried = Table(
    "audit_carried",
    metadata,
    Column("chain", _TEXT, primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("body", LargeBinary, nullable=False),
)

#: Leaves of the Merkle log (RFC 6962) of blinded chain heads.
log_leaf = Table(
    "log_leaf",
    metadata,
    Column("index", BigInteger, primary_key=True, autoincrement=False),
    Column("chain", _TEXT, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("blind", LargeBinary, nullable=False),
    # Of that event, which retention may have dropped: the leaf can be checked without it.
    Column("head_hash", LargeBinary, nullable=False),
    Column("leaf_hash", LargeBinary, nullable=False),
    Index("log_leaf_chain", "chain", "sequence"),
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

#: What the reconcile pass had verified, so that a start need not follow every chain again;
#: part 0 holds the MAC over the others.
reconcile_part = Table(
    "reconcile_part",
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

#: What is said of a tenant's KEK before its old versions are trimmed: nothing may be stored
#: under an older one any more. The highest number: the backend's KEK is destroyed whole.
kek_minimum = Table(
    "kek_minimum",
    metadata,
    Column("tenant", _TEXT, primary_key=True),
    Column("backend", _TEXT, primary_key=True),
    Column("version", Integer, nullable=False),
)

#: Rotations, rewraps, migrations and shred sweeps of a tenant: one job each, resumed by whoever
#: looks next.
kek_job = Table(
    "kek_job",
    metadata,
    Column("job_id", _TEXT, primary_key=True),
    Column("tenant", _TEXT, nullable=False),
    Column("request_id", _TEXT, nullable=False),
    Column("caller", _TEXT, nullable=False),
    Column("rotate", Boolean, nullable=False),
    Column("rewrap", Boolean, nullable=False),
    Column("trim", Boolean, nullable=False),
    Column("phase", _TEXT, nullable=False),
    # Nothing is done before; while one process is at it, the others wait until then.
    _time("due_time"),
    # Both are known once the first step is done.
    Column("target_backend", _TEXT, nullable=False, server_default=text("''")),
    Column("target_version", Integer, nullable=False, server_default=text("0")),
    Column("total", BigInteger),
    Column("done", BigInteger, nullable=False, server_default=text("0")),
    Column("failed", BigInteger, nullable=False, server_default=text("0")),
    # Where the pass over the rows stands, and how many passes there were.
    Column("after_key_id", _TEXT, nullable=False, server_default=text("''")),
    Column("after_version", Integer, nullable=False, server_default=text("0")),
    Column("passes", Integer, nullable=False, server_default=text("0")),
    # Where it failed as a whole: an ErrorReason name.
    Column("reason", _TEXT, nullable=False, server_default=text("''")),
    _time("create_time"),
    _time("update_time"),
    _time("end_time", nullable=True),
    UniqueConstraint("tenant", "request_id", name="kek_job_request"),
    Index("kek_job_open", "phase", postgresql_where=text("end_time IS NULL")),
    # A tenant has one sweep waiting, however many keys are destroyed meanwhile.
    Index(
        "kek_job_waiting_sweep",
        "tenant",
        unique=True,
        postgresql_where=text("phase = 'QUEUED' AND caller = 'keyvault'"),
    ),
)

#: Versions whose data key was found not to open, as last seen.
unopened_version = Table(
    "unopened_version",
    metadata,
    Column("tenant", _TEXT, primary_key=True),
    Column("key_id", _TEXT, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("reason", _TEXT, nullable=False),
    # The job that met it, which leaves it alone from then on; NULL: a lease did.
    Column("job_id", _TEXT),
    _time("update_time"),
)

#: Keys of keyvault itself (state MAC, intake signing, audit log), wrapped by the KEK `system`.
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
    # NULL while it is prepared: its public part is given out, and nothing is signed with it.
    _time("activate_time", nullable=True),
)

provider_key = Table(
    "provider_key",
    metadata,
    Column("tenant", _TEXT, primary_key=True),
    Column("key_id", _TEXT, primary_key=True),
    Column("provider", _TEXT, nullable=False),
    Column("owner", _TEXT, nullable=False),
    Column("display_name", _TEXT, nullable=False),
    Column("revision", BigInteger, nullable=False, server_default=text("1")),
    _time("create_time"),
    _time("destroy_time", nullable=True),
    Index(
        "provider_key_name",
        "tenant",
        "provider",
        "owner",
        "display_name",
        unique=True,
        postgresql_where=text("destroy_time IS NULL"),
    ),
)

key_version = Table(
    "key_version",
    metadata,
    Column("tenant", _TEXT, primary_key=True),
    Column("key_id", _TEXT, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("state", SmallInteger, nullable=False),
    Column("state_sequence", BigInteger, nullable=False),
    Column("state_mac", LargeBinary, nullable=False),
    _time("state_time"),
    Column("hint", _TEXT, nullable=False),
    Column("kek_backend", _TEXT, nullable=False),
    Column("kek_version", Integer, nullable=False),
    # All are NULL once the version is destroyed.
    Column("wrapped_dek", LargeBinary),
    Column("wrap_mac", LargeBinary),
    Column("envelope", LargeBinary),
    _time("create_time"),
    ForeignKeyConstraint(["tenant", "key_id"], ["provider_key.tenant", "provider_key.key_id"]),
    # What is SUPERSEDED ends after its grace: looked for every ten seconds.
    Index("key_version_superseded", "state_time", postgresql_where=text("state = 3")),
)

#: KEKs of epochs that were made and not yet destroyed; a backend lists none.
epoch_kek = Table(
    "epoch_kek",
    metadata,
    Column("name", _TEXT, primary_key=True),
    Column("kek_backend", _TEXT, primary_key=True),
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
    # NULL until the key is staged.
    Column("version", Integer),
    _time("create_time"),
    Index("intake_request_actor", "tenant", "actor", "create_time"),
)

#: What was changed by request, so that a retry changes nothing more.
change_request = Table(
    "change_request",
    metadata,
    Column("tenant", _TEXT, primary_key=True),
    Column("key_id", _TEXT, primary_key=True),
    Column("method", _TEXT, primary_key=True),
    Column("request_id", _TEXT, primary_key=True),
    Column("digest", LargeBinary, nullable=False),
    Column("mac", LargeBinary, nullable=False),
    _time("create_time"),
)

lease = Table(
    "lease",
    metadata,
    Column("lease_id", _TEXT, primary_key=True),
    Column("grant_id", _TEXT, nullable=False),
    Column("tenant", _TEXT, nullable=False),
    Column("key_id", _TEXT, nullable=False),
    Column("version", Integer, nullable=False),
    Column("holder", _TEXT, nullable=False),
    Column("attempt_id", _TEXT, nullable=False),
    Column("review_id", _TEXT, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("purpose", SmallInteger, nullable=False),
    _time("issue_time"),
    Column("expire_time", DateTime(timezone=True), nullable=False),
    # A revocation ends a lease; the release, or its lack, closes it.
    _time("end_time", nullable=True),
    _time("release_time", nullable=True),
    Column("outcome", SmallInteger),
    UniqueConstraint("grant_id", name="lease_grant_once"),
    Index("lease_live", "tenant", "key_id", postgresql_where=text("end_time IS NULL")),
    Index("lease_unreleased", "expire_time", postgresql_where=text("release_time IS NULL")),
)

#: What a tenant (key_id "") or a key has used of its lease caps; windows as in `limits`.
lease_meter = Table(
    "lease_meter",
    metadata,
    Column("tenant", _TEXT, primary_key=True),
    Column("key_id", _TEXT, primary_key=True),
    Column("in_flight", BigInteger, nullable=False),
    Column("minute", BigInteger, nullable=False),
    Column("minute_count", BigInteger, nullable=False),
    Column("day", BigInteger, nullable=False),
    Column("day_count", BigInteger, nullable=False),
)

#: Tenants whose leases are, or were, held back; the MAC is over this and the event that set it.
tenant_hold = Table(
    "tenant_hold",
    metadata,
    Column("tenant", _TEXT, primary_key=True),
    Column("held", Boolean, nullable=False),
    Column("state_sequence", BigInteger, nullable=False),
    Column("state_mac", LargeBinary, nullable=False),
    _time("state_time"),
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
