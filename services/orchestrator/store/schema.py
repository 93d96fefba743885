"""The orchestrator's tables. Migrations build them; a test compares the two.

No table has a column for a provider key, token usage or cost; what customers write and models
answer stands in three columns, encrypted. States, plans, verdicts and
failures stand as the short names of their proto enums.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    ForeignKey,
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
from sqlalchemy.dialects.postgresql import ARRAY

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    }
)


def _text(name: str, *, default: str | None = "") -> Column[str]:
    server_default = None if default is None else text(f"'{default}'")
    return Column(name, Text, nullable=False, server_default=server_default)


def _texts(name: str) -> Column[list[str]]:
    return Column(name, ARRAY(Text), nullable=False, server_default=text("'{}'"))


def _count(name: str) -> Column[int]:
    return Column(name, Integer, nullable=False, server_default=text("0"))


def _created(name: str = "create_time") -> Column[object]:
    return Column(name, DateTime(timezone=True), nullable=False, server_default=func.now())


def _time(name: str) -> Column[object]:
    return Column(name, DateTime(timezone=True))


def _flag(name: str) -> Column[bool]:
    return Column(name, Boolean, nullable=False, server_default=text("false"))


def _tenant() -> Column[str]:
    return Column("tenant", Text, ForeignKey("tenant.id"), nullable=False)


def _tenant_key() -> Column[str]:
    return Column("tenant", Text, ForeignKey("tenant.id"), primary_key=True)


def _review_key() -> Column[str]:
    return Column("review_id", Text, ForeignKey("review.id", ondelete="CASCADE"), primary_key=True)


tenant = Table(
    "tenant",
    metadata,
    Column("id", Text, primary_key=True),
    _text("state", default="ACTIVE"),
    _text("plan", default=None),
    _text("default_model"),
    _count("max_diff_bytes"),
    _count("max_calls_per_review"),
    _count("max_calls_per_day"),
    Column("max_reviews_per_day", BigInteger, nullable=False, server_default=text("0")),
    # Sources of keys in order, by the short names of KeySource; empty: as it always was.
    _texts("key_order"),
    # Reviews run on keys that the operator brought for the tenant, and on no others.
    _flag("managed_keys"),
    # provider/model, in the order in which they are taken.
    _texts("fallback_models"),
    _flag("keep_superseded"),
    _flag("retry_ambiguous"),
    _time("delete_time"),
    # It is DELETED, and nothing but this row is left of it.
    _flag("erased"),
    _count("settings_version"),
    _created(),
)

Index(
    "tenant_unerased_idx",
    tenant.c.delete_time,
    postgresql_where=text("state = 'DELETED' AND NOT erased"),
)

caller = Table(
    "caller",
    metadata,
    _tenant_key(),
    Column("spiffe_id", Text, primary_key=True),
    Column("roles", ARRAY(SmallInteger), nullable=False),
    _flag("may_assert_users"),
)
Index(None, caller.c.spiffe_id)

model_override = Table(
    "model_override",
    metadata,
    _tenant_key(),
    Column("pattern", Text, primary_key=True),
    Column("path_pattern", Text, primary_key=True, server_default=text("''")),
    _text("model", default=None),
)

repository_key = Table(
    "repository_key",
    metadata,
    _tenant_key(),
    Column("pattern", Text, primary_key=True),
    Column("provider", Text, primary_key=True),
    _text("key_id", default=None),
)

request = Table(
    "request",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("method", Text, primary_key=True),
    # The request id; for SubmitReview with what else makes it the same submission.
    Column("scope", Text, primary_key=True),
    Column("digest", LargeBinary, nullable=False),
    _text("resource"),
    _created(),
)
Index(None, request.c.create_time)

rate_bucket = Table(
    "rate_bucket",
    metadata,
    Column("scope", Text, primary_key=True),
    Column("hour", DateTime(timezone=True), primary_key=True),
    _count("events"),
)

key_validation = Table(
    "key_validation",
    metadata,
    # A client chooses its keys' ids: another tenant may have the same.
    _tenant_key(),
    Column("key_id", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    _text("provider", default=None),
    _text("owner"),
    # As keyvault redacted it.
    _text("hint"),
    _text("actor", default=None),
    _flag("destroy_previous"),
    _text("verdict", default="UNSPECIFIED"),
    # What was unreachable, where the verdict is UNREACHABLE.
    _text("cause"),
    _texts("models"),
    _count("attempts"),
    # What keyvault is still to be told: PROMOTE, DESTROY, or nothing.
    _text("action"),
    Column("fence", BigInteger, nullable=False, server_default=text("1")),
    _time("check_time"),
    _time("retry_time"),
    _created(),
)
Index(
    "key_validation_action_idx",
    key_validation.c.check_time,
    postgresql_where=key_validation.c.action != "",
)

review = Table(
    "review",
    metadata,
    Column("id", Text, primary_key=True),
    _tenant(),
    _text("state", default="QUEUED"),
    _text("repository", default=None),
    Column("pull_request", BigInteger, nullable=False, server_default=text("0")),
    _text("head_commit"),
    _text("model", default=None),
    # The settings' choice, where another took its place, and why: a short name of ModelFallback.
    _text("chosen_model"),
    _text("model_fallback"),
    # What is left of the tenant's, of that provider, as they were when it was submitted.
    _texts("fallback_models"),
    # The model that the diff is divided for, where chunks were done on another than `model`.
    _text("plan_model"),
    _text("key_id", default=None),
    # Whose key that is; `owner` is the user who submitted it.
    _text("key_owner"),
    # Whether the submitter named the key: a retry stays on it then.
    _flag("named_key"),
    _text("owner"),
    _text("actor", default=None),
    _text("failure"),
    _text("failure_message"),
    # The review of a newer head commit that took its place.
    _text("superseded_by"),
    _count("max_calls"),
    _count("calls_started"),
    _count("ambiguous_calls"),
    _count("chunks_done"),
    _count("chunks_total"),
    _count("finding_count"),
    _count("dropped_findings"),
    _count("unread_count"),
    _count("skipped_count"),
    # A serialized Review with its unread parts and skipped files alone, sealed; NULL where there
    # are none.
    Column("unread", LargeBinary),
    # The newest start's fence: an attempt that is put back and started again gets another.
    Column("fence", BigInteger, nullable=False, server_default=text("1")),
    Column("attempts", Integer, nullable=False, server_default=text("1")),
    # 0: interactive, 1: batch.
    Column("priority", SmallInteger, nullable=False, server_default=text("0")),
    # W3C traceparent of its submission; its attempts go on in that trace.
    _text("trace_parent"),
    Column("version", BigInteger, nullable=False, server_default=text("1")),
    _created(),
    _time("start_time"),
    _time("end_time"),
)
Index(None, review.c.tenant, review.c.id)
Index(None, review.c.tenant, review.c.repository, review.c.pull_request, review.c.id)
Index(None, review.c.end_time)

review_content = Table(
    "review_content",
    metadata,
    _review_key(),
    # A serialized ReviewInput (diff, title, description, guidance, context files), sealed:
    # content.py.
    Column("input", LargeBinary, nullable=False),
)

attempt = Table(
    "attempt",
    metadata,
    Column("id", Text, primary_key=True),
    _text("kind", default=None),
    _tenant(),
    Column("review_id", Text, ForeignKey("review.id", ondelete="CASCADE")),
    _text("key_id", default=None),
    Column("key_version", Integer, nullable=False),
    # Its place among the attempts of its review or validation, from 1.
    Column("number", Integer, nullable=False, server_default=text("1")),
    # The fencing token: rises with every start of any attempt of its review.
    Column("fence", BigInteger, nullable=False, server_default=text("1")),
    # Since the submission or the last RetryReview: what the retry budget counts.
    Column("tries", Integer, nullable=False, server_default=text("1")),
    _text("state", default="QUEUED"),
    Column("priority", SmallInteger, nullable=False, server_default=text("0")),
    # Why it waits, or waited last, and since when: kept while it runs, so that the same reason
    # goes on where it began.
    _text("wait_reason"),
    _text("wait_cause"),
    _time("wait_since"),
    # Since when it waits, for whatever reasons, without a chunk done in between; NULL: it does not.
    _time("stalled_since"),
    _text("failure"),
    # What was unreachable, where the provider was.
    _text("cause"),
    # The runner that has its child; empty before a call is about to be made.
    _text("runner_id"),
    _text("lease_id"),
    _count("process_id"),
    # Of the prompt that its calls send.
    _text("prompt_version"),
    _count("calls_started"),
    # Bytes so far of the answer to its open call, some seconds old.
    Column("answer_bytes", BigInteger, nullable=False, server_default=text("0")),
    # How often it was taken over from a worker that had fallen silent: only the last one writes.
    _count("turn"),
    _time("open_time"),
    _time("close_time"),
    _created(),
    Column("due_time", DateTime(timezone=True), nullable=False, server_default=func.now()),
    _time("start_time"),
    _time("heartbeat_time"),
    _time("end_time"),
)
Index(None, attempt.c.review_id)
Index(None, attempt.c.tenant, attempt.c.key_id, attempt.c.id)
# Retention; those of reviews go with them.
Index(
    "attempt_key_end_idx",
    attempt.c.end_time,
    postgresql_where=text("kind <> 'REVIEW'"),
)
# Who is next: lane by lane (tenant, key, priority), and in each by time.
Index(
    "attempt_lane_idx",
    attempt.c.tenant,
    attempt.c.key_id,
    attempt.c.priority,
    attempt.c.due_time,
    postgresql_where=text("state = 'QUEUED' AND kind = 'REVIEW'"),
)
Index(
    "attempt_key_check_idx",
    attempt.c.due_time,
    postgresql_where=text("state = 'QUEUED' AND kind <> 'REVIEW'"),
)
Index(
    "attempt_check_idx",
    attempt.c.tenant,
    attempt.c.key_id,
    attempt.c.id,
    postgresql_where=text("kind = 'CHECK'"),
)
Index(
    "attempt_running_idx",
    attempt.c.tenant,
    attempt.c.heartbeat_time,
    postgresql_where=text("state = 'RUNNING'"),
)
Index(
    "attempt_waiting_idx",
    attempt.c.stalled_since,
    postgresql_where=text("state = 'QUEUED' AND stalled_since IS NOT NULL"),
)
Index(
    "attempt_open_idx",
    attempt.c.tenant,
    attempt.c.id,
    postgresql_where=attempt.c.state.in_(["QUEUED", "RUNNING"]),
)

provider_call = Table(
    "provider_call",
    metadata,
    Column("attempt_id", Text, ForeignKey("attempt.id", ondelete="CASCADE"), primary_key=True),
    Column("call_number", Integer, primary_key=True),
    _text("chunk_id"),
    _created("start_time"),
    _time("finish_time"),
    _flag("ambiguous"),
)

chunk_done = Table(
    "chunk_done",
    metadata,
    _review_key(),
    Column("chunk_id", Text, primary_key=True),
    _text("attempt_id", default=None),
    # Its place among the chunks that are done, from 1: that of the diff, whose order they go in.
    _count("position"),
    # A serialized Review with the chunk's findings alone, sealed; NULL where there are none.
    Column("findings", LargeBinary),
)

# Attempts that wait together: of a key, of a tenant (no key), or of all (neither).
pause = Table(
    "pause",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("key_id", Text, primary_key=True),
    Column("reason", Text, primary_key=True),
    Column("since", DateTime(timezone=True), nullable=False, server_default=func.now()),
    # 'infinity' where an event ends it.
    Column("until", DateTime(timezone=True), nullable=False),
)

# Up to when a tenant's retries are booked, at the pace of its budget.
retry_budget = Table(
    "retry_budget",
    metadata,
    _tenant_key(),
    Column("booked", DateTime(timezone=True), nullable=False),
)

# When a tenant was given a place last: among tenants that wait, the longest ago is next.
turn = Table(
    "turn",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("served", DateTime(timezone=True), nullable=False, server_default=text("'-infinity'")),
    # Not worth a look before; 'infinity' where nothing waits. A trigger of `attempt` calls for a
    # look, and says in which transaction: whoever found nothing says so only of what was there.
    Column("due", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("called", BigInteger, nullable=False, server_default=text("0")),
)
Index("turn_due_idx", turn.c.served, turn.c.tenant, postgresql_where=text("due < 'infinity'"))
