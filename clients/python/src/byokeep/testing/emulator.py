"""Scripts the emulator of the three providers, and reads what it saw."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, Unpack

import httpx

from byokeep import Error
from byokeep.testing.faults import Behaviour, FaultKind, Provider


class FaultSettings(TypedDict, total=False):
    """What some kinds of fault take beside what they match."""

    seconds: float
    status: int
    after_bytes: int
    events: int
    location: str


class EmulatorError(Error, ValueError):
    """The emulator refuses a request; the text says what there is instead."""


@dataclass(frozen=True, slots=True)
class LoggedCall:
    """One call that the emulator saw.

    ``time`` is Unix time in seconds; ``status`` is None while in flight and 0 if the
    answer was cut; ``key_digest`` is the first 8 hex digits of the key's SHA-256.
    """

    sequence: int
    time: float
    provider: str
    kind: str
    path: str
    key_digest: str
    request_id: str
    status: int | None
    fault: str | None
    held_ms: int


class Emulator:
    """Scripts a running emulator. Raises EmulatorError for a request that makes no sense, and
    httpx.TransportError where nobody listens."""

    def __init__(self, url: str, timeout: float = 10.0) -> None:
        """``url`` is the control listener's, such as ``http://127.0.0.1:PORT``."""
        self._client = httpx.Client(base_url=url, timeout=timeout, trust_env=False)

    def fault(
        self,
        kind: FaultKind,
        *,
        provider: Provider | None = None,
        path: Literal["models", "chat"] | None = None,
        key: str | None = None,
        times: int | None = 1,
        **settings: Unpack[FaultSettings],
    ) -> None:
        """Make the next ``times`` matching calls (None: all of them) fail in this way.

        `byokeep.testing.faults.FAULTS` says what each kind does, and with which of the settings.
        ``key`` is any part of a key; ``path`` is "models" (the validation of a key) or "chat".
        """
        match = {"provider": provider, "path": path, "key": key}
        chosen = {name: value for name, value in match.items() if value is not None}
        self._post("/faults", {"kind": kind, "times": times, **chosen, **settings})

    def calls(self, since: int = 0) -> list[LoggedCall]:
        """Calls with a sequence number above ``since``, oldest first."""
        answer = self._ask("GET", "/calls", params={"since": since})
        return [LoggedCall(**call) for call in answer["calls"]]

    def held(self) -> int:
        """How many calls a hold fault keeps waiting right now."""
        return int(self._ask("GET", "/faults")["held"])

    def clear_faults(self) -> None:
        """Drop all scripted faults; calls that are held stay held."""
        self._ask("DELETE", "/faults")

    def clear_calls(self) -> None:
        """Empty the call log; sequence numbers go on."""
        self._ask("DELETE", "/calls")

    def add_key(self, provider: Provider, key: str, behaviour: Behaviour = "valid") -> None:
        """Say how a provider treats a key from now on."""
        self._post("/keys", {"provider": provider, "key": key, "behaviour": behaviour})

    def latency(self, seconds: float) -> None:
        """Make every call take this much longer."""
        self._post("/latency", {"seconds": seconds})

    def release(self) -> int:
        """Let the held calls go; returns how many there were."""
        return int(self._post("/release", {})["released"])

    def reset(self) -> None:
        """Forget faults, registered keys and calls, release held ones, restore latency."""
        self._post("/reset", {})

    def close(self) -> None:
        """Close the connection to the control listener."""
        self._client.close()

    def __enter__(self) -> Self:
        """Use as a context manager closes the client."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """See __enter__."""
        self.close()

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._ask("POST", path, json=body)

    def _ask(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        response = self._client.request(method, path, **more)
        document: dict[str, Any] = response.json()
        if response.is_error:
            raise EmulatorError(
                document.get("error", f"the emulator answers {response.status_code}")
            )
        return document
