"""From a request to its answer: which provider, which key, which fault."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any, Final

from deploy.local.emulator import echo, rules
from deploy.local.emulator.http import Reply, Request, Trickle, chunk, json_reply, stream_reply
from deploy.local.emulator.state import Call, Fault, PathKind, State
from deploy.local.emulator.wire import WIRES, Chat, End, Wire

_PIECE: Final = 40  # characters of an answer in an event
# Faults that stand in place of the answer; the others bend the answer.
_HTML: Final = b"<html><head><title>403 Forbidden</title></head><body>cloudflare</body></html>"
_INSTEAD: Final[dict[str, Callable[[Wire, PathKind, str, Fault], Reply]]] = {
    "unauthorized": lambda wire, _kind, key, _fault: wire.unauthorized(key),
    "missing_scope": lambda wire, kind, _key, _fault: wire.missing_scope(kind),
    "quota": lambda wire, _kind, _key, _fault: wire.quota(),
    "rate_limited": lambda wire, _kind, _key, fault: wire.rate_limited(fault.seconds),
    "server_error": lambda wire, _kind, _key, fault: wire.server_error(fault.status),
    "echo_key": lambda wire, _kind, key, _fault: wire.bad_request(f"Bad request with key {key}"),
    "region_refused": lambda wire, _kind, _key, _fault: wire.region_refused(),
    "blocked": lambda _wire, _kind, _key, _fault: Reply(
        403, _HTML, (("content-type", "text/html"),)
    ),
    "redirect": lambda _wire, _kind, _key, fault: Reply(
        302, headers=(("location", fault.location),)
    ),
}
_STREAM: Final = stream_reply(())
# Faults that never get to an end: what begins, and what then drips.
_TRICKLES: Final[dict[str, tuple[bytes, bytes]]] = {
    "flood_1xx": (b"", b"HTTP/1.1 103 Early Hints\r\nlink: </style.css>\r\n\r\n"),
    "drip_head": (b"HTTP/1.1 200 OK\r\nx-drip: ", b"a"),
    "drip_extension": (_STREAM.head() + b"10;", b"x"),
    "drip_comment": (_STREAM.head(), chunk(b": ping\n\n")),
}


class App:
    """Answers providers' requests as the state says."""

    def __init__(self, state: State) -> None:
        """The state is shared with the control API."""
        self._state = state

    async def handle(self, request: Request) -> Reply:
        """Answer one request; the Host header says which provider is meant."""
        wire = WIRES.get(request.headers.get("host", "").partition(":")[0].lower())
        if wire is None:
            return json_reply(421, {"error": "the Host header names no known provider"})
        kind, key = wire.route(request), wire.key(request) or ""
        call = self._state.log(wire.name, kind, request.path, key)
        fault = self._state.take_fault(wire.name, kind, key) if kind != "other" else None
        call.fault = fault.kind if fault else None
        await self._wait(call, fault)
        reply = self._answer(wire, kind, key, request, fault)
        header = "request-id" if wire.name == "anthropic" else "x-request-id"
        reply = dataclasses.replace(reply, headers=(*reply.headers, (header, call.request_id)))
        if fault is not None:
            reply = _bent(wire, reply, fault)
        whole = reply.cut_after is None and reply.trickle is None
        call.status = reply.status if whole else 0
        return reply

    async def _wait(self, call: Call, fault: Fault | None) -> None:
        started = time.monotonic()
        if fault is not None and fault.kind == "hold":
            await self._state.hold()
        seconds = self._state.latency_seconds
        if fault is not None and fault.kind == "slow":
            seconds += fault.seconds
        if seconds > 0:
            await asyncio.sleep(seconds)
        call.held_ms = round((time.monotonic() - started) * 1000)

    def _answer(
        self, wire: Wire, kind: PathKind, key: str, request: Request, fault: Fault | None
    ) -> Reply:
        if kind == "other":
            return wire.not_found(request)
        if fault is not None and fault.kind in _INSTEAD:
            return _INSTEAD[fault.kind](wire, kind, key, fault)
        reply = self._refused(wire, kind, key)
        if reply is None:
            echoed = key if fault is not None and fault.kind == "echo" else None
            if kind == "models":
                reply = wire.models(request, [echoed] if echoed else [])
            else:
                reply = _chat(wire, request, fault, echoed)
        return reply

    def _refused(self, wire: Wire, kind: PathKind, key: str) -> Reply | None:
        if not key:
            return wire.no_key()
        behaviour = self._state.behaviour(wire.name, key, plausible=wire.plausible(key))
        if behaviour == "invalid":
            return wire.unauthorized(key)
        if behaviour == "noquota":
            return wire.quota()
        if behaviour == "restricted" and kind == "models":
            return wire.missing_scope(kind)
        return None


def _bent(wire: Wire, reply: Reply, fault: Fault) -> Reply:
    """The reply as its fault has it."""
    events = reply.events or ()
    changed: dict[str, Any] = {}
    if fault.kind in _TRICKLES:
        changed = {"trickle": Trickle(*_TRICKLES[fault.kind], fault.seconds)}
    elif fault.kind == "slow_stream" and events:
        changed = {"pause": fault.seconds}
    elif fault.kind == "cut":
        middle = (len(reply.head()) + len(reply.wire())) // 2
        changed = {"cut_after": middle if fault.after_bytes is None else fault.after_bytes}
    elif fault.kind == "cut_stream" and events:
        begun = dataclasses.replace(reply, events=events[: fault.events])
        changed = {"cut_after": len(begun.wire()) - len(b"0\r\n\r\n")}
    elif fault.kind == "error_event" and events:
        changed = {"events": (*events[: fault.events], wire.error_event())}
    elif fault.kind == "malformed_json" and events:
        changed = {"events": (events[0], events[1][: len(events[1]) // 2] + b"\n\n", *events[2:])}
    elif fault.kind == "malformed_json":
        changed = {"body": reply.body[: len(reply.body) // 2]}
    return dataclasses.replace(reply, **changed)


def _chat(wire: Wire, request: Request, fault: Fault | None, echoed: str | None) -> Reply:
    chat = wire.chat(request)
    if not isinstance(chat, Chat):
        return chat
    kind = fault.kind if fault is not None else None
    longest = 0 if fault is None else fault.after_bytes or 0
    if kind == "context_too_long" and len(chat.user) > longest:
        return wire.context_too_long()
    findings = rules.review(chat.user)
    text = json.dumps({"findings": echo.echoed(findings, echoed) if echoed else findings})
    end: End = "stop"
    if kind == "refusal":
        text, end = "", "refusal"
    elif kind == "truncated":
        text, end = text[: len(text) // 2], "length"
    elif kind == "malformed_answer":
        text = '{"findings": [{"path": 1}]}'
    pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]
    return stream_reply(wire.events(chat.model, pieces, end))
