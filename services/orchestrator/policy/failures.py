"""What follows from a failure: one table, read wherever something has failed.

Each FailureReason either waits (uncounted, until the stated limit), is tried again (counted, up to
MAX_TRIES), or is final. What waits may hold up more than one attempt: every attempt of the key,
or of the tenant, pauses then, so that not each of them has to find out by itself.

Pure. `decide` is for attempts of reviews, `verdict_of` for those of validations.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import grpc
from byokeep.orchestrator.v1.key_pb2 import UnreachableCause
from byokeep.orchestrator.v1.review_pb2 import FailureReason

from services.common.errors import ByokeepError
from services.orchestrator.policy.states import Reason, Verdict

_dice: Final = random.SystemRandom()
MAX_TRIES: Final = 4
#: A tenant's budget of retries: so many at once, and one more each so many seconds. What is beyond
#: is later, not lost: a provider that fails for all of a tenant's reviews is not asked by all of
#: them, again and again.
RETRIES_AT_ONCE: Final = 20
RETRY_SECONDS: Final = 15.0
_LONGEST_DELAY: Final = 60.0
_SOON: Final = 1.0
_ROOM: Final = (Reason.RUNNERS_FULL, Reason.RUNNER_UNAVAILABLE)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt failed.

    `ambiguous`: the answer to a started call was lost. `retry_after_seconds`: not sooner, as who
    refused said; 0 where nobody said. `cause`: what was unreachable, or an empty text.
    """

    reason: Reason
    retry_after_seconds: float = 0.0
    ambiguous: bool = False
    cause: str = ""


class Follows(enum.Enum):
    """What follows for a review whose attempt failed."""

    #: Uncounted: it goes on by itself, or ends with this reason at the stated limit.
    WAIT = enum.auto()
    #: Counted: a few times.
    RETRY = enum.auto()
    #: Nothing could help, or it could cost twice.
    END = enum.auto()


class Holds(enum.Enum):
    """Whose attempts wait."""

    ATTEMPT = enum.auto()
    KEY = enum.auto()
    TENANT = enum.auto()


class Row(NamedTuple):
    """One reason of the table.

    `until_told`: it ends with an event (a promotion, a resumed tenant), not after a time.
    `newer`: a newer version of the key helps, at once; `other_model`: another model does.
    `says_itself`: it stays the reason though a call's answer was lost. `refused`: the provider did
    nothing for the call, so it does not count against the review's ceiling. `checks`: the
    provider's model list is asked whether the key is good. `failed` and `waits` are what the tenant
    reads.
    """

    follows: Follows
    failed: str
    waits: str = ""
    holds: Holds = Holds.ATTEMPT
    until_told: bool = False
    newer: bool = False
    other_model: bool = False
    says_itself: bool = False
    refused: bool = False
    checks: bool = False
    verdict: Verdict = Verdict.UNREACHABLE


