"""Sealed intake, attacked: replay, oracle, malformed keys."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import threading

import grpc
import pytest
from byokeep import hpke
from byokeep.errors import error_info
from byokeep.keyshape import KeyFormatError, check_key
from byokeep.keyvault.v1 import custody_pb2

from services.keyvault import epochs, intake
from services.keyvault.sql import intake as intake_store
from tests.harness import keyvault as kv
from tests.harness.keyvault import refusal


def seal_unchecked(key, context, statement):
    """Seal as a client that skips the checks would."""
    raw = key if isinstance(key, bytes) else key.encode()
    info = context.info(statement.deployment, statement.intake_key_id)
    return custody_pb2.SealedKey(
        intake_key_id=statement.intake_key_id,
        suite=statement.suite,
        ciphertext=hpke.seal(statement.suite, statement.public_key, raw, info),
    )


def _other(**changes):
    """Seal for another context than the request will name."""

    def seal(key, context, statement):
        return seal_unchecked(key, dataclasses.replace(context, **changes), statement)

    return seal


def _other_deployment(key, context, statement):
    copy = custody_pb2.IntakeStatement()
    copy.CopyFrom(statement)
    copy.deployment = "elsewhere"
    return seal_unchecked(key, context, copy)


REPLAYS = {
    "tenant": _other(tenant="evil"),
    "owner": _other(owner="ann"),
    "provider": _other(provider="gemini"),
    "key": _other(key_id="key_" + "0" * 26),
    "operation": _other(operation="rotate"),
    "request": _other(request_id="other-request"),
    "deployment": _other_deployment,
}


async def test_intake_replay(keyvault):
    """47. A key sealed for something else does not open, and nothing is stored.

    Shown to fail: per row, by leaving the field out of SealContext.info.
    """
    for what, seal in REPLAYS.items():
        request = await keyvault.stage_request(seal=seal)
        assert await refusal(keyvault.custody.StageKey(request)) == "SEAL_INVALID", what
    assert await keyvault.sql("SELECT count(*) FROM key_secret") == [(0,)]


async def test_intake_replay_to_another_tenant(keyvault):
    """47. The very bytes that were accepted for one tenant are refused for another."""
    await keyvault.create_tenant("evil")
    request = await keyvault.stage_request()
    await keyvault.custody.StageKey(request)
    request.name = request.name.replace("acme", "evil")
    assert await refusal(keyvault.custody.StageKey(request)) == "SEAL_INVALID"


async def test_intake_replay_of_a_closed_window(keyvault, monkeypatch):
    """47. After its window an intake key takes nothing, and is deleted.

    Shown to fail: with sql.intake.get not looking at the window.
    """
    # A key that is older than it may be: its row can't be made so, the window is sealed with it.
    monkeypatch.setattr(intake, "MAX_WINDOW", -datetime.timedelta(minutes=6))

    async def unchecked():
        asked = custody_pb2.GetIntakeKeyRequest(suite=hpke.HYBRID_V1)
        answer = await keyvault.custody.GetIntakeKey(asked)
        return custody_pb2.IntakeStatement.FromString(answer.statement.payload)

    monkeypatch.setattr(keyvault, "statement", unchecked)
    request = await keyvault.stage_request()
    assert await refusal(keyvault.custody.StageKey(request)) == "INTAKE_KEY_EXPIRED"
    await intake_store.forget(keyvault.app.database)
    assert await keyvault.sql("SELECT count(*) FROM intake_key") == [(0,)]


async def test_intake_replay_of_a_closed_epoch(keyvault, monkeypatch):
    """47. When an epoch closes, its KEK is destroyed: a recorded seal does not open, though the
    intake key's row is kept or restored.

    Shown to fail: with Epochs._destroy not destroying.
    """
    request = await keyvault.stage_request()
    statement = await keyvault.statement()
    epoch = epochs.INTAKE.at(statement.not_before.ToDatetime(datetime.UTC))
    later = epochs.intake_close(epoch)

    kv.move_clocks(monkeypatch, keyvault, lambda: later)
    await keyvault.app.epochs.tick()
    left = await keyvault.sql("SELECT name FROM local_kek WHERE name = %s", f"intake/{epoch}")
    assert left == []
    assert await keyvault.sql("SELECT count(*) FROM intake_key") == [(1,)]
    assert await refusal(keyvault.custody.StageKey(request)) == "INTAKE_KEY_EXPIRED"


async def test_intake_replay_of_a_foreign_intake_key(keyvault):
    """47. A seal to a key that this deployment never made is refused."""
    request = await keyvault.stage_request()
    request.sealed_key.intake_key_id = "ink_" + "0" * 26
    assert await refusal(keyvault.custody.StageKey(request)) == "INTAKE_KEY_EXPIRED"


async def test_intake_keys_live_an_hour_and_are_shared(keyvault, deployment):
    """Replicas give out the same key; its window is at most an hour."""
    statement = await keyvault.statement()
    window = statement.not_after.ToDatetime() - statement.not_before.ToDatetime()
    assert window <= datetime.timedelta(hours=1)
    async with kv.running(deployment) as second:
        assert (await second.statement()).intake_key_id == statement.intake_key_id
        request = await keyvault.stage_request()
        assert await refusal(second.custody.StageKey(request)) == ""


async def test_intake_oracle(deployment):
    """48. A caller that feeds many keys is stopped, per tenant; refused keys count too.

    Shown to fail: with Staging._count not counting.
    """
    async with kv.running(deployment, intake_per_hour=3) as keyvault:
        await keyvault.create_tenant()
        await keyvault.create_tenant("other")
        reasons = [
            await refusal(
                keyvault.custody.StageKey(
                    await keyvault.stage_request("short", seal=seal_unchecked, name=f"n{i}")
                )
            )
            for i in range(5)
        ]
        assert reasons == ["KEY_LENGTH"] * 3 + ["INTAKE_LIMIT"] * 2
        request = await keyvault.stage_request(actor="spiffe://byokeep.test/client/else")
        assert await refusal(keyvault.custody.StageKey(request)) == ""
        request = await keyvault.stage_request(tenant="other")
        assert await refusal(keyvault.custody.StageKey(request)) == ""


async def test_intake_oracle_repeats_count(deployment):
    """48. Naming new actors, and repeating a request, does not get around the caps.

    Shown to fail: with the tenant's cap left out; with the cap asked for new requests only.
    """
    async with kv.running(deployment, intake_per_hour=2) as keyvault:
        await keyvault.create_tenant()
        refused = await keyvault.stage_request("short", seal=seal_unchecked)
        before = await intake_store.recent(keyvault.app.database, "acme", refused.actor)
        reasons = [await refusal(keyvault.custody.StageKey(refused)) for _ in range(4)]
        assert reasons == ["KEY_LENGTH"] * 4
        after = await intake_store.recent(keyvault.app.database, "acme", refused.actor)
        assert (before, after) == ((0, 0), (1, 1))
        reasons = []
        for number in range(12):
            actor = f"spiffe://byokeep.test/client/{number}"
            request = await keyvault.stage_request(actor=actor, name=f"n{number}")
            reasons.append(await refusal(keyvault.custody.StageKey(request)))
        assert reasons == [""] * 9 + ["INTAKE_LIMIT"] * 3
        assert await refusal(keyvault.custody.StageKey(request)) == "INTAKE_LIMIT"


@pytest.mark.parametrize(
    "change", ["public = %s", "not_after = not_after + interval '1 minute'", "suite = 1"]
)
async def test_intake_key_from_sql_is_not_signed(keyvault, deployment, change):
    """47. keyvault signs an intake key only if the row is what it wrote: whoever can write
    SQL can't have clients seal to a key of his own.

    Shown to fail: with IntakeKeys._verify returning early.
    """
    await keyvault.statement()
    mine = hpke.PrivateKey.generate(hpke.HYBRID_V1)
    values = (mine.public_bytes,) if "%s" in change else ()
    await keyvault.sql(f"UPDATE intake_key SET {change}", *values)
    suite = 1 if change == "suite = 1" else hpke.HYBRID_V1
    answer = keyvault.custody.GetIntakeKey(custody_pb2.GetIntakeKeyRequest(suite=suite))
    assert await refusal(answer) == "ROW_TAMPERED"


async def test_the_same_request_at_once_is_one_key(keyvault):
    """A client that retries while its first try still runs gets the first one's answer."""
    request = await keyvault.stage_request()
    answers = await asyncio.gather(*(keyvault.custody.StageKey(request) for _ in range(4)))
    assert {answer.version for answer in answers} == {1}
    assert await keyvault.sql("SELECT count(*) FROM key_secret") == [(1,)]


