"""46. stateful_model, keyvault's part: whatever order things come in, keyvault and a model of
thirty lines agree on which grants yield the key, and the database on what happened.

`make test` tries a few sequences of steps; `BYOKEEP_MODEL_EXAMPLES=500` tries more. A failure
prints the steps and a line to repeat it (`@reproduce_failure`).
"""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import pytest
from byokeep.keyvault.v1 import admin_pb2, audit_pb2, lease_pb2
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from services.keyvault.event import GENESIS, link_hash
from services.keyvault.ledger import ALL
from services.keyvault.lifecycle import STATE_AFTER
from services.keyvault.sql import events
from tests.harness import keyvault as kv
from tests.harness.keyvault import Child, grant_for, lease_request, refusal, released

EXAMPLES = int(os.environ.get("BYOKEEP_MODEL_EXAMPLES", "4"))
STEPS = int(os.environ.get("BYOKEEP_MODEL_STEPS", "20"))
REVIEW = kv.grant_pb2.LEASE_PURPOSE_REVIEW
VALIDATION = kv.grant_pb2.LEASE_PURPOSE_VALIDATION


@dataclass
class Model:
    """One key as it should be: its versions' states and plaintexts, and live leases."""

    states: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    leases: dict[str, int] = field(default_factory=dict)
    held: bool = False

    def with_state(self, *states: str) -> list[int]:
        return [number for number, one in enumerate(self.states, 1) if one in states]

    def set(self, number: int, state: str) -> None:
        self.states[number - 1] = state
        if state in ("REVOKED", "DESTROYED"):
            self.leases = {one: of for one, of in self.leases.items() if of != number}

    def gone(self) -> bool:
        active, kept = self.with_state("ACTIVE"), [s for s in self.states if s != "DESTROYED"]
        return not active and (not kept or kept[-1] == "REVOKED")

    def leased(self, number: int, purpose: int) -> bool:
        allowed = ("ACTIVE",) if purpose == REVIEW else ("ACTIVE", "PENDING")
        return not self.held and self.states[number - 1] in allowed


