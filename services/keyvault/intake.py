"""Sealed intake: hourly intake keys, and the one-shot process that opens a seal.

HPKE returns an immutable value, which can't be wiped; so a seal is opened by a
fresh process that encrypts what it finds under a data key and ends. keyvault
itself never has a plaintext at intake.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import grpc
from byokeep import dsse, hpke
from byokeep.common.v1 import options_pb2
from byokeep.ids import new_id
from byokeep.keyvault.v1 import custody_pb2
from byokeep.sealing import MAX_WINDOW, SealContext

from services.common.errors import ByokeepError, internal
from services.keyvault import kek
from services.keyvault.database import Database
from services.keyvault.envelope import Context, EnvelopeError, decrypt, encrypt
from services.keyvault.store import intake as store
from services.keyvault.system_keys import SigningKey

_REMAINING = datetime.timedelta(minutes=15)
_CHILD_SECONDS = 20
_REFUSALS = {
    "seal": ("SEAL_INVALID", "the sealed key does not open for this tenant, key and request"),
    "charset": ("KEY_CHARSET", "a provider key has printable ASCII characters only"),
    "length": ("KEY_LENGTH", "a provider key has 16 to 512 characters"),
    "admin": ("KEY_IS_ADMIN", "an administrator's key is refused; use an ordinary API key"),
}


@dataclass(frozen=True, slots=True)
class Opened:
    """What the one-shot process leaves: ciphertext, and a hint that may be shown."""

    envelope: bytes
    hint: str


class IntakeKeys:
    """Makes, signs, opens and closes intake keys."""

    def __init__(
        self, database: Database, backend: kek.Backend, signing: SigningKey, deployment: str
    ) -> None:
        """Keep keys in a database, wrapped under epoch KEKs of a backend."""
        self._database = database
        self._backend = backend
        self._signing = signing
        self._deployment = deployment
        self._making = asyncio.Lock()

    async def statement(self, suite: options_pb2.HpkeSuite.ValueType) -> options_pb2.SignedEnvelope:
        """Return the newest intake key of a suite, signed; make one where it would end soon."""
        async with self._making:
            key = await store.newest(self._database, suite, _REMAINING)
            if key is None:
                key = await self._make(suite)
        body = custody_pb2.IntakeStatement(
            deployment=self._deployment,
            suite=suite,
            intake_key_id=key.key_id,
            public_key=key.public,
        )
        body.not_before.FromDatetime(key.not_before)
        body.not_after.FromDatetime(key.not_after)
        payload = body.SerializeToString(deterministic=True)
        return dsse.sign(dsse.INTAKE_KEY, payload, self._signing.key_id, self._signing.private)

    async def open(
        self,
        sealed: custody_pb2.SealedKey,
        context: SealContext,
        data_key: bytearray,
        target: Context,
    ) -> Opened:
        """Open a seal in a one-shot process, and encrypt it there under a data key.

        Raises:
            ByokeepError: INTAKE_KEY_EXPIRED, SEAL_INVALID, KEY_CHARSET, KEY_LENGTH, KEY_IS_ADMIN.
        """
        key = await store.get(self._database, sealed.intake_key_id)
        if key is None or key.suite != sealed.suite:
            raise expired()
        try:
            private = await self._private(key)
        except (kek.KekMissingError, kek.UnwrapError, EnvelopeError):
            raise expired() from None
        order = {
            "suite": int(sealed.suite),
            "private_bytes": len(private),
            "sealed": sealed.ciphertext.hex(),
            "info": context.info(self._deployment, key.key_id).hex(),
            "provider": context.provider,
            "context": [
                target.deployment,
                target.tenant,
                target.owner,
                target.provider,
                target.key_id,
                target.version,
            ],
        }
        message = bytearray(json.dumps(order).encode() + b"\n")
        message += private
        message += data_key
        try:
            return await _one_shot(message)
        finally:
            for buffer in (message, private):
                buffer[:] = bytes(len(buffer))

    async def close_epochs(self) -> None:
        """Delete intake keys whose window is over, and their KEKs first."""
        for key_id in await store.closed(self._database):
            await self._backend.destroy(kek.intake_kek(key_id))
            await store.delete(self._database, key_id)

    async def _make(self, suite: options_pb2.HpkeSuite.ValueType) -> store.IntakeKey:
        key_id = new_id("ink")
        private = hpke.PrivateKey.generate(suite)
        await self._backend.create(kek.intake_kek(key_id))
        data_key = await self._backend.generate_data_key(kek.intake_kek(key_id))
        with data_key.plaintext as clear:
            sealed = encrypt(clear.reveal(), private.reveal(), self._context(key_id))
        now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        key = store.IntakeKey(
            key_id, suite, private.public_bytes, data_key.wrapped, sealed, now, now + MAX_WINDOW
        )
        await store.insert(self._database, key)
        return key

    async def _private(self, key: store.IntakeKey) -> bytearray:
        wrapped = await self._backend.unwrap(kek.intake_kek(key.key_id), key.wrapped_dek)
        with wrapped as data_key:
            return decrypt(data_key.reveal(), key.envelope, self._context(key.key_id))

    def _context(self, key_id: str) -> Context:
        return Context(self._deployment, "", "", "intake", key_id, 1)


def expired() -> ByokeepError:
    """Return the error for a seal to an intake key that is closed or unknown."""
    return ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "INTAKE_KEY_EXPIRED",
        "the intake key is over or unknown here; get a new one and seal again",
        field="sealed_key.intake_key_id",
    )


async def _one_shot(message: bytearray) -> Opened:
    reading, writing = os.pipe()
    try:
        # At most 10 KiB: it fits the pipe, so no copy stays behind in a transport's buffer.
        os.write(writing, message)
        os.close(writing)
        output = await asyncio.to_thread(_run_child, reading)
    finally:
        os.close(reading)
    answer = json.loads(output)
    if "refusal" in answer:
        reason, sentence = _REFUSALS[answer["refusal"]]
        field = "sealed_key" if reason == "SEAL_INVALID" else "key"
        raise ByokeepError(
            grpc.StatusCode.INVALID_ARGUMENT, reason, sentence, field=field, rule=answer["refusal"]
        )
    return Opened(bytes.fromhex(answer["envelope"]), answer["hint"])


def _run_child(stdin: int) -> bytes:
    # Not asyncio's subprocess: uvloop forks, and gRPC's fork handlers can't run while its
    # threads are busy. The subprocess module uses vfork, which runs none.
    done = subprocess.run(
        [sys.executable, "-m", "services.keyvault.intake_child"],
        stdin=stdin,
        stdout=subprocess.PIPE,
        timeout=_CHILD_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise internal()
    return done.stdout
