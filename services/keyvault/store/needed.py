"""What stored rows name which KEK backend."""

from __future__ import annotations

from services.keyvault.database import Database, Row

_DATA_KEYS = """
SELECT kek_backend, count(*), count(DISTINCT tenant) FROM key_version
WHERE wrapped_dek IS NOT NULL GROUP BY kek_backend
"""
_SYSTEM_KEYS = "SELECT kek_backend, count(*) FROM system_key GROUP BY kek_backend"


async def data_keys(database: Database) -> list[Row]:
    """Return (backend, data keys, tenants that they are of)."""
    return await database.all(_DATA_KEYS)


async def system_keys(database: Database) -> list[Row]:
    """Return (backend, keys of keyvault itself)."""
    return await database.all(_SYSTEM_KEYS)
