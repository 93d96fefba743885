"""SQL of what a tenant chose for repositories: models and keys by pattern."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from byokeep.orchestrator.v1 import settings_pb2

from services.orchestrator.policy import bounds
from services.orchestrator.policy.keys import RepositoryKey
from services.orchestrator.policy.overrides import Override
from services.orchestrator.policy.refusals import full
from services.orchestrator.store import requests
from services.orchestrator.store.database import Database
from services.orchestrator.store.tenants import TenantRow, bump, read

# Most repositories that are looked at for a pattern that matches none.
_REPOSITORIES: Final = 1000
_OVERRIDES = "SELECT pattern, path_pattern, model FROM model_override WHERE tenant = %(tenant)s"
_SET_OVERRIDE = """
INSERT INTO model_override (tenant, pattern, path_pattern, model)
VALUES (%(tenant)s, %(pattern)s, %(path_pattern)s, %(model)s)
ON CONFLICT ON CONSTRAINT model_override_pkey DO UPDATE SET model = excluded.model
"""
_COUNT_OVERRIDES = """
SELECT count(*) AS overrides, count(*) FILTER (WHERE path_pattern <> '') AS of_paths
FROM model_override WHERE tenant = %(tenant)s
"""
_UNSET_OVERRIDE = """
DELETE FROM model_override
WHERE tenant = %(tenant)s AND pattern = %(pattern)s AND path_pattern = %(path_pattern)s
"""
# Each repository once, however many reviews it has. A pattern's characters are those of LIKE, once
# the shell's are put in their place.
_MATCHING_NONE = """
WITH RECURSIVE known AS (
    (SELECT repository FROM review WHERE tenant = %(tenant)s ORDER BY repository LIMIT 1)
    UNION ALL
    SELECT following.repository FROM known, LATERAL (
        SELECT repository FROM review
        WHERE tenant = %(tenant)s AND repository > known.repository
        ORDER BY repository LIMIT 1) following),
few AS (SELECT repository FROM known LIMIT %(most)s + 1)
SELECT pattern FROM unnest(CAST(%(patterns)s AS text[])) AS pattern
WHERE (SELECT count(*) FROM few) <= %(most)s AND NOT EXISTS (
    SELECT FROM few WHERE repository LIKE replace(replace(replace(
        pattern, '_', '\\_'), '*', '%%'), '?', '_'))
"""
_REPOSITORY_KEYS = """
SELECT pattern, provider, key_id FROM repository_key WHERE tenant = %(tenant)s
ORDER BY pattern, provider
"""
_SET_REPOSITORY_KEY = """
INSERT INTO repository_key (tenant, pattern, provider, key_id)
VALUES (%(tenant)s, %(pattern)s, %(provider)s, %(key_id)s)
ON CONFLICT ON CONSTRAINT repository_key_pkey DO UPDATE SET key_id = excluded.key_id
"""
_COUNT_REPOSITORY_KEYS = """
SELECT count(*) AS patterns FROM repository_key WHERE tenant = %(tenant)s
"""
_UNSET_REPOSITORY_KEY = """
DELETE FROM repository_key WHERE tenant = %(tenant)s AND pattern = %(pattern)s
"""


class ChoiceStore:
    """Models and keys of repositories."""

    def __init__(self, database: Database) -> None:
        """Use a database."""
        self._database = database

    async def overrides(self, tenant_id: str) -> list[Override]:
        """Return a tenant's models for repositories and paths."""
        async with self._database.statement() as session:
            found = await session.all(_OVERRIDES, {"tenant": tenant_id})
        return [Override(*row) for row in found]

    async def matching_none(self, tenant_id: str, patterns: Sequence[str]) -> set[str]:
        """Return the patterns that match the repository of none of the tenant's reviews; none where
        it has too many repositories to look at."""
        parameters = {"tenant": tenant_id, "patterns": list(patterns), "most": _REPOSITORIES}
        async with self._database.statement() as session:
            return {row.pattern for row in await session.all(_MATCHING_NONE, parameters)}

    async def repository_keys(self, tenant_id: str) -> list[RepositoryKey]:
        """Return the keys of a tenant's repositories."""
        async with self._database.statement() as session:
            found = await session.all(_REPOSITORY_KEYS, {"tenant": tenant_id})
        return [RepositoryKey(*row) for row in found]

    async def set_repository_key(
        self, tenant_id: str, provider: str, message: settings_pb2.SetRepositoryKeyRequest
    ) -> TenantRow:
        """Set the key of a repository pattern for a provider, or take all of the pattern away."""
        values = {
            "tenant": tenant_id,
            "pattern": message.repository_pattern,
            "provider": provider,
            "key_id": message.key,
        }
        async with self._database.of_tenant(tenant_id) as session:
            if await requests.first_time(session, tenant_id, message):
                set_or_unset = _SET_REPOSITORY_KEY if message.key else _UNSET_REPOSITORY_KEY
                await session.run(set_or_unset, values)
                await bump(session, tenant_id, {})
                found = await session.one(_COUNT_REPOSITORY_KEYS, values)
                if found.patterns > bounds.OVERRIDES:
                    raise full("repository_pattern", "patterns that have a key", bounds.OVERRIDES)
            return await read(session, tenant_id)

    async def set_override(
        self, tenant_id: str, message: settings_pb2.SetModelOverrideRequest
    ) -> TenantRow:
        """Set the model of a repository pattern, or remove it. Raises ByokeepError: INVALID_FIELD,
        where there are too many."""
        async with self._database.of_tenant(tenant_id) as session:
            if await requests.first_time(session, tenant_id, message):
                values = {
                    "tenant": tenant_id,
                    "pattern": message.repository_pattern,
                    "path_pattern": message.path_pattern,
                    "model": message.model,
                }
                await session.run(_SET_OVERRIDE if message.model else _UNSET_OVERRIDE, values)
                await bump(session, tenant_id, {})
                found = await session.one(_COUNT_OVERRIDES, values)
                if found.overrides > bounds.OVERRIDES:
                    raise full("repository_pattern", "patterns that have a model", bounds.OVERRIDES)
                if found.of_paths > bounds.PATH_OVERRIDES:
                    what = "patterns of paths that have a model"
                    raise full("path_pattern", what, bounds.PATH_OVERRIDES)
            return await read(session, tenant_id)
