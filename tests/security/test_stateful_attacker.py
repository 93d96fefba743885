"""Somebody with PostgreSQL's superuser against keyvault's core, whatever order things come in: two
replicas, their restarts and pauses, and any row there ever was put back, swapped, hidden, flipped
or planted between any two steps.

What must hold: no key is given that was revoked, destroyed, held or never there; no grant yields
its key twice from one process; every key that was given is on record; and once the attacker has
gone, nothing that was answered is lost. `make test` takes some 2,000 steps, the same ones each
time. `make test-deep` takes 100,000 (`ATTACKS` of 50) that nobody took before; a failure prints
them, and a line to repeat it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from dataclasses import dataclass, field

import pytest
from byokeep.ids import new_id
from byokeep.keyvault.v1 import audit_pb2
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from services.common.errors import ByokeepError
from services.keyvault import custody, ledger
from services.keyvault.lifecycle import State
from tests.harness.parts import ORIGIN, RUNNER, Replica, Shared

EXAMPLES = int(os.environ.get("BYOKEEP_ATTACK_EXAMPLES", "40"))
STEPS = 50
TENANTS = ("acme", "other")
KEYS = ("key_a", "key_b")
_TABLES = {
    "tenant": "name",
    "tenant_part": "tenant, part",
    "key_secret": "tenant, key_id, version",
    "event": "tenant, sequence",
    "lease": "lease_id",
    "log_leaf": "index",
    "log_snapshot": "part",
}
#: Where the columns of a key are in its table's rows.
_PLACES = {table: range(len(names.split(", "))) for table, names in _TABLES.items()}
_OF_TENANTS = ("tenant", "tenant_part", "key_secret", "event")
_FLIPPED = [
    ("tenant", "state"),
    ("tenant", "usage"),
    ("tenant", "mac"),
    ("tenant", "head_hash"),
    ("tenant_part", "state"),
    ("tenant_part", "usage"),
    ("key_secret", "wrapped_dek"),
    ("key_secret", "envelope"),
    ("event", "body"),
]
replica_number = st.integers(0, 1)
#: Which row, of those that there are: nothing that is drawn hangs on what happened before.
picks = st.integers(0, 2**32).map(random.Random)
tenants, keys = st.sampled_from(TENANTS), st.sampled_from(KEYS)


@dataclass
class Truth:
    """What was answered: values by version, what ended and when, who was given what."""

    values: dict[tuple[str, str, int], str] = field(default_factory=dict)
    #: By version: (replica that answered, each replica's ticks by then).
    ended: dict[tuple[str, str, int], tuple[int, list[int]]] = field(default_factory=dict)
    destroyed: set[tuple[str, str, int]] = field(default_factory=set)
    held: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    grants: list = field(default_factory=list)
    #: (replica, its start, grant, lease, tenant)
    given: list[tuple[int, int, str, str, str]] = field(default_factory=list)


class Attack(RuleBasedStateMachine):
    """Steps of replicas, and of whoever writes their database (see the module)."""

    loop: asyncio.AbstractEventLoop
    shared: Shared
    reset = None

    def run(self, awaitable):
        return self.loop.run_until_complete(asyncio.wait_for(awaitable, 60))

    @initialize()
    def begin(self) -> None:
        self.truth, self.copies = Truth(), []
        self.ticks, self.starts, self.forks = [0, 0], [0, 0], 0
        self.run(self._begin())

    async def _begin(self) -> None:
        await self.reset()
        await Replica(self.shared).create_system()
        self.replicas = [Replica(self.shared) for _ in range(2)]
        for one in self.replicas:
            await one.start()
        for tenant in TENANTS:
            await self.replicas[0].create_tenant(tenant)
            for key in KEYS:
                await self._add(0, tenant, key)
        await self._tick(1)

    def teardown(self) -> None:
        self.run(self._end())

    # What users and operators do.

    @rule(number=replica_number, tenant=tenants, key=keys)
    def add(self, number: int, tenant: str, key: str) -> None:
        self.attempt(self._add(number, tenant, key))

    async def _add(self, number: int, tenant: str, key: str) -> None:
        value = f"sk-{new_id('key')}"
        version = await self.replicas[number].add(tenant, key, value)
        self.truth.values[tenant, key, version] = value
        for other in range(1, version):
            # A version that was PENDING is destroyed by the next.
            self._ended(number, (tenant, key, other))

    @rule(number=replica_number, tenant=tenants, key=keys, destroyed=st.booleans())
    def end(self, number: int, tenant: str, key: str, destroyed: bool) -> None:
        after = State.DESTROYED if destroyed else State.REVOKED
        self.attempt(self._finish(number, tenant, key, after))

    async def _finish(self, number: int, tenant: str, key: str, after: State) -> None:
        one = self.replicas[number]

        def act(found) -> None:
            custody.finish(found, key, ORIGIN, one.backends, after)

        _, head = await one.ledger.change(tenant, act, {ledger.part_of(key)})
        await one.anchored(tenant, head)
        for version in [at for at in self.truth.values if at[:2] == (tenant, key)]:
            self._ended(number, version)

    def _ended(self, number: int, version: tuple[str, str, int]) -> None:
        if version in self.truth.values:
            self.truth.ended.setdefault(version, (number, list(self.ticks)))

    @rule(number=replica_number, tenant=tenants, held=st.booleans())
    def hold(self, number: int, tenant: str, held: bool) -> None:
        self.truth.held.pop(tenant, None) if not held else None
        if self.attempt(self._hold(number, tenant, held)) and held:
            self.truth.held[tenant] = (number, list(self.ticks))

    async def _hold(self, number: int, tenant: str, held: bool) -> None:
        kind = (
            audit_pb2.AUDIT_EVENT_TYPE_TENANT_REVOKED
            if held
            else audit_pb2.AUDIT_EVENT_TYPE_TENANT_RESUMED
        )

        def act(found) -> None:
            found.edit().held = held
            found.events.append(audit_pb2.AuditEvent(type=kind))
            if held:
                ledger.end_leases(found)

        _, head = await self.replicas[number].ledger.change(tenant, act)
        await self.replicas[number].anchored(tenant, head)

    # Leases.

    @rule(number=replica_number, tenant=tenants, key=keys, again=st.booleans(), picks=picks)
    def lease(self, number: int, tenant: str, key: str, again: bool, picks: random.Random) -> None:
        if again and self.truth.grants:
            grant = picks.choice(self.truth.grants)
        else:
            versions = [at[2] for at in self.truth.values if at[:2] == (tenant, key)]
            grant = self.replicas[number].grant(tenant, key, picks.choice(versions))
            self.truth.grants.append(grant)
        self.attempt(self._lease(number, grant))

    async def _lease(self, number: int, grant) -> None:
        lease, value = await self.replicas[number].lease(grant)
        at = (grant.tenant, grant.key_id, grant.key_version)
        note(f"leased {at} by {number}")
        assert value == self.truth.values.get(at), "a foreign value"
        assert not self._late(number, self.truth.ended.get(at)), "an ended version was leased"
        assert not self._late(number, self.truth.held.get(grant.tenant)), "a held tenant"
        own = (number, self.starts[number], grant.grant_id)
        assert own not in [one[:3] for one in self.truth.given], "a grant was redeemed twice"
        self.truth.given.append((*own, lease, grant.tenant))

    def _late(self, number: int, said: tuple[int, list[int]] | None) -> bool:
        """Say whether a replica must know what was answered: it answered it, or ticked since."""
        return said is not None and (said[0] == number or self.ticks[number] > said[1][number])

    @rule(number=replica_number, picks=picks)
    def release(self, number: int, picks: random.Random) -> None:
        if self.truth.given:
            lease = picks.choice(self.truth.given)[3]
            one = self.replicas[number]
            report = audit_pb2.AuditEvent().report
            self.attempt(one.releases.release(lease, 1, report, RUNNER))

    # What replicas do.

    @rule(number=replica_number)
    def tick(self, number: int) -> None:
        self.attempt(self._tick(number))

    async def _tick(self, number: int) -> None:
        before = self.replicas[number].log.fresh
        await self.replicas[number].log.tick()
        # A tick that did not succeed has not looked.
        self.ticks[number] += self.replicas[number].log.fresh > before

    @rule(number=replica_number, saved=st.booleans())
    def restart(self, number: int, saved: bool) -> None:
        self.run(self._restart(number, saved))

    async def _restart(self, number: int, saved: bool) -> None:
        old = self.replicas[number]
        if saved:
            # An orderly end: what it owes is anchored, where the database lets it.
            for step in (old.log.tick, old.log.save):
                with contextlib.suppress(ByokeepError):
                    await step()
        await old.close()
        lost = set(old.heads.owed)
        # Stated: what a process gave in the second before it dies may be forgotten.
        self.truth.given = [
            one for one in self.truth.given if one[0] != number or one[4] not in lost
        ]
        self.replicas[number], self.starts[number] = Replica(self.shared), self.starts[number] + 1
        await self.replicas[number].start()

    # What the attacker does. Whatever it is, both replicas are asked for keys right after it; where
    # neither gave one, everything is mostly put back as it was: damage denies all that follows.

    @rule()
    def copy(self) -> None:
        self.copies = [*self.copies[-5:], self.run(self._dump())]

    @rule(table=st.sampled_from(sorted(_TABLES)), tenant=tenants, one=st.booleans(), picks=picks)
    def put_back(self, table: str, tenant: str, one: bool, picks: random.Random) -> None:
        """Rows of a table as they were, of one tenant or all; or a single one of them."""
        if not self.copies:
            return
        rows = picks.choice(self.copies)[table]
        if table in _OF_TENANTS:
            rows = [row for row in rows if row[0] == tenant]
        if rows and one:
            rows = [picks.choice(rows)]
        self.attack(tenant, picks, [table], self._put(table, rows))

    @rule(tenant=tenants, picks=picks)
    def put_back_with_its_past(self, tenant: str, picks: random.Random) -> None:
        """A tenant whole: row, parts, ciphertext, events."""
        if self.copies:
            copy = picks.choice(self.copies)
            steps = [
                self._put(table, [row for row in copy[table] if row[0] == tenant])
                for table in _OF_TENANTS
            ]
            self.attack(tenant, picks, _OF_TENANTS, *steps)

    @rule(table=st.sampled_from(["tenant_part", "key_secret", "event", "lease"]), picks=picks)
    def hide(self, table: str, picks: random.Random) -> None:
        rows = self.run(self._sql(f"SELECT ctid::text FROM {table} ORDER BY 1"))
        if rows:
            (row,) = picks.choice(rows)
            hidden = self._sql(f"DELETE FROM {table} WHERE ctid = %s::tid", row)
            self.attack(picks.choice(TENANTS), picks, [table], hidden)

    @rule(at=st.sampled_from(_FLIPPED), tenant=tenants, picks=picks)
    def flip(self, at: tuple[str, str], tenant: str, picks: random.Random) -> None:
        table, column = at
        flipped = (
            f"UPDATE {table} SET {column} = set_byte({column}, 0, 255 - get_byte({column}, 0))"
            f" WHERE {_TABLES[table].split(', ')[0]} = %s AND length({column}) > 0"
        )
        self.attack(tenant, picks, [table], self._sql(flipped, tenant))

    @rule(key=keys, picks=picks)
    def swap(self, key: str, picks: random.Random) -> None:
        """One tenant's ciphertext under the other's name."""
        swapped = (
            "UPDATE key_secret m SET wrapped_dek = o.wrapped_dek, envelope = o.envelope"
            " FROM key_secret o WHERE m.key_id = %s AND o.key_id = m.key_id"
            " AND o.version = m.version AND o.tenant <> m.tenant"
        )
        self.attack(picks.choice(TENANTS), picks, ["key_secret"], self._sql(swapped, key))

    @rule(tenant=tenants, picks=picks)
    def plant(self, tenant: str, picks: random.Random) -> None:
        """An event past the head, and a leaf past the end."""
        event = (
            "INSERT INTO event SELECT name, sequence + 1, '', 'x', 'x' FROM tenant"
            " WHERE name = %s ON CONFLICT DO NOTHING"
        )
        leaf = (
            "INSERT INTO log_leaf SELECT coalesce(max(index), -1) + 1, 0, %s, 99, 'x', 'x', 'x'"
            " FROM log_leaf"
        )
        steps = self._sql(event, tenant), self._sql(leaf, tenant)
        self.attack(tenant, picks, ["event", "log_leaf"], *steps)

    def attack(self, tenant: str, picks: random.Random, touched, *steps) -> None:
        before, given = self.run(self._dump(touched)), len(self.truth.given)
        for step in steps:
            self.run(step)
        versions = [at for at in self.truth.values if at[0] == tenant]
        ended = [at for at in versions if at in self.truth.ended]
        for number in (0, 1):
            if self.truth.grants:
                self.attempt(self._lease(number, picks.choice(self.truth.grants)))
            for at in (picks.choice(ended or versions), versions[-1]):
                self.attempt(self._lease(number, self.replicas[number].grant(*at)))
        if len(self.truth.given) == given and picks.randint(0, 4):
            for table, rows in before.items():
                self.run(self._sql(f"DELETE FROM {table}"))
                self.run(self._put(table, rows))
        elif "event" in touched:
            # Where it is kept, and by more than one fork, evidence may be gone: an export tells.
            self.forks += 1 if touched is _OF_TENANTS else 2

    async def _dump(self, tables=tuple(_TABLES)) -> dict[str, list]:
        return {table: await self._sql(f"SELECT * FROM {table}") for table in tables}

    async def _put(self, table: str, rows: list) -> None:
        """Put rows in the place of those with the same key."""
        if not rows:
            return
        own = " AND ".join(f'"{name}" = %s' for name in _TABLES[table].split(", "))
        marks = ", ".join(["%s"] * len(rows[0]))
        async with self.admin.transaction(), self.admin.cursor() as cursor:
            keys = [[row[at] for at in _PLACES[table]] for row in rows]
            await cursor.executemany(f"DELETE FROM {table} WHERE {own}", keys)
            await cursor.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)

    # The harness.

    async def _sql(self, statement: str, *parameters):
        async with self.admin.transaction():
            cursor = await self.admin.execute(statement, parameters)
            return await cursor.fetchall() if cursor.description else []

    def attempt(self, work) -> bool:
        """Do it; whoever writes the database may deny it."""
        try:
            self.run(work)
        except ByokeepError as error:
            note(f"refused: {error.reason}")
            return False
        return True

    async def _end(self) -> None:
        """Every key that was given is on record: in its tenant's chain, or as lost in the system's,
        once each replica has looked. What was hidden of a chain an export tells."""
        for one in self.replicas:
            for _ in range(2):
                with contextlib.suppress(ByokeepError):
                    await one.log.tick()
        whole = not any(one.log.rolled_back for one in self.replicas)
        bodies = b"".join(row[0] for row in await self._sql("SELECT body FROM event"))
        for one in self.replicas:
            await one.close()
        if whole and self.forks < 2:
            for *_, lease, _ in self.truth.given:
                assert lease.encode() in bodies, "a key was given, and no event says so"


@pytest.mark.fuzz
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("examples", [EXAMPLES])
def test_nothing_that_sql_does_gives_a_key_away(
    postgres, database_passwords, keyvault_database_url, tmp_path, examples
):
    """Shown to fail without each rule of heads, digests and the MAC (tests/mutants)."""
    import psycopg

    loop = asyncio.new_event_loop()
    Attack.loop, Attack.shared = loop, Shared(keyvault_database_url, tmp_path)
    Attack.admin = loop.run_until_complete(
        psycopg.AsyncConnection.connect(keyvault_database_url, autocommit=True)
    )

    async def reset() -> None:
        (tmp_path / "anchor.json").unlink(missing_ok=True)
        tables = ", ".join([*_TABLES, "log_node", "log_checkpoint", "revocation", "local_kek"])
        await Attack.admin.execute(f"TRUNCATE {tables}")

    Attack.reset = staticmethod(reset)
    try:
        run_state_machine_as_test(
            Attack,
            settings=settings(
                max_examples=examples,
                stateful_step_count=STEPS,
                deadline=None,
                # The same walks each time, where nobody asks for more of them.
                derandomize="BYOKEEP_ATTACK_EXAMPLES" not in os.environ,
                suppress_health_check=list(HealthCheck),
                print_blob=True,
            ),
        )
    finally:
        loop.run_until_complete(Attack.admin.close())
        loop.close()
