"""What the three provider adapters share: prompt, answer, client and error rules."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, NoReturn

import httpx

from services.llm_runner.providers import table
from services.llm_runner.providers.errors import FailureKind, ProviderError
from services.llm_runner.providers.exchange import Answer, exchange, retry_after
from services.llm_runner.providers.findings import FINDINGS_SCHEMA, parse_findings
from services.llm_runner.providers.table import Said

__all__ = [
    "FINDINGS_SCHEMA",
    "MAX_MODEL_PAGES",
    "Adapter",
    "FailureKind",
    "ProviderError",
    "ReviewAnswer",
    "ReviewPrompt",
    "client",
    "parse_findings",
]

MAX_MODEL_PAGES: Final = 20
_HEADER_SAFE_KEY: Final = re.compile(r"[\x21-\x7e]{16,512}")
_MODEL_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
_WAITABLE: Final = (FailureKind.RATE_LIMITED, FailureKind.PROVIDER_UNAVAILABLE)


@dataclass(frozen=True, slots=True)
class ReviewPrompt:
    """One review call: the provider's model id, the texts, and the answer's schema."""

    model: str
    system: str = field(repr=False)
    user: str = field(repr=False)
    schema: dict[str, Any] = field(repr=False)
    max_output_tokens: int


@dataclass(frozen=True, slots=True)
class ReviewAnswer:
    """The findings of one call, each of the shape of FINDINGS_SCHEMA's items."""

    findings: list[dict[str, Any]] = field(repr=False)


class Adapter(ABC):
    """One provider's API: fixed host, key in a header, one request per call.

    ``list_models`` and ``review`` raise ProviderError and nothing else; they never
    retry, and never read the token usage in an answer.
    """

    name: ClassVar[str]
    host: ClassVar[str]

    @property
    def base_url(self) -> str:
        """The only origin that this adapter's requests go to."""
        return f"https://{self.host}"

    @abstractmethod
    def auth_headers(self, key: str) -> dict[str, str]:
        """Headers that authenticate with the key, and any that the API demands."""

    @abstractmethod
    def list_models(self, client: httpx.Client) -> tuple[str, ...]:
        """Ids of the models that this key can use to generate text."""

    @abstractmethod
    def review(self, client: httpx.Client, prompt: ReviewPrompt) -> ReviewAnswer:
        """Make one review call and return its validated findings."""

    @abstractmethod
    def _said(self, status: int, document: Mapping[str, Any]) -> Said:
        """Reduce an error answer to what the table looks at."""

    def _retry_after(self, answer: Answer) -> float | None:
        return retry_after(answer.headers)

    def _call(
        self,
        client: httpx.Client,
        method: str,
        path: str,
        *,
        params: Mapping[str, str | int] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        answer = exchange(client, method, path, params=params, body=body)
        if answer.status != 200:
            self._fail(answer)
        document = answer.document()
        if not document:
            raise ProviderError(FailureKind.BAD_RESPONSE, http_status=200)
        return document

    def _fail(self, answer: Answer) -> NoReturn:
        said = self._said(answer.status, answer.document())
        kind = table.failure(self.name, said)
        raise ProviderError(
            kind,
            http_status=answer.status,
            retry_after_seconds=self._retry_after(answer) if kind in _WAITABLE else None,
        )

    def _ended(self, reason: str) -> None:
        """Raise ProviderError unless the model stopped where its answer is whole."""
        if (kind := table.end(self.name, reason)) is not None:
            raise ProviderError(kind, http_status=200)


def text(value: object) -> str:
    """The value if it is a string, else the empty string."""
    return value if isinstance(value, str) else ""


def mapping(value: object) -> Mapping[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def objects(value: object) -> list[dict[str, Any]]:
    """The JSON objects in a value that should be an array of them."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def model_ids(values: Iterable[object]) -> list[str]:
    """The values from a model list that can be model ids at all, each once, in order."""
    ids = (value for value in values if isinstance(value, str) and _MODEL_ID.fullmatch(value))
    return list(dict.fromkeys(ids))


class _KeyAuth(httpx.Auth):
    """Puts the key's headers on requests to its own provider, and shows nothing."""

    __slots__ = ("_headers", "_host")

    def __init__(self, host: str, headers: dict[str, str]) -> None:
        self._host = host
        self._headers = headers

    def __repr__(self) -> str:
        return "<provider key>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a provider key can't be pickled")

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if request.url.scheme != "https" or request.url.netloc != self._host.encode():
            raise ValueError("a provider key is only ever sent to its own provider")
        request.headers.update(self._headers)
        yield request


def client(
    adapter: Adapter,
    key: str,
    transport: httpx.BaseTransport,
    timeout: httpx.Timeout | float,
) -> httpx.Client:
    """Return a client that can talk to this adapter's provider with this key only.

    The transport is the caller's, TLS included; ``timeout`` is in seconds. Raises
    ValueError, without the key, if the key can't stand in a header.
    """
    if _HEADER_SAFE_KEY.fullmatch(key) is None:
        raise ValueError("the provider key has a length or characters that no key has")
    # httpx logs each URL at INFO, httpcore each header block at DEBUG.
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return httpx.Client(
        base_url=adapter.base_url,
        auth=_KeyAuth(adapter.host, adapter.auth_headers(key)),
        headers={
            "accept": "application/json",
            "accept-encoding": "identity",
            "user-agent": "byokeep",
        },
        transport=transport,
        timeout=timeout,
        trust_env=False,
        follow_redirects=False,
    )
