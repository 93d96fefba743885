"""SQL of looks at a key that serves: whether its provider still takes it, and for which models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final

from byokeep import ids

from services.orchestrator.store.database import Session

# Nobody runs it while one is open; the row of the pause or the tenant, locked before, orders who
# asks.
_CHECK_KEY: Final = """
    WITH known AS (
        INSERT INTO key_validation (key_id, version, tenant, provider, owner, actor)
        VALUES (%(key_id)s, %(version)s, %(tenant)s, %(provider)s, %(owner)s, %(actor)s)
        ON CONFLICT (tenant, key_id, version) DO UPDATE SET fence = key_validation.fence + 1
        RETURNING fence)
    INSERT INTO attempt (id, kind, tenant, key_id, key_version, number, fence)
    SELECT %(check_id)s, 'CHECK', %(tenant)s, %(key_id)s, %(version)s, fence, fence FROM known
    RETURNING pg_notify('byokeep_due', '')"""

_CHECK_OPEN: Final = """
    SELECT FROM attempt WHERE tenant = %(tenant)s AND key_id = %(key_id)s AND kind = 'CHECK'
        AND state IN ('QUEUED', 'RUNNING')"""


@dataclass(frozen=True)
class Asked:
    """A version of a key that its provider is asked about; `owner` is whose key it is."""

    tenant: str
    key_id: str
    version: int
    provider: str
    owner: str
    actor: str


async def ask(session: Session, asked: Asked) -> None:
    """Have the provider asked about a version of a key, unless it is being asked."""
    if not await is_open(session, asked.tenant, asked.key_id):
        await session.run(_CHECK_KEY, asdict(asked) | {"check_id": ids.new_id("att")})


async def is_open(session: Session, tenant: str, key_id: str) -> bool:
    """Whether a provider is being asked about a key that serves."""
    return await session.one(_CHECK_OPEN, {"tenant": tenant, "key_id": key_id}) is not None
