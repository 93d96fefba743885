"""What the emulator remembers: keys, faults, the call log and its own slowness."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from byokeep.testing.faults import BEHAVIOURS, FAULTS, Behaviour, FaultKind

PathKind = Literal["models", "chat", "other"]
# These change the model's answer, and a model list has none.
CHAT_FAULTS: Final[tuple[FaultKind, ...]] = (
    *("malformed_answer", "truncated", "refusal", "context_too_long"),
    *("drip_comment", "slow_stream", "cut_stream", "error_event"),
)
_MAX_CALLS: Final = 100_000
_MAX_HOLD_SECONDS: Final = 600.0


@dataclass(slots=True)
class Fault:
    """One scripted fault: what it matches (None: anything), and how often it strikes."""

    kind: FaultKind
    provider: str | None = None
    path: str | None = None
    key: str | None = field(default=None, repr=False)
    times: int | None = 1
    seconds: float = 1.0
    status: int = 503
    after_bytes: int | None = None
    events: int = 1
    location: str = "https://example.com/elsewhere"

    def __post_init__(self) -> None:
        """Refuse a kind that doesn't exist; bind answer faults to chat calls."""
        if self.kind not in FAULTS:
            raise ValueError(f"no such fault; there are: {', '.join(FAULTS)}")
        if self.kind in CHAT_FAULTS:
            self.path = "chat"

    def matches(self, provider: str, path: str, key: str) -> bool:
        """Whether the fault strikes this call."""
        return (
            self.times != 0
            and self.provider in (None, provider)
            and self.path in (None, path)
            and (self.key is None or self.key in key)
        )


@dataclass(slots=True)
class Call:
    """One logged call; ``status`` is None while it is in flight, 0 if it was cut."""

    sequence: int
    time: float
    provider: str
    kind: str
    path: str
    key_digest: str
    request_id: str
    status: int | None = None
    fault: str | None = None
    held_ms: int = 0


class State:
    """All that the control API can see and change."""

    def __init__(self, *, accept_any: bool, latency_seconds: float = 0.0) -> None:
        """``accept_any`` takes every key of plausible shape; else only registered ones."""
        self.accept_any = accept_any
        self._initial_latency = latency_seconds
        self._gate = asyncio.Event()
        self._sequence = itertools.count(1)
        self.reset()

    def reset(self) -> None:
        """Forget faults, keys and calls, let held calls go, restore the latency."""
        self.latency_seconds = self._initial_latency
        self.faults: list[Fault] = []
        self.keys: dict[tuple[str, str], Behaviour] = {}
        self.calls: deque[Call] = deque(maxlen=_MAX_CALLS)
        self.held = 0
        self.release()

    def take_fault(self, provider: str, path: str, key: str) -> Fault | None:
        """The first fault that matches, with one of its times used up."""
        return self._take(
            fault
            for fault in self.faults
            if fault.kind != "hang_handshake" and fault.matches(provider, path, key)
        )

    def hangs(self) -> bool:
        """Whether a fault keeps a new connection from its handshake."""
        faults = (one for one in self.faults if one.kind == "hang_handshake" and one.times != 0)
        return self._take(faults) is not None

    def _take(self, faults: Iterator[Fault]) -> Fault | None:
        fault = next(faults, None)
        if fault is not None and fault.times is not None:
            fault.times -= 1
        return fault

    def log(self, provider: str, kind: str, path: str, key: str) -> Call:
        """Note a call that has just come in; the caller fills in how it went."""
        sequence = next(self._sequence)
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        call = Call(sequence, time.time(), provider, kind, path, digest, f"req_emu{sequence:08d}")
        self.calls.append(call)
        return call

    def calls_since(self, sequence: int) -> Iterator[dict[str, Any]]:
        """Logged calls after this sequence number, oldest first."""
        return (asdict(call) for call in self.calls if call.sequence > sequence)

    async def hold(self) -> None:
        """Wait for the next release, ten minutes at most."""
        self.held += 1
        gate = self._gate
        try:
            async with asyncio.timeout(_MAX_HOLD_SECONDS):
                await gate.wait()
        except TimeoutError:
            self.held -= 1

    def release(self) -> int:
        """Let all held calls go; returns how many there were."""
        released, self.held = self.held, 0
        self._gate.set()
        self._gate = asyncio.Event()
        return released

    def behaviour(self, provider: str, key: str, *, plausible: bool) -> Behaviour:
        """How a provider treats this key: by marker, else as registered, else by shape."""
        for marker in BEHAVIOURS[1:]:
            if marker in key:
                return marker
        registered = self.keys.get((provider, key))
        if registered is not None:
            return registered
        return "valid" if self.accept_any and plausible else "invalid"
