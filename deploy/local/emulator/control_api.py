"""The control listener: JSON over plain HTTP."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from byokeep.testing.faults import BEHAVIOURS

from deploy.local.emulator.http import Reply, Request, json_reply
from deploy.local.emulator.models import PROVIDERS
from deploy.local.emulator.state import Fault, State

_FAULT_FIELDS = {
    "kind": str,
    "provider": str,
    "path": str,
    "key": str,
    "times": int,
    "seconds": float,
    "status": int,
    "after_bytes": int,
    "events": int,
    "location": str,
}


class ControlApi:
    """Lets a test or a person script the emulator and read its call log."""

    def __init__(self, state: State) -> None:
        """The state is shared with the providers' listener."""
        self._state = state

    async def handle(self, request: Request) -> Reply:
        """Answer one control request; a mistake in it is a 400 with a sentence."""
        try:
            document = self._dispatch(request)
        except (TypeError, ValueError, KeyError) as error:
            return json_reply(400, {"error": str(error)})
        if document is None:
            return json_reply(404, {"error": "no such control"})
        return json_reply(200, document)

    def _dispatch(self, request: Request) -> dict[str, Any] | None:
        state = self._state
        match request.method, request.path:
            case "GET", "/calls":
                since = int(request.query.get("since", "0"))
                return {"calls": list(state.calls_since(since))}
            case "DELETE", "/calls":
                state.calls.clear()
            case "GET", "/faults":
                return {"faults": [_shown(fault) for fault in state.faults], "held": state.held}
            case "POST", "/faults":
                state.faults.append(_fault(request))
            case "DELETE", "/faults":
                state.faults.clear()
            case "POST", "/keys":
                self._add_key(_body(request))
            case "POST", "/latency":
                state.latency_seconds = _seconds(_body(request)["seconds"])
            case "POST", "/release":
                return {"released": state.release()}
            case "POST", "/reset":
                state.reset()
            case _:
                return None
        return {}

    def _add_key(self, body: dict[str, Any]) -> None:
        provider, key, behaviour = body["provider"], body["key"], body.get("behaviour", "valid")
        if provider not in PROVIDERS or behaviour not in BEHAVIOURS or not isinstance(key, str):
            raise ValueError(
                f"a key needs a provider ({', '.join(PROVIDERS)}), a key, and a behaviour"
                f" ({', '.join(BEHAVIOURS)})"
            )
        self._state.keys[provider, key] = behaviour


def _body(request: Request) -> dict[str, Any]:
    body = request.json()
    if not isinstance(body, dict):
        raise ValueError("the body must be a JSON object")
    return body


def _fault(request: Request) -> Fault:
    body = _body(request)
    for name, value in body.items():
        wanted = _FAULT_FIELDS.get(name)
        number = wanted is float and type(value) in (int, float)
        if wanted is None or not (number or isinstance(value, wanted) or value is None):
            raise ValueError(
                f"a fault has no {name} of this type; it has: {', '.join(_FAULT_FIELDS)}"
            )
    if "seconds" in body:
        _seconds(body["seconds"])
    if body.get("provider") not in (None, *PROVIDERS):
        raise ValueError(f"no such provider; there are: {', '.join(PROVIDERS)}")
    return Fault(**body)


def _seconds(value: object) -> float:
    if type(value) not in (int, float) or not 0 <= (seconds := float(str(value))) < math.inf:
        raise ValueError("seconds must be a number of at least 0")
    return seconds


def _shown(fault: Fault) -> dict[str, Any]:
    return {**dataclasses.asdict(fault), "key": None if fault.key is None else "set"}
