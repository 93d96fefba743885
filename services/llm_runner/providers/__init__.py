"""Provider adapters, used inside the one-shot child only."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from services.llm_runner.providers.anthropic import Anthropic
from services.llm_runner.providers.base import (
    FINDINGS_SCHEMA,
    Adapter,
    FailureKind,
    ProviderError,
    ReviewAnswer,
    ReviewPrompt,
)
from services.llm_runner.providers.exchange import REVIEW, VALIDATION, Client, Connection, Limits
from services.llm_runner.providers.gemini import Gemini
from services.llm_runner.providers.openai import OpenAI

__all__ = [
    "ADAPTERS",
    "FINDINGS_SCHEMA",
    "REVIEW",
    "VALIDATION",
    "Adapter",
    "Client",
    "Connection",
    "FailureKind",
    "Limits",
    "ProviderError",
    "ReviewAnswer",
    "ReviewPrompt",
]

ADAPTERS: Final[Mapping[str, Adapter]] = MappingProxyType(
    {adapter.name: adapter for adapter in (OpenAI(), Anthropic(), Gemini())}
)
