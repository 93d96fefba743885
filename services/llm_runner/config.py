"""What the runner is told."""

from __future__ import annotations

import dataclasses
import ssl
from collections.abc import Mapping
from pathlib import Path

from services.common import config, models
from services.llm_runner.sockets import parse_overrides


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings(config.ServiceSettings):
    """Settings of the parent; the zygote reads its own few (see `spawner`)."""

    keyvault_address: str = config.setting("gRPC target of keyvault", form=config.TARGET)
    keyvault_name: str = config.setting(
        "DNS name that keyvault's certificate must have", form=config.DNS
    )
    max_children: int = config.setting("most attempts at once", default=16, most=1000)
    drain_seconds: int = config.setting(
        "SIGTERM waits this long for attempts", default=900, most=86_400
    )
    models_file: Path | None = config.setting("TOML file laid over the known models", default=None)
    provider_dial: str = config.setting(
        "development only: host=ip:port pairs, dialled instead of the provider", default=""
    )
    provider_ca: Path | None = config.setting(
        "development only: PEM file that replaces the public CAs", default=None
    )

    @property
    def call_drain_seconds(self) -> float:
        """An attempt is one call."""
        return float(self.drain_seconds)


def load(environ: Mapping[str, str]) -> Settings:
    """Return the settings. Raises ConfigError."""
    settings = config.load(Settings, environ)
    if settings.mode == "production" and (settings.provider_dial or settings.provider_ca):
        raise config.ConfigError(
            "BYOKEEP_PROVIDER_DIAL and BYOKEEP_PROVIDER_CA are for BYOKEEP_MODE=development only"
        )
    for name, read in (
        ("PROVIDER_DIAL", lambda: parse_overrides(settings.provider_dial)),
        ("PROVIDER_CA", lambda: ssl.create_default_context(cafile=settings.provider_ca)),
        ("MODELS_FILE", lambda: models.load(settings.models_file)),
    ):
        failed: Exception | None = None
        try:
            read()
        except (ValueError, OSError) as error:
            failed = error
        if failed is not None:
            why = failed.strerror if isinstance(failed, OSError) else failed
            raise config.ConfigError(f"BYOKEEP_{name}: {why}")
    return settings
