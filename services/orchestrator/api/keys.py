"""KeyService: relays sealed keys to keyvault, and shows how their validation goes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final

import grpc
from byokeep import names
from byokeep.keyvault.v1 import custody_pb2
from byokeep.orchestrator.v1 import key_pb2, key_pb2_grpc
from byokeep.orchestrator.v1.review_pb2 import FailureReason

from services.common import load
from services.common.errors import ByokeepError
from services.common.models import MAX_LISTED
from services.orchestrator.api import access, paging
from services.orchestrator.api.tenants import timestamp
from services.orchestrator.custody.grants import PURPOSES
from services.orchestrator.custody.keyvault import Keyvault
from services.orchestrator.policy import bounds
from services.orchestrator.policy.keys import ENDED, OPERATOR, action_of, no_key, usable
from services.orchestrator.policy.refusals import deleted
from services.orchestrator.policy.states import Action, Verdict
from services.orchestrator.store.events import KEY, Events
from services.orchestrator.store.keys import KeyStore, Use, Validation
from services.orchestrator.store.waits import WaitStore

_WATCH_SECONDS: Final = 5.0


class KeyServicer(key_pb2_grpc.KeyServiceServicer):
    """A tenant's provider keys."""

    def __init__(
        self,
        store: KeyStore,
        keyvault: Keyvault,
        events: Events,
        waits: WaitStore,
        *,
        intake_per_hour: int,
        intake_per_hour_of_caller: int,
    ) -> None:
        """Use keyvault, what we keep of keys, what waits for them, and the caps of intake."""
        self._store = store
        self._waits = waits
        self._keyvault = keyvault
        self._events = events
        self._tenant_cap = intake_per_hour
        self._caller_cap = intake_per_hour_of_caller

    async def GetIntakeKey(
        self, request: key_pb2.GetIntakeKeyRequest, context: object
    ) -> key_pb2.GetIntakeKeyResponse:
        """Relay keyvault's newest intake key."""
        response = await self._keyvault.intake_key(
            custody_pb2.GetIntakeKeyRequest(suite=request.suite)
        )
        return key_pb2.GetIntakeKeyResponse(statement=response.statement)

    async def AddKey(
        self, request: key_pb2.AddKeyRequest, context: object
    ) -> key_pb2.AddKeyResponse:
        """Stage a new key and have it validated."""
        rights = access.current()
        rights.require_active()
        rights.require_key_owner(request.user, "user")
        rights.require_user_keys(request.user)
        await self._require_room(rights, request)
        await self._count(rights, "intake", "tried")
        staged = await self._keyvault.stage(
            custody_pb2.StageKeyRequest(
                name=names.key_name(rights.tenant.id, request.key_id),
                provider=request.provider,
                owner=request.user,
                display_name=request.display_name,
                operation=custody_pb2.INTAKE_OPERATION_ADD,
                sealed_key=request.sealed_key,
                request_id=request.request_id,
                actor=rights.actor(request.user),
            )
        )
        return key_pb2.AddKeyResponse(key=await self._validated(rights, staged, request.user))

    async def RotateKey(
        self, request: key_pb2.RotateKeyRequest, context: object
    ) -> key_pb2.RotateKeyResponse:
        """Stage a further version and have it validated."""
        rights = access.current()
        rights.require_active()
        key = await self._changeable(rights, request.name)
        rights.require_user_keys(key.owner)
        await self._count(rights, "intake", "tried")
        staged = await self._keyvault.stage(
            custody_pb2.StageKeyRequest(
                name=request.name,
                provider=key.provider,
                owner=key.owner,
                display_name=key.display_name,
                operation=custody_pb2.INTAKE_OPERATION_ROTATE,
                sealed_key=request.sealed_key,
                request_id=request.request_id,
                actor=rights.actor(),
                etag=request.etag,
            )
        )
        return key_pb2.RotateKeyResponse(
            key=await self._validated(rights, staged, destroy_previous=request.destroy_previous)
        )

    async def CheckKey(
        self, request: key_pb2.CheckKeyRequest, context: object
    ) -> key_pb2.CheckKeyResponse:
        """Have the provider asked about the version that serves."""
        rights = access.current()
        rights.require_active()
        key = await self._changeable(rights, request.name)
        rights.require_user_keys(key.owner)
        if not usable(key):
            raise no_key(names.provider_id(key.provider), [key], key.owner)
        await self._count(rights, "check", "checked")
        await self._store.check(request, rights.tenant.id, key, rights.actor())
        return key_pb2.CheckKeyResponse(key=await self._with_check(rights, key))

    async def WatchKey(
        self, request: key_pb2.WatchKeyRequest, context: object
    ) -> AsyncIterator[key_pb2.WatchKeyResponse]:
        """Stream a key until the verdict on its newest version is known."""
        rights = access.current()
        last: key_pb2.Key | None = None
        with self._events.subscribe(KEY, names.last_of(request.name)) as changes:
            while True:
                async with load.turn():
                    if last is not None:
                        rights = await access.again()
                    key = await self._with_check(rights, await self._readable(rights, request.name))
                pending = custody_pb2.KEY_VERSION_STATE_PENDING
                done = _newest(key.provider_key).state != pending and not key.check.open
                if done or key != last:
                    yield key_pb2.WatchKeyResponse(key=key, done=done)
                if done:
                    return
                last = key
                await changes.wait(_WATCH_SECONDS)

    async def GetKey(
        self, request: key_pb2.GetKeyRequest, context: object
    ) -> key_pb2.GetKeyResponse:
        """Return a key's metadata."""
        rights = access.current()
        key = await self._readable(rights, request.name)
        return key_pb2.GetKeyResponse(key=await self._with_check(rights, key))

    async def ListKeys(
        self, request: key_pb2.ListKeysRequest, context: object
    ) -> key_pb2.ListKeysResponse:
        """List the keys that the caller may see; a page may be shorter than was asked."""
        rights = access.current()
        page = await self._keyvault.page(
            custody_pb2.ListKeysRequest(
                parent=request.parent,
                page_size=paging.size(request.page_size),
                page_token=request.page_token,
                show_destroyed=request.show_destroyed,
            )
        )
        keys = await self._messages([key for key in page.keys if rights.may_read(key.owner)])
        shown, token = paging.cut(
            keys, len(keys), lambda key: names.last_of(key.provider_key.name), _without_models
        )
        return key_pb2.ListKeysResponse(keys=shown, next_page_token=token or page.next_page_token)

    async def RevokeKey(
        self, request: key_pb2.RevokeKeyRequest, context: object
    ) -> key_pb2.RevokeKeyResponse:
        """Revoke a key."""
        message = custody_pb2.RevokeKeyRequest(**await self._ending(request))
        return key_pb2.RevokeKeyResponse(
            key=await self._changed(await self._keyvault.revoke(message))
        )

    async def DestroyKey(
        self, request: key_pb2.DestroyKeyRequest, context: object
    ) -> key_pb2.DestroyKeyResponse:
        """Destroy a key."""
        message = custody_pb2.DestroyKeyRequest(**await self._ending(request))
        return key_pb2.DestroyKeyResponse(
            key=await self._changed(await self._keyvault.destroy(message))
        )

    async def RollBackKey(
        self, request: key_pb2.RollBackKeyRequest, context: object
    ) -> key_pb2.RollBackKeyResponse:
        """Make the version before ACTIVE again."""
        rights = access.current()
        rights.require_active()
        await self._changeable(rights, request.name)
        key = await self._keyvault.roll_back(
            custody_pb2.RollBackKeyRequest(
                name=request.name,
                request_id=request.request_id,
                actor=rights.actor(),
                etag=request.etag,
            )
        )
        newer = [one.version for one in key.versions if one.version > key.active_version]
        return key_pb2.RollBackKeyResponse(key=await self._changed(key), destroyed_versions=newer)

    async def ListKeyUses(
        self, request: key_pb2.ListKeyUsesRequest, context: object
    ) -> key_pb2.ListKeyUsesResponse:
        """List the attempts that used a key."""
        rights = access.current()
        await self._readable(rights, request.name)
        limit = paging.size(request.page_size)
        rows = await self._store.uses(
            rights.tenant.id,
            names.last_of(request.name),
            request.page_token,
            limit + 1,
        )
        page, token = paging.cut(rows, limit, lambda row: row.attempt_id, _use_message)
        return key_pb2.ListKeyUsesResponse(uses=page, next_page_token=token)

    async def _require_room(self, rights: access.Rights, request: key_pb2.AddKeyRequest) -> None:
        # What the operator brings is no part of a plan.
        if not rights.plan.keys_per_provider or request.user == OPERATOR:
            return
        others = [
            key
            for key in await self._keyvault.keys(rights.tenant.id)
            if key.provider == request.provider
            and key.state not in ENDED
            and key.owner != OPERATOR
            # The same name is keyvault's to refuse, the same id is a retry.
            and key.display_name != request.display_name
            and names.last_of(key.name) != request.key_id
        ]
        rights.plan.require_room(len(others))

    async def _count(self, rights: access.Rights, kind: str, done: str) -> None:
        # One caller feeding many keys would make a checker of stolen keys of us.
        for scope, cap in (
            (f"{kind}:{rights.tenant.id}", self._tenant_cap),
            (f"{kind}-caller:{rights.spiffe_id}", self._caller_cap),
        ):
            if await self._store.count_intake(scope) > cap:
                raise ByokeepError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "INTAKE_LIMIT",
                    f"more than {cap} keys were {done} within an hour; try again later",
                    retry_after_seconds=600,
                    limit=str(cap),
                    window="1h",
                )

    async def _readable(self, rights: access.Rights, name: str) -> custody_pb2.ProviderKey:
        key = await self._keyvault.get(name)
        rights.require_reader(key.owner, "name")
        return key

    async def _changeable(self, rights: access.Rights, name: str) -> custody_pb2.ProviderKey:
        key = await self._keyvault.get(name)
        rights.require_key_owner(key.owner, "name")
        return key

    async def _ending(
        self, request: key_pb2.RevokeKeyRequest | key_pb2.DestroyKeyRequest
    ) -> dict[str, str]:
        """Return what keyvault is told of a key that the caller may revoke or destroy, also one
        that keyvault can't show: whoever damages what is stored of it must not keep it alive."""
        rights = access.current()
        try:
            await self._changeable(rights, request.name)
        except ByokeepError as error:
            # keyvault keeps the end and carries it out. Whose key it is can't be known then.
            if error.reason not in ("STATE_TAMPERED", "ROLLED_BACK", "NOT_FOUND"):
                raise
            rights.require_key_owner("", "name")
            if error.reason == "NOT_FOUND":
                raise
        return {
            "name": request.name,
            "request_id": request.request_id,
            "actor": rights.actor(),
            "etag": request.etag,
        }

    async def _validated(
        self,
        rights: access.Rights,
        staged: custody_pb2.StageKeyResponse,
        user: str = "",
        *,
        destroy_previous: bool = False,
    ) -> key_pb2.Key:
        version = next(one for one in staged.key.versions if one.version == staged.version)
        if version.state == custody_pb2.KEY_VERSION_STATE_PENDING:
            scheduled = await self._store.schedule(
                rights.tenant.id,
                staged.key,
                staged.version,
                rights.actor(user),
                destroy_previous=destroy_previous,
            )
            if not scheduled:
                # Deleted while the key was staged: the deletion knew nothing of it.
                await self._keyvault.destroy_all(rights.tenant.id, rights.actor(user))
                raise deleted()
        return (await self._messages([staged.key]))[0]

    async def _changed(self, key: custody_pb2.ProviderKey) -> key_pb2.Key:
        await self._store.changed(names.last_of(key.name))
        # What waits goes on: on the version that serves now, or to be told that the key has ended.
        await self._waits.resume_key(
            names.tenant_of(key.name), names.last_of(key.name), key.active_version
        )
        return (await self._messages([key]))[0]

    async def _with_check(self, rights: access.Rights, key: custody_pb2.ProviderKey) -> key_pb2.Key:
        (message,) = await self._messages([key])
        check = await self._store.newest_check(rights.tenant.id, key)
        if check is not None:
            reason = FailureReason.Value(f"FAILURE_REASON_{check.failure or 'UNSPECIFIED'}")
            told = key_pb2.KeyCheck(
                open=check.open,
                end_time=timestamp(check.end_time),
                failure=reason,
                unreachable_cause=_cause(check.cause),
            )
            message.check.CopyFrom(told)
        return message

    async def _messages(self, keys: Sequence[custody_pb2.ProviderKey]) -> list[key_pb2.Key]:
        versions = [
            (names.last_of(key.name), number)
            for key in keys
            for number in (_newest(key).version, key.active_version)
        ]
        known = await self._store.validations(access.current().tenant.id, versions)
        return [
            key_pb2.Key(
                provider_key=_shown(key),
                validation=_validation_message(key, _telling(key, known)),
                version_count=len(key.versions),
            )
            for key in keys
        ]


