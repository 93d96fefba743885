"""What the audit log may keep in Vault: its anchor, and the key that signs its checkpoints.

Both are beside the backend: a deployment may use either, or keep the file and the wrapped
key. They are reached through the identity that the process has.
"""

from __future__ import annotations

import base64
import contextlib

from byokeep.ids import public_key_id

from services.keyvault.anchor import Stored
from services.keyvault.kek.vault import states
from services.keyvault.kek.vault.session import Session

_CHANGED = b"check-and-set parameter did not match"


class KvAnchor:
    """The anchor as one entry of a key/value engine (version 2), written by check-and-set.

    A check-and-set version is the number of the entry's newest version, 0 where there is none.
    """

    def __init__(self, session: Session, place: str) -> None:
        """Keep it at `place`: mount and path, such as `byokeep/anchor`."""
        self._session = session
        self._mount, _, self._path = place.partition("/")

    async def read(self) -> Stored:
        """Return the newest version; no text where nothing was written, or it was deleted."""
        reply = await self._session.ask(
            lambda call: call.kv.read_secret_version(
                self._path, mount_point=self._mount, raise_on_deleted_version=True
            )
        )
        if reply.is_nothing():
            return Stored(None, "0")
        # A version that was deleted is a 404 as well, with its metadata.
        if reply.status != 200 and not reply.says(b'"metadata"'):
            raise states.unavailable("no_mount" if reply.status == 404 else "misconfigured")
        data = reply.fields("data", "data", "metadata")
        return Stored((data["data"] or {}).get("text"), str(data["metadata"]["version"]))

    async def write(self, text: str, after: Stored) -> bool:
        """Write a version over `after`; False where that is not the newest any more."""
        reply = await self._session.ask(
            lambda call: call.kv.create_or_update_secret(
                self._path, {"text": text}, cas=int(after.version), mount_point=self._mount
            )
        )
        if reply.status == 200:
            return True
        if reply.status == 400 and reply.says(_CHANGED):
            return False
        raise states.unavailable("no_mount" if reply.status == 404 else "misconfigured")


class TransitSigner:
    """Signs with an Ed25519 key that never leaves Vault, in the version that was newest at
    start: clients pin its public key. Make by `load`."""

    def __init__(self, session: Session, mount: str, key: str, version: int, public: bytes) -> None:
        """Sign with one version of a Transit key."""
        self._session = session
        self._mount = mount
        self._key = key
        self._version = version
        self.public_key = public
        self.key_id = public_key_id("alk", public)

    @classmethod
    async def load(cls, session: Session, mount: str, key: str) -> TransitSigner:
        """Look the key's newest version up. Raises KekUnavailableError."""
        reply = await session.ask(lambda call: call.transit.read_key(key, mount_point=mount))
        if reply.status != 200:
            raise states.unavailable("no_mount")
        data = reply.fields("data", "type", "latest_version", "keys")
        if data["type"] != "ed25519":
            raise states.unavailable("misconfigured")
        version = int(data["latest_version"])
        public = base64.b64decode(data["keys"][str(version)]["public_key"])
        return cls(session, mount, key, version, public)

    async def sign(self, message: bytes) -> bytes:
        """Return the signature of a message (RFC 8032: 64 bytes)."""
        text = base64.b64encode(message).decode()
        reply = await self._session.ask(
            lambda call: call.transit.sign_data(
                self._key, text, key_version=self._version, mount_point=self._mount
            )
        )
        signature = b""
        if reply.status == 200:
            _, _, encoded = str(reply.fields("data", "signature")["signature"]).rpartition(":")
            # What is not ASCII is another ValueError than binascii.Error.
            with contextlib.suppress(ValueError):
                signature = base64.b64decode(encoded, validate=True)
        if len(signature) != 64:
            raise states.unavailable("misconfigured")
        return signature
