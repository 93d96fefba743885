"""One HTTP/1.1 request to a provider, and its answer within bounds of time and size.

The client has what a call to one host with one key needs: no redirects, cookies, proxies or
compression, and a connection for each request, since a kept one that the provider closes
meanwhile would make a call ambiguous that was never taken.

h11's exceptions hold parts of headers and answers, so none leaves this module, not even as the
context of another exception.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn, Protocol
from urllib.parse import urlencode

import h11
from byokeep.orchestrator.v1 import key_pb2

from services.llm_runner.providers.errors import FailureKind, ProviderError
from services.llm_runner.providers.findings import load_json
from services.llm_runner.wire import LostError, UnreachableError

MAX_HEAD_BYTES: Final = 64 * 1024
"""Longest head of an answer, line of a chunk's size with its extensions, and trailer."""
MAX_BODY_BYTES: Final = 8 * 1024 * 1024
"""Longest body that is read whole."""
MAX_STREAM_BYTES: Final = 64 * 1024 * 1024
_MAX_INTERIM: Final = 16
"""Most answers 1xx before the final one."""
_HEADER_SAFE_KEY: Final = re.compile(r"[\x21-\x7e]{16,512}")


@dataclass(frozen=True, slots=True)
class Limits:
    """How many seconds a request's steps may take, whatever drips meanwhile."""

    send: float = 60.0
    """Until the request is sent."""
    answer: float = 300.0
    """From then to the first byte: Gemini says nothing until it has thought."""
    head: float = 15.0
    """From the first byte to the end of the final answer's head, after any answers 1xx; and as
    much again for a body that is no stream."""
    idle: float = 300.0
    """Between two events of a stream."""
    total: float = 900.0
    """From the start to the end."""


REVIEW: Final = Limits()
VALIDATION: Final = Limits(send=10.0, answer=15.0, head=5.0, idle=10.0, total=30.0)


class Connection(Protocol):
    """What an exchange needs of a connection: `services.llm_runner.wire` has it."""

    def read(self, until: float) -> bytes:
        """Return what has come, or nothing at the end. Raises LostError."""

    def write(self, data: bytes, until: float) -> None:
        """Send all of it. Raises LostError."""

    def close(self) -> None:
        """Close it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A provider's whole answer; the body is empty if it was too large or encoded."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)

    def document(self) -> dict[str, Any]:
        """The body as a JSON object, or the one in an array; empty when it is anything else."""
        parsed = load_json(self.body)
        if isinstance(parsed, list) and len(parsed) == 1:
            parsed = parsed[0]  # Gemini's errors of a stream
        return parsed if isinstance(parsed, dict) else {}


class Client:
    """Makes the requests of one key to its provider; shows nothing of the key."""

    __slots__ = ("_connect", "_headers", "_host", "_limits")

    def __init__(
        self,
        host: str,
        key: str,
        headers: Mapping[str, str],
        connect: Callable[[str], Connection],
        limits: Limits,
    ) -> None:
        """`headers` hold the key; `connect` raises UnreachableError.

        Raises ValueError, without the key, if the key can't stand in a header.
        """
        if _HEADER_SAFE_KEY.fullmatch(key) is None:
            raise ValueError("the provider key has a length or characters that no key has")
        self._host = host
        self._headers = {
            "host": host,
            "accept-encoding": "identity",
            "user-agent": "byokeep",
            "connection": "close",
            **headers,
        }
        self._connect = connect
        self._limits = limits

    def __repr__(self) -> str:
        """Nothing of the key."""
        return f"<client of {self._host}>"

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled."""
        raise TypeError("a provider key can't be pickled")

    def deadline(self) -> float:
        """When a call that begins now has to be over, by the monotonic clock."""
        return time.monotonic() + self._limits.total

    def get(self, path: str, params: Mapping[str, str | int], until: float) -> Answer:
        """Return the whole answer to a GET, whatever its status; `until` is its deadline.

        Raises ProviderError: NETWORK_BEFORE_SEND if no connection came about, AMBIGUOUS if
        the answer was lost after sending began.
        """
        target = f"{path}?{urlencode(params)}" if params else path
        with self._exchange("GET", target, None, {"accept": "application/json"}, until) as exchange:
            return exchange.whole()

    @contextmanager
    def post(self, path: str, body: Mapping[str, Any]) -> Iterator[Exchange]:
        """Give out the exchange of a POST whose answer is to be a stream. Raises as `get`."""
        # A lone surrogate would raise an error that carries the whole prompt.
        content = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        headers = {
            "accept": "text/event-stream",
            "content-type": "application/json",
            "content-length": str(len(content)),
        }
        with self._exchange("POST", path, content, headers, self.deadline()) as exchange:
            yield exchange

    @contextmanager
    def _exchange(
        self, method: str, target: str, body: bytes | None, headers: Mapping[str, str], until: float
    ) -> Iterator[Exchange]:
        request = h11.Request(
            method=method, target=target, headers=list({**self._headers, **headers}.items())
        )
        cause = None
        try:
            connection = self._connect(self._host)
        except UnreachableError as error:
            cause = error.cause
        if cause is not None:
            raise ProviderError(FailureKind.NETWORK_BEFORE_SEND, cause=cause)
        try:
            exchange = Exchange(connection, self._limits, until)
            exchange.send(request, body)
            yield exchange
        finally:
            connection.close()


