"""SQL of what the orchestrator keeps of keys: validations, models, uses, intake counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from byokeep import ids
from byokeep.keyvault.v1 import custody_pb2
from byokeep.names import last_of, provider_id
from byokeep.orchestrator.v1 import key_pb2

from services.common.models import MAX_LISTED, Listing
from services.orchestrator.policy import bounds
from services.orchestrator.policy.keys import hint_of
from services.orchestrator.policy.models import KeyModels
from services.orchestrator.policy.refusals import deleted
from services.orchestrator.policy.states import Action, AttemptKind, Verdict
from services.orchestrator.store import checks, requests
from services.orchestrator.store.database import Database, Row, Session
from services.orchestrator.store.tenants import is_deleted


@dataclass(frozen=True, slots=True)
class Validation:
    """The validation of one version, so far."""

    key_id: str
    version: int
    tenant: str
    actor: str
    destroy_previous: bool
    verdict: Verdict
    cause: str
    models: Sequence[str]
    attempts: int
    action: Action
    check_time: datetime | None
    retry_time: datetime | None
    create_time: datetime


@dataclass(frozen=True, slots=True)
class Check:
    """The newest look at a version that serves; `failure` is empty where the provider was asked."""

    open: bool
    end_time: datetime | None
    failure: str
    cause: str


@dataclass(frozen=True, slots=True)
class Use:
    """One attempt that used a key."""

    attempt_id: str
    kind: AttemptKind
    number: int
    fence: int
    review_id: str
    label: str
    key_version: int
    lease_id: str
    process_id: int
    open_time: datetime | None
    close_time: datetime | None
    state: str
    calls_started: int
    failure: str
    cause: str


@dataclass(frozen=True, slots=True)
class ModelsOf:
    """A key whose models are asked for; `default` stands for them where they are not known."""

    key_id: str
    version: int
    provider: str
    default: str


@dataclass(frozen=True, slots=True)
class UsableModel:
    """A model, how many keys can use it, and some of those."""

    model: str
    key_count: int
    key_ids: Sequence[str]


_COLUMNS = """
SELECT key_id, version, tenant, actor, destroy_previous, verdict, cause, models, attempts, action,
    check_time, retry_time, create_time
FROM key_validation
"""
_OF_VERSIONS = f"""
{_COLUMNS} WHERE tenant = %(tenant)s AND (key_id, version) IN (
    SELECT * FROM unnest(%(keys)s::text[], %(versions)s::int[]))
"""  # noqa: S608 - constants
# A list that has the model, was cut or is not known stays where it is: most submissions read none.
_LIST_WITHOUT = """
SELECT models, check_time FROM key_validation
WHERE tenant = %(tenant)s AND key_id = %(key_id)s AND version = %(version)s
    AND cardinality(models) BETWEEN 1 AND %(most)s AND %(model)s <> ALL (models)
"""
_ASKED = """
unnest(%(keys)s::text[], %(versions)s::int[], %(providers)s::text[], %(defaults)s::text[])
        AS key (id, version, provider, model)
    LEFT JOIN key_validation known ON known.tenant = %(tenant)s AND known.key_id = key.id
        AND known.version = key.version
"""
_MODELS = f"""
SELECT model, count(*), (array_agg(id ORDER BY id))[:%(named)s] FROM (
    SELECT (key.provider || '/' || coalesce(listed.model, key.model)) COLLATE "C" AS model, key.id
    FROM {_ASKED} LEFT JOIN LATERAL unnest(known.models[:%(most)s]) AS listed (model) ON true) one
WHERE model > %(after)s GROUP BY model ORDER BY model LIMIT %(limit)s
"""  # noqa: S608 - constants
_MODELS_CUT = f"""
SELECT coalesce(bool_or(cardinality(known.models) > %(most)s), false) AS cut FROM {_ASKED}
"""  # noqa: S608
_UNAPPLIED = _COLUMNS + "WHERE action <> '' LIMIT 100"
_SCHEDULE = """
INSERT INTO key_validation
    (key_id, version, tenant, provider, owner, hint, actor, destroy_previous)
VALUES (%(key_id)s, %(version)s, %(tenant)s, %(provider)s, %(owner)s, %(hint)s, %(actor)s,
    %(destroy_previous)s)
ON CONFLICT DO NOTHING RETURNING version
"""
_ATTEMPT = """
INSERT INTO attempt (id, kind, tenant, key_id, key_version)
VALUES (%(id)s, 'VALIDATION', %(tenant)s, %(key_id)s, %(version)s)
RETURNING pg_notify('byokeep_due', '')
"""
_CHECK = """
SELECT state IN ('QUEUED', 'RUNNING') AS open, end_time, failure, cause FROM attempt
WHERE tenant = %(tenant)s AND key_id = %(key_id)s AND kind = 'CHECK' AND key_version = %(version)s
ORDER BY id DESC LIMIT 1
"""
# Each key at another hour, so that those of one morning are not all asked the next.
_OUTDATED = """
SELECT used.tenant, used.key_id FROM (
    SELECT DISTINCT tenant, key_id FROM review WHERE end_time > now() - interval '10 minutes') used
