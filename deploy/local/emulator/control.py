"""Client of the emulator's control listener, for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from deploy.local.emulator.state import FaultKind


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


class EmulatorControl:
    """Scripts a running emulator. Raises httpx.HTTPStatusError if it doesn't like a request."""

    def __init__(self, url: str, timeout: float = 10.0) -> None:
        """``url`` is the control listener's, such as ``http://127.0.0.1:PORT``."""
        self._client = httpx.Client(base_url=url, timeout=timeout, trust_env=False)

    def fault(
        self,
        kind: FaultKind,
        *,
        provider: str | None = None,
        path: str | None = None,
        key: str | None = None,
        times: int | None = 1,
        **settings: float | int | str,
    ) -> None:
        """Make the next ``times`` matching calls (None: all of them) fail in this way.

        ``deploy.local.emulator.state.FAULTS`` says what each kind does, and with which of the
        settings ``seconds``, ``status``, ``after_bytes``, ``events`` and ``location``. ``key``
        is any part of a key; ``path`` is "models" or "chat".
        """
        match = {"provider": provider, "path": path, "key": key}
        chosen = {name: value for name, value in match.items() if value is not None}
        self._post("/faults", {"kind": kind, "times": times, **chosen, **settings})

    def calls(self, since: int = 0) -> list[LoggedCall]:
        """Calls with a sequence number above ``since``, oldest first."""
        response = self._client.get("/calls", params={"since": since})
        response.raise_for_status()
        return [LoggedCall(**call) for call in response.json()["calls"]]

    def held(self) -> int:
        """How many calls a hold fault keeps waiting right now."""
        response = self._client.get("/faults")
        response.raise_for_status()
        return int(response.json()["held"])

    def clear_faults(self) -> None:
        """Drop all scripted faults; calls that are held stay held."""
        self._client.delete("/faults").raise_for_status()

    def clear_calls(self) -> None:
        """Empty the call log; sequence numbers go on."""
        self._client.delete("/calls").raise_for_status()

    def add_key(self, provider: str, key: str, behaviour: str = "valid") -> None:
        """Register a key: "valid", "invalid", "restricted" or "noquota"."""
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
        response = self._client.post(path, json=body)
        response.raise_for_status()
        document: dict[str, Any] = response.json()
        return document