_LATER: Final = " Retry the review later."
TABLE: Final[Mapping[Reason, Row]] = {
    # --- waits
    Reason.RUNNER_UNAVAILABLE: Row(
        Follows.WAIT, "No runner answered." + _LATER, "No runner answers."
    ),
    Reason.RUNNERS_FULL: Row(
        Follows.WAIT, "No runner had room for it." + _LATER, "Every runner is full."
    ),
    Reason.KEYVAULT_UNAVAILABLE: Row(
        Follows.WAIT,
        "keyvault gave no lease: it, or the backend of its key-encryption keys, did not answer, or"
        " it did not believe the orchestrator's grants." + _LATER,
        "keyvault gives no lease, and nothing is sent meanwhile: it, or the backend of its"
        " key-encryption keys, does not answer, or it does not believe the orchestrator's grants."
        " Whoever runs byokeep sees which.",
        Holds.KEY,
    ),
    Reason.LEASE_CAP: Row(
        Follows.WAIT,
        "A lease cap that keyvault holds was reached all the time." + _LATER,
        "A lease cap that keyvault holds is reached, of key {key} or of the tenant.",
        Holds.KEY,
    ),
    Reason.TENANT_SUSPENDED: Row(
        Follows.WAIT,
        "The tenant is suspended, or its leases are held back. Once an operator has resumed it,"
        " retry the review.",
        "The tenant is suspended, or its leases are held back, until an operator resumes it.",
        Holds.TENANT,
    ),
    Reason.KEY_NEEDS_REKEY: Row(
        Follows.WAIT,
        "The provider rejected the key, and no new version came. Add a new version of {key}, then"
        " retry the review.",
        "The provider rejected the key. Make a new one in the provider's console, and add it as a"
        " new version of {key}: the review goes on by itself then.",
        Holds.KEY,
        until_told=True,
        newer=True,
        verdict=Verdict.INVALID,
    ),
    Reason.RATE_LIMITED: Row(
        Follows.WAIT,
        "The provider asked to slow down all the time." + _LATER,
        "The provider asked to slow down.",
        refused=True,
    ),
    Reason.NETWORK: Row(
        Follows.WAIT,
        "The provider could not be reached; nothing was sent." + _LATER,
        "The provider can't be reached{cause}; nothing was sent.",
        refused=True,
    ),
    # --- is tried again
    Reason.KEY_REJECTED: Row(
        Follows.RETRY,
        "The provider rejected the key for reviews, though it lists models for it. Add a new"
        " version of {key}, then retry the review.",
        "The provider rejected the key once; its model list is asked before the key counts as"
        " rejected.",
        Holds.KEY,
        until_told=True,
        newer=True,
        refused=True,
        checks=True,
        verdict=Verdict.INVALID,
    ),
    Reason.PROVIDER_UNAVAILABLE: Row(
        Follows.RETRY,
        "The provider answers with errors of its own." + _LATER,
        "The provider answers with errors of its own.",
    ),
    Reason.CHILD_LOST: Row(
        Follows.RETRY,
        "The process that ran the review died. Retry the review.",
        "The process that ran the review died.",
    ),
    Reason.TIMEOUT: Row(
        Follows.RETRY,
        "The attempt took longer than it may. Retry the review, or review a smaller diff.",
        "The attempt took longer than it may.",
    ),
    # --- is final
    Reason.KEY_RESTRICTED: Row(
        Follows.END,
        "The key lacks a scope that a review needs. Widen it at the provider, or add a new"
        " version of {key}.",
        verdict=Verdict.RESTRICTED,
    ),
    Reason.QUOTA_EXHAUSTED: Row(
        Follows.END,
        "The key's quota or credit is gone. Raise it at the provider, then retry the review.",
        verdict=Verdict.QUOTA_EXHAUSTED,
    ),
    Reason.MODEL_NOT_FOUND: Row(
        Follows.END,
        "The provider does not know {model}, or the key can't use it. Choose another.",
        other_model=True,
    ),
    Reason.BAD_REQUEST: Row(Follows.END, "The provider refused the request as malformed."),
    Reason.BAD_RESPONSE: Row(
        Follows.END,
        "The model's answer was cut, empty or not of the asked shape. Retry the review, or choose"
        " another model.",
    ),
    Reason.REFUSED: Row(Follows.END, "The model refused to review this diff."),
    Reason.CONTEXT_TOO_LONG: Row(
        Follows.END,
        "The request is longer than the context of {model}, also in small parts. Review a smaller"
        " diff, give fewer context files, or choose another model.",
    ),
    Reason.REGION_REFUSED: Row(
        Follows.END,
        "The provider does not serve the country or region that the runner calls from. Ask who"
        " runs byokeep.",
    ),
    Reason.AMBIGUOUS: Row(
        Follows.END,
        "A call was sent and its answer lost; it may have been billed, so it was not repeated."
        " Retry the review to make it again.",
        "A call's answer was lost; it is made again, as the tenant's settings say.",
    ),
    Reason.LEASE_REFUSED: Row(
        Follows.END,
        "keyvault refused {key} for this attempt. Look at its state.",
        newer=True,
    ),
    Reason.KEY_REVOKED: Row(
        Follows.END, "The key was revoked or destroyed.", newer=True, says_itself=True
    ),
    Reason.DAILY_LIMIT: Row(
        Follows.END,
        "The tenant's ceiling of provider calls in 24 hours is reached; nothing more was sent."
        " Retry the review later, or raise the ceiling.",
    ),
    Reason.CONTENT_UNREADABLE: Row(
        Follows.END, "What was submitted can't be opened any more. Submit it again."
    ),
    Reason.INTERNAL: Row(Follows.END, "Something unforeseen happened; the service's log has more."),
}
_LOST_CALL: Final = " A call was open then: it may have been billed."
_CAUSES: Final = {
    "NAME_RESOLUTION": " (its name does not resolve)",
    "CONNECT": " (no connection)",
    "TLS": " (the TLS handshake fails)",
    "TIMEOUT": " (no answer in time)",
}


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows from a failed attempt of a review.

    `follows` END: `reason` is the review's. Else a further start after `delay_seconds`, which
    somebody named (`told`) or we chose; `holds` and `until_told` say who else waits, and whether
    for an event. `checks`: have the key looked at. `refund`: calls that don't count after all.
    """

    follows: Follows
    reason: Reason
    delay_seconds: float = 0.0
    told: bool = False
    holds: Holds = Holds.ATTEMPT
    until_told: bool = False
    checks: bool = False
    refund: int = 0


def decide(
    failure: Failure,
    *,
    tries: int,
    waited_seconds: float = 0.0,
    spare_calls: int = 0,
    refused_call: bool = False,
    at_once: bool = False,
    retry_ambiguous: bool = False,
) -> Decision:
    """Return what follows.

    Args:
        failure: how the attempt failed.
        tries: attempts that counted, with this one.
        waited_seconds: how long the review has waited for this same reason.
        spare_calls: calls that the review may still make, beyond what it needs; below 0: too few.
        refused_call: whether the provider answered the attempt's last call with this failure.
        at_once: whether what helps is there: a newer version of the key, or a further model.
        retry_ambiguous: whether the tenant has calls made again whose answer was lost.
    """
    row = TABLE[failure.reason]
    if failure.ambiguous and not row.says_itself:
        if not retry_ambiguous or tries >= MAX_TRIES or spare_calls < 0:
            return Decision(Follows.END, Reason.AMBIGUOUS)
        return Decision(Follows.RETRY, Reason.AMBIGUOUS, _delay(failure, Follows.RETRY, tries, 0.0))
    if failure.ambiguous:
        return Decision(Follows.END, failure.reason)
    follows = row.follows
    if at_once or (follows is Follows.RETRY and failure.retry_after_seconds):
        follows = Follows.WAIT  # what ends it is known: nothing is tried in vain
    refund = int(refused_call and (row.refused or follows is Follows.WAIT))
    too_often = follows is Follows.RETRY and tries >= MAX_TRIES
    if follows is Follows.END or too_often or spare_calls + refund < 0:
        return Decision(Follows.END, failure.reason)
    if at_once:
        return Decision(follows, failure.reason, refund=refund)
    return Decision(
        follows,
        failure.reason,
        0.0 if row.until_told else _delay(failure, follows, tries, waited_seconds),
        failure.retry_after_seconds > 0,
        row.holds,
        row.until_told,
        row.checks,
        refund,
    )


def _delay(failure: Failure, follows: Follows, tries: int, waited_seconds: float) -> float:
    if follows is Follows.RETRY:
        delay = 2.0 * 4.0 ** (tries - 1)
    else:
        # A quarter of what it has waited already: soon at first, then ever more slowly. Who waits
        # for a runner is started no sooner than one has room, as it tells.
        longest = _SOON if failure.reason in _ROOM else _LONGEST_DELAY
        delay = min(max(_SOON, waited_seconds / 4), longest)
    return max(delay * _dice.uniform(0.8, 1.2), failure.retry_after_seconds)


def newer_version_helps(reason: Reason) -> bool:
    """Whether the attempt may go on at once where a newer version of the key is active."""
    return TABLE[reason].newer


def other_model_helps(reason: Reason) -> bool:
    """Whether the review may go on at once on another model."""
    return TABLE[reason].other_model


def verdict_of(failure: Failure) -> Verdict:
    """Return what a failed validation attempt says of the key."""
    return TABLE[failure.reason].verdict


def of_unreachable(cause: str) -> Reason:
    """Return why a provider could not be asked, by what was unreachable, if anything was."""
    return Reason.NETWORK if cause else Reason.PROVIDER_UNAVAILABLE


def failed_sentence(
    reason: Reason, *, key: str, model: str, lost_call: bool = False, managed: bool = False
) -> str:
    """Return what a review that failed tells its tenant: why, and what to do."""
    row = TABLE[reason].failed
    sentence = row.format(key=key, model=model) + _whose(row, managed)
    return sentence + _LOST_CALL if lost_call and reason != Reason.AMBIGUOUS else sentence


def waiting_sentence(reason: Reason, *, key: str, cause: str = "", managed: bool = False) -> str:
    """Return what a review that waits tells its tenant."""
    row = TABLE[reason].waits
    return row.format(key=key, cause=_CAUSES.get(cause, "")) + _whose(row, managed)


def _whose(sentence: str, managed: bool) -> str:
    """Return who can do something about a key that a sentence is about, if not the tenant."""
    return (
        " The key is managed: ask the operator of the deployment."
        if managed and "{key}" in sentence
        else ""
    )


def reason_of(value: FailureReason.ValueType) -> Reason | None:
    """Return a failure's reason, None for none; INTERNAL for one that we don't know."""
    if not value:
        return None
    known = value in FailureReason.values()
    return (
        Reason(FailureReason.Name(value).removeprefix("FAILURE_REASON_"))
        if known
        else Reason.INTERNAL
    )


def cause_of(value: UnreachableCause.ValueType) -> str:
    """Return the short name of what was unreachable, empty for none or one that we don't know."""
    known = value and value in UnreachableCause.values()
    return UnreachableCause.Name(value).removeprefix("UNREACHABLE_CAUSE_") if known else ""