WHERE (
    SELECT max(check_time) FROM key_validation known
    WHERE known.tenant = used.tenant AND known.key_id = used.key_id
    ) < now() - make_interval(hours => 24, mins => abs(hashtext(used.key_id) %% 240))
    AND NOT EXISTS (
        SELECT FROM attempt
        WHERE attempt.tenant = used.tenant AND attempt.key_id = used.key_id AND kind = 'CHECK'
            AND create_time > now() - interval '24 hours')
LIMIT %(limit)s
"""
_APPLIED = """
UPDATE key_validation SET action = ''
WHERE tenant = %(tenant)s AND key_id = %(key_id)s AND version = %(version)s
"""
_COUNT_INTAKE = """
    WITH now_hour AS (
        INSERT INTO rate_bucket (scope, hour, events)
        VALUES (%(scope)s, date_trunc('hour', now()), 1)
        ON CONFLICT (scope, hour) DO UPDATE SET events = rate_bucket.events + 1
        RETURNING events)
    SELECT now_hour.events + coalesce((
        -- The hour before counts by the part of it that lies within the last 60 minutes.
        SELECT events * extract(epoch FROM hour + interval '2 hours' - now()) / 3600
        FROM rate_bucket
        WHERE scope = %(scope)s AND hour = date_trunc('hour', now()) - interval '1 hour'), 0)
    FROM now_hour"""
_NOTIFY_KEY = "SELECT pg_notify('byokeep_key', %(key_id)s)"
_USES = """
SELECT attempt.id, attempt.kind, attempt.number, attempt.fence, attempt.review_id,
    attempt.key_version, attempt.lease_id, attempt.process_id, attempt.open_time,
    attempt.close_time, attempt.state, attempt.calls_started, attempt.failure, attempt.cause,
    review.repository, review.pull_request
