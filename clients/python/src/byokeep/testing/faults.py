"""How the emulated providers treat keys, and the ways in which they fail."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

Provider = Literal["openai", "anthropic", "gemini"]
Behaviour = Literal["valid", "invalid", "restricted", "noquota"]
"""A provider accepts a key, rejects it, accepts it but lists no models, or its quota is gone."""
BEHAVIOURS: Final[tuple[Behaviour, ...]] = ("valid", "invalid", "restricted", "noquota")

FaultKind = Literal[
    "unauthorized",
    "missing_scope",
    "quota",
    "rate_limited",
    "server_error",
    "context_too_long",
    "region_refused",
    "blocked",
    "redirect",
    "slow",
    "slow_stream",
    "hold",
    "hang_handshake",
    "flood_1xx",
    "drip_head",
    "drip_extension",
    "drip_comment",
    "cut",
    "cut_stream",
    "error_event",
    "malformed_json",
    "malformed_answer",
    "truncated",
    "refusal",
    "echo",
    "echo_key",
]
FAULTS: Final[Mapping[FaultKind, str]] = MappingProxyType(
    {
        "unauthorized": "the key is wrong",
        "missing_scope": "the key may not do this",
        "quota": "quota or credit is gone",
        "rate_limited": "come back after `seconds`",
        "server_error": "the provider fails with `status`",
        "context_too_long": "the prompt is too long; with `after_bytes`, only a longer one",
        "region_refused": "the provider does not serve this country",
        "blocked": "403 with a page of HTML, from a CDN in front of the provider",
        "redirect": "302 to `location`",
        "slow": "the answer comes after `seconds`",
        "slow_stream": "an event of the stream every `seconds`",
        "hold": "the answer waits for a release",
        "hang_handshake": "the next connection gets no TLS handshake; it knows no provider or key",
        "flood_1xx": "an answer 103 every `seconds`, for ever",
        "drip_head": "a byte of the answer's head every `seconds`, for ever",
        "drip_extension": "a byte of a chunk's extension every `seconds`, for ever",
        "drip_comment": "a comment in the stream every `seconds`, for ever",
        "cut": "the connection ends in the middle, or after `after_bytes`",
        "cut_stream": "the connection ends after `events` events",
        "error_event": "the stream ends after `events` events with an error",
        "malformed_json": "JSON that is none",
        "malformed_answer": "an answer off the schema",
        "truncated": "the model ran out of tokens",
        "refusal": "the model declines",
        "echo": "findings, or models, that hold the key, in many encodings",
        "echo_key": "a bad request whose text holds the key",
    }
)
