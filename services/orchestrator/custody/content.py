"""Customers' content at rest: reviews' inputs and findings, encrypted under epoch content keys.

    "BYC1" ‖ epoch (10, such as "2026-11-23") ‖ commitment (32) ‖ nonce (12) ‖
    AES-256-GCM ciphertext and tag

keyvault hands out one content key per tenant and epoch, and destroys it when the epoch's
retention ends: what is older in backups and write-ahead logs is noise from then on.
`enc_key ‖ commitment = HKDF-SHA256(content key, info = label, 64 bytes)`; the commitment keeps a
ciphertext from opening under two keys. The associated data is tenant, epoch, review and field.
A review has one epoch, that of its input: what a running attempt finds can be stored though
keyvault is away.

Format and label are no provider key's envelope's, on purpose: nothing here could open one.

Source: NIST SP 800-38D (GCM), RFC 5869 (HKDF).
"""

from __future__ import annotations

import asyncio
import hmac
import os
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import grpc
from byokeep.encoding import fields
from byokeep.keyvault.v1 import content_pb2
from byokeep.orchestrator.v1.review_pb2 import Finding, Review, UnreadPart
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from services.common import deadline
from services.common.errors import ByokeepError

INPUT: Final = "input"
_UNREAD: Final = "unread"
_MAGIC: Final = b"BYC1"
_LABEL: Final = b"byokeep/content/v1"
_EPOCH: Final = 10
_COMMITMENT: Final = 32
_NONCE: Final = 12
_TAG: Final = 16
_BODY: Final = len(_MAGIC) + _EPOCH + _COMMITMENT + _NONCE
#: A destroyed key is forgotten by every replica after this long.
KEY_SECONDS: Final = 60.0
_KEYS: Final = 4096

Fetch = Callable[[str, str], Awaitable[content_pb2.GetContentKeyResponse]]


@dataclass(frozen=True, slots=True, repr=False)
class ContentKey:
    """A tenant's content key of one epoch, ready for use."""

    tenant: str
    epoch: str
    cipher: AESGCM
    commitment: bytes

    @classmethod
    def derive(cls, tenant: str, epoch: str, key: bytes) -> ContentKey:
        """Make the cipher of a content key of 32 bytes."""
        material = HKDF(SHA256(), 64, salt=None, info=_LABEL).derive(key)
        return cls(tenant, epoch, AESGCM(material[:32]), material[32:])

    def seal(self, review_id: str, field: str, plaintext: bytes) -> bytes:
        """Encrypt one field of a review."""
        nonce = os.urandom(_NONCE)
        sealed = self.cipher.encrypt(nonce, plaintext, self._binding(review_id, field))
        return b"".join((_MAGIC, self.epoch.encode(), self.commitment, nonce, sealed))

    def open(self, review_id: str, field: str, sealed: bytes) -> bytes:
        """Decrypt one field of a review. Raises ByokeepError: ROW_TAMPERED."""
        nonce = sealed[_BODY - _NONCE : _BODY]
        commitment = sealed[_BODY - _NONCE - _COMMITMENT : _BODY - _NONCE]
        plaintext = None
        if epoch_of(sealed) == self.epoch and hmac.compare_digest(commitment, self.commitment):
            try:
                binding = self._binding(review_id, field)
                plaintext = self.cipher.decrypt(nonce, sealed[_BODY:], binding)
            except InvalidTag:
                plaintext = None
        if plaintext is None:
            raise _tampered(review_id)
        return plaintext

    def _binding(self, review_id: str, field: str) -> bytes:
        return fields(_MAGIC, self.tenant, self.epoch, review_id, field)


def epoch_of(sealed: bytes) -> str:
    """Return the epoch whose key a field is sealed with. Raises ByokeepError: ROW_TAMPERED."""
    epoch = sealed[len(_MAGIC) : len(_MAGIC) + _EPOCH]
    if not sealed.startswith(_MAGIC) or len(sealed) < _BODY + _TAG or not epoch.isascii():
        raise _tampered("")
    return epoch.decode()


