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
ScheduleKeyDeletion, UpdateAlias). Region, credentials and endpoint are boto3's own
settings (AWS_REGION, AWS_ROLE_ARN, AWS_ENDPOINT_URL_KMS, …).
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

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

_CALL_SECONDS = 3
_DEADLINE_SECONDS = 8.0  # of a call, with its wait for a thread
# keyvault asks every second whether to serve, and KMS bills each call.
_WELL_SECONDS = 30.0
_THREADS = 16
# A wrapped data key: version of the KEK ‖ KMS's CiphertextBlob.
_VERSION_BYTES = 4
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_DESCRIPTION = re.compile(r"byokeep [^ ]+ [^ ]+ v([0-9]{1,9})")

_WELL = Health(True, "ok", "AWS KMS answers")
_MISSING = ("NotFoundException", "KMSInvalidStateException")
_NOT_OURS = ("InvalidCiphertextException", "IncorrectKeyException", "ValidationException")
_STATES = {
    "AccessDeniedException": ("denied", "AWS KMS refuses keyvault's identity; check its policy"),
    "ThrottlingException": ("slow", "AWS KMS throttles this account's calls"),
    "LimitExceededException": ("slow", "an AWS KMS quota of this account is reached"),
    "DisabledException": ("disabled", "the KMS key is disabled; enable it"),
}


class _AlreadyExistsError(Exception):
    """What was to be made is there."""


