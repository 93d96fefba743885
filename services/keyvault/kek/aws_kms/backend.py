"""Backend `aws_kms`: KEKs in AWS KMS, one KMS key for each version of a KEK.

A KEK is an alias, `alias/byokeep/{deployment}/{kek}`, that points at the KMS key of its
newest version; each version has an alias of its own, `…/v{n}`. The aliases are the only
record of which KMS key is whose: whoever writes keyvault's database can't point a KEK at
a KMS key of their own. Rotation is manual (a new KMS key behind the alias), for KMS's own
rotation keeps every old version for ever and so can't be trimmed.

The encryption context of every call is deployment and KEK, so that KMS itself refuses a
data key under another tenant's name. `shred` is "delayed": KMS destroys a key only after
a waiting period of 7 to 30 days, within which an administrator of the account can cancel it.

botocore hands a data key out as immutable bytes; our copy is wiped, that one is freed.

Source: docs.aws.amazon.com/kms/latest/APIReference (GenerateDataKey, Decrypt, ReEncrypt,
ScheduleKeyDeletion, UpdateAlias).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence

from services.common.config import ConfigError
from services.common.secret import Secret
from services.keyvault.kek import (
    SYSTEM,
    DataKey,
    Health,
    KekMissingError,
    KekUnavailableError,
    RewrapFailed,
    Rewrapped,
    Shred,
    UnwrapError,
)
from services.keyvault.kek.aws_kms.client import Client, description

# keyvault asks every second whether to serve, and KMS bills each call.
_WELL_SECONDS = 30.0
# A wrapped data key: version of the KEK ‖ KMS's CiphertextBlob.
_VERSION_BYTES = 4
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

_WELL = Health(True, "ok", "AWS KMS answers")


class KmsBackend:
    """KEKs in AWS KMS (see the module)."""

    name = "aws_kms"
    shred: Shred = "delayed"

    def __init__(self, deployment: str, deletion_days: int) -> None:
        """Use a deployment's KMS keys. Raises ConfigError."""
        if _NAME.fullmatch(deployment) is None:
            raise ConfigError("BYOKEEP_DEPLOYMENT: an AWS KMS alias takes letters, digits, _ and -")
        self._deployment = deployment
        self._deletion_days = deletion_days
        self._versions: dict[str, int] = {}
        self._client = Client()

    async def generate_data_key(self, kek: str) -> DataKey:
        """Return a fresh data key under the KEK's newest version."""
        answer = await self._client.call(
            "generate_data_key",
            KeyId=self._alias(kek),
            KeySpec="AES_256",
            EncryptionContext=self._context(kek),
        )
        version = await self._version(answer["KeyId"])
        key = Secret(bytearray(answer.pop("Plaintext")))
        return DataKey(key, _join(version, answer["CiphertextBlob"]), version)

    async def unwrap(self, kek: str, wrapped: bytes) -> Secret:
        """Return a data key in clear."""
        version, blob = _split(wrapped)
        answer = await self._client.call(
            "decrypt",
            # Named, or KMS would open what was planted under somebody else's KMS key.
            KeyId=self._alias(kek, version),
            CiphertextBlob=blob,
            EncryptionContext=self._context(kek),
        )
        return Secret(bytearray(answer.pop("Plaintext")))

    async def rewrap(self, kek: str, wrapped: Sequence[bytes]) -> list[Rewrapped | RewrapFailed]:
        """Wrap data keys again under the KEK's newest version; KMS alone sees them."""
        await self.newest(kek)
        return await asyncio.gather(*(self._rewrap(kek, one) for one in wrapped))

    async def _rewrap(self, kek: str, wrapped: bytes) -> Rewrapped | RewrapFailed:
        try:
            version, blob = _split(wrapped)
            answer = await self._client.call(
                "re_encrypt",
                CiphertextBlob=blob,
                SourceKeyId=self._alias(kek, version),
                SourceEncryptionContext=self._context(kek),
                DestinationKeyId=self._alias(kek),
                DestinationEncryptionContext=self._context(kek),
            )
            newest = await self._version(answer["KeyId"])
        except KekMissingError:
            return RewrapFailed("UNDECRYPTABLE")
        except UnwrapError:
            return RewrapFailed("ROW_TAMPERED")
        return Rewrapped(_join(newest, answer["CiphertextBlob"]), newest)

    async def create(self, kek: str) -> bool:
        """Create a KEK; False where it exists."""
        if await self._client.described(self._alias(kek)) is not None:
            return False
        key_id = await self._make(kek, 1)
        if not await self._client.make(
            "create_alias", AliasName=self._alias(kek), TargetKeyId=key_id
        ):
            # Left by a destruction that died half-way, or made by another process just now.
            await self._point(kek, key_id)
        return True

    async def rotate(self, kek: str) -> int:
        """Make a new version of a KEK and return its number."""
        version = await self.newest(kek) + 1
        # Where an earlier rotation died half-way, or another one runs, its key is taken.
        await self._point(kek, await self._make(kek, version))
        return version

    async def newest(self, kek: str) -> int:
        """Return the number of the newest version."""
        found = await self._client.described(self._alias(kek))
        if found is None:
            raise KekMissingError(kek)
        return found[1]

    async def trim(self, kek: str, minimum: int) -> None:
        """Schedule the deletion of every version below `minimum`."""
        if await self.newest(kek) < minimum:
            raise KekMissingError(kek)
        await self._delete(kek, minimum - 1)

    async def destroy(self, kek: str) -> None:
        """Schedule the deletion of every version of a KEK."""
        found = await self._client.described(self._alias(kek))
        if found is not None:
            await self._delete(kek, found[1])
        await self._client.end("delete_alias", AliasName=self._alias(kek))

    async def health(self) -> Health:
        """Ask KMS for the KEK of keyvault's own keys; not again for half a minute, unless a call
        failed meanwhile."""
        if time.monotonic() < self._client.well_until:
            return _WELL
        try:
            found = await self._client.described(self._alias(SYSTEM))
        except KekUnavailableError as error:
            return Health(False, error.state, str(error))
        if found is None:
            return Health(False, "uninitialized", "no KMS key of keyvault's own: run migrate")
        self._client.well_until = time.monotonic() + _WELL_SECONDS
        return _WELL

    def refusal(self) -> None:
        """Return nothing: KMS is asked each time."""

    async def start(self) -> None:
        """Do nothing: boto3 finds and renews credentials by itself."""

    async def close(self) -> None:
        """End the threads."""
        self._client.close()

    async def _make(self, kek: str, version: int) -> str:
        """Return the KMS key of a version, made where there is none."""
        alias = self._alias(kek, version)
        found = await self._client.described(alias)
        if found is not None:
            return found[0]
        answer = await self._client.call(
            "create_key",
            Description=description(self._deployment, kek, version),
            KeySpec="SYMMETRIC_DEFAULT",
            KeyUsage="ENCRYPT_DECRYPT",
        )
        key_id: str = answer["KeyMetadata"]["KeyId"]
        if not await self._client.make("create_alias", AliasName=alias, TargetKeyId=key_id):
            # Another process was first: its key counts, and ours is of no use.
            await self._schedule(key_id)
            found = await self._client.described(alias)
            if found is None:
                raise KekMissingError(kek)
            return found[0]
        return key_id

    async def _point(self, kek: str, key_id: str) -> None:
        await self._client.call("update_alias", AliasName=self._alias(kek), TargetKeyId=key_id)

    async def _delete(self, kek: str, newest: int) -> None:
        # Found downwards, deleted upwards: who dies half-way leaves no gap for the next one.
        found = []
        for version in range(newest, 0, -1):
            described = await self._client.described(self._alias(kek, version))
            if described is None:
                break
            found.append((self._alias(kek, version), described[0]))
        for alias, key_id in reversed(found):
            await self._schedule(key_id)
            await self._client.end("delete_alias", AliasName=alias)

    async def _schedule(self, key_id: str) -> None:
        await self._client.end(
            "schedule_key_deletion",
            KeyId=key_id,
            PendingWindowInDays=self._deletion_days,
        )

    async def _version(self, arn: str) -> int:
        # A KMS key is one version for ever.
        if arn not in self._versions:
            found = await self._client.described(arn)
            if found is None:
                raise KekMissingError(arn)
            self._versions[arn] = found[1]
        return self._versions[arn]

    def _alias(self, kek: str, version: int | None = None) -> str:
        alias = f"alias/byokeep/{self._deployment}/{kek}"
        return alias if version is None else f"{alias}/v{version}"

    def _context(self, kek: str) -> dict[str, str]:
        return {"byokeep:deployment": self._deployment, "byokeep:kek": kek}


def _join(version: int, blob: bytes) -> bytes:
    return version.to_bytes(_VERSION_BYTES, "big") + blob


def _split(wrapped: bytes) -> tuple[int, bytes]:
    if len(wrapped) <= _VERSION_BYTES:
        raise UnwrapError
    return int.from_bytes(wrapped[:_VERSION_BYTES], "big"), wrapped[_VERSION_BYTES:]
