"""Which tenants' leases are held back."""

from __future__ import annotations

from services.keyvault.database import Connection, Database

_GET = "SELECT held, state_sequence, state_mac FROM tenant_hold WHERE tenant = %s"
_HELD = "SELECT tenant FROM tenant_hold WHERE held ORDER BY tenant LIMIT %s"
_PUT = """
INSERT INTO tenant_hold (tenant, held, state_sequence, state_mac) VALUES (%s, %s, %s, %s)
ON CONFLICT (tenant) DO UPDATE SET held = excluded.held, state_sequence = excluded.state_sequence,
    state_mac = excluded.state_mac, state_time = now()
"""

#: Held or not, the sequence number of the event that said so, and the MAC over both.
Hold = tuple[bool, int, bytes]


async def get(connection: Connection, tenant: str) -> Hold | None:
    """Return a tenant's hold; None where there never was one."""
    row = await (await connection.execute(_GET, (tenant,))).fetchone()
    return (row[0], row[1], row[2]) if row else None


async def held(database: Database, most: int) -> list[str]:
    """Return the tenants that a row holds back, by name."""
    return [row[0] for row in await database.all(_HELD, (most,))]


async def put(connection: Connection, tenant: str, hold: Hold) -> None:
    """Store a tenant's hold, under the lock of its chain."""
    await connection.execute(_PUT, (tenant, *hold))
