"""Brings the database to the newest schema, and makes what must exist before a first start."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any, Final

from services.common import postgres
from services.common.waiting import until_there
from services.keyvault import system_keys
from services.keyvault.config import Settings
from services.keyvault.database import Database
from services.keyvault.kek.configured import open_anchor, open_backends, open_signer
from services.keyvault.server import not_yet

_CERTIFICATE: Final = re.compile(
    r"-----BEGIN CERTIFICATE-----\n.+?\n-----END CERTIFICATE-----\n?", re.DOTALL
)
_SCRIPTS = Path(__file__).parent / "migrations"
# Vault may start together with us.
_WAIT_SECONDS = 30.0
_LOCK = 7_316_530_021  # of our own; keeps two migrations apart


def upgrade(url: str) -> None:
    """Run Alembic's migrations up to the newest, one process at a time."""
    # Late: a serving keyvault never loads SQLAlchemy.
    import sqlalchemy
    from alembic import command
    from alembic.config import Config

    engine = sqlalchemy.create_engine(
        sqlalchemy.make_url(url).set(drivername="postgresql+psycopg"),
        poolclass=sqlalchemy.pool.NullPool,
    )
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"SELECT pg_advisory_lock({_LOCK})"))
        connection.commit()
        config = Config()
        config.set_main_option("script_location", str(_SCRIPTS))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        connection.commit()
    engine.dispose()


async def bootstrap(settings: Settings) -> dict[str, Any]:
    """Make keyvault's own keys where they are missing; return the clients' trust bundle.

    It is what `trust.json` holds: the deployment's name, the CA certificates of `BYOKEEP_TLS_CA`,
    and the public keys by their ids, in base64.

    Raises:
        NotYetError: database or KEK backend are not there.
        ConfigError.
    """
    database = Database(
        postgres.database_url(settings.database_url_file), settings.database_connections
    )
    backends = open_backends(settings, database)
    await database.open()

    async def begin() -> None:
        with not_yet():
            await backends.start()

    try:
        await until_there(begin, _WAIT_SECONDS)
        with not_yet():
            anchored = open_anchor(settings, backends)
            await system_keys.create(database, backends, settings.deployment, anchored)
            await system_keys.move(database, backends, settings.deployment)
            keys = await system_keys.load(database, backends, settings.deployment)
            public = system_keys.public_keys(keys)
            signer = await open_signer(settings, backends, lambda: keys.audit_log)
    finally:
        await backends.close()
        await database.close()
    # Both are pinned: older heads are signed by the one, newer ones perhaps by the other.
    audit_log = {**public[system_keys.AUDIT_LOG], signer.key_id: signer.public_key}
    encoded = {
        kind: {key_id: base64.b64encode(raw).decode() for key_id, raw in keys.items()}
        for kind, keys in {**public, system_keys.AUDIT_LOG: audit_log}.items()
    }
    return {
        "deployment": settings.deployment,
        "ca": _CERTIFICATE.findall(settings.tls_ca.read_text()),
        "intake_signing_keys": encoded[system_keys.INTAKE_SIGNING],
        "audit_log_keys": encoded[system_keys.AUDIT_LOG],
    }