class KmsBackend:
    """KEKs in AWS KMS (see the module)."""

    name = "aws_kms"
    shred: Shred = "delayed"

    def __init__(self, deployment: str, deletion_days: int) -> None:
        """Use a deployment's KMS keys. Raises ConfigError."""
        if _NAME.fullmatch(deployment) is None:
            raise ConfigError("BYOKEEP_DEPLOYMENT: an AWS KMS alias takes letters, digits, _ and -")
        if not 7 <= deletion_days <= 30:
            raise ConfigError("BYOKEEP_KMS_DELETION_DAYS: KMS takes 7 to 30")
        # Its debug log has requests and answers in it.
        logging.getLogger("botocore").setLevel(logging.WARNING)
        self._deployment = deployment
        self._deletion_days = deletion_days
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="kms")
        self._versions: dict[str, int] = {}
        self._well_until = 0.0
        config = Config(
            connect_timeout=_CALL_SECONDS,
            read_timeout=_CALL_SECONDS,
            retries={"total_max_attempts": 2, "mode": "standard"},
            max_pool_connections=_THREADS,
        )
        client = None
        try:
            client = boto3.client("kms", config=config)
        except BotoCoreError as error:
            problem = type(error).__name__
        if client is None:
            raise ConfigError(f"boto3 can't make a KMS client ({problem}); is AWS_REGION set?")
        self._kms: Any = client

    async def generate_data_key(self, kek: str) -> DataKey:
        """Return a fresh data key under the KEK's newest version."""
        answer = await self._call(
            self._kms.generate_data_key,
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
        answer = await self._call(
            self._kms.decrypt,
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
            answer = await self._call(
                self._kms.re_encrypt,
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
        if await self._described(self._alias(kek)) is not None:
            return False
        key_id = await self._make(kek, 1)
        if await self._exists(
            self._kms.create_alias, AliasName=self._alias(kek), TargetKeyId=key_id
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
        found = await self._described(self._alias(kek))
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
        found = await self._described(self._alias(kek))
        if found is not None:
            await self._delete(kek, found[1])
        await self._gone(self._kms.delete_alias, AliasName=self._alias(kek))

    async def health(self) -> Health:
        """Ask KMS for the KEK of keyvault's own keys; not again for half a minute, unless a call
        failed meanwhile."""
        if time.monotonic() < self._well_until:
            return _WELL
        try:
            found = await self._described(self._alias(SYSTEM))
        except KekUnavailableError as error:
            return Health(False, error.state, str(error))
        if found is None:
            return Health(False, "uninitialized", "no KMS key of keyvault's own: run migrate")
        self._well_until = time.monotonic() + _WELL_SECONDS
        return _WELL

    def refusal(self) -> None:
        """Return nothing: KMS is asked each time."""

    async def start(self) -> None:
        """Do nothing: boto3 finds and renews credentials by itself."""

    async def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._kms.close()

    async def _make(self, kek: str, version: int) -> str:
        """Return the KMS key of a version, made where there is none."""
        alias = self._alias(kek, version)
        found = await self._described(alias)
        if found is not None:
            return found[0]
        answer = await self._call(
            self._kms.create_key,
            Description=f"byokeep {self._deployment} {kek} v{version}",
            KeySpec="SYMMETRIC_DEFAULT",
            KeyUsage="ENCRYPT_DECRYPT",
        )
        key_id: str = answer["KeyMetadata"]["KeyId"]
        if await self._exists(self._kms.create_alias, AliasName=alias, TargetKeyId=key_id):
            # Another process was first: its key counts, and ours is of no use.
            await self._schedule(key_id)
            found = await self._described(alias)
            if found is None:
                raise KekMissingError(kek)
            return found[0]
        return key_id

    async def _point(self, kek: str, key_id: str) -> None:
        await self._call(self._kms.update_alias, AliasName=self._alias(kek), TargetKeyId=key_id)

    async def _delete(self, kek: str, newest: int) -> None:
        # Found downwards, deleted upwards: who dies half-way leaves no gap for the next one.
        found = []
        for version in range(newest, 0, -1):
            described = await self._described(self._alias(kek, version))
            if described is None:
                break
            found.append((self._alias(kek, version), described[0]))
        for alias, key_id in reversed(found):
            await self._schedule(key_id)
            await self._gone(self._kms.delete_alias, AliasName=alias)

    async def _schedule(self, key_id: str) -> None:
        await self._gone(
            self._kms.schedule_key_deletion,
            KeyId=key_id,
            PendingWindowInDays=self._deletion_days,
        )

    async def _gone(self, call: Callable[..., Any], **parameters: Any) -> None:
        try:
            await self._call(call, **parameters)
        except KekMissingError:
            return

    async def _exists(self, call: Callable[..., Any], **parameters: Any) -> bool:
        """Call; return whether what was to be made was there."""
        try:
            await self._call(call, **parameters)
        except _AlreadyExistsError:
            return True
        return False

    async def _described(self, key: str) -> tuple[str, int] | None:
        """Return id and version of a KMS key that is alive."""
        try:
            answer = await self._call(self._kms.describe_key, KeyId=key)
        except KekMissingError:
            return None
        metadata = answer["KeyMetadata"]
        match = _DESCRIPTION.fullmatch(metadata.get("Description", ""))
        if match is None or metadata.get("KeyState") == "PendingDeletion":
            return None
        return metadata["KeyId"], int(match[1])

    async def _version(self, arn: str) -> int:
        # A KMS key is one version for ever.
        if arn not in self._versions:
            found = await self._described(arn)
            if found is None:
                raise KekMissingError(arn)
            self._versions[arn] = found[1]
        return self._versions[arn]

    def _alias(self, kek: str, version: int | None = None) -> str:
        alias = f"alias/byokeep/{self._deployment}/{kek}"
        return alias if version is None else f"{alias}/v{version}"

    def _context(self, kek: str) -> dict[str, str]:
        return {"byokeep:deployment": self._deployment, "byokeep:kek": kek}

    async def _call(self, call: Callable[..., Any], **parameters: Any) -> dict[str, Any]:
        problem = ""
        answer: dict[str, Any] = {}
        loop = asyncio.get_running_loop()
        try:
            work = loop.run_in_executor(self._threads, lambda: call(**parameters))
            answer = await asyncio.wait_for(work, _DEADLINE_SECONDS)
        except ClientError as error:
            problem = str(error.response.get("Error", {}).get("Code", ""))
        except BotoCoreError:
            problem = "unreachable"
        except TimeoutError:
            problem = "ThrottlingException"
        if problem:
            refusal = _error(problem)
            if isinstance(refusal, KekUnavailableError):
                self._well_until = 0.0
            raise refusal
        return answer


def _error(problem: str) -> Exception:
    if problem in _MISSING:
        return KekMissingError(problem)
    if problem in _NOT_OURS:
        return UnwrapError()
    if problem == "AlreadyExistsException":
        return _AlreadyExistsError()
    state, sentence = _STATES.get(problem, ("unreachable", "AWS KMS does not answer"))
    return KekUnavailableError("aws_kms", state, sentence)


def _join(version: int, blob: bytes) -> bytes:
    return version.to_bytes(_VERSION_BYTES, "big") + blob


def _split(wrapped: bytes) -> tuple[int, bytes]:
    if len(wrapped) <= _VERSION_BYTES:
        raise UnwrapError
    return int.from_bytes(wrapped[:_VERSION_BYTES], "big"), wrapped[_VERSION_BYTES:]
