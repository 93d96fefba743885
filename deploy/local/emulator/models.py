"""The models that the emulator offers: real ids, in the order of the real lists.

Taken from the providers' public model pages in late 2026; edit here only.
"""

from __future__ import annotations

from typing import Final

PROVIDERS: Final = ("openai", "anthropic", "gemini")

CHAT_MODELS: Final[dict[str, tuple[str, ...]]] = {
    "openai": (
        "gpt-5.6-sol",
        "gpt-5.6-terra",
        "gpt-5.6-luna",
        "gpt-5.5",
        "gpt-5.4",
        "gpt-5.4-mini",
        "gpt-5.4-nano",
        "gpt-4.1",
    ),
    "anthropic": (
        "claude-opus-5-5",
        "claude-sonnet-5-5",
        "claude-haiku-5-5",
        "claude-opus-5",
        "claude-sonnet-5",
        "claude-sonnet-4-6",
        "claude-haiku-4-5-20251001",
    ),
    "gemini": (
        "gemini-3.6-flash",
        "gemini-3.5-flash",
        "gemini-3.5-flash-lite",
        "gemini-3.1-pro-preview",
        "gemini-3.1-flash-lite",
        "gemini-2.5-pro",
        "gemini-2.5-flash",
    ),
}

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
