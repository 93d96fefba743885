"""What is stored of one tenant, as an attacker copies it and puts it back."""

from __future__ import annotations

from typing import Any, Final

from deploy.local.prove.attacker import Attacker

#: Tables, and the column that names the tenant.
_TABLES: Final = {
    "tenant": "name",
    "tenant_part": "tenant",
    "key_secret": "tenant",
    "event": "tenant",
}


class Backup:
    """A tenant's row, keys, ciphertext and audit chain as they were."""

    def __init__(self, attacker: Attacker, tenant: str) -> None:
        """Copy them now."""
        self._attacker = attacker
        self._tenant = tenant
        self._rows: dict[str, list[tuple[Any, ...]]] = {
            table: attacker.sql(f"SELECT * FROM {table} WHERE {column} = %s", tenant)  # noqa: S608
            for table, column in _TABLES.items()
        }

    def put_back(self, *tables: str) -> None:
        """Put all of it back in one transaction; of some tables only."""
        connect = self._attacker.stack.postgres.connect
        with connect("keyvault") as session, session.transaction():
            for table in tables or _TABLES:
                gone = f"DELETE FROM {table} WHERE {_TABLES[table]} = %s"  # noqa: S608
                session.execute(gone.encode(), (self._tenant,))
                for row in self._rows[table]:
                    values = f"({', '.join(['%s'] * len(row))})"
                    session.execute(f"INSERT INTO {table} VALUES {values}".encode(), row)  # noqa: S608
