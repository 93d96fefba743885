"""What keyvault does when Vault is in a bad state, slow, or lies in its errors."""

from __future__ import annotations

import asyncio
import base64
import logging
import time

import grpc
import pytest
from byokeep.errors import error_info

from services.keyvault import kek
from tests.harness import keyvault as kv
from tests.harness.vault_faults import Answer, Delay, Drip, Hang, Reset

# What happens to every request, and the state that is said: of the call, or of the look at
# health that came before it.
_STATES = {
    "472": (Answer(472), "dr_secondary"),
    "473 on calls": (Answer(473), "performance_standby"),
    "474": (Answer(474), "standby_without_leader"),
    "501": (Answer(501), "uninitialized"),
    "503": (Answer(503), "sealed"),
    "530": (Answer(530), "removed"),
    "500": (Answer(500), "failing"),
    "307": (Answer(307), "redirected failing"),
    "no JSON": (Answer(200, b"<html>"), "broken"),
    "hang": (Hang(), "slow"),
    "reset": (Reset(), "broken"),
    "drip": (Drip(0.2), "slow"),
}
# What a call of the backend may raise.
_SAID = (kek.KekUnavailableError, kek.KekMissingError, kek.UnwrapError)
# What a slow machine may add to the deadline of 2 s.
_SLACK = 8.0


async def until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < end, "it did not come about"
        await asyncio.sleep(0.1)


@pytest.fixture
async def keyvault(vault, proxy, deployment, tmp_path):
    """A keyvault that reaches Vault through the fault proxy; `local` is configured as well, so
    that there would be a key to fall back to."""
    settings = vault.settings(
        tmp_path, vault_address=proxy.address, kek_backends_read="local", vault_deadline_ms=2000
    )
    async with kv.running(deployment, **settings) as running:
        await running.create_tenant()
        yield running
        proxy.heal()


async def leases_again(keyvault, key) -> None:
    """Wait until a lease is given, without anybody's help."""

    async def leased() -> bool:
        return await kv.try_lease(keyvault, key) == ""

    await until(lambda: _not(keyvault.app.missing))
    await until(leased)


async def test_vault_states(keyvault, proxy):
    """Shown to fail with `sealed` in `states.USABLE` (health), and with the errors of calls
    ignored in `Session.ask`."""
    key = await keyvault.add_active()
    for name, (fault, states) in _STATES.items():
        proxy.all(fault)
        start = time.monotonic()
        reason, state = await _state(keyvault, key)
        assert reason == "KEK_UNAVAILABLE", name
        assert state in states.split(), name
        assert time.monotonic() - start < 2 + _SLACK, name
        if name not in ("473 on calls", "no JSON", "307"):
            await until(keyvault.app.missing)
            # Known by now: refused at once, and the grant is not spent.
            before = await keyvault.sql("SELECT count(*) FROM lease")
            assert await kv.try_lease(keyvault, key) == "KEK_UNAVAILABLE"
            assert await keyvault.sql("SELECT count(*) FROM lease") == before
        proxy.heal()
        await leases_again(keyvault, key)


async def _not(condition) -> bool:
    return not await condition()


async def test_vault_states_a_quota_refuses_calls(keyvault, proxy):
    """429 on a call is a rate-limit quota: this call is refused, Vault is well."""
    key = await keyvault.add_active()
    proxy.rule = lambda method, path: Answer(429) if "/decrypt/" in path else None
    for _ in range(5):
        assert await kv.try_lease(keyvault, key) == "KEK_UNAVAILABLE"
    assert not await keyvault.app.missing()
    proxy.heal()
    assert await kv.try_lease(keyvault, key) == ""


@pytest.mark.parametrize(("status", "state"), [(429, "standby"), (473, "performance_standby")])
async def test_vault_states_a_standby_serves(keyvault, proxy, status, state):
    """429 and 473 on health: a standby forwards, a performance standby answers."""
    key = await keyvault.add_active()
    proxy.rule = lambda method, path: Answer(status) if path == "/v1/sys/health" else None

    async def standby() -> bool:
        return (await keyvault.app.backends.primary.health()).state == state

    await until(standby)
    assert not await keyvault.app.missing()
    assert await kv.try_lease(keyvault, key) == ""


async def test_a_failed_lease_does_not_stay_alive(keyvault, proxy):
    """The grant is spent and the audit log says so, but the lease ends with the failure.

    Shown to fail without `_close` for KekUnavailableError in `Leasing._open`."""
    key = await keyvault.add_active()
    proxy.rule = lambda method, path: Answer(500) if "/decrypt/" in path else None
    assert await kv.try_lease(keyvault, key) == "KEK_UNAVAILABLE"
    status = await keyvault.admin.GetStatus(kv.admin_pb2.GetStatusRequest())
    assert status.live_leases == 0
    kinds = [event.type for event in await keyvault.events()]
    assert kinds[-2:] == [
        kv.audit_pb2.AUDIT_EVENT_TYPE_LEASED,
        kv.audit_pb2.AUDIT_EVENT_TYPE_RELEASED,
    ]


