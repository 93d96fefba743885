"""Keys of keyvault itself: state MAC, intake signing, audit log.

Each is rotated in two steps: `prepare` makes one, and gives its public part out where it has one,
for clients pin it; `activate` has it used. The ones before stay, so that what they signed, or
authenticated, can still be verified.

Each is stored in an envelope under a data key that the KEK `system` wraps, and
held in memory while keyvault runs: none of them can open a provider key. Which of them are in use
stands in the deployment's own row, which the state MAC authenticates: so all of them are opened
first, and which of them are current is said by `choose`, once that row was read.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from byokeep.ids import public_key_id
from byokeep.keyvault.v1 import audit_pb2, state_pb2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.common import logs
from services.common.config import ConfigError
from services.common.secret import Secret
from services.keyvault import kek
from services.keyvault.anchor import AnchorStore
from services.keyvault.database import Connection, Database, DuplicateError
from services.keyvault.envelope import Context, EnvelopeError, decrypt, encrypt
from services.keyvault.event import SYSTEM
from services.keyvault.heads import Heads
from services.keyvault.ledger import Ledger, Macs, Tenant
from services.keyvault.lifecycle import not_found
from services.keyvault.log import Log
from services.keyvault.sql import system_keys as sql

log = logging.getLogger(__name__)
STATE_MAC, INTAKE_SIGNING, AUDIT_LOG = "state_mac", "intake_signing", "audit_log"
_KINDS: Final = (STATE_MAC, INTAKE_SIGNING, AUDIT_LOG)
_PREFIX: Final = {STATE_MAC: "smk", INTAKE_SIGNING: "isk", AUDIT_LOG: "alk"}
#: Every process has opened a key so long after it was made.
_OPENED_SECONDS: Final = 5.0
#: Kind and id.
_Name = tuple[str, str]


@dataclass(frozen=True, slots=True)
class SigningKey:
    """An Ed25519 key and its id."""

    key_id: str
    private: Ed25519PrivateKey


@dataclass(slots=True)
class SystemKeys:
    """keyvault's own keys: those in use, and every one that was opened."""

    macs: Macs
    intake_signing: SigningKey
    audit_log: SigningKey
    opened: dict[_Name, bytes] = field(default_factory=dict)
    #: Rows that did not open: somebody else's.
    unopened: set[_Name] = field(default_factory=set)

    def __repr__(self) -> str:
        """Show ids only."""
        return (
            f"<SystemKeys {self.macs.current} {self.intake_signing.key_id} {self.audit_log.key_id}>"
        )

    def choose(self, system: state_pb2.SystemState) -> None:
        """Use what the deployment's own row says is in use: of each kind the newest."""
        current = {one.kind: one.key_id for one in system.keys if one.active}
        if (STATE_MAC, current.get(STATE_MAC, "")) in self.opened:
            self.macs.current = current[STATE_MAC]
        for kind in (INTAKE_SIGNING, AUDIT_LOG):
            raw = self.opened.get((kind, current.get(kind, "")))
            if raw is not None and getattr(self, kind).key_id != current[kind]:
                setattr(self, kind, _signing(current[kind], raw))


async def create(
    database: Database, backends: kek.Backends, deployment: str, store: AnchorStore
) -> None:
    """Make what is missing: the KEK, one key of each kind, the deployment's own row.

    Raises:
        ConfigError: some of it is missing, and the anchor says that it was there.
    """
    backend = backends.primary
    anchored = (await store.read()).text is not None
    if not anchored:
        await backend.create(kek.SYSTEM)
    async with database.transaction() as connection:
        await sql.lock(connection)
        missing = [kind for kind in _KINDS if kind not in await sql.kinds(connection)]
        if anchored and missing:
            raise ConfigError(
                "keyvault's own keys are not in this database, and its anchor says that they were:"
                " restore the database. Without them nothing that it holds can be authenticated"
            )
        for kind in missing:
            await _add(connection, backend, deployment, kind)
    if anchored:
        # The KEK of a backend that becomes the primary one, for `move`.
        await backend.create(kek.SYSTEM)
        return
    keys = await load(database, backends, deployment)
    state = state_pb2.SystemState(backends=[backend.name])
    for kind, key_id in (
        (STATE_MAC, keys.macs.current),
        (INTAKE_SIGNING, keys.intake_signing.key_id),
        (AUDIT_LOG, keys.audit_log.key_id),
    ):
        state.keys.add(kind=kind, key_id=key_id, active=True)

    def begin(system: Tenant) -> None:
        system.events += [
            _event(audit_pb2.AUDIT_EVENT_TYPE_SYSTEM_KEY_ACTIVATED, one.kind, one.key_id, "")
            for one in state.keys
        ]

    with suppress(DuplicateError):
        await Ledger(database, Heads(), keys.macs, deployment).create(SYSTEM, state, begin)


