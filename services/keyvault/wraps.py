"""What wraps a data key, said so that SQL alone can't say it: a MAC over each row's wrapping, with
the envelope that it opens.

Old versions of a KEK are destroyed for good, in backups of the database too. So whoever
destroys them asks not what the rows say, but whether every version of every key, as the
tenant's chain counts them, has a row that keyvault itself wrapped anew.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Collection
from dataclasses import dataclass

from byokeep.encoding import fields

from services.keyvault import domain
from services.keyvault.database import Connection
from services.keyvault.domain import State
from services.keyvault.store import jobs as store
from services.keyvault.store import keys as key_store
from services.keyvault.store.jobs import Job

#: Rows that are looked at before others have a turn.
STRIDE = 500


@dataclass(frozen=True, slots=True)
class Proof:
    """What a tenant's rows prove: how many versions that its chain knows have a sound state, and of
    those that live, which are not known to be wrapped by what a job leaves."""

    versions: int
    unproven: Collection[tuple[str, int]]


class Wraps:
    """Makes and checks the MACs (see the module)."""

    def __init__(self, mac_key: bytes, deployment: str) -> None:
        """Use keyvault's state MAC key."""
        self._mac_key = mac_key
        self._deployment = deployment
        self._prefix = fields("byokeep/wrap/v2", deployment)

    def mac(
        self,
        tenant: str,
        bound: tuple[str, int],
        backend: str,
        kek_version: int,
        wrapped: bytes,
        envelope_sha256: bytes,
    ) -> bytes:
        """Return the MAC of what wraps a version's data key. Not of that alone: a version that
        moved has had two, and the one before would stand for the other's."""
        own = fields(tenant, *bound, backend, kek_version, wrapped, envelope_sha256)
        return hmac.digest(self._mac_key, self._prefix + own, "sha256")

    async def proof(
        self, connection: Connection, job: Job, newest: int, known: Callable[[str, str, int], bool]
    ) -> Proof:
        """Look at a tenant's rows; its chain is locked. `newest`: the newest version of its KEK
        that the job's backend has; a row that names a newer one is of an earlier KEK of that name.
        `known` says of which versions the chain tells, followed to its head: another row stands for
        none of them. What it tells of an end does not count: anybody can add an event, and of a
        living version a backup would then be lost.

        Raises:
            ByokeepError: STATE_TAMPERED.
        """
        found = {row[:2]: row[2:] for row in await store.wraps(connection, job.tenant)}
        looked, versions, unproven = 0, 0, list[tuple[str, int]]()
        for key in await key_store.of_tenant(connection, job.tenant):
            for one in key.versions:
                looked += 1
                if looked % STRIDE == 0:
                    await asyncio.sleep(0)
                bound = key.key_id, one.version
                if not known(job.tenant, *bound):
                    continue
                domain.check_state(self._mac_key, self._deployment, key, one)
                versions += 1
                if one.state is State.DESTROYED:
                    continue
                backend, kek_version, *wrap = found[bound]
                aimed = (
                    backend == job.target_backend and job.target_version <= kek_version <= newest
                )
                if not aimed or not self.sound(job.tenant, bound, backend, kek_version, *wrap):
                    unproven.append(bound)
        return Proof(versions, unproven)

    def sound(
        self,
        tenant: str,
        bound: tuple[str, int],
        backend: str,
        kek_version: int,
        wrapped: bytes | None,
        mac: bytes | None,
        envelope_sha256: bytes | None,
    ) -> bool:
        """Say whether keyvault itself wrote what wraps a version's data key."""
        if wrapped is None or mac is None or envelope_sha256 is None:
            return False
        own = self.mac(tenant, bound, backend, kek_version, wrapped, envelope_sha256)
        return hmac.compare_digest(mac, own)
