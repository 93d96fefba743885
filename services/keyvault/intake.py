"""Sealed intake: intake keys of an hour, and the one-shot process that opens a seal.

Their private parts are wrapped under the KEK of their epoch (see `epochs`), which
the admin role destroys: with it, what was sealed to them is noise.

HPKE returns an immutable value, which can't be wiped; so a seal is opened by a
fresh process that encrypts what it finds under a data key and ends. keyvault
itself never has a plaintext at intake.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace

import grpc
from byokeep import dsse, hpke
from byokeep.common.v1 import options_pb2
from byokeep.encoding import fields
from byokeep.ids import new_id
from byokeep.keyshape import KeyFormatError
from byokeep.keyvault.v1 import custody_pb2
from byokeep.sealing import MAX_WINDOW, SealContext

from services.common.errors import ByokeepError, internal
from services.common.secret import Secret
from services.keyvault import epochs, kek, lifecycle
from services.keyvault.database import Database
from services.keyvault.envelope import Context, EnvelopeError, decrypt, encrypt
from services.keyvault.intake_child import READY
from services.keyvault.ledger import clock
from services.keyvault.sql import intake as sql
from services.keyvault.system_keys import SigningKey

_REMAINING = datetime.timedelta(minutes=15)
_CHILD_SECONDS = 20.0
_CHILDREN = 4  # at once
_REMEMBERED = 16


@dataclass(frozen=True, slots=True)
class Opened:
    """What the one-shot process leaves: ciphertext, and a hint that may be shown."""

    envelope: bytes
    hint: str


class IntakeKeys:
    """Makes and signs intake keys, and opens what is sealed to them."""

    def __init__(
        self,
        database: Database,
        backends: kek.Backends,
        signing: Callable[[], SigningKey],
        deployment: str,
    ) -> None:
        """Keep keys in a database, wrapped under epoch KEKs."""
        self._database = database
        self._backends = backends
        self._signing = signing
        self._deployment = deployment
        self._making = asyncio.Lock()
        # Apart from other threads, and bounded where a child runs on though its caller has gone.
        self._children = ThreadPoolExecutor(_CHILDREN, "intake")
        self._verified: set[sql.IntakeKey] = set()

    async def statement(self, suite: options_pb2.HpkeSuite.ValueType) -> options_pb2.SignedEnvelope:
        """Return the newest intake key of a suite, signed; make one where it would end soon."""
        async with self._making:
            key = await sql.newest(self._database, suite, _REMAINING)
            if key is None:
                key = await self._make(suite)
            await self._verify(key)
        body = custody_pb2.IntakeStatement(
            deployment=self._deployment,
            suite=suite,
            intake_key_id=key.key_id,
            public_key=key.public,
        )
        body.not_before.FromDatetime(key.not_before)
        body.not_after.FromDatetime(key.not_after)
        payload = body.SerializeToString(deterministic=True)
        signing = self._signing()
        return dsse.sign(dsse.INTAKE_KEY, payload, signing.key_id, signing.private)

    async def open(
        self,
        sealed: custody_pb2.SealedKey,
        context: SealContext,
        data_key: bytearray,
        target: Context,
    ) -> Opened:
        """Open a seal in a one-shot process, and encrypt it there under a data key.

        Raises:
            ByokeepError: INTAKE_KEY_EXPIRED, SEAL_INVALID, or as byokeep.keyshape refuses.
        """
        key = await sql.get(self._database, sealed.intake_key_id)
        if key is None or key.suite != sealed.suite:
            raise _expired()
        private = await self._private(key)
        if private is None:
            raise _expired()
        order = {
            "suite": int(sealed.suite),
            "private_bytes": len(private.reveal()),
            "sealed": sealed.ciphertext.hex(),
            "info": context.info(self._deployment, key.key_id).hex(),
            "provider": context.provider,
            "context": astuple(target),
        }
        head = json.dumps(order).encode() + b"\n"
        with private:
            output = await asyncio.get_running_loop().run_in_executor(
                self._children, _run_child, head, private.reveal(), data_key
            )
        answer = json.loads(output)
        if "refusal" in answer:
            raise refusal(answer["refusal"], context.provider)
        return Opened(bytes.fromhex(answer["envelope"]), answer["hint"])

    async def _make(self, suite: options_pb2.HpkeSuite.ValueType) -> sql.IntakeKey:
        key_id = new_id("ink")
        private = hpke.PrivateKey.generate(suite)
        backend = self._backends.primary
        now = clock().replace(microsecond=0)
        epoch = epochs.INTAKE.at(now)
        try:
            data_key = await backend.generate_data_key(kek.intake_kek(epoch))
        except kek.KekMissingError:
            raise epochs.missing(kek.intake_kek(epoch)) from None
        key = sql.IntakeKey(
            key_id,
            suite,
            private.public_bytes,
            backend.name,
            data_key.kek_version,
            data_key.wrapped,
            b"",
            now,
            min(now + MAX_WINDOW, epochs.intake_close(epoch) - epochs.INTAKE_GRACE),
        )
        with data_key.plaintext as clear:
            sealed = encrypt(clear.reveal(), private.reveal(), self._context(key))
        key = replace(key, envelope=sealed)
        await sql.insert(self._database, key)
        return key

    async def _verify(self, key: sql.IntakeKey) -> None:
        """Refuse to sign a public key that SQL put there: the envelope is bound to the row."""
        if key in self._verified:
            return
        private = await self._private(key)
        if private is None:
            raise lifecycle.row_tampered("intake key", key.key_id)
        private.wipe()
        if len(self._verified) > _REMEMBERED:
            self._verified.clear()
        self._verified.add(key)

    async def _private(self, key: sql.IntakeKey) -> Secret | None:
        """Return the private part; None where it does not open: its KEK is gone, or by SQL."""
        name = kek.intake_kek(epochs.INTAKE.at(key.not_before))
        try:
            data_key = await self._backends.named(key.kek_backend).unwrap(name, key.wrapped_dek)
            with data_key as clear:
                return Secret(decrypt(clear.reveal(), key.envelope, self._context(key)))
        except (kek.KekMissingError, kek.UnwrapError, EnvelopeError):
            return None

    def _context(self, key: sql.IntakeKey) -> Context:
        row = fields(
            key.suite, key.public, int(key.not_before.timestamp()), int(key.not_after.timestamp())
        )
        return Context(
            self._deployment, "", hashlib.sha256(row).hexdigest(), "intake", key.key_id, 1
        )


def _expired() -> ByokeepError:
    """Return the error for a seal to an intake key that is closed or unknown."""
    return ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "INTAKE_KEY_EXPIRED",
        "the intake key is over or unknown here; get a new one and seal again",
        field="sealed_key.intake_key_id",
    )


def refusal(rule: str, provider: str) -> ByokeepError:
    """Return the error for what the one-shot process refused: `seal`, or a rule of keyshape."""
    if rule == "seal":
        field, reason = "sealed_key", "SEAL_INVALID"
        sentence = "the sealed key does not open for this tenant, key and request"
    else:
        refused = KeyFormatError(rule, provider)
        field, reason, sentence = "key", refused.reason, str(refused)
    return ByokeepError(grpc.StatusCode.INVALID_ARGUMENT, reason, sentence, field=field, rule=rule)


def _run_child(*message: bytes | bytearray) -> bytes:
    # Not asyncio's subprocess: uvloop forks, and gRPC's fork handlers can't run while its
    # threads are busy. The subprocess module uses vfork, which runs none. The child gets
    # none of keyvault's environment, which may hold the keyring.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "services.keyvault.intake_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env={"PYTHONPATH": os.pathsep.join(sys.path), "LC_ALL": "C.UTF-8"},
    )
    watchdog = threading.Timer(_CHILD_SECONDS, process.kill)
    watchdog.start()
    with process:
        assert process.stdin is not None  # noqa: S101 for the type checker
        assert process.stdout is not None  # noqa: S101
        # Its door is closed (not dumpable) before anything secret is in its pipe.
        if process.stdout.read(1) == READY:
            for part in message:
                process.stdin.write(part)
        process.stdin.close()
        output = process.stdout.read()
    watchdog.cancel()
    if process.returncode != 0:
        raise internal()
    return output