async def load(database: Database, backends: kek.Backends, deployment: str) -> SystemKeys:
    """Open every key. Until `choose`, the oldest of each kind is in use.

    Raises:
        KeyError: a kind has none.
        KekMissingError, UnwrapError: a kind has none that opens.
    """
    opened, failed = await _open(backends, deployment, await sql.rows(database))
    oldest: dict[str, str] = {}
    for kind, key_id in opened:
        oldest.setdefault(kind, key_id)
    if failed is not None and len(oldest) < len(_KINDS):
        raise failed
    return SystemKeys(
        Macs(
            oldest[STATE_MAC],
            {key_id: raw for (kind, key_id), raw in opened.items() if kind == STATE_MAC},
        ),
        _signing(oldest[INTAKE_SIGNING], opened[INTAKE_SIGNING, oldest[INTAKE_SIGNING]]),
        _signing(oldest[AUDIT_LOG], opened[AUDIT_LOG, oldest[AUDIT_LOG]]),
        opened,
    )


class Rotation:
    """Rotates keyvault's own keys, on an operator's word, and takes up what others rotated."""

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        log_: Log,
        backends: kek.Backends,
        keys: SystemKeys,
        deployment: str,
    ) -> None:
        """Rotate the keys that this process holds."""
        self._database = database
        self._ledger = ledger
        self._log = log_
        self._backends = backends
        self._keys = keys
        self._deployment = deployment

    async def refresh(self) -> None:
        """Open keys that were made since, before anything is authenticated with them; use those
        that were activated."""
        keys, system = self._keys, self._log.system
        new = await sql.names(self._database) - keys.opened.keys() - keys.unopened
        keys.macs.complete = not new & {(one.kind, one.key_id) for one in system.keys}
        if new:
            rows = [row for row in await sql.rows(self._database) if (row[0], row[1]) in new]
            opened, _ = await _open(self._backends, self._deployment, rows)
            keys.opened.update(opened)
            keys.unopened |= new - opened.keys()
            for (kind, key_id), raw in opened.items():
                if kind == STATE_MAC:
                    keys.macs.keys[key_id] = raw
            keys.macs.complete = True
        keys.choose(system)

    async def prepare(self, kind: str, caller: str) -> tuple[str, bytes]:
        """Make a key that is not used yet, or return the one that waits: its id, and its public
        part; none of a MAC key."""
        waiting = await self._waiting(kind)
        if waiting is None:
            async with self._database.transaction() as connection:
                key_id = await _add(connection, self._backends.primary, self._deployment, kind)
            await self.refresh()

            def add(system: Tenant) -> None:
                system.edit().keys.add(kind=kind, key_id=key_id)
                prepared = audit_pb2.AUDIT_EVENT_TYPE_SYSTEM_KEY_PREPARED
                system.events.append(_event(prepared, kind, key_id, caller))

            _, head = await self._ledger.change(SYSTEM, add)
            await self._log.anchored(SYSTEM, head)
            waiting = key_id
        return waiting, _public(kind, self._keys.opened[kind, waiting])

    async def activate(self, kind: str, key_id: str, caller: str) -> None:
        """Have a prepared key used; every replica takes it up within seconds.

        Raises:
            ByokeepError: NOT_FOUND.
        """
        await self.refresh()
        if kind == STATE_MAC:
            # Whoever has not opened it yet would find the log to be of somebody else.
            await asyncio.sleep(_OPENED_SECONDS)

        def act(system: Tenant) -> None:
            found = [one for one in system.state.keys if (one.kind, one.key_id) == (kind, key_id)]
            if not found or (kind, key_id) not in self._keys.opened:
                raise not_found("prepared key")
            if found[0].active:
                return
            others = [one for one in system.state.keys if one != found[0]]
            keys = system.edit().keys
            del keys[:]
            keys.extend(others)
            keys.add(kind=kind, key_id=key_id, active=True)
            activated = audit_pb2.AUDIT_EVENT_TYPE_SYSTEM_KEY_ACTIVATED
            system.events.append(_event(activated, kind, key_id, caller))

        _, head = await self._ledger.change(SYSTEM, act)
        await self._log.anchored(SYSTEM, head)

    async def _waiting(self, kind: str) -> str | None:
        await self.refresh()
        system = await self._ledger.read(SYSTEM)
        found = [
            one.key_id
            for one in system.state.keys
            if one.kind == kind and not one.active and (kind, one.key_id) in self._keys.opened
        ]
        return found[-1] if found else None