FROM attempt LEFT JOIN review ON review.id = attempt.review_id
WHERE attempt.tenant = %(tenant)s AND attempt.key_id = %(key_id)s AND attempt.id > %(after)s
ORDER BY attempt.id LIMIT %(limit)s
"""


class KeyStore:
    """Validations of key versions, and who used a key."""

    def __init__(self, database: Database) -> None:
        """Use a database."""
        self._database = database

    async def count_intake(self, scope: str) -> float:
        """Count one intake in a scope; return how many there were in the last hour, with it."""
        async with self._database.statement() as session:
            (count,) = await session.one(_COUNT_INTAKE, {"scope": scope})
        return float(count)

    async def schedule(
        self,
        tenant: str,
        key: custody_pb2.ProviderKey,
        version: int,
        actor: str,
        *,
        destroy_previous: bool = False,
    ) -> bool:
        """Have a staged version validated, once; False where its tenant is deleted by now."""
        key_id, attempt_id = last_of(key.name), ids.new_id("att")
        values = {
            "key_id": key_id,
            "version": version,
            "tenant": tenant,
            "provider": provider_id(key.provider),
            "owner": key.owner,
            "hint": hint_of(key, version),
            "actor": actor,
            "destroy_previous": destroy_previous,
        }
        async with self._database.of_tenant(tenant) as session:
            if await is_deleted(session, tenant):
                return False
            if await session.one(_SCHEDULE, values) is not None:
                await session.run(_ATTEMPT, values | {"id": attempt_id})
        return True

    async def check(
        self,
        message: key_pb2.CheckKeyRequest,
        tenant: str,
        key: custody_pb2.ProviderKey,
        actor: str,
    ) -> None:
        """Have the provider asked about the version that serves, unless it is being asked.

        Raises ByokeepError: REQUEST_ID_CONFLICT, and WRONG_STATE of a deleted tenant.
        """
        async with self._database.of_tenant(tenant) as session:
            # Orders who asks; and the tenant's deletion erases what it finds.
            if await is_deleted(session, tenant):
                raise deleted()
            if await requests.first_time(session, tenant, message):
                await _ask(session, tenant, key, actor)

    async def outdated(self, limit: int) -> list[tuple[str, str]]:
        """Return some (tenant, key id) whose reviews ended lately, and whose provider has not been
        asked for a day or some hours more, nor was in vain."""
        async with self._database.statement() as session:
            found = await session.all(_OUTDATED, {"limit": limit})
        return [(row.tenant, row.key_id) for row in found]

    async def refresh(self, tenant: str, key: custody_pb2.ProviderKey, actor: str) -> None:
        """Have the provider asked about the version that serves, though nobody asked for it."""
        async with self._database.of_tenant(tenant) as session:
            if not await is_deleted(session, tenant):
                await _ask(session, tenant, key, actor)

    async def newest_check(self, tenant: str, key: custody_pb2.ProviderKey) -> Check | None:
        """Return the newest look at the version of a key that serves."""
        values = {"tenant": tenant, "key_id": last_of(key.name), "version": key.active_version}
        async with self._database.statement() as session:
            row = await session.one(_CHECK, values)
        return None if row is None else Check(*row)

    async def validations(
        self, tenant: str, versions: Sequence[tuple[str, int]]
    ) -> dict[tuple[str, int], Validation]:
        """Return what is known of a tenant's (key id, version) pairs."""
        if not versions:
            return {}
        parameters = {
            "tenant": tenant,
            "keys": [key_id for key_id, _ in versions],
            "versions": [version for _, version in versions],
        }
        async with self._database.statement() as session:
            rows = [_validation(row) for row in await session.all(_OF_VERSIONS, parameters)]
        return {(row.key_id, row.version): row for row in rows}

    async def models_page(
        self, tenant: str, keys: Sequence[ModelsOf], after: str, limit: int
    ) -> tuple[list[UsableModel], bool]:
        """Return the models that keys can use, by name from after one on, and whether some key's
        provider lists more than are kept."""
        parameters = {
            "tenant": tenant,
            "keys": [key.key_id for key in keys],
            "versions": [key.version for key in keys],
            "providers": [key.provider for key in keys],
            "defaults": [key.default for key in keys],
            "most": MAX_LISTED,
            "named": bounds.KEYS_OF_MODEL,
            "after": after,
            "limit": limit,
        }
        async with self._database.statement() as session:
            found = await session.all(_MODELS, parameters)
            cut = (await session.one(_MODELS_CUT, parameters)).cut
        return [UsableModel(*row) for row in found], bool(cut)

    async def models(self, tenant: str, keys: Sequence[custody_pb2.ProviderKey]) -> list[KeyModels]:
        """Return what is known of the models that the active versions of keys can use. Of each
        provider the lists of a few keys are read: of the others nothing is known."""
        read: Counter[int] = Counter()
        versions = []
        for key in keys:
            read[key.provider] += 1
            if read[key.provider] <= bounds.LISTS:
                versions.append((last_of(key.name), key.active_version))
        found = await self.validations(tenant, versions)
        known = []
        for key in keys:
            row = found.get((last_of(key.name), key.active_version))
            models = () if row is None else (row.models, row.check_time)
            known.append(KeyModels(last_of(key.name), provider_id(key.provider), *models))
        return known

    async def list_without(
        self, tenant: str, key: custody_pb2.ProviderKey, model: str
    ) -> KeyModels | None:
        """Return the list of models of a key's active version, where it is whole and lacks one."""
        parameters = {
            "tenant": tenant,
            "key_id": last_of(key.name),
            "version": key.active_version,
            "model": model,
            "most": MAX_LISTED,
        }
        async with self._database.statement() as session:
            row = await session.one(_LIST_WITHOUT, parameters)
        if row is None or model in Listing(row.models):
            return None
        return KeyModels(last_of(key.name), provider_id(key.provider), row.models, row.check_time)

    async def unapplied(self) -> list[Validation]:
        """Return verdicts that keyvault was not told of yet."""
        async with self._database.statement() as session:
            return [_validation(row) for row in await session.all(_UNAPPLIED)]

    async def applied(self, tenant: str, key_id: str, version: int) -> None:
        """Note that keyvault was told of a verdict, and wake who watches the key."""
        values = {"tenant": tenant, "key_id": key_id, "version": version}
        async with self._database.transaction() as session:
            await session.run(_APPLIED, values)
            await session.run(_NOTIFY_KEY, values)

    async def changed(self, key_id: str) -> None:
        """Wake who watches a key."""
        async with self._database.statement() as session:
            await session.run(_NOTIFY_KEY, {"key_id": key_id})

    async def uses(self, tenant: str, key_id: str, after: str, limit: int) -> list[Use]:
        """Return the attempts that used a key, oldest first."""
        parameters = {"tenant": tenant, "key_id": key_id, "after": after, "limit": limit}
        async with self._database.statement() as session:
            return [_use(row) for row in await session.all(_USES, parameters)]


async def _ask(session: Session, tenant: str, key: custody_pb2.ProviderKey, actor: str) -> None:
    asked = checks.Asked(
        tenant, last_of(key.name), key.active_version, provider_id(key.provider), key.owner, actor
    )
    await checks.ask(session, asked)


def _validation(row: Row) -> Validation:
    states = {"verdict": Verdict(row.verdict), "action": Action(row.action)}
    return Validation(**row._asdict() | states)


def _use(row: Row) -> Use:
    number = f"#{row.pull_request}" if row.pull_request else ""
    return Use(
        attempt_id=row.id,
        kind=AttemptKind(row.kind),
        number=row.number,
        fence=row.fence,
        review_id=row.review_id or "",
        label=f"{row.repository or ''}{number}",
        key_version=row.key_version,
        lease_id=row.lease_id,
        process_id=row.process_id,
        open_time=row.open_time,
        close_time=row.close_time,
        state=row.state,
        calls_started=row.calls_started,
        failure=row.failure,
        cause=row.cause,
    )
