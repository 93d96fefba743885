"""The models that the emulator offers: those that byokeep knows, and a few of no use to it."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Final

PROVIDERS: Final = ("openai", "anthropic", "gemini")


def _known() -> dict[str, tuple[str, ...]]:
    data = resources.files("services.common").joinpath("data/models.toml").read_text("utf-8")
    return {name: tuple(table["models"]) for name, table in tomllib.loads(data).items()}


# From the catalog, so that every default and every example has a model here.
CHAT_MODELS: Final = _known()

# In the lists, but of no use for a review.
OTHER_MODELS: Final[dict[str, tuple[str, ...]]] = {
    "openai": (
        "text-embedding-3-large",
        "gpt-4o-mini-tts",
        "gpt-4o-transcribe",
        "gpt-5.4-pro",
        "whisper-1",
        "omni-moderation-latest",
    ),
    "anthropic": (),
    "gemini": ("gemini-embedding-001", "gemini-3.1-flash-tts-preview", "gemini-3.1-flash-image"),
}

# The real maximum is 1000; this small, even a short list has several pages.
MAX_PAGE: Final = 3


def listed(provider: str) -> tuple[str, ...]:
    """All ids in a provider's model list."""
    return CHAT_MODELS[provider] + OTHER_MODELS[provider]
