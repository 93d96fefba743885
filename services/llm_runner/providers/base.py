"""What the three provider adapters share: prompt, answer, streams and error rules."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, NoReturn

from services.llm_runner.providers import sse, table
from services.llm_runner.providers.errors import FailureKind, ProviderError
from services.llm_runner.providers.exchange import (
    MAX_STREAM_BYTES,
    Answer,
    Client,
    Connection,
    Exchange,
    Limits,
)
from services.llm_runner.providers.findings import FINDINGS_SCHEMA, load_json, parse_findings
from services.llm_runner.providers.table import Said
from services.llm_runner.providers.waits import retry_after

__all__ = [
    "FINDINGS_SCHEMA",
    "MAX_MODEL_PAGES",
    "Adapter",
    "Answer",
    "FailureKind",
    "Piece",
    "ProviderError",
    "ReviewAnswer",
    "ReviewPrompt",
]

MAX_MODEL_PAGES: Final = 20
MAX_ANSWER_BYTES: Final = 4 * 1024 * 1024
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


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event of a stream brings: more of the answer's text, why it ends, or neither."""

    text: str = field(default="", repr=False)
    end: str | None = None


def _nobody_listens(answer_bytes: int) -> None:
    pass


class Adapter(ABC):
    """One provider's API: fixed host, key in a header, one request per call.

    ``list_models`` and ``review`` raise ProviderError and nothing else; they never
    retry, and never read the token usage in an answer.
    """

    name: ClassVar[str]
    host: ClassVar[str]

    def client(self, key: str, connect: Callable[[str], Connection], limits: Limits) -> Client:
        """Return what makes requests with this key, to this provider alone.

        ``connect`` takes a host. Raises ValueError, without the key, if no header can hold it.
        """
        return Client(self.host, key, self.auth_headers(key), connect, limits)

    @abstractmethod
    def auth_headers(self, key: str) -> dict[str, str]:
        """Headers that authenticate with the key, and any that the API demands."""

    @abstractmethod
    def list_models(self, client: Client) -> tuple[str, ...]:
        """Ids of the models that this key can use to generate text."""

    def review(
        self,
        client: Client,
        prompt: ReviewPrompt,
        progress: Callable[[int], None] = _nobody_listens,
    ) -> ReviewAnswer:
        """Make one review call and return its validated findings.

        The answer is streamed; ``progress`` is told of each event how long the answer is by
        then, in bytes. A stream that ends before its model says that it stopped was cut.
        """
        path, body = self._request(prompt)
        texts: list[str] = []
        size = 0
        with client.post(path, body) as exchange:
            for document in self._documents(exchange):
                piece = self._piece(document)
                texts.append(piece.text)
                size += len(piece.text.encode("utf-8", "replace"))
                if size > MAX_ANSWER_BYTES:
                    raise ProviderError(FailureKind.BAD_RESPONSE, http_status=200)
                progress(size)
                if piece.end is not None:
                    kind = table.end(self.name, piece.end)
                    if kind is not None:
                        raise ProviderError(kind, http_status=200)
                    return ReviewAnswer(parse_findings("".join(texts)))
        raise ProviderError(FailureKind.AMBIGUOUS, http_status=200)

    @abstractmethod
    def _request(self, prompt: ReviewPrompt) -> tuple[str, dict[str, Any]]:
        """Path and body of a review call whose answer is a stream."""

    @abstractmethod
    def _piece(self, document: Mapping[str, Any]) -> Piece:
        """What an event of the stream brings."""

    @abstractmethod
    def _said(self, status: int, document: Mapping[str, Any]) -> Said:
        """Reduce an error answer to what the table looks at."""

    def _retry_after(self, answer: Answer) -> float | None:
        return retry_after(answer.headers)

    def _documents(self, exchange: Exchange) -> Iterator[Mapping[str, Any]]:
        """The JSON objects of a stream's events. Raises ProviderError, also for an error's."""
        kind = exchange.headers.get("content-type", "").partition(";")[0].strip().lower()
        if exchange.status != 200 or kind != "text/event-stream":
            self._fail(exchange.whole())
        decoder = sse.Decoder()
        events = decoder.events(_bounded(exchange.pieces()))
        too_long = False
        try:
            for data in events:
                if data == "[DONE]":
                    break
                exchange.alive()
                document = load_json(data)
                if not isinstance(document, dict):
                    raise ProviderError(FailureKind.BAD_RESPONSE, http_status=200)
                if document.get("error"):
                    self._fail(Answer(200, exchange.headers, data.encode("utf-8", "replace")))
                yield document
        except sse.TooLongError:
            too_long = True
        if too_long:
            raise ProviderError(FailureKind.BAD_RESPONSE, http_status=200)
        rest = Answer(200, exchange.headers, decoder.rest)
        if rest.document().get("error"):
            self._fail(rest)

    def _get(
        self, client: Client, path: str, params: Mapping[str, str | int], until: float
    ) -> dict[str, Any]:
        answer = client.get(path, params, until)
        document = answer.document()
        if answer.status != 200 or not document:
            self._fail(answer)
        return document

    def _fail(self, answer: Answer) -> NoReturn:
        said = self._said(answer.status, answer.document())
        kind = table.failure(self.name, said)
        raise ProviderError(
            kind,
            http_status=answer.status,
            retry_after_seconds=self._retry_after(answer) if kind in _WAITABLE else None,
        )


def _bounded(pieces: Iterable[bytes]) -> Iterator[bytes]:
    left = MAX_STREAM_BYTES
    for piece in pieces:
        left -= len(piece)
        if left < 0:
            raise sse.TooLongError
        yield piece


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