async def test_intake_children_are_bounded(keyvault, monkeypatch):
    """Those whose callers have gone count. Shown to fail where each caller has a thread of its
    own."""
    counted, release = threading.Semaphore(0), threading.Event()

    def child(*_):
        counted.release()
        release.wait(30)
        return b'{"refusal": "charset"}'

    monkeypatch.setattr(intake, "_run_child", child)
    calls = [
        keyvault.custody.StageKey(await keyvault.stage_request())
        for _ in range(2 * intake._CHILDREN)
    ]
    for _ in range(intake._CHILDREN):
        assert await asyncio.to_thread(counted.acquire, timeout=20)
    for call in calls:
        call.cancel()
    after = keyvault.custody.StageKey(await keyvault.stage_request())
    assert not await asyncio.to_thread(counted.acquire, timeout=0.5)
    release.set()
    assert await refusal(after) == "KEY_CHARSET"


def test_the_intake_child_gets_no_environment(monkeypatch):
    """What is in keyvault's environment, such as a keyring, is not in its child's.

    Shown to fail: without `env` in intake._run_child.
    """
    seen = {}

    def popen(*arguments, **options):
        seen.update(options["env"])
        raise RuntimeError("seen enough")

    monkeypatch.setenv("BYOKEEP_KEYRING", CANARY)
    monkeypatch.setattr(intake.subprocess, "Popen", popen)
    with pytest.raises(RuntimeError):
        intake._run_child(bytearray())
    assert sorted(seen) == ["LC_ALL", "PYTHONPATH"]