class Exchange:
    """One request that was sent, and its answer: status and headers are there from the start."""

    def __init__(self, connection: Connection, limits: Limits, until: float) -> None:
        """Take over a fresh connection; `until` is the end of it all by the monotonic clock."""
        self._connection = connection
        self._limits = limits
        self._until = until
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._heard = False
        self._next = 0.0
        self.status = 0
        self.headers: Mapping[str, str] = {}

    def send(self, request: h11.Request, body: bytes | None) -> None:
        """Send the request, and wait for the head of its answer. Raises ProviderError."""
        data = self._http.send(request) or b""
        if body is not None:
            data += self._http.send(h11.Data(data=body)) or b""
        data += self._http.send(h11.EndOfMessage()) or b""
        lost = None
        try:
            until = min(time.monotonic() + self._limits.send, self._until)
            self._connection.write(data, until)
        except LostError as error:
            lost = error.late
        if lost is not None:
            _ambiguous(late=lost)
        self._next = time.monotonic() + self._limits.answer
        for _ in range(_MAX_INTERIM):
            event = self._event()
            if isinstance(event, h11.Response):
                self.status = event.status_code
                self.headers = {
                    name.decode("ascii"): value.decode("latin-1") for name, value in event.headers
                }
                break
        else:
            _ambiguous()
        self.alive()

    def alive(self) -> None:
        """Note that what came was of use: what is idle may now be idle anew."""
        self._next = time.monotonic() + self._limits.idle

    def whole(self) -> Answer:
        """Return the answer with its body, which comes as promptly as a head."""
        self._next = time.monotonic() + self._limits.head
        body = bytearray()
        for data in self.pieces():
            body += data
            if len(body) > MAX_BODY_BYTES:
                return Answer(self.status, self.headers, b"")
        return Answer(self.status, self.headers, bytes(body))

    def pieces(self) -> Iterator[bytes]:
        """Give out the body as it comes; nothing of one that nobody asked for.

        Raises ProviderError(AMBIGUOUS) if it is cut, or too late.
        """
        # Identity was asked for: a compressed body could be a bomb. A redirect is not followed.
        encoded = self.headers.get("content-encoding", "identity") != "identity"
        if encoded or 300 <= self.status < 400:
            return
        while isinstance(event := self._event(), h11.Data):
            yield bytes(event.data)

    def _event(self) -> h11.Event:
        late = False
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                data = self._connection.read(min(self._next, self._until))
                self._http.receive_data(data)
                if not self._heard:
                    self._heard = True
                    self._next = time.monotonic() + self._limits.head
            if isinstance(event, h11.Event):
                return event
        except h11.RemoteProtocolError:
            pass
        except LostError as error:
            late = error.late
        _ambiguous(late=late)


def _ambiguous(*, late: bool = False) -> NoReturn:
    timeout, unknown = key_pb2.UNREACHABLE_CAUSE_TIMEOUT, key_pb2.UNREACHABLE_CAUSE_UNSPECIFIED
    raise ProviderError(FailureKind.AMBIGUOUS, cause=timeout if late else unknown)
