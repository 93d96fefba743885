"""One HTTP/1.1 request to a provider, and its answer within bounds of time and size.

The client has what a call to one host with one key needs: no redirects, cookies, proxies or
compression, and a connection for each request, since a kept one that the provider closes
meanwhile would make a call ambiguous that was never taken.

It is httpx over a transport of our own, which reads and writes what `wire.Connection` is: httpx's
own timeouts begin anew with each byte, and its pool dials. Exceptions of httpx and httpcore hold
parts of headers and answers, so none leaves this module, not even as the context of another.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Final, NoReturn, Protocol

import httpcore
import httpx
from byokeep.orchestrator.v1 import key_pb2

from services.llm_runner.providers.errors import FailureKind, ProviderError
from services.llm_runner.providers.findings import load_json
from services.llm_runner.wire import LostError, UnreachableError

MAX_HEAD_BYTES: Final = 256 * 1024
"""Most bytes until the final answer's head is there, after any answers 1xx."""
MAX_BODY_BYTES: Final = 8 * 1024 * 1024
"""Longest body that is read whole."""
MAX_STREAM_BYTES: Final = 64 * 1024 * 1024
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

    __slots__ = ("_host", "_http", "_limits")

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
        self._limits = limits
        # httpx logs each URL at INFO, httpcore each header block at DEBUG.
        for name in ("httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._http = httpx.Client(
            transport=_Transport(connect),
            base_url=f"https://{host}",
            headers={
                "accept-encoding": "identity",
                "user-agent": "byokeep",
                "connection": "close",
                **headers,
            },
            # A jar that takes no cookie of anybody.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            follow_redirects=False,
            trust_env=False,
        )

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
        headers = {"accept": "application/json"}
        with self._exchange("GET", path, until, params=params, headers=headers) as exchange:
            return exchange.whole()

    @contextmanager
    def post(self, path: str, body: Mapping[str, Any]) -> Iterator[Exchange]:
        """Give out the exchange of a POST whose answer is to be a stream. Raises as `get`."""
        # A lone surrogate would raise an error that carries the whole prompt.
        content = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        headers = {"accept": "text/event-stream", "content-type": "application/json"}
        until = self.deadline()
        with self._exchange("POST", path, until, content=content, headers=headers) as exchange:
            yield exchange

    @contextmanager
    def _exchange(self, method: str, path: str, until: float, **request: Any) -> Iterator[Exchange]:
        pace = _Pace(self._limits, until)
        extensions = {_PACE: pace}
        response = cause = late = None
        try:
            built = self._http.build_request(method, path, extensions=extensions, **request)
            response = self._http.send(built, stream=True)
        except UnreachableError as error:
            cause = error.cause
        except LostError as error:
            late = error.late
        except (httpx.HTTPError, httpcore.ProtocolError):
            late = False
        if cause is not None:
            raise ProviderError(FailureKind.NETWORK_BEFORE_SEND, cause=cause)
        if response is None:
            _ambiguous(late=bool(late))
        try:
            pace.alive()
            yield Exchange(response, pace)
        finally:
            response.close()


class _Pace:
    """When the step that is under way has to be over; every read and write asks anew."""

    def __init__(self, limits: Limits, until: float) -> None:
        self._limits = limits
        self._until = until
        self._step = until
        self._heard = False
        #: Bytes that were read of the answer so far.
        self.read = 0

    @property
    def deadline(self) -> float:
        """By the monotonic clock."""
        return min(self._step, self._until)

    def connected(self) -> None:
        """Note that there is a connection: the request is sent now."""
        self._step = time.monotonic() + self._limits.send

    def sent(self) -> None:
        """Note that the request is sent: its answer is waited for."""
        self._step = time.monotonic() + self._limits.answer

    def heard(self, size: int) -> None:
        """Note what came: with the first byte the head has to come soon."""
        self.read += size
        if not self._heard:
            self._heard = True
            self.prompt()

    def prompt(self) -> None:
        """Expect what comes as promptly as a head."""
        self._step = time.monotonic() + self._limits.head

    def alive(self) -> None:
        """Note that what came was of use: what is idle may now be idle anew."""
        self._step = time.monotonic() + self._limits.idle


_PACE: Final = "byokeep.pace"


