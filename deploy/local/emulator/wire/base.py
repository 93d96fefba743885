"""What each provider's wire format has to say."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

from deploy.local.emulator.http import Reply, Request
from deploy.local.emulator.state import PathKind

# In every answer's usage figures, so that a test can look for where they end up.
USAGE_TOKENS: Final = 424242


End = Literal["stop", "length", "refusal"]


@dataclass(frozen=True, slots=True)
class Chat:
    """A valid chat request: the model asked for, and the user's text."""

    model: str
    user: str


class Wire(ABC):
    """One provider's requests and answers, in its own words."""

    name: ClassVar[str]
    host: ClassVar[str]

    @abstractmethod
    def route(self, request: Request) -> PathKind:
        """What the request is for; "other" is answered by not_found."""

    @abstractmethod
    def key(self, request: Request) -> str | None:
        """The key in the header where this provider wants it."""

    @abstractmethod
    def plausible(self, key: str) -> bool:
        """Whether the key has the shape that this provider gives out."""

    @abstractmethod
    def not_found(self, request: Request) -> Reply:
        """No such path or method."""

    @abstractmethod
    def no_key(self) -> Reply:
        """No key came along."""

    @abstractmethod
    def unauthorized(self, key: str) -> Reply:
        """The key isn't valid."""

    @abstractmethod
    def missing_scope(self, kind: PathKind) -> Reply:
        """The key may not do this."""

    @abstractmethod
    def quota(self) -> Reply:
        """Nothing left to spend."""

    @abstractmethod
    def rate_limited(self, seconds: float) -> Reply:
        """Come back later."""

    @abstractmethod
    def server_error(self, status: int) -> Reply:
        """The provider is down or overloaded."""

    @abstractmethod
    def bad_request(self, message: str) -> Reply:
        """The request is wrong, with a free text."""

    @abstractmethod
    def context_too_long(self) -> Reply:
        """The prompt is too long for the model."""

    @abstractmethod
    def region_refused(self) -> Reply:
        """This country is not served."""

    @abstractmethod
    def error_event(self) -> bytes:
        """An event in the middle of a stream: the provider is overloaded."""

    @abstractmethod
    def models(self, request: Request, more: Sequence[str] = ()) -> Reply:
        """A page of the model list, with more ids than there are."""

    @abstractmethod
    def chat(self, request: Request) -> Chat | Reply:
        """The chat request, or what is wrong with it; one that asks for no stream is wrong."""

    @abstractmethod
    def events(self, model: str, pieces: Sequence[str], end: End) -> Iterator[bytes]:
        """The stream of an answer, and why it ends."""


def event(document: object, name: str | None = None, newline: str = "\n") -> bytes:
    """A server-sent event."""
    line = "" if name is None else f"event: {name}{newline}"
    return f"{line}data: {json.dumps(document)}{newline}{newline}".encode()


def strict_schema_fault(schema: object, place: str = "") -> str | None:
    """Where a schema breaks the strict modes' rules: closed objects, all required."""
    if not isinstance(schema, dict):
        return f"{place or 'schema'} is not an object"
    if schema.get("type") == "object":
        properties = schema.get("properties")
        if schema.get("additionalProperties") is not False or not isinstance(properties, dict):
            return f"({place}) 'additionalProperties' is required to be supplied and to be false"
        if set(schema.get("required", ())) != set(properties):
            return f"({place}) 'required' is required to be an array including every key"
        for name, inner in properties.items():
            if fault := strict_schema_fault(inner, f"{place}.{name}"):
                return fault
    if schema.get("type") == "array":
        return strict_schema_fault(schema.get("items"), f"{place}[]")
    return None


def dig(document: object, *names: str) -> Any:
    """The value at a path of names in a JSON document, or None."""
    for name in names:
        document = document.get(name) if isinstance(document, dict) else None
    return document


def is_positive(value: object) -> bool:
    """Whether a JSON value is a whole number above zero."""
    return type(value) is int and value > 0