CANARY = "CANARYcanary0123"
BAD_KEYS = {
    "newline": (f"sk-{CANARY}\nabcdefgh", "KEY_CHARSET"),
    "nul": (f"sk-{CANARY}\0abcdefgh", "KEY_CHARSET"),
    "space": (f"sk-{CANARY} abcdefgh", "KEY_CHARSET"),
    "delete": (f"sk-{CANARY}\x7fabcdefgh", "KEY_CHARSET"),
    "umlaut": (f"sk-{CANARY}äbcdefgh", "KEY_CHARSET"),
    "not utf-8": (f"sk-{CANARY}".encode() + b"\xff\xfe", "KEY_CHARSET"),
    "short": (CANARY[:15], "KEY_LENGTH"),
    "long": (CANARY * 33, "KEY_LENGTH"),
    "admin": (f"sk-admin-{CANARY}", "KEY_IS_ADMIN"),
    "other's admin": (f"sk-ant-admin01-{CANARY}", "KEY_IS_ADMIN"),
    "other provider's": (f"sk-ant-api03-{CANARY}", "KEY_OF_OTHER_PROVIDER"),
    "a stranger's": (f"ghp_{CANARY}", "KEY_OF_OTHER_PROVIDER"),
    "in quotes": (f'"sk-{CANARY}"', "KEY_FORMAT"),
    "in typographic quotes": (f"\u201csk-{CANARY}\u201d", "KEY_FORMAT"),
    "with its name": (f"OPENAI_API_KEY=sk-{CANARY}", "KEY_FORMAT"),
    "in a URL": (f"https://api.example/?key=sk-{CANARY}", "KEY_FORMAT"),
    "in JSON": (f'{{"key": "sk-{CANARY}"}}', "KEY_FORMAT"),
}


async def test_key_charset(deployment, capfd):
    """33. A key of the wrong form is refused by keyvault itself, and not echoed.

    Shown to fail: without check_key in intake_child.answer; the echo, with the key in
    KeyFormatError's sentence put into the answer.
    """
    async with kv.running(deployment, intake_per_hour=100) as keyvault:
        await keyvault.create_tenant()
        for what, (key, expected) in BAD_KEYS.items():
            request = await keyvault.stage_request(key, seal=seal_unchecked)
            with pytest.raises(grpc.RpcError) as error:
                await keyvault.custody.StageKey(request)
            assert error_info(error.value).reason == expected, what
            said = str(error.value) + "".join(capfd.readouterr())
            assert CANARY[:8] not in said, what


@pytest.mark.parametrize("length", [16, 23, 24, 512])
@pytest.mark.parametrize("prefix", ["", "sk-", "sk-proj-", "sk-ant-api03-", "AIza", "AQ."])
def test_key_charset_hint(prefix, length):
    """33. A hint shows a public prefix, and the last four from 24 characters on.

    Shown to fail: with key[-4:] unconditionally.
    """
    from services.keyvault.hint import hint

    key = prefix + "Q" * (length - len(prefix) - 4) + "LAST"
    assert hint(key) == f"{prefix}...{'LAST' if length >= 24 else ''}"


async def test_no_ciphertext_of_intake_is_kept(keyvault):
    """The sealed bytes are stored nowhere: a digest is."""
    request = await keyvault.stage_request()
    await keyvault.custody.StageKey(request)
    stored = await keyvault.sql("SELECT to_jsonb(r)::text FROM intake_request r")
    assert request.sealed_key.ciphertext.hex()[:64] not in stored[0][0]
    recent = await intake_store.recent(keyvault.app.database, "acme", request.actor)
    assert recent == (1, 1)


def test_the_client_checks_the_same():
    """33. What keyvault refuses, the client refuses before it seals."""
    for key, expected in BAD_KEYS.values():
        text = key if isinstance(key, str) else key.decode(errors="replace")
        with pytest.raises(KeyFormatError) as error:
            check_key("openai", text)
        assert error.value.reason == expected
        assert CANARY[:8] not in str(error.value)
