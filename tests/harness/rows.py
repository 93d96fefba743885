"""What somebody with the database's password copies, puts back and edits."""

from __future__ import annotations

from collections.abc import Callable

from byokeep.keyvault.v1 import audit_pb2, state_pb2

from services.keyvault import lifecycle
from services.keyvault.database import Connection, Database
from services.keyvault.ledger import Ledger, Tenant, part_of, secret_digest

#: The tables of a tenant, and the column that has its name.
OF_TENANT = {"tenant": "name", "tenant_part": "tenant", "key_secret": "tenant", "event": "tenant"}
#: Those of the log.
OF_LOG = ("log_leaf", "log_node", "log_checkpoint", "log_snapshot")


class Copy:
    """Rows of some tables, kept to be put back."""

    def __init__(self, tenant: str | None) -> None:
        self._tenant = tenant
        self.rows: dict[str, list[tuple]] = {}

    @classmethod
    async def of(cls, connection: Connection, tenant: str | None = "acme") -> Copy:
        """Copy a tenant's rows; None: those of all tenants, and of the log."""
        made = cls(tenant)
        for table in (*OF_TENANT, *(OF_LOG if tenant is None else ())):
            where, parameters = made._where(table)
            cursor = await connection.execute(f"SELECT * FROM {table} {where}", parameters)
            made.rows[table] = await cursor.fetchall()
        return made

    async def put_back(self, connection: Connection, *tables: str) -> None:
        """Put the rows back in place of what there is; in some of the tables only."""
        for table in tables or self.rows:
            where, parameters = self._where(table)
            await connection.execute(f"DELETE FROM {table} {where}", parameters)
            for row in self.rows[table]:
                places = ", ".join(["%s"] * len(row))
                await connection.execute(f"INSERT INTO {table} VALUES ({places})", row)

    def _where(self, table: str) -> tuple[str, tuple[str, ...]]:
        if self._tenant is None:
            return "", ()
        return f"WHERE {OF_TENANT[table]} = %s", (self._tenant,)


async def copied(database: Database, tenant: str | None = "acme") -> Copy:
    """Copy what is stored of a tenant; None: of all, and of the log."""
    async with database.transaction() as connection:
        return await Copy.of(connection, tenant)


async def put_back(database: Database, copy: Copy, *tables: str) -> None:
    """Put a copy back, at one moment."""
    async with database.transaction() as connection:
        await copy.put_back(connection, *tables)


async def edit_part(
    database: Database, change: Callable[[state_pb2.PartState], None], tenant: str = "acme"
) -> None:
    """Change the stored keys of a tenant whose keys are in one part, without the MAC's key."""
    async with database.transaction() as connection:
        query = "SELECT part, state FROM tenant_part WHERE tenant = %s"
        ((number, raw),) = await (await connection.execute(query, (tenant,))).fetchall()
        part = state_pb2.PartState.FromString(bytes(raw))
        change(part)
        await connection.execute(
            "UPDATE tenant_part SET state = %s WHERE tenant = %s AND part = %s",
            (part.SerializeToString(deterministic=True), tenant, number),
        )


async def store(
    ledger: Ledger, place: tuple[str, str, int], wrapped: bytes, envelope: bytes
) -> None:
    """Store a ciphertext as a version's own, in its state too: for what is behind that."""
    tenant, key_id, number = place

    def put(found: Tenant) -> None:
        found.put[place] = wrapped, envelope
        version = lifecycle.version_of(found.edit_key(key_id), number)
        version.secret_digest = secret_digest(wrapped, envelope)
        found.events.append(audit_pb2.AuditEvent(type=audit_pb2.AUDIT_EVENT_TYPE_REWRAPPED))

    await ledger.change(tenant, put, {part_of(key_id)})
