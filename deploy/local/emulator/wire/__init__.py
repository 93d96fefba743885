"""The providers' wire formats, by host name."""

from __future__ import annotations

from typing import Final

from deploy.local.emulator.wire.anthropic import Anthropic
from deploy.local.emulator.wire.base import Chat, End, Wire
from deploy.local.emulator.wire.gemini import Gemini
from deploy.local.emulator.wire.openai import OpenAI

__all__ = ["WIRES", "Chat", "End", "Wire"]

WIRES: Final[dict[str, Wire]] = {wire.host: wire for wire in (OpenAI(), Anthropic(), Gemini())}
