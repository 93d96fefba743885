"""One HTTP request to a provider: sent once, read within bounds, failures mapped.

httpx's exceptions hold URLs and requests (with their headers), so none leaves this
module, not even as the context of another exception.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

import httpx

from services.llm_runner.providers.errors import FailureKind, ProviderError
from services.llm_runner.providers.findings import load_json

MAX_BODY_BYTES: Final = 8 * 1024 * 1024
# httpx's read timeout is per chunk: an answer that drips needs a bound of its own.
MAX_BODY_SECONDS: Final = 600.0
_MAX_RETRY_AFTER_SECONDS: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A provider's HTTP answer; the body is empty if it was too large or encoded."""

    status: int
    headers: httpx.Headers = field(repr=False)
    body: bytes = field(repr=False)

    def document(self) -> dict[str, Any]:
        """The body as a JSON object, or the one in an array; empty when it is anything else."""
        parsed = load_json(self.body)
        if isinstance(parsed, list) and len(parsed) == 1:
            parsed = parsed[0]  # Gemini's errors of a stream
        return parsed if isinstance(parsed, dict) else {}


def exchange(
    client: httpx.Client,
    method: str,
    path: str,
    *,
    params: Mapping[str, str | int] | None = None,
    body: Mapping[str, Any] | None = None,
) -> Answer:
    """Send one request and return the answer, whatever its status.

    Raises ProviderError: NETWORK_BEFORE_SEND if no connection came about, AMBIGUOUS if
    the answer was lost after sending began, BAD_REQUEST if it can't be put on the wire.
    """
    outcome = _attempt(client, method, path, params, body)
    if isinstance(outcome, FailureKind):
        raise ProviderError(outcome)
    return outcome


def _attempt(
    client: httpx.Client,
    method: str,
    path: str,
    params: Mapping[str, str | int] | None,
    body: Mapping[str, Any] | None,
) -> Answer | FailureKind:
    content, headers = None, {}
    if body is not None:
        # A lone surrogate would raise an error that carries the whole prompt.
        content = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        headers["content-type"] = "application/json"
    try:
        with client.stream(
            method, path, params=params, content=content, headers=headers
        ) as response:
            return Answer(response.status_code, response.headers, _read(response))
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout):
        return FailureKind.NETWORK_BEFORE_SEND
    except (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.InvalidURL):
        return FailureKind.BAD_REQUEST
    except (httpx.RequestError, OSError):
        return FailureKind.AMBIGUOUS


def _read(response: httpx.Response) -> bytes:
    if response.is_redirect or response.headers.get("content-encoding", "identity") != "identity":
        return b""  # identity was asked for: a compressed body could be a bomb
    deadline = time.monotonic() + MAX_BODY_SECONDS
    body = bytearray()
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            return b""
        if time.monotonic() > deadline:
            raise httpx.ReadTimeout("answer took too long")
    return bytes(body)


def retry_after(headers: httpx.Headers) -> float | None:
    """Seconds that the provider asks to wait: ``retry-after-ms``, else ``retry-after``.

    Takes seconds or an HTTP date (RFC 9110, 10.2.3); None if absent or unreadable.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return bounded_wait(milliseconds / 1000)
    value = headers.get("retry-after")
    seconds = _number(value)
    if seconds is None and value is not None:
        seconds = _seconds_until(value)
    return None if seconds is None else bounded_wait(seconds)


def bounded_wait(seconds: float) -> float:
    """Clamp a wait to between nothing and one day."""
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER_SECONDS)


def _number(value: str | None) -> float | None:
    try:
        number = float(value or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _seconds_until(value: str) -> float | None:
    try:
        when = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return (when - datetime.now(UTC)).total_seconds()
