"""One child: one attempt, one key, then gone.

It takes the provider, and so the host, from the grant that its seal is bound to; an assignment
that says otherwise is refused before the seal is opened.
"""

from __future__ import annotations

import hashlib
import logging
import os
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from byokeep import hpke, names
from byokeep.keyvault.v1 import grant_pb2, lease_pb2
from byokeep.leasing import lease_info
from byokeep.orchestrator.v1 import review_pb2
from byokeep.runner.v1 import runner_pb2

from services.common import logs, models
from services.llm_runner import failures, plan, prompt, providers, review, validation, wire
from services.llm_runner.calls import Calls
from services.llm_runner.channel import ChildEnd, Kind

log = logging.getLogger(__name__)

SUITE: Final = hpke.HYBRID_V1


@dataclass(frozen=True, slots=True)
class Tools:
    """What the zygote makes once for all children."""

    tls: ssl.SSLContext
    catalog: models.Catalog
    connect: Callable[[ChildEnd, ssl.SSLContext, str], providers.Connection] = wire.connect


@dataclass(frozen=True, slots=True)
class _Lease:
    adapter: providers.Adapter
    key: str = field(repr=False)
    done_chunk_ids: frozenset[str]


class _RefusedError(Exception):
    """The attempt ends here, with this outcome."""

    def __init__(self, outcome: runner_pb2.Outcome) -> None:
        super().__init__(outcome.message)
        self.outcome = outcome


def prepare(environ: Mapping[str, str]) -> Tools:
    """Make what children share. Raises ValueError or OSError where a setting is wrong."""
    override = environ.get("BYOKEEP_MODELS_FILE")
    return Tools(wire.tls_context(environ), models.load(Path(override) if override else None))


def main(channel: ChildEnd, tools: Tools) -> None:
    """Run the attempt that the parent assigns, and say how it ended."""
    assign = runner_pb2.Assign.FromString(channel.receive(Kind.ASSIGN))
    try:
        outcome = _attempt(channel, tools, assign)
    except _RefusedError as refused:
        outcome = refused.outcome
    except Exception as error:
        # Types and places only: frames and texts may hold the key.
        logs.failure(log, "attempt_failed", error, attempt=assign.attempt_id)
        outcome = failures.failed(
            review_pb2.FAILURE_REASON_INTERNAL, "Something unforeseen; the runner's log has more."
        )
    channel.send(Kind.END, outcome)


def _attempt(channel: ChildEnd, tools: Tools, assign: runner_pb2.Assign) -> runner_pb2.Outcome:
    reviewing = assign.purpose == grant_pb2.LEASE_PURPOSE_REVIEW
    work = _plan(assign, tools) if reviewing else None
    lease = _lease(channel, assign, work)
    connect = partial(tools.connect, channel, tools.tls)
    limits = providers.REVIEW if reviewing else providers.VALIDATION
    client = lease.adapter.client(lease.key, connect, limits)
    if work is None:
        return validation.run(channel, Calls(channel, 1), lease.adapter, client)
    calls = Calls(channel, assign.max_calls)
    return review.run(channel, calls, work, lease.done_chunk_ids, lease.adapter, client)


def _plan(assign: runner_pb2.Assign, tools: Tools) -> plan.Plan:
    try:
        return plan.plan(assign, names.provider_id(assign.provider), tools.catalog)
    except plan.PlanError as error:
        refusal = failures.failed(review_pb2.FAILURE_REASON_BAD_REQUEST, str(error))
    raise _RefusedError(refusal)


def _lease(channel: ChildEnd, assign: runner_pb2.Assign, work: plan.Plan | None) -> _Lease:
    private = hpke.PrivateKey.generate(SUITE)
    channel.send(Kind.ACCEPTED, _accepted(private.public_bytes, work))
    proceed = runner_pb2.Proceed.FromString(channel.receive(Kind.PROCEED))
    leased = lease_pb2.LeaseKeyResponse.FromString(channel.receive(Kind.LEASE))
    grant = grant_pb2.Grant.FromString(proceed.grant.payload)
    _check(grant, assign, private.public_bytes)
    try:
        key = private.open(leased.sealed_key, lease_info(proceed.grant.payload, leased.lease_id))
    except hpke.SealError:
        key = b""
    if not key:
        raise _refused("The leased key does not open for this attempt.")
    channel.withhold(key.decode("ascii"))
    opened = lease_pb2.PlaintextReport(process_id=os.getpid())
    opened.open_time.FromNanoseconds(time.time_ns())
    channel.send(Kind.OPENED, opened)
    return _Lease(
        providers.ADAPTERS[names.provider_id(grant.provider)],
        key.decode("ascii"),
        frozenset(proceed.done_chunk_ids),
    )


def _accepted(public_key: bytes, work: plan.Plan | None) -> runner_pb2.Accepted:
    return runner_pb2.Accepted(
        prompt_version=prompt.VERSION,
        public_key=public_key,
        suite=SUITE,
        chunks=[review.planned(chunk) for chunk in (work.chunks if work else ())],
    )


def _check(grant: grant_pb2.Grant, assign: runner_pb2.Assign, public_key: bytes) -> None:
    """Refuse a grant for anything but this attempt in this process.

    Its signature is keyvault's to verify: a seal that opens for these bytes says that it did.
    """
    if grant.provider != assign.provider:
        raise _refused("The grant is for another provider than the assignment.")
    if (grant.attempt_id, grant.fence, grant.purpose, grant.recipient_key_sha256) != (
        assign.attempt_id,
        assign.fence,
        assign.purpose,
        hashlib.sha256(public_key).digest(),
    ):
        raise _refused("The grant is not for this attempt.")


def _refused(message: str) -> _RefusedError:
    return _RefusedError(failures.failed(review_pb2.FAILURE_REASON_LEASE_REFUSED, message))
