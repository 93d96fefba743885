"""Settings of the orchestrator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.common import config


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrateSettings:
    """What `migrate` is told."""

    database_url_file: Path = config.setting("0600 file with a postgresql:// URL")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(config.ServiceSettings):
    """What the orchestrator is told beside what every service is told."""

    database_url_file: Path = config.setting("0600 file with a postgresql:// URL")
    grant_signing_key: Path = config.setting("0600 PEM file: PKCS 8 Ed25519 key that signs grants")
    keyvault_address: str = config.setting("gRPC target of keyvault", form=config.TARGET)
    keyvault_name: str = config.setting(
        "DNS name that keyvault's certificate must have", form=config.DNS
    )
    runner_address: str = config.setting("gRPC target of llm_runner", form=config.TARGET)
    runner_name: str = config.setting(
        "DNS name that llm_runner's certificate must have", form=config.DNS
    )
    runner_class: str = config.setting(
        "runner class that may redeem our grants", default="default", form=config.NAME
    )
    models_file: Path | None = config.setting("file laid over the built-in models", default=None)
    plans_file: Path | None = config.setting("file laid over the built-in plans", default=None)
    max_diff_bytes: int = config.setting("largest diff taken, in bytes", default=2 * 1024 * 1024)
    max_calls_per_review: int = config.setting("most provider calls of one review", default=20)
    intake_per_hour: int = config.setting("keys that one tenant may try in an hour", default=20)
    intake_per_hour_of_caller: int = config.setting(
        "keys that one caller may try in an hour, for all its tenants", default=200
    )
    attempt_seconds: int = config.setting(
        "an attempt is killed after this long", default=900, most=86_400
    )
    wait_seconds: int = config.setting(
        "a review that waits this long without a chunk done fails with what it waits for",
        default=86_400,
        most=30 * 86_400,
    )
    drain_seconds: int = config.setting(
        "SIGTERM waits this long for attempts", default=900, most=86_400
    )
    concurrency: int = config.setting(
        "attempts that this process runs at once", default=32, most=10_000
    )
    database_connections: int = config.setting(
        "most connections of this process", default=8, most=1_000
    )
    failed_content_hours: int = config.setting(
        "hours that a failed review's diff is kept for a retry", default=24, most=24 * 36_500
    )
    findings_days: int = config.setting("days that findings are kept", default=90, most=36_500)
    review_days: int = config.setting(
        "days that reviews which have ended are kept at all", default=730, most=36_500
    )