class Custody(RuleBasedStateMachine):
    """Steps of custody and leasing on a real keyvault with a real database."""

    loop: asyncio.AbstractEventLoop
    deployment: kv.Deployment

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.child = Child()
        self.key = None
        self.stack = AsyncExitStack()

    def run(self, awaitable):
        return self.loop.run_until_complete(awaitable)

    async def _start(self) -> None:
        self.keyvault = await self.stack.enter_async_context(
            kv.running(self.deployment, intake_per_hour=10_000)
        )

    @initialize()
    def begin(self) -> None:
        self.run(self._begin())

    async def _begin(self) -> None:
        await self._start()
        self.tenant = f"t{os.urandom(6).hex()}"
        await self.keyvault.create_tenant(self.tenant)

    def teardown(self) -> None:
        self.run(self.stack.aclose())

    @property
    def key_id(self) -> str:
        return self.key.name.split("/")[3]

    @precondition(lambda self: len(self.model.states) < 6)
    @rule()
    def stage(self) -> None:
        """A new version; an older PENDING one is destroyed; a key that is gone takes none."""
        text = f"sk-proj-{len(self.model.states):040d}"
        extra = {"key_id": self.key_id, "operation": "rotate"} if self.key else {}
        wanted = "WRONG_STATE" if self.key and self.model.gone() else ""
        request = self.run(self.keyvault.stage_request(text, tenant=self.tenant, **extra))
        got = self.run(refusal(self._stage(request)))
        assert got == wanted
        if not wanted:
            for number in self.model.with_state("PENDING"):
                self.model.set(number, "DESTROYED")
            self.model.states.append("PENDING")
            self.model.texts.append(text)

    async def _stage(self, request) -> None:
        self.key = (await self.keyvault.custody.StageKey(request)).key

    @precondition(lambda self: self.key)
    @rule(data=st.data(), now=st.booleans())
    def promote(self, data, now) -> None:
        """PENDING becomes ACTIVE; what was ACTIVE is SUPERSEDED, or destroyed at once."""
        number = data.draw(st.integers(1, len(self.model.states)))
        state = self.model.states[number - 1]
        call = self.keyvault.promote(self.key.name, number, destroy_previous=now)
        assert self.run(refusal(call)) == ("" if state in ("PENDING", "ACTIVE") else "WRONG_STATE")
        if state == "PENDING":
            for old in self.model.with_state("SUPERSEDED", "NEEDS_REKEY"):
                self.model.set(old, "DESTROYED")
            for old in self.model.with_state("ACTIVE"):
                self.model.set(old, "DESTROYED" if now else "SUPERSEDED")
            self.model.set(number, "ACTIVE")

    @precondition(lambda self: self.key)
    @rule()
    def roll_back(self) -> None:
        """The SUPERSEDED version is ACTIVE again; what came after it is destroyed."""
        previous = self.model.with_state("SUPERSEDED")
        got = self.run(refusal(self.keyvault.change("RollBackKey", self.key.name)))
        assert got == ("" if previous else "WRONG_STATE")
        if previous:
            for number in self.model.with_state("PENDING", "ACTIVE", "NEEDS_REKEY"):
                self.model.set(number, "DESTROYED")
            self.model.set(previous[-1], "ACTIVE")

    @precondition(lambda self: self.key)
    @rule()
    def revoke(self) -> None:
        """Every version that is not gone is REVOKED, for good."""
        self.run(self.keyvault.change("RevokeKey", self.key.name))
        for number in self.model.with_state("PENDING", "ACTIVE", "SUPERSEDED", "NEEDS_REKEY"):
            self.model.set(number, "REVOKED")

    @precondition(lambda self: self.key and len(self.model.states) > 3)
    @rule()
    def destroy(self) -> None:
        """Every version is DESTROYED, for good."""
        self.run(self.keyvault.change("DestroyKey", self.key.name))
        for number in range(1, len(self.model.states) + 1):
            self.model.set(number, "DESTROYED")

    @rule(held=st.booleans())
    def hold(self, held) -> None:
        """An operator revokes the tenant's leases, or resumes them."""
        kind = admin_pb2.RevokeTenantRequest if held else admin_pb2.ResumeTenantRequest
        call = self.keyvault.admin.RevokeTenant if held else self.keyvault.admin.ResumeTenant
        self.run(call(kind(tenant=f"tenants/{self.tenant}", reason="model")))
        self.model.held = held
        if held:
            self.model.leases = {}

    @precondition(lambda self: self.key)
    @rule(
        target=leases,
        data=st.data(),
        purpose=st.sampled_from([REVIEW, REVIEW, VALIDATION]),
        times=st.integers(1, 4),
    )
    def lease(self, data, purpose, times):
        """A grant redeemed so many times at once: yields the key once, or not at all."""
        number = data.draw(st.integers(1, len(self.model.states)))
        changes = {"key_version": number, "purpose": purpose}
        grant = grant_for(self.key, self.child, **changes)
        request = lease_request(self.deployment, grant, self.child)
        answers = [one for one in self.run(self._redeem(request, times)) if one is not None]
        if not self.model.leased(number, purpose):
            assert answers == []
            return multiple()
        (answer,) = answers
        assert self.child.open(request, answer) == self.model.texts[number - 1]
        self.model.leases[answer.lease_id] = number
        self.spent = request
        return (answer.lease_id, number, purpose)

    async def _redeem(self, request, times):
        async def one():
            answer = None

            async def call() -> None:
                nonlocal answer
                answer = await self.keyvault.leases().LeaseKey(request)

            assert await refusal(call()) in (
                "",
                "GRANT_REFUSED",
                "WRONG_STATE",
                "TENANT_NOT_ACTIVE",
                "KEY_NEEDS_REKEY",
            )
            return answer

        return await asyncio.gather(*(one() for _ in range(times)))

    @precondition(lambda self: hasattr(self, "spent"))
    @rule()
    def redeem_again(self) -> None:
        """A grant that was redeemed stays so, whatever happened since."""
        assert self.run(self._redeem(self.spent, 2)) == [None, None]

    @rule(lease=consumes(leases), rejected=st.booleans())
    def release(self, lease, rejected) -> None:
        """A release ends a lease; a rejected key needs to be replaced."""
        lease_id, number, purpose = lease
        outcomes = (lease_pb2.LEASE_OUTCOME_COMPLETED, lease_pb2.LEASE_OUTCOME_KEY_REJECTED)
        for _ in range(2):
            assert self.run(released(self.keyvault, lease_id, outcomes[rejected])) == ""
        self.model.leases.pop(lease_id, None)
        if rejected and purpose == VALIDATION and self.model.states[number - 1] == "ACTIVE":
            self.model.set(number, "NEEDS_REKEY")

    @precondition(lambda self: self.key)
    @rule()
    def crash(self) -> None:
        """keyvault is started anew beside the database that it left."""
        self.run(self.stack.aclose())
        self.run(self._start())

    @invariant()
    def agrees(self) -> None:
        if self.key is not None:
            self.run(self._agrees())

    async def _agrees(self) -> None:
        """States, live leases, counters and the audit chain say what the model says."""
        sql, app = self.keyvault.sql, self.keyvault.app
        tenant = await app.ledger.read(self.tenant, ALL)
        versions = [one for key in tenant.every_key() for one in key.versions]
        assert [kv_state(one.state) for one in versions] == self.model.states
        live = await sql(
            "SELECT lease_id FROM lease WHERE tenant = %s AND end_time IS NULL", self.tenant
        )
        assert {one for (one,) in live} == set(self.model.leases)
        counted = {one.lease_id for one in tenant.usage.leases if not one.ended}
        assert counted == set(self.model.leases)
        secrets = await sql("SELECT version FROM key_secret WHERE tenant = %s", self.tenant)
        destroyed = self.model.with_state("DESTROYED")
        assert not {number for (number,) in secrets} & set(destroyed)
        assert len(secrets) == len(self.model.states) - len(destroyed)
        leased, previous, states = 0, GENESIS, {}
        async for sequence, body, digest in events.links(app.database, self.tenant):
            assert digest == link_hash(previous, body)
            previous = digest
            event = audit_pb2.AuditEvent.FromString(body)
            leased += event.type == audit_pb2.AUDIT_EVENT_TYPE_LEASED
            # Of version 0: the key as a whole.
            if event.type in STATE_AFTER and event.key_version:
                states[event.key_version] = (STATE_AFTER[event.type], sequence)
        assert previous == tenant.head.hash
        assert states == {one.version: (one.state, one.state_sequence) for one in versions}
        ((stored,),) = await sql("SELECT count(*) FROM lease WHERE tenant = %s", self.tenant)
        assert leased == stored


def kv_state(number: int) -> str:
    name: str = kv.custody_pb2.KeyVersionState.Name(number)
    return name.removeprefix("KEY_VERSION_STATE_")


@pytest.mark.timeout(3600)
def test_stateful_model(deployment):
    """46. Shown to fail: with used grants not looked for; with State.SUPERSEDED leased for review;
    without end_leases in custody.apply."""
    with asyncio.Runner() as runner:
        machine = type("Machine", (Custody,), {"loop": runner.get_loop(), "deployment": deployment})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
