"""The same connection for asyncio: the surface of `byokeep.client`, awaited.

    async with byokeep.aio.connect() as connection:
        key = await connection.add_key("openai", key_text)
        review = await connection.review(diff, "acme/shop")
        await connection.keys.ListKeys(ListKeysRequest(parent=connection.parent))

Use a connection within one event loop. Sealing is done in a thread. `connect` reads the client's
files, which are small, before it returns.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Unpack

import grpc

from byokeep import edge, ids, sealing
from byokeep.calls import AioCalls
from byokeep.edge import (
    REVIEW_SECONDS,
    SUBMIT_SECONDS,
    VERDICT_SECONDS,
    Edge,
    ReviewOptions,
    new_request_id,
)
from byokeep.errors import WatchTimeoutError
from byokeep.identity import TlsFiles
from byokeep.keyshape import check_key
from byokeep.keyvault.v1 import admin_pb2_grpc, audit_pb2_grpc, custody_pb2
from byokeep.orchestrator.v1 import (
    key_pb2,
    key_pb2_grpc,
    review_pb2,
    review_pb2_grpc,
    settings_pb2_grpc,
    tenant_pb2_grpc,
)
from byokeep.profile import Endpoint, Profile, TrustBundle
from byokeep.transport import following_aio_channel
from byokeep.watching import watch_aio

__all__ = ["Connection", "ReviewOptions", "connect", "new_request_id"]

# The orchestrator serves a hundred of a tenant at a time, and a connection of many large requests
# begins to refuse calls.
_SUBMISSIONS: Final = 50


def connect(
    profile: str | Profile | None = None,
    *,
    config: Path | None = None,
    tenant: str | None = None,
    orchestrator: str | None = None,
    orchestrator_name: str = "",
    keyvault: str | None = None,
    keyvault_name: str = "",
    tls: TlsFiles | None = None,
    trust: TrustBundle | Path | None = None,
) -> Connection:
    """Return a connection; nothing is dialled before the first call.

    Either by a profile (its name, or a `Profile`; by default the config file's own),
    or by addresses (`host:port`), the DNS names that the certificates must have, the
    caller's TLS files and the trust bundle. `tenant` overrides the profile's.

    Raises:
        ProfileError: a client file is missing or wrong, or the arguments don't fit.
    """
    chosen = edge.chosen_profile(
        profile, config, orchestrator, orchestrator_name, keyvault, keyvault_name, tls, trust
    )
    return Connection(chosen, tenant or chosen.tenant)


class Connection(Edge):
    """The services as one identity sees them. An asynchronous context manager; `close` ends it."""

    def __init__(self, profile: Profile, tenant: str = "") -> None:
        """Keep the profile; open nothing yet."""
        super().__init__(profile, tenant)
        self._channels: list[grpc.aio.Channel] = []
        self._submitting = asyncio.Semaphore(_SUBMISSIONS)

    @cached_property
    def tenants(self) -> tenant_pb2_grpc.TenantServiceAsyncStub:
        """Return the orchestrator's tenants."""
        return tenant_pb2_grpc.TenantServiceStub(self._orchestrator)

    @cached_property
    def callers(self) -> tenant_pb2_grpc.CallerServiceAsyncStub:
        """Return the orchestrator's callers."""
        return tenant_pb2_grpc.CallerServiceStub(self._orchestrator)

    @cached_property
    def keys(self) -> key_pb2_grpc.KeyServiceAsyncStub:
        """Return the orchestrator's keys."""
        return key_pb2_grpc.KeyServiceStub(self._orchestrator)

    @cached_property
    def reviews(self) -> review_pb2_grpc.ReviewServiceAsyncStub:
        """Return the orchestrator's reviews."""
        return review_pb2_grpc.ReviewServiceStub(self._orchestrator)

    @cached_property
    def settings(self) -> settings_pb2_grpc.SettingsServiceAsyncStub:
        """Return the orchestrator's settings."""
        return settings_pb2_grpc.SettingsServiceStub(self._orchestrator)

    @cached_property
    def audit(self) -> audit_pb2_grpc.AuditServiceAsyncStub:
        """Return keyvault's audit log. Raises ProfileError without a keyvault address."""
        return audit_pb2_grpc.AuditServiceStub(self._keyvault)

    @cached_property
    def admin(self) -> admin_pb2_grpc.AdminServiceAsyncStub:
        """Return keyvault's administration. Raises ProfileError without a keyvault address."""
        return admin_pb2_grpc.AdminServiceStub(self._keyvault)

    async def seal(
        self,
        provider: str,
        key_text: str,
        key_id: str,
        operation: Literal["add", "rotate"],
        request_id: str,
        owner: str = "",
    ) -> custody_pb2.SealedKey:
        """Seal a provider key to keyvault's newest intake key.

        Raises:
            KeyFormatError: the text can't be a key of that provider.
            UntrustedIntakeKeyError: the statement is not to be believed; nothing was sealed.
            CallError: the statement could not be had.
        """
        return await self._seal(
            self._context(provider, key_id, operation, request_id, owner), key_text
        )

    async def add_key(
        self,
        provider: str,
        key_text: str,
        *,
        name: str = "default",
        user: str = "",
        wait: float = VERDICT_SECONDS,
        request_id: str = "",
    ) -> key_pb2.Key:
        """Seal a provider key, add it, and return it once its provider accepts it.

        ``wait`` is in seconds; 0 returns the key at once, PENDING. ``user`` owns it; empty: the
        tenant.

        Raises:
            KeyNotUsableError: its provider rejects it, or could not be asked yet.
            KeyFormatError, UntrustedIntakeKeyError, CallError: as `seal`.
        """
        context = self._context(provider, ids.new_id("key"), "add", request_id, user)
        request = edge.add_request(context, name, await self._seal(context, key_text))
        return await self._validated((await self.keys.AddKey(request)).key, wait)

    async def rotate_key(
        self,
        name: str,
        key_text: str,
        *,
        destroy_previous: bool = False,
        wait: float = VERDICT_SECONDS,
        request_id: str = "",
    ) -> key_pb2.Key:
        """Add a version to a key, and return it once its provider accepts that.

        ``name`` is `tenants/{tenant}/providerKeys/{key}`. The version before serves until
        then, and is kept for 24 hours unless ``destroy_previous``.

        Raises:
            KeyNotUsableError: the provider rejects the version, or could not be asked yet.
            KeyFormatError, UntrustedIntakeKeyError, CallError: as `seal`.
        """
        kept = (await self.keys.GetKey(key_pb2.GetKeyRequest(name=name))).key.provider_key
        context = self._rotation(kept, request_id)
        sealed = await self._seal(context, key_text)
        request = edge.rotate_request(context, sealed, destroy_previous=destroy_previous)
        return await self._validated((await self.keys.RotateKey(request)).key, wait)

    def watch_key(
        self, name: str, seconds: float = VERDICT_SECONDS
    ) -> AsyncIterator[key_pb2.WatchKeyResponse]:
        """Yield a key as it changes, until the verdict on its newest version is known or its
        provider could not be asked this time; past lost connections.

        Raises:
            WatchTimeoutError: so many seconds were over before.
            CallError: the service stays away, or refuses.
        """
        request = key_pb2.WatchKeyRequest(name=name)
        return watch_aio(
            lambda left: key_pb2_grpc.KeyServiceStub(self._watched).WatchKey(request, timeout=left),
            edge.verdict_is_known,
            seconds,
        )

    async def submit_review(
        self,
        diff: bytes | str,
        repository: str,
        *,
        wait: float = SUBMIT_SECONDS,
        **options: Unpack[ReviewOptions],
    ) -> review_pb2.Review:
        """Submit a unified diff, as git prints it, and return the review, QUEUED.

        ``wait`` is how many seconds it may take: a service that has too much to do takes it later.
        More than a few at once wait for one another here.

        Raises:
            CallError: it was refused, or the service stays away.
        """
        request = edge.review_request(self.parent, diff, repository, options)
        async with self._submitting:
            return (await self.reviews.SubmitReview(request, timeout=wait)).review

    async def review(
        self,
        diff: bytes | str,
        repository: str,
        *,
        wait: float = REVIEW_SECONDS,
        **options: Unpack[ReviewOptions],
    ) -> review_pb2.Review:
        """Submit a diff, wait for the review's end, and return it with its findings.

        Raises:
            ReviewFailedError: it failed, or was cancelled.
            WatchTimeoutError: ``wait`` seconds were over before; the review goes on.
            CallError: it was refused, or the service stays away.
        """
        end = time.monotonic() + wait
        review = await self.submit_review(
            diff, repository, wait=min(wait, SUBMIT_SECONDS), **options
        )
        async for answer in self.watch_review(review.name, max(end - time.monotonic(), 0.0)):
            review = answer.review
        return edge.completed(review)

    async def get_review(self, name: str) -> review_pb2.Review:
        """Return a review with all of its findings.

        Raises:
            CallError: there is none, or its findings are kept no more.
        """
        answer = await self.reviews.GetReview(review_pb2.GetReviewRequest(name=name))
        return (await self._with_rest(answer)).review

    async def watch_review(
        self, name: str, seconds: float = REVIEW_SECONDS
    ) -> AsyncIterator[review_pb2.WatchReviewResponse]:
        """Yield a review as it changes, until it has ended, with all of its findings then; past
        lost connections.

        Raises:
            WatchTimeoutError: so many seconds were over before.
            CallError: the service stays away, or refuses.
        """
        request = review_pb2.WatchReviewRequest(name=name)
        answers = watch_aio(
            lambda left: review_pb2_grpc.ReviewServiceStub(self._watched).WatchReview(
                request, timeout=left
            ),
            edge.review_is_over,
            seconds,
        )
        async for answer in answers:
            yield await self._with_rest(answer)

    async def close(self) -> None:
        """Close the channels that were opened."""
        while self._channels:
            await self._channels.pop().close()

    async def __aenter__(self) -> Connection:
        """Return the connection itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        await self.close()

    async def _with_rest(self, answer: edge.Answer) -> edge.Answer:
        while answer.next_page_token:
            edge.append_page(answer, await self.reviews.GetReview(edge.next_page(answer)))
        return answer

    async def _seal(self, context: sealing.SealContext, key_text: str) -> custody_pb2.SealedKey:
        check_key(context.provider, key_text)
        answer = await self.keys.GetIntakeKey(self._intake_request())
        return await asyncio.to_thread(self._sealed, answer.statement, context, key_text)

    async def _validated(self, key: key_pb2.Key, wait: float) -> key_pb2.Key:
        if not wait:
            return key
        answer = key_pb2.WatchKeyResponse(key=key)
        try:
            async for step in self.watch_key(key.provider_key.name, wait):
                answer = step
        except WatchTimeoutError as error:
            answer = error.latest or answer
        return edge.usable(answer.key, done=answer.done)

    @cached_property
    def _orchestrator(self) -> grpc.aio.Channel:
        return self._open(self.profile.orchestrator)

    # What is watched has a connection of its own: the calls that one takes at a time are few, and
    # many reviews that go on would leave none for any other.
    @cached_property
    def _watched(self) -> grpc.aio.Channel:
        return self._open(self.profile.orchestrator)

    @cached_property
    def _keyvault(self) -> grpc.aio.Channel:
        return self._open(self._keyvault_endpoint())

    def _open(self, endpoint: Endpoint) -> grpc.aio.Channel:
        channel = AioCalls(
            following_aio_channel(
                endpoint.address, endpoint.server_name, self._followed(), self.profile.proxy
            )
        )
        self._channels.append(channel)
        return channel
