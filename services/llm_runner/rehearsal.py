"""An attempt played through in the zygote, without a provider, before anything is forked.

What Python and OpenSSL make on first use (compiled patterns, caches, tables, specialised code) is
then made once and shared by all children, instead of in each: a third of a child's page faults.
A build whose pieces don't fit together doesn't start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import ssl
from typing import Final

from byokeep import hpke
from byokeep.common.v1 import options_pb2
from byokeep.keyvault.v1 import grant_pb2, lease_pb2
from byokeep.leasing import lease_info
from byokeep.orchestrator.v1 import review_pb2
from byokeep.runner.v1 import runner_pb2
from google.protobuf.message import Message

from services.llm_runner import child
from services.llm_runner.channel import ChildEnd, Kind

_KEY: Final = b"no-key-only-a-rehearsal"
_DIFF: Final = b"--- a/one.py\n+++ b/one.py\n@@ -0,0 +1 @@\n+one = 1\n"
_FINDING: Final = {
    "path": "one.py",
    "start_line": 1,
    "end_line": 1,
    "severity": "info",
    "category": "style",
    "title": "Title",
    "message": "Message.",
    "suggestion": "",
}
_LONG: Final = 3600
# Python specialises a function's code, and so writes to it, over its first dozen of calls.
_TIMES: Final = 16


def rehearse(tools: child.Tools) -> None:
    """Play a review through, often enough. Raises ValueError where it does not end well."""
    for _ in range(_TIMES):
        _review(tools)
    _greet(tools.tls)


def _greet(tls: ssl.SSLContext) -> None:
    """Say the first words of a handshake, to nobody: OpenSSL then looks its algorithms up."""
    greeting = tls.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="rehearsal.invalid")
    with contextlib.suppress(ssl.SSLWantReadError):
        greeting.do_handshake()


def _review(tools: child.Tools) -> None:
    channel = _Script()
    child.main(channel, dataclasses.replace(tools, connect=lambda *_: _Answering()))
    outcome = runner_pb2.Outcome.FromString(channel.said[Kind.END])
    if outcome.failure != review_pb2.FAILURE_REASON_UNSPECIFIED:
        raise ValueError(f"the rehearsal failed: {outcome.message}")


class _Answering:
    """Says what a provider would."""

    def __init__(self) -> None:
        found = json.dumps({"findings": [_FINDING]})
        choices: list[dict[str, object]] = [
            {"delta": {"content": found[:40]}},
            {"delta": {"content": found[40:]}},
            {"delta": {}, "finish_reason": "stop"},
        ]
        head = (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        events = (b"data: %s\n\n" % json.dumps({"choices": [one]}).encode() for one in choices)
        self._said = iter([head, *(b"%x\r\n%s\r\n" % (len(one), one) for one in events)])

    def read(self, until: float) -> bytes:
        return next(self._said)

    def write(self, data: bytes, until: float) -> None:
        pass

    def close(self) -> None:
        pass


class _Script(ChildEnd):
    """Says what a parent would."""

    def __init__(self) -> None:
        self.said: dict[Kind, bytes] = {}
        self._proceed = runner_pb2.Proceed()

    def _write(self, kind: Kind, payload: bytes) -> None:
        self.said[kind] = payload

    def receive(self, kind: Kind) -> bytes:
        answers = {Kind.ASSIGN: self._assign, Kind.PROCEED: self._go, Kind.LEASE: self._lease}
        return answers[kind]().SerializeToString() if kind in answers else b""

    def _assign(self) -> Message:
        return runner_pb2.Assign(
            provider=options_pb2.PROVIDER_OPENAI,
            purpose=grant_pb2.LEASE_PURPOSE_REVIEW,
            model="rehearsal",
            max_calls=1,
            timeout_seconds=60,
            input=review_pb2.ReviewInput(repository="re/hearsal", diff=_DIFF),
        )

    def _go(self) -> Message:
        grant = grant_pb2.Grant(
            provider=options_pb2.PROVIDER_OPENAI,
            purpose=grant_pb2.LEASE_PURPOSE_REVIEW,
            recipient_key_sha256=hashlib.sha256(self._accepted().public_key).digest(),
        )
        self._proceed.grant.payload = grant.SerializeToString()
        return self._proceed

    def _lease(self) -> Message:
        accepted = self._accepted()
        info = lease_info(self._proceed.grant.payload, "")
        leased = lease_pb2.LeaseKeyResponse(
            sealed_key=hpke.seal(accepted.suite, accepted.public_key, _KEY, info)
        )
        leased.life.FromSeconds(_LONG)
        return leased

    def _accepted(self) -> runner_pb2.Accepted:
        return runner_pb2.Accepted.FromString(self.said[Kind.ACCEPTED])
