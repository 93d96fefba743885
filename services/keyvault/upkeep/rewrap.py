"""Rewrap, in the data role: data keys below a tenant's target are wrapped again, in batches.

A batch is read, then wrapped by the backend outside of any transaction, then swapped in one change
of the tenant: a version that changed since it was read stays as it is. Within the primary backend
a data key is wrapped again; a version that another backend holds moves instead: it gets a fresh
data key and a new envelope (docs/decisions/0006). What is not the ciphertext that the state
names is given to no backend. All that says what is left stands in the state: whoever is killed
leaves nothing behind. Leases go on meanwhile.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from byokeep.keyvault.v1 import audit_pb2, state_pb2

from services.common import logs
from services.common.secret import Secret
from services.keyvault import kek, lifecycle
from services.keyvault.envelope import (
    Context,
    EnvelopeError,
    UnknownEnvelopeError,
    decrypt,
    encrypt,
)
from services.keyvault.ledger import Ledger, Tenant, part_of, secret_digest
from services.keyvault.lifecycle import RETRY_SECONDS, State
from services.keyvault.sql.ledger import SecretName

log = logging.getLogger(__name__)
_BATCH: Final = 500
# A version that moves costs calls of its own: fewer in a batch, some of them at once.
_MOVES: Final = 64
_AT_ONCE: Final = 8


@dataclass(frozen=True, slots=True)
class _Wrap:
    """A version as it was read."""

    tenant: str
    owner: str
    provider: str
    key_id: str
    version: int
    backend: str
    digest: bytes

    @property
    def name(self) -> SecretName:
        return self.tenant, self.key_id, self.version


@dataclass(frozen=True, slots=True)
class _Swap:
    """What its ciphertext becomes, and the version of the KEK that wraps that."""

    secret: tuple[bytes, bytes]
    kek_version: int


class Rewrap:
    """Wraps towards tenants' targets (see the module)."""

    def __init__(
        self, ledger: Ledger, backends: kek.Backends, deployment: str, rows_per_second: int
    ) -> None:
        """Rewrap a ledger's versions, at most so many a second."""
        self._ledger = ledger
        self._backends = backends
        self._deployment = deployment
        self._rows_per_second = max(1, rows_per_second)
        # Small enough that the pace is held within every quarter of a second.
        self._limit = min(_BATCH, max(1, self._rows_per_second // 4))

    async def tend(self, tenant: Tenant) -> bool:
        """Wrap all of a tenant's versions that are below its target and may be tried; False where
        there was none. Raises KekUnavailableError: the rest stays as it is."""
        worked = False
        for parts in self._rounds(tenant):
            found = list(_candidates(await self._ledger.read(tenant.name, parts)))
            moves = any(one.backend != tenant.state.target_backend for one in found)
            limit = min(self._limit, _MOVES) if moves else self._limit
            for start in range(0, len(found), limit):
                batch = found[start : start + limit]
                started = time.monotonic()
                if not await self._work(tenant.name, batch):
                    return False  # all of them changed meanwhile: the next round looks again
                worked = True
                pace = len(batch) / self._rows_per_second - (time.monotonic() - started)
                await asyncio.sleep(max(0.0, pace))
        return worked

    def _left(self, tenant: Tenant) -> bool:
        state = tenant.state
        primary = self._backends.primary.name
        return not state.shredded and state.target_backend == primary and lifecycle.left(state)

    def _rounds(self, tenant: Tenant) -> Iterator[list[int]]:
        """Yield parts with versions that are left: one, or as many as fill no more than a batch,
        for each batch writes its parts whole."""
        parts, room = list[int](), self._limit
        for part in tenant.state.parts if self._left(tenant) else ():
            left = lifecycle.left_of(tenant.state, part)
            if parts and left > room:
                yield parts
                parts, room = [], self._limit
            if left:
                parts.append(part.part)
                room -= left
        if parts:
            yield parts

    async def _work(self, name: str, batch: Sequence[_Wrap]) -> int:
        """Wrap a batch again; return how many versions were swapped, or marked."""
        tenant = await self._ledger.read(name, (), [one.name for one in batch])
        if not self._left(tenant):
            return 0
        target = tenant.state.target_backend, tenant.state.target_version
        sound = [one for one in batch if tenant.secret(one.name, one.digest) is not None]
        results: dict[SecretName, _Swap | kek.RewrapFailed] = {}
        results |= await self._rewrapped(
            name, [one for one in sound if one.backend == target[0]], tenant
        )
        results |= await self._moved([one for one in sound if one.backend != target[0]], tenant)

        def swap(found: Tenant) -> int:
            return self._swap(found, batch, results, target)

        parts = {part_of(one.key_id) for one in batch}
        odd = [one.name for one in batch if one.name not in results]
        worked, _ = await self._ledger.change(name, swap, parts, odd)
        return worked

    def _swap(
        self,
        found: Tenant,
        batch: Sequence[_Wrap],
        results: Mapping[SecretName, _Swap | kek.RewrapFailed],
        target: tuple[str, int],
    ) -> int:
        """Put new ciphertexts in their places, and mark what failed; return how many versions
        changed."""
        state, done, reasons = found.state, 0, list[str]()
        if state.shredded or (state.target_backend, state.target_version) != target:
            return 0
        wraps = {one.name: one for one in batch}
        keys = [key for part in found.parts.values() for key in part.edit().keys]
        for key_id, version in ((key.key_id, one) for key in keys for one in key.versions):
            one = wraps.get((found.name, key_id, version.version))
            if one is None or not _is_left(state, version):
                continue
            if not hmac.compare_digest(version.secret_digest, one.digest):
                continue  # somebody else wrapped it again
            result = results.get(one.name)
            if result is None:
                # It was not what the state names. Here both are locked: they change together.
                if found.secret(one.name, one.digest) is not None:
                    continue
                result = kek.RewrapFailed("ROW_TAMPERED")
            if isinstance(result, kek.RewrapFailed):
                version.unopened_time = int(found.now.timestamp())
                version.unopened_reason = result.reason
                reasons.append(result.reason)
                _report(one, result.reason)
            elif lifecycle.may_store(state, target[0], result.kek_version):
                version.kek_backend, version.kek_version = target[0], result.kek_version
                version.secret_digest = secret_digest(*result.secret)
                version.unopened_time, version.unopened_reason = 0, ""
                found.put[one.name] = result.secret
                done += 1
        if done or reasons:
            found.events.append(
                audit_pb2.AuditEvent(
                    type=audit_pb2.AUDIT_EVENT_TYPE_REWRAPPED,
                    caller="keyvault",
                    detail=f"{target[0]} v{target[1]}",
                    count=done,
                    reason=reasons[0] if reasons else "",
                )
            )
        return done + len(reasons)

    async def _rewrapped(
        self, name: str, batch: Sequence[_Wrap], tenant: Tenant
    ) -> dict[SecretName, _Swap | kek.RewrapFailed]:
        if not batch:
            return {}
        secrets = [tenant.secrets[one.name] for one in batch]
        backend = self._backends.primary
        try:
            results = await backend.rewrap(kek.tenant_kek(name), [one[0] for one in secrets])
        except kek.KekMissingError:
            return {one.name: kek.RewrapFailed("UNDECRYPTABLE") for one in batch}
        return {
            one.name: _Swap((result.wrapped, secret[1]), result.kek_version)
            if isinstance(result, kek.Rewrapped)
            else result
            for one, secret, result in zip(batch, secrets, results, strict=True)
        }

    async def _moved(
        self, batch: Sequence[_Wrap], tenant: Tenant
    ) -> dict[SecretName, _Swap | kek.RewrapFailed]:
        at_once = asyncio.Semaphore(_AT_ONCE)

        async def move(one: _Wrap) -> _Swap | kek.RewrapFailed:
            async with at_once:
                return await self._move(one, *tenant.secrets[one.name])

        results = await asyncio.gather(*(move(one) for one in batch))
        return {one.name: result for one, result in zip(batch, results, strict=True)}

    async def _move(self, one: _Wrap, wrapped: bytes, envelope: bytes) -> _Swap | kek.RewrapFailed:
        name = kek.tenant_kek(one.tenant)
        context = Context(
            self._deployment, one.tenant, one.owner, one.provider, one.key_id, one.version
        )
        try:
            with kek.opened_for(f"move_{one.key_id}"):
                opened = await self._backends.named(one.backend).unwrap(name, wrapped)
            with opened as old:
                plaintext = Secret(decrypt(old.reveal(), envelope, context))
            with plaintext:
                fresh = await self._backends.primary.generate_data_key(name)
                with fresh.plaintext as new:
                    moved = encrypt(new.reveal(), plaintext.reveal(), context)
            return _Swap((fresh.wrapped, moved), fresh.kek_version)
        except (kek.KekMissingError, UnknownEnvelopeError):
            return kek.RewrapFailed("UNDECRYPTABLE")
        except (kek.UnwrapError, EnvelopeError):
            return kek.RewrapFailed("ROW_TAMPERED")


def _candidates(tenant: Tenant) -> Iterator[_Wrap]:
    """Yield the versions of the parts that were read that are to be wrapped again now."""
    tried = tenant.now.timestamp() - RETRY_SECONDS
    for key, one in tenant.living():
        if not lifecycle.at_target(tenant.state, one) and one.unopened_time <= tried:
            yield _Wrap(
                tenant.name,
                key.owner,
                key.provider,
                key.key_id,
                one.version,
                one.kek_backend,
                one.secret_digest,
            )


def _is_left(state: state_pb2.TenantState, version: state_pb2.VersionState) -> bool:
    living = lifecycle.state_of(version) is not State.DESTROYED
    return living and not lifecycle.at_target(state, version)


def _report(one: _Wrap, reason: str) -> None:
    logs.event(
        log,
        "rewrap_failed",
        level=logging.ERROR,
        tenant=one.tenant,
        key=one.key_id,
        version=one.version,
        reason=reason,
    )