class _Transport(httpx.BaseTransport):
    """A fresh connection for each request; what can't be reached raises UnreachableError."""

    def __init__(self, connect: Callable[[str], Connection]) -> None:
        self._connect = connect

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; its extensions have the pace of the exchange."""
        url, pace = request.url, request.extensions[_PACE]
        origin = httpcore.Origin(url.raw_scheme, url.raw_host, 443)
        stream = _Stream(self._connect(url.host), pace)
        connection = httpcore.HTTP11Connection(origin, stream)
        answered = False
        try:
            answer = connection.handle_request(
                httpcore.Request(
                    request.method,
                    httpcore.URL(
                        scheme=url.raw_scheme, host=url.raw_host, port=443, target=url.raw_path
                    ),
                    headers=request.headers.raw,
                    content=request.stream,
                )
            )
            answered = True
        finally:
            if not answered:
                stream.close()
        stream.body()
        return httpx.Response(
            answer.status, headers=answer.headers, stream=_Body(answer.stream, stream)
        )


class _Body(httpx.SyncByteStream):
    """The body of an answer as it comes; closing it closes the connection."""

    def __init__(self, pieces: Any, stream: _Stream) -> None:
        self._pieces, self._stream = pieces, stream

    def __iter__(self) -> Iterator[bytes]:
        yield from self._pieces

    def close(self) -> None:
        self._stream.close()


class _Stream(httpcore.NetworkStream):
    """A connection as httpcore has it, with the pace's deadlines in place of its timeouts."""

    def __init__(self, connection: Connection, pace: _Pace) -> None:
        self._connection, self._pace = connection, pace
        self._most: int | None = MAX_HEAD_BYTES
        self._sending = True
        pace.connected()

    def body(self) -> None:
        """Note that the head is there: what comes now is the body, which others bound."""
        self._most = None

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._sending:
            self._sending = False
            self._pace.sent()
        data = self._connection.read(self._pace.deadline)
        self._pace.heard(len(data))
        if self._most is not None and self._pace.read > self._most:
            self.close()
            raise LostError(late=False)
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._connection.write(buffer, self._pace.deadline)

    def close(self) -> None:
        self._connection.close()

    def start_tls(self, *args: Any, **settings: Any) -> httpcore.NetworkStream:
        """Nothing: the connection is a TLS connection from its start."""
        return self

    def get_extra_info(self, info: str) -> Any:
        return None


class Exchange:
    """One request that was sent, and its answer: status and headers are there from the start."""

    def __init__(self, response: httpx.Response, pace: _Pace) -> None:
        """Take over an answer whose body has not been read."""
        self._response = response
        self._pace = pace
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers

    def alive(self) -> None:
        """Note that what came was of use: what is idle may now be idle anew."""
        self._pace.alive()

    def whole(self) -> Answer:
        """Return the answer with its body, which comes as promptly as a head. Of an error's that is
        cut, what came: its status says that nothing was done for the call."""
        self._pace.prompt()
        body = bytearray()
        try:
            for data in self.pieces():
                body += data
                if len(body) > MAX_BODY_BYTES:
                    return Answer(self.status, self.headers, b"")
        except ProviderError:
            if self.status < 400:
                raise
        return Answer(self.status, self.headers, bytes(body))

    def pieces(self) -> Iterator[bytes]:
        """Give out the body as it comes; nothing of one that nobody asked for.

        Raises ProviderError(AMBIGUOUS) if it is cut, or too late.
        """
        # Identity was asked for: a compressed body could be a bomb. A redirect is not followed.
        encoded = self.headers.get("content-encoding", "identity") != "identity"
        if encoded or 300 <= self.status < 400:
            return
        late = None
        try:
            yield from self._response.iter_raw()
        except LostError as error:
            late = error.late
        except (httpx.HTTPError, httpcore.ProtocolError):
            late = False
        if late is not None:
            _ambiguous(late=late)


def _ambiguous(*, late: bool = False) -> NoReturn:
    timeout, unknown = key_pb2.UNREACHABLE_CAUSE_TIMEOUT, key_pb2.UNREACHABLE_CAUSE_UNSPECIFIED
    raise ProviderError(FailureKind.AMBIGUOUS, cause=timeout if late else unknown)
