"""What is sealed, to whom, and what a seal is bound to."""

from __future__ import annotations

import datetime

import pytest
from byokeep import dsse, hpke, sealing
from byokeep.common.v1 import options_pb2
from byokeep.keyshape import KeyFormatError
from byokeep.keyvault.v1 import custody_pb2
from byokeep.sealing import ClockError, SealContext, UntrustedIntakeKeyError

from tests.harness.chain import SigningKey

NOW = datetime.datetime(2026, 3, 1, 12, 30, tzinfo=datetime.UTC)
HOUR, MINUTE = datetime.timedelta(hours=1), datetime.timedelta(minutes=1)
PINNED = SigningKey("isk")
KEY = "sk-proj-" + "aB3x" * 6
CONTEXT = SealContext("acme", "ann", "openai", "key_" + "0" * 26, "add", "request-1")


def statement(start=NOW - MINUTE, life=HOUR, key=PINNED, kind=dsse.INTAKE_KEY, **changes):
    body = custody_pb2.IntakeStatement(
        deployment="test", suite=hpke.X25519_V1, intake_key_id="ink_1", public_key=bytes(32)
    )
    body.MergeFrom(custody_pb2.IntakeStatement(**changes))
    body.not_before.FromDatetime(start)
    body.not_after.FromDatetime(start + life)
    return dsse.sign(kind, body.SerializeToString(), key.key_id, key.private)


def verify(envelope):
    return sealing.verify_statement(
        envelope, deployment="test", pinned={PINNED.key_id: PINNED.public}, now=NOW
    )


def test_a_pinned_statement_of_now_is_believed():
    assert verify(statement()).intake_key_id == "ink_1"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"key": SigningKey("isk")}, "not trusted"),
        ({"kind": dsse.GRANT}, "payload type"),
        ({"deployment": "other"}, "another deployment"),
        ({"life": HOUR + MINUTE}, "window"),
        ({"life": -HOUR}, "window"),
    ],
)
def test_any_other_statement_is_not(changes, why):
    with pytest.raises(UntrustedIntakeKeyError, match=why):
        verify(statement(**changes))


@pytest.mark.parametrize("start", [NOW - 2 * HOUR, NOW - HOUR - MINUTE, NOW + 3 * MINUTE])
def test_a_clock_that_is_off_is_named_as_that(start):
    """A pinned key signed it: nobody has to distrust trust.json."""
    with pytest.raises(ClockError, match="this machine's clock says 2026-03-01 12:30 UTC"):
        verify(statement(start=start))


def test_a_statement_under_anothers_key_id_is_not_believed():
    stranger = SigningKey("isk")
    envelope = statement(key=stranger)
    envelope.key_id = PINNED.key_id
    with pytest.raises(UntrustedIntakeKeyError, match="does not verify"):
        verify(envelope)


@pytest.mark.parametrize("field", ["payload", "signature"])
def test_a_changed_bit_is_not_believed(field):
    envelope = statement()
    raw = bytearray(getattr(envelope, field))
    raw[len(raw) // 2] ^= 1
    setattr(envelope, field, bytes(raw))
    with pytest.raises(UntrustedIntakeKeyError):
        verify(envelope)


@pytest.fixture(params=[hpke.X25519_V1, hpke.HYBRID_V1], ids=["x25519", "hybrid"])
def private(request):
    return hpke.PrivateKey.generate(request.param)


def sealed_to(private, context=CONTEXT):
    target = custody_pb2.IntakeStatement(
        deployment="test",
        suite=private.suite,
        intake_key_id="ink_1",
        public_key=private.public_bytes,
    )
    return sealing.seal_key(KEY, context, target)


def test_a_seal_opens_with_its_context(private):
    sealed = sealed_to(private)
    assert private.open(sealed.ciphertext, CONTEXT.info("test", "ink_1")) == KEY.encode()
    assert (sealed.suite, sealed.intake_key_id) == (private.suite, "ink_1")


@pytest.mark.parametrize(
    ("deployment", "intake_key_id", "changes"),
    [
        ("other", "ink_1", {}),
        ("test", "ink_2", {}),
        ("test", "ink_1", {"tenant": "evil"}),
        ("test", "ink_1", {"owner": "bob"}),
        ("test", "ink_1", {"provider": "gemini"}),
        ("test", "ink_1", {"key_id": "key_" + "1" * 26}),
        ("test", "ink_1", {"operation": "rotate"}),
        ("test", "ink_1", {"request_id": "request-2"}),
        # The same characters, cut at another place.
        ("test", "ink_1", {"tenant": "acm", "owner": "eann"}),
    ],
)
def test_a_seal_opens_nowhere_else(private, deployment, intake_key_id, changes):
    """Shown to fail: with the length prefixes taken out of `fields` the last case opens, and
    with a field taken out of `SealContext.info` its case does."""
    values = {name: getattr(CONTEXT, name) for name in SealContext.__slots__} | changes
    with pytest.raises(hpke.SealError):
        private.open(
            sealed_to(private).ciphertext, SealContext(**values).info(deployment, intake_key_id)
        )


def test_another_key_opens_nothing(private):
    other = hpke.PrivateKey.generate(private.suite)
    with pytest.raises(hpke.SealError):
        other.open(sealed_to(private).ciphertext, CONTEXT.info("test", "ink_1"))


def test_the_same_key_is_sealed_differently_each_time(private):
    assert sealed_to(private).ciphertext != sealed_to(private).ciphertext


@pytest.mark.parametrize("suite", [0, 99])
def test_an_unknown_suite_is_refused(suite):
    target = custody_pb2.IntakeStatement(suite=suite, public_key=bytes(32))
    with pytest.raises(hpke.SealError):
        sealing.seal_key(KEY, CONTEXT, target)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_malformed_public_key_is_refused(length):
    target = custody_pb2.IntakeStatement(suite=hpke.X25519_V1, public_key=bytes(length))
    with pytest.raises(hpke.SealError):
        sealing.seal_key(KEY, CONTEXT, target)


def test_what_cannot_be_a_key_is_not_sealed(private):
    """The rule itself: tests/unit/test_keyshape.py."""
    target = custody_pb2.IntakeStatement(suite=private.suite, public_key=private.public_bytes)
    with pytest.raises(KeyFormatError):
        sealing.seal_key(f'"{KEY}"', CONTEXT, target)


def test_no_exception_of_sealing_holds_the_key_in_its_chain():
    target = custody_pb2.IntakeStatement(suite=hpke.X25519_V1, public_key=bytes(31))
    with pytest.raises(hpke.SealError) as caught:
        sealing.seal_key(KEY, CONTEXT, target)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_the_suite_that_clients_ask_for_is_the_hybrid():
    assert sealing.SUITE == options_pb2.HPKE_SUITE_MLKEM768_X25519_V1