def _newest(key: custody_pb2.ProviderKey) -> custody_pb2.KeyVersion:
    return max(key.versions, key=lambda one: one.version, default=custody_pb2.KeyVersion())


def _shown(key: custody_pb2.ProviderKey) -> custody_pb2.ProviderKey:
    """Return a key with as many of its versions as an answer has."""
    if len(key.versions) <= bounds.VERSIONS:
        return key
    oldest = sorted(one.version for one in key.versions)[-bounds.VERSIONS]
    kept = [
        one for one in key.versions if one.version >= oldest or one.version == key.active_version
    ]
    shown = custody_pb2.ProviderKey()
    shown.CopyFrom(key)
    del shown.versions[:]
    shown.versions.extend(kept)
    return shown


def _without_models(key: key_pb2.Key) -> key_pb2.Key:
    if key.HasField("validation"):
        key.validation.ClearField("models")
    return key


def _telling(
    key: custody_pb2.ProviderKey, known: Mapping[tuple[str, int], Validation]
) -> Validation | None:
    """Return the validation that says how a key is: a version that was rolled back says nothing."""
    key_id, newest = names.last_of(key.name), _newest(key)
    validation = known.get((key_id, newest.version))
    accepted = validation is not None and action_of(validation.verdict) is Action.PROMOTE
    if newest.state == custody_pb2.KEY_VERSION_STATE_DESTROYED and key.active_version and accepted:
        return known.get((key_id, key.active_version))
    return validation


