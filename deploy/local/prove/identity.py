"""Asking for a lease as somebody else than a runner."""

from __future__ import annotations

import datetime

import grpc
from byokeep.errors import error_info

from deploy.local.material import TRUST_DOMAIN
from deploy.local.pki import CertificateAuthority, Identity
from deploy.local.prove.attack import GotThroughError, Group, refused
from deploy.local.prove.attacker import Attacker

GROUP = Group("Asking keyvault for a key as somebody else")
_HOLDS = "the orchestrator's grant signing key, and the certificate named below"


def _ask(attacker: Attacker, identity: Identity | None, runner_class: str = "default") -> object:
    # Everything fits but who presents it.
    return attacker.take_as(identity, attacker.victim, runner_class=runner_class)


@GROUP.attack("LeaseKey as a developer", holds=_HOLDS)
def lease_as_developer(attacker: Attacker) -> str:
    """A client that may do everything else."""
    return refused(
        lambda: _ask(attacker, attacker.identity("developer"), "developer"), "CALLER_NOT_ALLOWED"
    )


@GROUP.attack("LeaseKey as the orchestrator", holds=_HOLDS)
def lease_as_orchestrator(attacker: Attacker) -> str:
    """The orchestrator signs grants; it can't redeem them."""
    return refused(
        lambda: _ask(attacker, attacker.identity("orchestrator"), "orchestrator"),
        "CALLER_NOT_ALLOWED",
    )


@GROUP.attack("LeaseKey as the auditor", holds=_HOLDS)
def lease_as_auditor(attacker: Attacker) -> str:
    """Who reads the audit log reads no key."""
    return refused(
        lambda: _ask(attacker, attacker.identity("auditor"), "auditor"), "CALLER_NOT_ALLOWED"
    )


@GROUP.attack("LeaseKey with two identities in one certificate", holds=_HOLDS)
def lease_with_two_identities(attacker: Attacker) -> str:
    """A certificate with two URI SANs is no SVID (SPIFFE X509-SVID, 2)."""
    identity = attacker.stack.authority.issue(
        attacker.loot("two"),
        uris=[f"spiffe://{TRUST_DOMAIN}/{path}" for path in ("runner/default", "client/developer")],
    )
    return refused(lambda: _ask(attacker, identity), "IDENTITY_INVALID")


@GROUP.attack("LeaseKey without a certificate", holds=_HOLDS)
def lease_without_certificate(attacker: Attacker) -> str:
    """TLS ends before anything is asked."""
    return _no_handshake(attacker, None)


@GROUP.attack("LeaseKey with a certificate of a foreign CA", holds=_HOLDS)
def lease_with_foreign_ca(attacker: Attacker) -> str:
    """The right SPIFFE ID, signed by somebody else."""
    foreign = CertificateAuthority.new(TRUST_DOMAIN)
    return _no_handshake(
        attacker, foreign.issue(attacker.loot("foreign"), spiffe_id="runner/default")
    )


@GROUP.attack("LeaseKey with a runner's certificate that has expired", holds=_HOLDS)
def lease_with_expired_certificate(attacker: Attacker) -> str:
    """An hour ago; certificates live for a day."""
    hour_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    expired = attacker.stack.authority.issue(
        attacker.loot("expired"), spiffe_id="runner/default", not_after=hour_ago
    )
    return _no_handshake(attacker, expired)


def _no_handshake(attacker: Attacker, identity: Identity | None) -> str:
    try:
        _ask(attacker, identity)
    except grpc.RpcError as error:
        info = error_info(error)
    else:
        raise GotThroughError("the lease was given")
    if info.code is not grpc.StatusCode.UNAVAILABLE or info.reason:
        raise GotThroughError(f"past TLS: {info.code.name} {info.reason}")
    # keyvault itself is there: the runner's own lease goes through.
    attacker.check_that_it_leases(attacker.victim)
    return "no TLS connection; the runner's lease beside it went through"
