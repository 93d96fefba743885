"""Changes of keys that were carried out, by request id."""

from __future__ import annotations

from services.keyvault.database import Connection, Database

_FIRST = """
INSERT INTO change_request (tenant, request_id, digest) VALUES (%s, %s, %s)
ON CONFLICT DO NOTHING RETURNING digest
"""
_SEEN = "SELECT digest FROM change_request WHERE tenant = %s AND request_id = %s"
_FORGET = "DELETE FROM change_request WHERE create_time < now() - interval '7 days'"


async def earlier(
    connection: Connection, tenant: str, request_id: str, digest: bytes
) -> bytes | None:
    """Note a change in the transaction that makes it; the digest of an earlier one, or None."""
    noted = await connection.execute(_FIRST, (tenant, request_id, digest))
    if await noted.fetchone() is not None:
        return None
    row = await (await connection.execute(_SEEN, (tenant, request_id))).fetchone()
    assert row is not None  # noqa: S101 the insert met it, under the lock of the tenant's chain
    return bytes(row[0])


async def forget(database: Database) -> None:
    """Forget changes older than a week: nobody retries them any more."""
    async with database.transaction() as connection:
        await connection.execute(_FORGET)
