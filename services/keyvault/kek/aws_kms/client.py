"""Calls to AWS KMS: threads, deadlines, and its errors in the words of `kek`.

Region, credentials and endpoint are boto3's own settings (AWS_REGION, AWS_ROLE_ARN,
AWS_ENDPOINT_URL_KMS, …).
"""

from __future__ import annotations

import asyncio
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from services.common.config import ConfigError
from services.keyvault import metrics
from services.keyvault.kek import KekMissingError, KekUnavailableError, UnwrapError

_CALL_SECONDS = 3
_DEADLINE_SECONDS = 8.0  # of a call, with its wait for a thread
_THREADS = 16
_DESCRIPTION = re.compile(r"byokeep [^ ]+ [^ ]+ v([0-9]{1,9})")

_MISSING = ("NotFoundException", "KMSInvalidStateException")
_NOT_OURS = ("InvalidCiphertextException", "IncorrectKeyException", "ValidationException")
_STATES = {
    "AccessDeniedException": ("denied", "AWS KMS refuses keyvault's identity; check its policy"),
    "ThrottlingException": ("slow", "AWS KMS throttles this account's calls"),
    "LimitExceededException": ("slow", "an AWS KMS quota of this account is reached"),
    "DisabledException": ("disabled", "the KMS key is disabled; enable it"),
}


def description(deployment: str, kek: str, version: int) -> str:
    """Return what a KMS key says of itself: which version of which KEK it is."""
    return f"byokeep {deployment} {kek} v{version}"


class AlreadyExistsError(Exception):
    """What was to be made is there."""


class Client:
    """Calls KMS (see the module)."""

    def __init__(self) -> None:
        """Make boto3's client. Raises ConfigError."""
        # Its debug log has requests and answers in it.
        logging.getLogger("botocore").setLevel(logging.WARNING)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="kms")
        #: Until when KMS is taken to be well without being asked: the next failure ends it.
        self.well_until = 0.0
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

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._kms.close()

    async def call(self, operation: str, **parameters: Any) -> dict[str, Any]:
        """Return the answer to an operation, by boto3's name for it.

        Raises: KekMissingError, UnwrapError, KekUnavailableError, AlreadyExistsError.
        """
        problem = ""
        answer: dict[str, Any] = {}
        loop = asyncio.get_running_loop()
        run = getattr(self._kms, operation)
        try:
            work = loop.run_in_executor(self._threads, lambda: run(**parameters))
            with metrics.kek_call("aws_kms"):
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
                self.well_until = 0.0
            raise refusal
        return answer

    async def end(self, operation: str, **parameters: Any) -> None:
        """Call what ends something; that may be gone."""
        try:
            await self.call(operation, **parameters)
        except KekMissingError:
            return

    async def make(self, operation: str, **parameters: Any) -> bool:
        """Call what makes something; False where that is there."""
        try:
            await self.call(operation, **parameters)
        except AlreadyExistsError:
            return False
        return True

    async def described(self, key: str) -> tuple[str, int] | None:
        """Return id and KEK's version of a KMS key that is alive, by its alias or ARN."""
        try:
            answer = await self.call("describe_key", KeyId=key)
        except KekMissingError:
            return None
        metadata = answer["KeyMetadata"]
        match = _DESCRIPTION.fullmatch(metadata.get("Description", ""))
        if match is None or metadata.get("KeyState") == "PendingDeletion":
            return None
        return metadata["KeyId"], int(match[1])


def _error(problem: str) -> Exception:
    if problem in _MISSING:
        return KekMissingError(problem)
    if problem in _NOT_OURS:
        return UnwrapError()
    if problem == "AlreadyExistsException":
        return AlreadyExistsError()
    state, sentence = _STATES.get(problem, ("unreachable", "AWS KMS does not answer"))
    return KekUnavailableError("aws_kms", state, sentence)