async def move(database: Database, backends: kek.Backends, deployment: str) -> None:
    """Move keys that another backend holds to the primary one, each with a fresh data key."""
    backend = backends.primary
    for kind, key_id, holder, wrapped, sealed in await sql.rows(database):
        if holder == backend.name:
            continue
        context = _context(deployment, kind, key_id)
        with await backends.named(holder).unwrap(kek.SYSTEM, wrapped) as old:
            secret = Secret(decrypt(old.reveal(), sealed, context))
        with secret:
            fresh = await backend.generate_data_key(kek.SYSTEM)
            with fresh.plaintext as clear:
                moved = encrypt(clear.reveal(), secret.reveal(), context)
        place = backend.name, fresh.kek_version
        await sql.move(database, kind, key_id, place, (fresh.wrapped, moved), wrapped)


def public_keys(keys: SystemKeys) -> Mapping[str, dict[str, bytes]]:
    """Return the public keys that clients pin, by kind and id; from the private ones, so that
    nobody can put another there by SQL."""
    found: dict[str, dict[str, bytes]] = {INTAKE_SIGNING: {}, AUDIT_LOG: {}}
    for (kind, key_id), raw in keys.opened.items():
        if kind in found:
            found[kind][key_id] = _public(kind, raw)
    return found


async def _add(connection: Connection, backend: kek.Backend, deployment: str, kind: str) -> str:
    secret, key_id = _fresh(kind)
    data_key = await backend.generate_data_key(kek.SYSTEM)
    with data_key.plaintext as clear:
        sealed = encrypt(clear.reveal(), secret, _context(deployment, kind, key_id))
    place = backend.name, data_key.kek_version
    await sql.insert(connection, kind, key_id, place, (data_key.wrapped, sealed))
    return key_id


async def _open(
    backends: kek.Backends, deployment: str, rows: Sequence[tuple[str, str, str, bytes, bytes]]
) -> tuple[dict[_Name, bytes], Exception | None]:
    """Open keys; return those that do, and why another one did not."""
    opened: dict[_Name, bytes] = {}
    failed: Exception | None = None
    for kind, key_id, holder, wrapped, sealed in rows:
        context = _context(deployment, kind, key_id)
        try:
            with await backends.named(holder).unwrap(kek.SYSTEM, wrapped) as data_key:
                opened[kind, key_id] = bytes(decrypt(data_key.reveal(), sealed, context))
        except EnvelopeError:
            failed = kek.UnwrapError(key_id)
        except (kek.KekMissingError, kek.UnwrapError) as error:
            failed = error
        if (kind, key_id) not in opened:
            logs.event(log, "system_key_unopened", level=logging.ERROR, kind=kind, key=key_id)
    return opened, failed


def _fresh(kind: str) -> tuple[bytes, str]:
    if kind == STATE_MAC:
        return os.urandom(32), f"{_PREFIX[kind]}_{hashlib.sha256(os.urandom(32)).hexdigest()[:16]}"
    private = Ed25519PrivateKey.generate()
    public = private.public_key().public_bytes_raw()
    return private.private_bytes_raw(), public_key_id(_PREFIX[kind], public)


def _public(kind: str, raw: bytes) -> bytes:
    if kind == STATE_MAC:
        return b""
    return Ed25519PrivateKey.from_private_bytes(raw).public_key().public_bytes_raw()


def _event(
    event: audit_pb2.AuditEventType.ValueType, kind: str, key_id: str, caller: str
) -> audit_pb2.AuditEvent:
    return audit_pb2.AuditEvent(type=event, caller=caller, detail=f"{kind} {key_id}")


def _signing(key_id: str, raw: bytes) -> SigningKey:
    return SigningKey(key_id, Ed25519PrivateKey.from_private_bytes(raw))


def _context(deployment: str, kind: str, key_id: str) -> Context:
    # No tenant has an empty name, so no provider key's context can equal this.
    return Context(deployment, "", kind, "system", key_id, 1)