def _validation_message(
    key: custody_pb2.ProviderKey, row: Validation | None
) -> key_pb2.KeyValidation | None:
    if row is None:
        return None
    rejected = any(
        one.version == row.version and one.state == custody_pb2.KEY_VERSION_STATE_NEEDS_REKEY
        for one in key.versions
    )
    # keyvault's word that the provider rejected it is newer than any verdict of ours.
    verdict = Verdict.INVALID if rejected else row.verdict
    return key_pb2.KeyValidation(
        version=row.version,
        verdict=key_pb2.ValidationVerdict.Value(f"VALIDATION_VERDICT_{verdict}"),
        models=[] if rejected else row.models[:MAX_LISTED],
        models_cut=not rejected and len(row.models) > MAX_LISTED,
        check_time=timestamp(row.check_time),
        retry_time=timestamp(row.retry_time),
        attempts=row.attempts,
        unreachable_cause=_cause(row.cause),
    )


def _use_message(row: Use) -> key_pb2.KeyUse:
    return key_pb2.KeyUse(
        attempt_id=row.attempt_id,
        number=row.number,
        fence=row.fence,
        review_id=row.review_id,
        label=row.label,
        purpose=PURPOSES[row.kind],
        key_version=row.key_version,
        lease_id=row.lease_id,
        process_id=row.process_id,
        open_time=timestamp(row.open_time),
        close_time=timestamp(row.close_time),
        state=row.state,
        calls_started=row.calls_started,
        failure=FailureReason.Value(f"FAILURE_REASON_{row.failure or 'UNSPECIFIED'}"),
        unreachable_cause=_cause(row.cause),
    )


def _cause(name: str) -> key_pb2.UnreachableCause.ValueType:
    return key_pb2.UnreachableCause.Value(f"UNREACHABLE_CAUSE_{name or 'UNSPECIFIED'}")
