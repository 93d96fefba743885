"""Settings of keyvault."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.common import config
from services.keyvault.limits import Caps

BACKENDS = ("local", "vault", "aws_kms")
_PATH = (r"[A-Za-z0-9._/-]+", "letters, digits and . _ / -")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(config.ServiceSettings):
    """What keyvault is told."""

    database_url_file: Path = config.setting("0600 file with the postgresql:// URL of its database")
    anchor_file: Path | None = config.setting(
        "file outside the database that holds the newest log position;"
        " unless BYOKEEP_VAULT_ANCHOR is set",
        default=None,
    )
    grant_keys_dir: Path = config.setting(
        "folder of *.pem: Ed25519 public keys of orchestrator replicas"
    )
    kek_backend: Literal["local", "vault", "aws_kms"] = config.setting(
        "local, vault or aws_kms: where new rows' key-encryption keys live", default="local"
    )
    kek_backends_read: str = config.setting(
        "other backends that stored rows may still name, separated by commas", default=""
    )
    kek_backends_lost: str = config.setting(
        "backends that stored rows name and that are gone for good, separated by commas: what they"
        " held is undecryptable",
        default="",
    )
    allow_local_kek: bool = config.setting(
        "yes: allow backend local in production mode", default=False
    )
    keyring_file: Path | None = config.setting("0600 file: keyring of backend local", default=None)
    kms_deletion_days: int = config.setting(
        "backend aws_kms: days until a destroyed KMS key is gone, 7 to 30",
        default=7,
        least=7,
        most=30,
    )
    intake_per_hour: int = config.setting(
        "keys that one caller may send in for one tenant, per hour", default=20
    )
    tenant_leases_in_flight: int = config.setting(
        "leases of one tenant that live at once; 0: no cap", default=64, least=0
    )
    tenant_leases_per_minute: int = config.setting(
        "leases of one tenant in a minute; 0: no cap", default=1_200, least=0
    )
    tenant_leases_per_day: int = config.setting(
        "leases of one tenant in a UTC day; 0: no cap", default=200_000, least=0
    )
    key_leases_in_flight: int = config.setting(
        "leases of one key that live at once; 0: no cap", default=64, least=0
    )
    key_leases_per_minute: int = config.setting(
        "leases of one key in a minute; 0: no cap", default=600, least=0
    )
    key_leases_per_day: int = config.setting(
        "leases of one key in a UTC day; 0: no cap", default=120_000, least=0
    )
    rewrap_rows_per_second: int = config.setting(
        "data keys that a rewrap wraps again, per second, at most", default=20_000
    )
    shred_after_seconds: int = config.setting(
        "a destroyed key's shred sweep waits so long for others to share it",
        default=30,
        least=0,
        most=86_400,
    )
    audit_retention_days: int = config.setting(
        "audit events older than so many days are dropped, and the chain says so; 0: kept for ever",
        default=0,
        least=0,
        most=36_500,
    )
    content_retention_days: int = config.setting(
        "days after its day that a content key is kept; no less than the orchestrator's"
        " findings_days",
        default=90,
        most=36_500,
    )
    database_connections: int = config.setting(
        "connections to the database, but one", default=8, most=1_000
    )
    # Its one endless stream, of revocations, is taken up again at once; an export takes minutes.
    connection_grace_seconds: int = config.setting(
        "a caller's connection is cut, with the calls that still run, so long after its age",
        default=5 * 60,
        most=2_000_000,
    )

    vault_address: str | None = config.setting("https://host:port of Vault", default=None)
    vault_ca: Path | None = config.setting(
        "PEM file: CA of Vault's certificate; else the system's", default=None
    )
    vault_namespace: str = config.setting("Vault's namespace", default="")
    vault_mount: str = config.setting(
        "mount of Vault's Transit engine", default="transit", form=_PATH
    )
    vault_prefix: str = config.setting(
        "what names of Transit keys start with", default="byokeep-", form=_PATH
    )
    vault_data_login: str = config.setting(
        "login of the data identity, for roles data and all: kubernetes role=…,"
        " approle role_id=FILE secret_id=FILE, or token_file token=FILE",
        default="",
    )
    vault_admin_login: str = config.setting(
        "login of the admin identity, for roles admin and all: the same", default=""
    )
    vault_anchor: str = config.setting(
        "mount/path of a key/value (v2) entry for the newest log position, such as byokeep/anchor",
        default="",
        form=(r"[A-Za-z0-9._-]+/[A-Za-z0-9._/-]+", "mount/path"),
    )
    vault_checkpoint_key: str = config.setting(
        "Transit key (Ed25519) that signs the audit log, such as byokeep-checkpoint;"
        " else a key of keyvault's own",
        default="",
        form=_PATH,
    )
    vault_deadline_ms: int = config.setting(
        "milliseconds that a call to Vault may take in all", default=2000, most=60_000
    )
    vault_calls: int = config.setting(
        "calls to Vault's data identity at once", default=16, most=1_000
    )

    def read_backends(self) -> list[str]:
        """Return the names of the other backends."""
        return _names(self.kek_backends_read)

    def lost_backends(self) -> list[str]:
        """Return the names of backends that are not to be waited for."""
        return _names(self.kek_backends_lost)

    @property
    def tenant_caps(self) -> Caps:
        """Lease caps of each tenant."""
        return Caps(
            self.tenant_leases_in_flight, self.tenant_leases_per_minute, self.tenant_leases_per_day
        )

    @property
    def key_caps(self) -> Caps:
        """Lease caps of each key."""
        return Caps(self.key_leases_in_flight, self.key_leases_per_minute, self.key_leases_per_day)

    def check(self) -> None:
        """Refuse what must be said on purpose. Raises ConfigError."""
        for setting, names in (
            ("BYOKEEP_KEK_BACKENDS_READ", self.read_backends()),
            ("BYOKEEP_KEK_BACKENDS_LOST", self.lost_backends()),
        ):
            for name in names:
                if name not in BACKENDS:
                    raise config.ConfigError(
                        f"{setting} names {name}: there are {', '.join(BACKENDS)}"
                    )
        if self.anchor_file is not None:
            config.check_folder("BYOKEEP_ANCHOR_FILE", self.anchor_file)
        if self.kek_backend == "local" and self.mode == "production" and not self.allow_local_kek:
            raise config.ConfigError(
                "BYOKEEP_KEK_BACKEND is local in production mode: the keyring is only as safe as"
                " its copies. Use Vault, or set BYOKEEP_ALLOW_LOCAL_KEK=yes on purpose"
            )


def _names(setting: str) -> list[str]:
    return [name.strip() for name in setting.split(",") if name.strip()]
