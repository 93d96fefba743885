"""6. `fuzz_envelope`: a million damaged inputs have one error type, and cost no KEK call.

`BYOKEEP_FUZZ_INPUTS` asks for more than 200,000 (CI does: a million), `BYOKEEP_FUZZ_SEED` replays
a run: a failure says which seed, kind and input it was.
"""

from __future__ import annotations

import dataclasses
import os
import random
import secrets
from collections.abc import Callable

import pytest
from byokeep import dsse, hpke
from byokeep.common.v1 import options_pb2
from byokeep.ids import new_id, public_key_id
from byokeep.keyvault.v1 import grant_pb2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError

from services.keyvault.envelope import (
    MAGIC,
    Context,
    EnvelopeError,
    UnknownEnvelopeError,
    check_header,
    decrypt,
    encrypt,
)
from services.keyvault.grants import GrantRefusedError, check_holder, check_time, verify

INPUTS = int(os.environ.get("BYOKEEP_FUZZ_INPUTS", "200000"))
SEED = int(os.environ.get("BYOKEEP_FUZZ_SEED", "0")) or secrets.randbits(48)
_PARTS = 4  # of every kind, so that no test comes near its time limit

CONTEXT = Context("test", "acme", "", "openai", "key_1", 1)
DATA_KEY = bytearray(range(32))
VALID = [encrypt(DATA_KEY, b"k" * length, CONTEXT) for length in (16, 51, 164, 512)]
VALID += [encrypt(DATA_KEY, b"k" * 51, dataclasses.replace(CONTEXT, version=2))]

Make = Callable[[random.Random, list[bytes]], bytes]


def _random(chance: random.Random, valid: list[bytes]) -> bytes:
    body = chance.randbytes(chance.randrange(700))
    return MAGIC + body if chance.random() < 0.5 else body


def _flipped(chance: random.Random, valid: list[bytes]) -> bytes:
    data = bytearray(chance.choice(valid))
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8, 64))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def _truncated(chance: random.Random, valid: list[bytes]) -> bytes:
    data = chance.choice(valid)
    return data[: chance.randrange(len(data))]


def _extended(chance: random.Random, valid: list[bytes]) -> bytes:
    data = chance.choice(valid)
    more = chance.randbytes(chance.randrange(1, 64))
    at = chance.choice((0, len(data), chance.randrange(len(data))))
    return data[:at] + more + data[at:]


def _spliced(chance: random.Random, valid: list[bytes]) -> bytes:
    one, other = chance.sample(valid, 2)
    return one[: chance.randrange(len(one) + 1)] + other[chance.randrange(len(other) + 1) :]


KINDS: dict[str, Make] = {
    "random": _random,
    "flipped": _flipped,
    "truncated": _truncated,
    "extended": _extended,
    "spliced": _spliced,
}