class ContentKeys:
    """Content keys from keyvault, in memory for a minute."""

    def __init__(self, fetch: Fetch) -> None:
        """`fetch` asks keyvault for (tenant, epoch); an empty epoch is the current one."""
        self._fetch = fetch
        self._known: OrderedDict[tuple[str, str], tuple[float, ContentKey]] = OrderedDict()
        self._asked: dict[tuple[str, str], asyncio.Task[ContentKey]] = {}

    async def current(self, tenant: str) -> ContentKey:
        """Return the key for what is new. Raises ByokeepError: keyvault's."""
        return await self._get(tenant, "")

    async def of(self, tenant: str, sealed: bytes) -> ContentKey:
        """Return the key that something was sealed with.

        Raises ByokeepError: CONTENT_EXPIRED where it is gone, ROW_TAMPERED, keyvault's.
        """
        return await self._get(tenant, epoch_of(sealed))

    async def _get(self, tenant: str, epoch: str) -> ContentKey:
        known = self._known.get((tenant, epoch))
        if known is not None and known[0] > time.monotonic():
            return known[1]
        task = self._asked.get((tenant, epoch))
        if task is None:
            # Asked once, however many wait; and no one waiter's end ends it for the others.
            with deadline.lifted():
                task = asyncio.create_task(self._ask(tenant, epoch))
            self._asked[tenant, epoch] = task
            task.add_done_callback(lambda done: self._answered(tenant, epoch, done))
        return await asyncio.shield(task)

    async def _ask(self, tenant: str, epoch: str) -> ContentKey:
        until = time.monotonic() + KEY_SECONDS
        answer = await self._fetch(tenant, epoch)
        key = ContentKey.derive(tenant, answer.epoch, answer.key)
        for name in {epoch, answer.epoch}:
            self._known[tenant, name] = (until, key)
            self._known.move_to_end((tenant, name))
        while len(self._known) > _KEYS:
            self._known.popitem(last=False)
        return key

    def _answered(self, tenant: str, epoch: str, task: asyncio.Task[ContentKey]) -> None:
        del self._asked[tenant, epoch]
        if not task.cancelled():
            task.exception()  # every waiter may be gone, and nobody have looked at it


def seal_findings(
    key: ContentKey, review_id: str, chunk_id: str, findings: Sequence[Finding]
) -> bytes:
    """Encrypt a chunk's findings."""
    return key.seal(review_id, _field(chunk_id), Review(findings=findings).SerializeToString())


def open_findings(
    key: ContentKey, review_id: str, chunks: Sequence[tuple[str, bytes]]
) -> list[bytes]:
    """Return the findings of chunks, each a serialized Review that has nothing else: one behind
    the other, they are one that has them all."""
    return [key.open(review_id, _field(chunk_id), sealed) for chunk_id, sealed in chunks]


def seal_unread(
    key: ContentKey, review_id: str, parts: Sequence[UnreadPart], skipped: Sequence[str]
) -> bytes | None:
    """Encrypt a review's unread parts and skipped files, if there are any."""
    if not parts and not skipped:
        return None
    message = Review(unread=parts, skipped_files=skipped)
    return key.seal(review_id, _UNREAD, message.SerializeToString())


def open_unread(key: ContentKey, review_id: str, sealed: bytes) -> bytes:
    """Return a review's unread parts and skipped files: a serialized Review that has nothing
    else."""
    return key.open(review_id, _UNREAD, sealed)


def _field(chunk_id: str) -> str:
    return f"findings/{chunk_id}"


def expired() -> ByokeepError:
    """Return the error for content whose retention is over."""
    return ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "CONTENT_EXPIRED",
        "the review's content was kept as long as this deployment keeps it, and is gone;"
        " the list of reviews still has the review",
    )


def _tampered(review_id: str) -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.DATA_LOSS,
        "ROW_TAMPERED",
        "the review's stored content fails its authentication: it was altered, moved, or its"
        " content key is another's",
        review=review_id,
    )
