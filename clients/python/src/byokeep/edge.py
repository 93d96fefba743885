"""What a connection is apart from how it calls: its profile, its requests, its conclusions.

`byokeep.client` and `byokeep.aio` call; both say the same, through this.
"""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypedDict, TypeVar

from byokeep import Error, names, sealing
from byokeep.common.v1 import options_pb2
from byokeep.errors import KeyNotUsableError, ReviewFailedError
from byokeep.identity import Followed, IdentityError, Pem, TlsFiles, checked
from byokeep.keyvault.v1 import custody_pb2
from byokeep.orchestrator.v1 import key_pb2, review_pb2
from byokeep.profile import Endpoint, Profile, ProfileError, TrustBundle, load_profile, load_trust

VERDICT_SECONDS: Final = 60.0
"""How long a provider's verdict on a key is waited for by default."""
SUBMIT_SECONDS: Final = 600.0
"""How long a service that has too much to do is given to take a review, by default."""
REVIEW_SECONDS: Final = 24 * 3600.0
"""How long the end of a review is waited for by default."""

TERMINAL: Final = frozenset(
    {
        review_pb2.REVIEW_STATE_COMPLETED,
        review_pb2.REVIEW_STATE_FAILED,
        review_pb2.REVIEW_STATE_CANCELLED,
    }
)
_USABLE: Final = frozenset(
    {
        key_pb2.VALIDATION_VERDICT_VALID,
        key_pb2.VALIDATION_VERDICT_RESTRICTED,
        key_pb2.VALIDATION_VERDICT_QUOTA_EXHAUSTED,
    }
)


Answer = TypeVar("Answer", review_pb2.GetReviewResponse, review_pb2.WatchReviewResponse)
"""An answer that has a review with a page of its findings."""


class UnknownProviderError(Error, ValueError):
    """There is no such provider."""

    def __init__(self) -> None:
        """Say which there are; not what was given, which may be a key."""
        super().__init__(f"a provider is one of: {', '.join(names.PROVIDERS)}")


def new_request_id() -> str:
    """Return a fresh id for one mutation; a retry of that mutation uses it again."""
    return uuid.uuid4().hex


def chosen_profile(
    profile: str | Profile | None,
    config: Path | None,
    orchestrator: str | None,
    orchestrator_name: str,
    keyvault: str | None,
    keyvault_name: str,
    tls: TlsFiles | None,
    trust: TrustBundle | Path | None,
) -> Profile:
    """Return the profile that the arguments of `connect` mean. Raises ProfileError."""
    if orchestrator is None:
        return profile if isinstance(profile, Profile) else load_profile(profile, config)
    if profile is not None or tls is None or trust is None or not orchestrator_name:
        raise ProfileError(
            "an explicit connection needs orchestrator, orchestrator_name, tls and trust,"
            " and no profile"
        )
    bundle = load_trust(trust) if isinstance(trust, Path) else trust
    return Profile(
        name="",
        orchestrator=Endpoint(orchestrator, orchestrator_name),
        keyvault=Endpoint(keyvault, keyvault_name) if keyvault else None,
        certificate=tls.certificate,
        key=tls.key,
        trust=TrustBundle(
            bundle.deployment,
            tls.ca.read_bytes(),
            bundle.intake_signing_keys,
            bundle.audit_log_keys,
        ),
    )


class Edge:
    """The services as one identity sees them, before anything is called."""

    def __init__(self, profile: Profile, tenant: str = "") -> None:
        """Keep the profile; open nothing yet."""
        self.profile = profile
        self.trust = profile.trust
        self._tenant = tenant

    @property
    def tenant(self) -> str:
        """Return the tenant's id. Raises ProfileError where none is set."""
        if not self._tenant:
            raise ProfileError("no tenant is chosen", "--tenant NAME, or `tenant` in the profile")
        return self._tenant

    @property
    def parent(self) -> str:
        """Return `tenants/{tenant}`. Raises ProfileError where none is set."""
        return names.tenant_name(self.tenant)

    def _followed(self) -> Followed[Pem]:
        return Followed((self.profile.certificate, self.profile.key), self._identity)

    def _identity(self) -> Pem:
        try:
            return checked(Pem(*self.profile.read_identity(), ca=self.trust.ca))
        except IdentityError as error:
            raise ProfileError(f"the profile's certificate and key: {error}") from None

    def _keyvault_endpoint(self) -> Endpoint:
        if self.profile.keyvault is None:
            raise ProfileError(
                "this needs keyvault's own edge, and the profile has no keyvault address",
                "set `keyvault` and `keyvault_name` in the profile; auditors and operators have it",
            )
        return self.profile.keyvault

    def _intake_request(self) -> key_pb2.GetIntakeKeyRequest:
        return key_pb2.GetIntakeKeyRequest(parent=self.parent, suite=sealing.SUITE)

    def _context(
        self, provider: str, key_id: str, operation: str, request_id: str, owner: str
    ) -> sealing.SealContext:
        if provider not in names.PROVIDERS:
            raise UnknownProviderError
        return sealing.SealContext(
            tenant=self.tenant,
            owner=owner,
            provider=provider,
            key_id=key_id,
            operation=operation,
            request_id=request_id or new_request_id(),
        )

    def _rotation(self, kept: custody_pb2.ProviderKey, request_id: str) -> sealing.SealContext:
        provider, key_id = names.provider_id(kept.provider), names.last_of(kept.name)
        return self._context(provider, key_id, "rotate", request_id, kept.owner)

    def _sealed(
        self,
        answered: options_pb2.SignedEnvelope,
        context: sealing.SealContext,
        key_text: str,
    ) -> custody_pb2.SealedKey:
        """Seal to the intake key that a statement names, if the statement is to be believed.

        The orchestrator relays the statement and can't make one: it is believed only with the
        signature of a key that the trust bundle pins.
        """
        statement = sealing.verify_statement(
            answered,
            deployment=self.trust.deployment,
            pinned=self.trust.intake_signing_keys,
            now=datetime.datetime.now(datetime.UTC),
        )
        # A relay must not choose a weaker suite by passing on another genuine statement.
        if statement.suite != sealing.SUITE:
            raise sealing.UntrustedIntakeKeyError(
                "intake statement refused: it is for another suite than was asked for"
            )
        return sealing.seal_key(key_text, context, statement)