@pytest.mark.parametrize("everything", [True, False], ids=["all", "transit only"])
async def test_vault_slow(vault, proxy, deployment, tmp_path, everything):
    """5 s of latency: calls past the bulkhead are turned away at once, the others at their
    deadline; health is NOT_SERVING; it recovers by itself.

    Shown to fail without the limit in `Pool.run`, and without `_failures` in `Watch._closed`."""
    settings = vault.settings(
        tmp_path, vault_address=proxy.address, vault_deadline_ms=2000, vault_calls=2
    )
    async with kv.running(deployment, **settings) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        await leases_again(keyvault, key)
        slow = Delay(5.0)
        proxy.rule = lambda method, path: slow if everything or "/transit/" in path else None
        start = time.monotonic()
        states = await asyncio.gather(*(_state(keyvault, key) for _ in range(30)))
        assert time.monotonic() - start < 2 + 2 * _SLACK
        assert {reason for reason, _ in states} == {"KEK_UNAVAILABLE"}
        # 2 run and 8 wait; the rest is turned away.
        assert sum(state == "busy" for _, state in states) >= 15
        await until(keyvault.app.missing)
        start = time.monotonic()
        assert await kv.try_lease(keyvault, key) == "KEK_UNAVAILABLE"
        proxy.heal()
        await leases_again(keyvault, key)


async def _state(keyvault, key) -> tuple[str, str]:
    child = kv.Child()
    request = kv.lease_request(keyvault.deployment, kv.grant_for(key, child), child)
    try:
        await keyvault.leases().LeaseKey(request)
    except grpc.RpcError as error:
        info = error_info(error)
        return info.reason, dict(info.metadata).get("state", "")
    return "", ""


async def test_vault_error_text(keyvault, proxy, caplog, capfd):
    """A 400 whose body holds plaintexts, as a batch that fails in part has: nothing of it is in
    the exception, what is chained to it, the log, or the status. Every exception is one of the
    protocol's.

    Shown to fail with `raise ValueError(self.body)` in `Reply.fields`, and with hvac's own
    adapter instead of `Call`."""
    key = await keyvault.add_active()
    canary = base64.b64encode(b"canary-data-key-canary-data-key!").decode()
    body = f'{{"errors":["{canary}"],"data":{{"plaintext":"{canary}","x":"{canary}'.encode()
    caplog.set_level(logging.DEBUG)
    texts = []
    # The last is JSON, and nothing that Vault would say.
    answers = [Answer(status, body) for status in (400, 404, 500, 200)]
    answers.append(Answer(400, b'{"errors":["%s"]}' % canary.encode()))
    for answer in answers:
        proxy.all(answer)
        child = kv.Child()
        request = kv.lease_request(keyvault.deployment, kv.grant_for(key, child), child)
        try:
            await keyvault.leases().LeaseKey(request)
            raise AssertionError("a lease was given")
        except grpc.RpcError as error:
            texts.append(f"{error!r} {error.details()} {error.trailing_metadata()}")
        backend = keyvault.app.backends.primary
        for call in (
            backend.unwrap("tenant/acme", b"vault:v1:AAAA"),
            backend.generate_data_key("tenant/acme"),
            backend.rewrap("tenant/acme", [b"vault:v1:AAAA"]),
            backend.newest("tenant/acme"),
        ):
            try:
                made = await call
                if isinstance(made, kek.DataKey):
                    made.plaintext.wipe()
            except _SAID as error:
                chain = error
                while chain is not None:
                    texts.append(f"{chain!r} {chain}")
                    chain = chain.__cause__ or chain.__context__
    seen = " ".join(texts) + caplog.text + "".join(capfd.readouterr())
    assert canary not in seen
    assert "canary-data-key" not in seen


async def test_sealed_restarted_and_gone(own_vault, deployment, tmp_path):
    """A real Vault: sealed, unsealed, stopped, started: keyvault says so and comes back."""
    vault = own_vault
    async with kv.running(deployment, **vault.settings(tmp_path)) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        backend = keyvault.app.backends.primary

        async def said(state: str) -> None:
            async def is_said() -> bool:
                return (await backend.health()).state == state

            await until(is_said)
            assert await keyvault.app.missing()
            assert await kv.try_lease(keyvault, key) == "KEK_UNAVAILABLE"

        vault.seal()
        await said("sealed")
        vault.unseal()
        await leases_again(keyvault, key)
        vault.stop()
        await said("unreachable")
        vault.start()
        await leases_again(keyvault, key)


async def test_start_while_vault_is_sealed(own_vault, deployment, tmp_path):
    """keyvault waits for Vault at its start, for half a minute."""
    settings = own_vault.settings(tmp_path)
    async with kv.running(deployment, **settings) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
    own_vault.seal()

    async def unseal() -> None:
        await asyncio.sleep(3)
        await asyncio.to_thread(own_vault.unseal)

    unsealing = asyncio.create_task(unseal())
    async with kv.running(deployment, **settings) as keyvault:
        await unsealing
        assert await kv.try_lease(keyvault, key) == ""
