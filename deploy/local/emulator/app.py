"""From a request to its answer: which provider, which key, which fault."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable
from typing import Final

from deploy.local.emulator import rules
from deploy.local.emulator.http import Reply, Request, json_reply
from deploy.local.emulator.state import Call, Fault, PathKind, State
from deploy.local.emulator.wire import WIRES, Chat, Wire

# Faults that stand in place of the answer; the others bend the answer.
_INSTEAD: Final[dict[str, Callable[[Wire, PathKind, str, Fault], Reply]]] = {
    "unauthorized": lambda wire, _kind, key, _fault: wire.unauthorized(key),
    "missing_scope": lambda wire, kind, _key, _fault: wire.missing_scope(kind),
    "quota": lambda wire, _kind, _key, _fault: wire.quota(),
    "rate_limited": lambda wire, _kind, _key, fault: wire.rate_limited(fault.seconds),
    "server_error": lambda wire, _kind, _key, fault: wire.server_error(fault.status),
    "echo_key": lambda wire, _kind, key, _fault: wire.bad_request(f"Bad request with key {key}"),
    "redirect": lambda _wire, _kind, _key, fault: Reply(302, b"", (("location", fault.location),)),
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
        if fault is not None and fault.kind == "cut":
            reply = _cut(reply, fault)
        call.status = 0 if reply.cut_after is not None else reply.status
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
            reply = wire.models(request) if kind == "models" else _chat(wire, request, fault)
        if fault is not None and fault.kind == "malformed_json":
            return dataclasses.replace(reply, body=reply.body[: len(reply.body) // 2])
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


def _cut(reply: Reply, fault: Fault) -> Reply:
    middle = len(reply.wire()) - len(reply.body) // 2
    after = middle if fault.after_bytes is None else fault.after_bytes
    return dataclasses.replace(reply, cut_after=after)


def _chat(wire: Wire, request: Request, fault: Fault | None) -> Reply:
    chat = wire.chat(request)
    if not isinstance(chat, Chat):
        return chat
    if fault is not None and fault.kind == "refusal":
        return wire.refusal(chat.model)
    text = json.dumps({"findings": rules.review(chat.user)})
    if fault is not None and fault.kind == "truncated":
        return wire.answer(chat.model, text[: len(text) // 2], truncated=True)
    if fault is not None and fault.kind == "malformed_answer":
        return wire.answer(chat.model, '{"findings": [{"path": 1}]}')
    return wire.answer(chat.model, text)