def add_request(
    context: sealing.SealContext, name: str, sealed: custody_pb2.SealedKey
) -> key_pb2.AddKeyRequest:
    """Return the request that adds a sealed key under a name."""
    return key_pb2.AddKeyRequest(
        parent=names.tenant_name(context.tenant),
        key_id=context.key_id,
        provider=names.provider_value(context.provider),
        user=context.owner,
        display_name=name,
        sealed_key=sealed,
        request_id=context.request_id,
    )


def rotate_request(
    context: sealing.SealContext, sealed: custody_pb2.SealedKey, *, destroy_previous: bool
) -> key_pb2.RotateKeyRequest:
    """Return the request that adds a sealed key as a version."""
    return key_pb2.RotateKeyRequest(
        name=names.key_name(context.tenant, context.key_id),
        sealed_key=sealed,
        destroy_previous=destroy_previous,
        request_id=context.request_id,
    )


def verdict_is_known(answer: key_pb2.WatchKeyResponse) -> bool:
    """Whether a key's verdict is known, or its provider could not be asked this time."""
    versions = answer.key.provider_key.versions
    # Before it is asked, the verdict may be on the version before.
    newest = versions[-1].version if versions else 0
    validation = answer.key.validation
    unreachable = validation.verdict == key_pb2.VALIDATION_VERDICT_UNREACHABLE
    return answer.done or (unreachable and validation.version == newest)


def usable(key: key_pb2.Key, *, done: bool) -> key_pb2.Key:
    """Return a key whose provider accepts it. Raises KeyNotUsableError."""
    verdict = key.validation.verdict
    if verdict in _USABLE and done:
        return key
    if verdict == key_pb2.VALIDATION_VERDICT_INVALID:
        raise KeyNotUsableError(
            "KEY_REJECTED", "the provider rejects this key; it was destroyed here", key
        )
    raise KeyNotUsableError(
        "KEY_UNVALIDATED",
        "the provider could not be asked yet; the key is stored and stays PENDING",
        key,
    )


class ReviewOptions(TypedDict, total=False):
    """What may be said of a review beside its diff and repository; see ReviewInput."""

    pull_request: int
    head_commit: str
    title: str
    description: str
    guidance: str
    context_files: Mapping[str, str]
    """Text by path."""
    model: str
    user: str
    key: str
    request_id: str
    keep_older: bool


def review_request(
    parent: str, diff: bytes | str, repository: str, options: ReviewOptions
) -> review_pb2.SubmitReviewRequest:
    """Return the request that submits a diff."""
    return review_pb2.SubmitReviewRequest(
        parent=parent,
        input=review_pb2.ReviewInput(
            repository=repository,
            pull_request=options.get("pull_request", 0),
            head_commit=options.get("head_commit", ""),
            title=options.get("title", ""),
            description=options.get("description", ""),
            diff=diff.encode() if isinstance(diff, str) else diff,
            context_files=[
                review_pb2.ContextFile(path=path, content=content)
                for path, content in options.get("context_files", {}).items()
            ],
            guidance=options.get("guidance", ""),
            model=options.get("model", ""),
            user=options.get("user", ""),
            key=options.get("key", ""),
        ),
        request_id=options.get("request_id") or new_request_id(),
        keep_older=options.get("keep_older", False),
    )


def review_is_over(answer: review_pb2.WatchReviewResponse) -> bool:
    """Whether a review has ended."""
    return answer.review.state in TERMINAL


def next_page(answer: Answer) -> review_pb2.GetReviewRequest:
    """Return the request for the page of findings that follows those of an answer."""
    return review_pb2.GetReviewRequest(name=answer.review.name, page_token=answer.next_page_token)


def append_page(answer: Answer, page: review_pb2.GetReviewResponse) -> None:
    """Add a page of findings to those of an answer."""
    answer.review.findings.extend(page.review.findings)
    answer.next_page_token = page.next_page_token


def completed(review: review_pb2.Review) -> review_pb2.Review:
    """Return a review that is done. Raises ReviewFailedError."""
    if review.state == review_pb2.REVIEW_STATE_COMPLETED:
        return review
    if review.state == review_pb2.REVIEW_STATE_CANCELLED:
        raise ReviewFailedError("CANCELLED", "the review was cancelled", review)
    known = review_pb2.FailureReason.DESCRIPTOR.values_by_number.get(review.failure)
    reason = known.name.removeprefix("FAILURE_REASON_") if known else f"REASON_{review.failure}"
    raise ReviewFailedError(reason, review.failure_message or "the review failed", review)
