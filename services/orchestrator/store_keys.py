"""SQL of what the orchestrator keeps of keys: validations, models, uses, intake counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from byokeep import ids
from byokeep.keyvault.v1 import custody_pb2
from byokeep.names import last_of, provider_id
from google.protobuf.message import Message
from sqlalchemy import select, tuple_, update
from sqlalchemy.dialects.postgresql import insert

from services.orchestrator import sql, store_requests
from services.orchestrator.database import Database, raw
from services.orchestrator.queue import Queue
from services.orchestrator.schema import attempt, key_validation, review


@dataclass(frozen=True, slots=True)
class Validation:
    """The validation of one version, so far."""

    key_id: str
    version: int
    tenant: str
    actor: str
    destroy_previous: bool
    verdict: str
    models: Sequence[str]
    attempts: int
    action: str
    check_time: datetime | None
    retry_time: datetime | None
    create_time: datetime


@dataclass(frozen=True, slots=True)
class Use:
    """One attempt that used a key."""

    attempt_id: str
    kind: str
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


_VALIDATION = [key_validation.c[name] for name in Validation.__dataclass_fields__]


class KeyStore:
    """Validations of key versions, and who used a key."""

    def __init__(self, database: Database, queue: Queue) -> None:
        """Use a database, and the queue that lives in it."""
        self._database = database
        self._queue = queue

    async def count_intake(self, scope: str) -> float:
        """Count one intake in a scope; return how many there were in the last hour, with it."""
        async with self._database.statement() as connection:
            return float(
                (await connection.execute(sql.COUNT_INTAKE, {"scope": scope})).scalar_one()
            )

    async def first_time(self, tenant: str, message: Message) -> bool:
        """Note a request; False if it was before. Raises ByokeepError: REQUEST_ID_CONFLICT."""
        async with self._database.transaction() as connection:
            return await store_requests.first_time(connection, tenant, message)

    async def schedule(
        self,
        tenant: str,
        key: custody_pb2.ProviderKey,
        version: int,
        actor: str,
        *,
        destroy_previous: bool = False,
    ) -> None:
        """Have a staged version validated; nothing if it already is."""
        key_id, attempt_id = last_of(key.name), ids.new_id("att")
        async with self._database.transaction() as connection:
            done = await connection.execute(
                insert(key_validation)
                .values(
                    key_id=key_id,
                    version=version,
                    tenant=tenant,
                    provider=provider_id(key.provider),
                    owner=key.owner,
                    actor=actor,
                    destroy_previous=destroy_previous,
                )
                .on_conflict_do_nothing()
                .returning(key_validation.c.version)
            )
            if done.one_or_none() is None:
                return
            await connection.execute(
                insert(attempt).values(
                    id=attempt_id,
                    kind="VALIDATION",
                    tenant=tenant,
                    key_id=key_id,
                    key_version=version,
                    admitted=True,
                )
            )
            await self._queue.enqueue(await raw(connection), attempt_id)

    async def validations(
        self, tenant: str, versions: Sequence[tuple[str, int]]
    ) -> dict[tuple[str, int], Validation]:
        """Return what is known of a tenant's (key id, version) pairs."""
        if not versions:
            return {}
        query = select(*_VALIDATION).where(
            key_validation.c.tenant == tenant,
            tuple_(key_validation.c.key_id, key_validation.c.version).in_(versions),
        )
        async with self._database.statement() as connection:
            rows = [_validation(row) for row in await connection.execute(query)]
        return {(row.key_id, row.version): row for row in rows}

    async def models(
        self, tenant: str, versions: Sequence[tuple[str, int]]
    ) -> dict[str, list[str]]:
        """Return the models that a tenant's versions can use, by key id, where they are known."""
        found = await self.validations(tenant, versions)
        return {key_id: list(row.models) for (key_id, _), row in found.items()}

    async def unapplied(self) -> list[Validation]:
        """Return verdicts that keyvault was not told of yet."""
        query = select(*_VALIDATION).where(key_validation.c.action != "").limit(100)
        async with self._database.statement() as connection:
            return [_validation(row) for row in await connection.execute(query)]

    async def applied(self, tenant: str, key_id: str, version: int) -> None:
        """Note that keyvault was told of a verdict, and wake who watches the key."""
        async with self._database.transaction() as connection:
            await connection.execute(
                update(key_validation)
                .where(
                    key_validation.c.tenant == tenant,
                    key_validation.c.key_id == key_id,
                    key_validation.c.version == version,
                )
                .values(action="")
            )
            await connection.execute(sql.NOTIFY_KEY, {"key_id": key_id})

    async def changed(self, key_id: str) -> None:
        """Wake who watches a key."""
        async with self._database.statement() as connection:
            await connection.execute(sql.NOTIFY_KEY, {"key_id": key_id})

    async def uses(self, tenant: str, key_id: str, after: str, limit: int) -> list[Use]:
        """Return the attempts that used a key, oldest first."""
        query = (
            select(attempt, review.c.repository, review.c.pull_request)
            .outerjoin(review, review.c.id == attempt.c.review_id)
            .where(attempt.c.tenant == tenant, attempt.c.key_id == key_id, attempt.c.id > after)
            .order_by(attempt.c.id)
            .limit(limit)
        )
        async with self._database.statement() as connection:
            return [_use(row) for row in await connection.execute(query)]


def _validation(row: Any) -> Validation:
    return Validation(*row)


def _use(row: Any) -> Use:
    number = f"#{row.pull_request}" if row.pull_request else ""
    return Use(
        attempt_id=row.id,
        kind=row.kind,
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
    )