# --- what other errors are called here


def of_stream(code: grpc.StatusCode, *, call_open: bool) -> Failure:
    """Return what a runner's stream that ended without an outcome means."""
    if call_open:
        return Failure(Reason.AMBIGUOUS, ambiguous=True)
    return Failure(_STREAM.get(code, Reason.INTERNAL))


# FAILED_PRECONDITION: it knows the attempt already, from an assignment whose answer was lost.
_STREAM: Final = {
    grpc.StatusCode.OK: Reason.RUNNER_UNAVAILABLE,
    grpc.StatusCode.UNAVAILABLE: Reason.RUNNER_UNAVAILABLE,
    grpc.StatusCode.NOT_FOUND: Reason.RUNNER_UNAVAILABLE,
    grpc.StatusCode.FAILED_PRECONDITION: Reason.RUNNER_UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.RUNNERS_FULL,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.TIMEOUT,
}


def of_content(error: ByokeepError) -> Failure:
    """Return what it means for an attempt that its content could not be opened."""
    if error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
        return Failure(Reason.KEYVAULT_UNAVAILABLE, error.retry_after_seconds or 0.0)
    if error.reason in ("CONTENT_EXPIRED", "ROW_TAMPERED"):
        return Failure(Reason.CONTENT_UNREADABLE)
    return Failure(Reason.INTERNAL)