class _Untouchable:
    """Stands for the data key, which only the KEK backend has: asking for it is the call."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError("the data key was asked for before the header was valid")


def _inputs(kind: str, part: object, count: int, valid: list[bytes]):
    """Yield damaged inputs, each with the words that replay it."""
    chance = random.Random(f"{SEED} {kind} {part}")
    known = set(valid)
    for number in range(count):
        while (data := KINDS[kind](chance, valid)) in known:
            pass  # a splice may give back what it was made of
        yield data, f"BYOKEEP_FUZZ_SEED={SEED}: {kind}, part {part}, number {number}"


@pytest.mark.fuzz
@pytest.mark.timeout(600 * max(1, INPUTS // 1_000_000))
@pytest.mark.parametrize("part", range(_PARTS))
@pytest.mark.parametrize("kind", KINDS)
def test_fuzz_envelope(kind, part):
    """6. EnvelopeError for every input, and nothing else; an input whose header is refused is
    refused before a key is needed.

    Shown to fail: with ValueError in check_header; without `check_header` in decrypt; with
    `InvalidTag` not caught.
    """
    untouchable = _Untouchable()
    for data, which in _inputs(kind, part, INPUTS // len(KINDS) // _PARTS, VALID[:4]):
        key: object = DATA_KEY
        try:
            check_header(data)
        except EnvelopeError:
            key = untouchable
        outcome = "opened"
        try:
            decrypt(key, data, CONTEXT)  # type: ignore[arg-type]
        except EnvelopeError:
            outcome = ""
        except BaseException as error:
            outcome = repr(error)
        if outcome:
            pytest.fail(f"{which}: {outcome}: {data.hex()}")


def test_fuzz_envelope_counts_what_it_says():
    """The controls: undamaged envelopes open, and the figure is what was asked for."""
    assert all(decrypt(DATA_KEY, one, CONTEXT) for one in VALID[:4])
    assert INPUTS >= 100_000
    made = [sum(1 for _ in _inputs(kind, 0, 500, VALID[:4])) for kind in KINDS]
    assert made == [500] * len(KINDS)


def _header_says(envelope: bytes) -> str:
    try:
        check_header(envelope)
    except UnknownEnvelopeError:
        return "UNDECRYPTABLE"  # not damaged, as far as one can say
    except EnvelopeError:
        return "ROW_TAMPERED"
    return ""


async def test_fuzz_envelope_no_kek_call(keyvault):
    """6. The same in keyvault: an envelope that it did not write costs no KEK call.

    Shown to fail: without the comparison of digests in Leasing._may_lease.
    """
    from tests.harness.keyvault import try_lease

    key = await keyvault.add_active()
    good = bytes((await keyvault.sql("SELECT envelope FROM key_secret"))[0][0])
    calls = []

    class Counting:
        def refusal(self):
            return None  # what is known without a call

        async def close(self):
            pass

        def __getattr__(self, name):
            calls.append(name)
            raise AssertionError

    keyvault.app.backends._by_name = {"local": Counting()}
    tried = 0
    for kind in KINDS:
        for data, which in _inputs(kind, "row", 40, [good, VALID[1]]):
            if _header_says(data):
                tried += 1
                await keyvault.sql("UPDATE key_secret SET envelope = %s", data)
                assert await try_lease(keyvault, key) == "ROW_TAMPERED", which
    assert calls == []
    assert tried > 40


SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIGNER_ID = public_key_id("gsk", SIGNER.public_key().public_bytes_raw())
TRUSTED = {SIGNER_ID: SIGNER.public_key()}


def _grant(**changes) -> bytes:
    grant = grant_pb2.Grant(
        grant_id=new_id("gra"),
        deployment="test",
        tenant="acme",
        key_id=new_id("key"),
        attempt_id=new_id("att"),
        purpose=grant_pb2.LEASE_PURPOSE_REVIEW,
        runner_class="default",
        recipient_key_sha256=bytes(32),
    )
    grant.issue_time.seconds = 1_800_000_000
    grant.expire_time.seconds = 1_800_000_030
    return grant.SerializeToString()


def _redeem(envelope: options_pb2.SignedEnvelope) -> None:
    import datetime

    grant = verify(envelope, TRUSTED, "test")
    check_holder(grant, "spiffe://t/runner/default", b"")
    check_time(grant, datetime.datetime.now(datetime.UTC))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signed", [False, True], ids=["outside", "by-the-orchestrator"])
def test_fuzz_grant(kind, signed):
    """Damaged grants have one error type: before the signature, and behind one that is valid,
    as a rogue orchestrator could make it.

    Shown to fail: with DecodeError not caught in grants.verify.
    """
    valid = [_grant() for _ in range(4)]
    if not signed:
        valid = [dsse.sign(dsse.GRANT, one, SIGNER_ID, SIGNER).SerializeToString() for one in valid]
    for data, which in _inputs(kind, f"grant {signed}", 4_000, valid):
        try:
            if signed:
                envelope = dsse.sign(dsse.GRANT, data, SIGNER_ID, SIGNER)
            else:
                envelope = options_pb2.SignedEnvelope.FromString(data)
        except DecodeError:
            continue  # gRPC refuses it before us
        try:
            _redeem(envelope)
        except GrantRefusedError:
            continue
        except Exception as error:
            pytest.fail(f"{which}: {error!r}: {data.hex()}")
        pytest.fail(f"{which}: accepted: {data.hex()}")


@pytest.mark.parametrize(
    ("seconds", "nanos"),
    [(-(2**63), 0), (-62_135_596_801, 0), (-62_135_596_800, 0), (253_402_300_799, 0),
     (253_402_300_800, 0), (2**63 - 1, 0), (1_800_000_000, -1), (1_800_000_000, 2**31 - 1)],
)  # fmt: skip
def test_fuzz_grant_times_that_no_calendar_has(seconds, nanos):
    """Shown to fail: without the check in grants._time."""
    grant = grant_pb2.Grant.FromString(_grant())
    for stamp in (grant.issue_time, grant.expire_time):
        stamp.seconds, stamp.nanos = seconds, nanos
    if seconds < 2**62:
        grant.expire_time.seconds += 1
    with pytest.raises(GrantRefusedError):
        _redeem(dsse.sign(dsse.GRANT, grant.SerializeToString(), SIGNER_ID, SIGNER))


@pytest.mark.parametrize("suite", [hpke.X25519_V1, hpke.HYBRID_V1])
@pytest.mark.parametrize("kind", KINDS)
def test_fuzz_seal(kind, suite):
    """Damaged seals have one error type.

    Shown to fail: with `InvalidTag` not caught in hpke._attempt.
    """
    private = hpke.PrivateKey.generate(suite)
    valid = [hpke.seal(suite, private.public_bytes, b"k" * 51, b"info") for _ in range(4)]
    for data, which in _inputs(kind, f"seal {suite}", 1_000, valid):
        try:
            private.open(data, b"info")
        except hpke.SealError:
            continue
        pytest.fail(f"{which}: opened: {data.hex()}")
