"""Changes of keys that were carried out, by key, method and request id."""

from __future__ import annotations

from dataclasses import dataclass

from services.keyvault.database import Connection, Database

#: Tenant, key id, method, request id.
Name = tuple[str, str, str, str]

_GET = """
SELECT digest, mac FROM change_request
WHERE (tenant, key_id, method, request_id) = (%s, %s, %s, %s)
"""
_PUT = """
INSERT INTO change_request (tenant, key_id, method, request_id, digest, mac)
VALUES (%s, %s, %s, %s, %s, %s)
ON CONFLICT (tenant, key_id, method, request_id)
DO UPDATE SET digest = excluded.digest, mac = excluded.mac, create_time = now()
"""
_FORGET = "DELETE FROM change_request WHERE create_time < now() - interval '7 days'"


@dataclass(frozen=True, slots=True)
class Note:
    """That a request was carried out: the digest of its content, and the MAC of the note."""

    digest: bytes
    mac: bytes


async def get(connection: Connection, name: Name) -> Note | None:
    """Return what is noted of a request."""
    row = await (await connection.execute(_GET, name)).fetchone()
    return None if row is None else Note(*row)


async def put(connection: Connection, name: Name, note: Note) -> None:
    """Note a request, in the transaction that carries it out."""
    await connection.execute(_PUT, (*name, note.digest, note.mac))


async def forget(database: Database) -> None:
    """Forget changes older than a week: nobody retries them any more."""
    async with database.transaction() as connection:
        await connection.execute(_FORGET)
