"""Offline verification of an exported chain: every change is found, and placed."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable

import pytest
from byokeep import auditlog, dsse
from byokeep.auditlog import VerificationError, verify
from byokeep.keyvault.v1 import audit_pb2
from google.protobuf import json_format

from tests.harness.chain import START, Chain, SigningKey

KEY = SigningKey("alk")
TRUSTED = {KEY.key_id: KEY.public}


def chain(length: int = 6, **changes) -> Chain:
    made = Chain(key=KEY, **changes)
    for number in range(length):
        made.add("LEASED", key_id="key_" + "0" * 26, key_version=number + 1)
    return made


def in_runs(lines: list[str], trusted) -> auditlog.Verified:
    """Verify as the command does."""
    return auditlog.verify_chunks([("\n".join(lines) + "\n").encode()], trusted)


def altered(lines: list[str], number: int, change: Callable[[dict], None]) -> list[str]:
    record = json.loads(lines[number - 1])
    change(record)
    return [*lines[: number - 1], json.dumps(record), *lines[number:]]


def flip(name: str) -> Callable[[dict], None]:
    def change(record):
        raw = bytearray(base64.b64decode(record["event"][name]))
        raw[-1] ^= 1
        record["event"][name] = base64.b64encode(raw).decode()

    return change


def test_a_whole_chain_holds():
    result = verify(chain().export(), TRUSTED, deployment="test")
    assert (result.chain, result.count) == ("tenants/demo", 6)
    assert result.first_time == START
    assert result.head.sequence == 6
    assert result.signed_by == KEY.key_id


def test_an_empty_chain_holds():
    result = verify(chain(0).export(), TRUSTED)
    assert (result.count, result.first_time) == (0, None)


def test_hash_is_the_one_of_the_contract():
    """audit.proto: SHA-256("byokeep/audit/v1\\n" ‖ previous_hash ‖ body), as a fixed value."""
    assert auditlog.link_hash(bytes(32), b"body").hex() == (
        "03e59aae8379f6de8ae3c0110674a2f57ab30d3dafc524a735b9261603cf2ed3"
    )


@pytest.mark.parametrize("name", ["body", "previous_hash", "hash"])
@pytest.mark.parametrize("number", [1, 3, 6])
def test_a_changed_bit_is_found_at_its_link(name, number):
    """Shown to fail: without the comparison of `hash` a changed body passes up to the head."""
    with pytest.raises(VerificationError) as caught:
        verify(altered(chain().export(), number, flip(name)), TRUSTED)
    assert caught.value.sequence == number


@pytest.mark.parametrize(("number", "named"), [(1, 2), (3, 4), (6, 6)])
def test_a_changed_link_with_a_fitting_hash_is_found_at_the_next(number, named):
    """Shown to fail: without the comparison of `previous_hash` the change passes."""

    def forge(record):
        body = audit_pb2.AuditEvent.FromString(base64.b64decode(record["event"]["body"]))
        body.actor = "nobody"
        raw = body.SerializeToString()
        previous = base64.b64decode(record["event"]["previous_hash"])
        record["event"]["body"] = base64.b64encode(raw).decode()
        record["event"]["hash"] = base64.b64encode(auditlog.link_hash(previous, raw)).decode()
        record["view"]["actor"] = "nobody"

    with pytest.raises(VerificationError) as caught:
        verify(altered(chain().export(), number, forge), TRUSTED)
    assert caught.value.sequence == named


@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_removed_link_is_named(number):
    lines = chain().export()
    del lines[number - 1]
    with pytest.raises(VerificationError, match="missing") as caught:
        verify(lines, TRUSTED)
    assert caught.value.sequence == number


def test_two_links_in_the_wrong_order():
    lines = chain().export()
    lines[2], lines[3] = lines[3], lines[2]
    with pytest.raises(VerificationError) as caught:
        verify(lines, TRUSTED)
    assert caught.value.sequence == 3


def test_a_readable_view_that_lies_is_found():
    def change(record):
        record["view"]["type"] = "AUDIT_EVENT_TYPE_REVOKED"

    with pytest.raises(VerificationError, match="view") as caught:
        verify(altered(chain().export(), 4, change), TRUSTED)
    assert caught.value.sequence == 4


def test_a_truncated_tail_is_found_by_the_signed_head():
    lines = chain().export()
    with pytest.raises(VerificationError, match="counts 6 events, the file has 4") as caught:
        verify([*lines[:4], lines[-1]], TRUSTED)
    assert caught.value.sequence == 5


def test_a_truncated_tail_with_a_new_head_is_found_by_an_older_one():
    """Whoever holds the signing key can sign a shorter chain; an older head gives it away."""
    older = auditlog.read_older(chain(6).export(), TRUSTED, "test").head
    with pytest.raises(VerificationError, match="older head counts 6") as caught:
        verify(chain(4).export(), TRUSTED, against=older)
    assert caught.value.sequence == 5


def test_a_rewritten_past_is_found_by_an_older_head():
    older = auditlog.read_older(chain(3).export(), TRUSTED, "test").head
    rewritten = Chain(key=KEY)
    for _ in range(5):
        rewritten.add("STAGED", actor="another past")
    with pytest.raises(VerificationError, match="older head names") as caught:
        verify(rewritten.export(), TRUSTED, against=older)
    assert caught.value.sequence == 3


def test_a_grown_chain_contains_its_older_head():
    older = auditlog.read_older(chain(3).export()[-1:], TRUSTED, "test").head
    assert verify(chain(6).export(), TRUSTED, against=older).count == 6


def test_an_older_head_of_another_chain():
    older = auditlog.read_older(chain(3, name="tenants/acme").export(), TRUSTED, "test").head
    with pytest.raises(VerificationError, match="another chain"):
        verify(chain(6).export(), TRUSTED, against=older)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"sequence": 7}, "missing"),
        ({"sequence": 5}, "ends before"),
        ({"hash": bytes(31) + b"\1"}, "signed head names"),
        ({"chain": "tenants/acme"}, "another chain"),
        ({"deployment": "other"}, "another deployment"),
    ],
)
def test_a_signed_head_of_something_else(changes, what):
    made = chain()
    lines = [*made.export()[:-1], auditlog.head_line(made.head(**changes))]
    with pytest.raises(VerificationError, match=what):
        verify(lines, TRUSTED)


def test_a_head_signed_by_nobody_that_is_pinned():
    made = chain()
    made.key = SigningKey("alk")
    with pytest.raises(auditlog.UnpinnedKeyError, match="not pinned") as caught:
        verify(made.export(), TRUSTED)
    assert caught.value.key_id == made.key.key_id


def test_a_head_whose_signature_is_of_another_type():
    made = chain()
    head = json_format.ParseDict(json.loads(made.export()[-1])["head"], type(made.head())())
    signed = dsse.sign(dsse.GRANT, head.payload, KEY.key_id, KEY.private)
    with pytest.raises(VerificationError, match="payload type"):
        verify([*made.export()[:-1], auditlog.head_line(signed)], TRUSTED)


@pytest.mark.parametrize("check", [verify, in_runs])
@pytest.mark.parametrize("field", ["chain", "deployment"])
def test_links_of_two_chains(field, check):
    made = chain(2)
    stray = audit_pb2.AuditEvent(
        deployment="test", chain="tenants/demo", sequence=3, type=audit_pb2.AUDIT_EVENT_TYPE_STAGED
    )
    setattr(stray, field, "another")
    made.append(stray)
    with pytest.raises(VerificationError, match=f"another {field}") as caught:
        check(made.export(), TRUSTED)
    assert caught.value.sequence == 3


@pytest.mark.parametrize("check", [verify, in_runs])
@pytest.mark.parametrize("sequence", [2, 4, 0])
def test_a_link_that_leaves_numbers_out(sequence, check):
    """Shown to fail: without the comparison of numbers in run_of."""
    made = chain(2)
    made.append(
        audit_pb2.AuditEvent(
            deployment="test",
            chain="tenants/demo",
            sequence=sequence,
            type=audit_pb2.AUDIT_EVENT_TYPE_STAGED,
        )
    )
    with pytest.raises(VerificationError, match=f"missing.* link {sequence}") as caught:
        check(made.export(), TRUSTED)
    assert caught.value.sequence == 3


def test_another_deployment_than_the_trust_bundles():
    with pytest.raises(VerificationError, match="another deployment"):
        verify(chain().export(), TRUSTED, deployment="production")


def test_no_head():
    with pytest.raises(VerificationError, match="ends after link 6 without a signed head"):
        verify(chain().export()[:-1], TRUSTED)


def test_something_after_the_head():
    lines = chain().export()
    with pytest.raises(VerificationError, match="after the signed head"):
        verify([*lines, lines[0]], TRUSTED)


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "{}", '{"event": {}}', '{"event": 1, "head": 2}', '{"head": {"x": 1}}']
)
def test_what_is_no_export_is_refused_without_a_crash(line):
    with pytest.raises(VerificationError):
        verify([line], TRUSTED)


def test_a_body_with_a_time_that_no_calendar_has():
    made = chain(1)
    event = audit_pb2.AuditEvent(deployment="test", chain="tenants/demo", sequence=2)
    event.event_time.seconds = 10**15
    made.append(event)
    lines = chain(1).export()[:-1]
    link = made.links[-1]
    lines.append(
        json.dumps(
            {
                "event": {
                    name: base64.b64encode(getattr(link, name)).decode()
                    for name in ("body", "previous_hash", "hash")
                }
            }
        )
    )
    with pytest.raises(VerificationError, match="not an event"):
        verify(lines, TRUSTED)


def test_a_head_signed_at_a_time_that_no_calendar_has():
    """Shown to fail: without `view(head)` in `_end`."""
    head = audit_pb2.ChainHead(deployment="test", chain="tenants/demo")
    head.sign_time.seconds = 10**15
    envelope = dsse.sign(dsse.CHAIN_HEAD, head.SerializeToString(), KEY.key_id, KEY.private)
    with pytest.raises(VerificationError, match="malformed"):
        verify([auditlog.head_line(envelope)], TRUSTED)


def test_a_root_of_an_older_log_that_the_proof_has_no_size_of():
    """Nothing is read from it, so that it would be a byte that changes unseen."""
    made = chain()
    lines = made.export()[:-1]
    head, proof = made.proven()
    assert verify([*lines, auditlog.head_line(head, proof)], TRUSTED).checkpoint
    proof.since_root = bytes(32)
    with pytest.raises(VerificationError, match="without its size"):
        verify([*lines, auditlog.head_line(head, proof)], TRUSTED)


def test_an_old_head_beside_a_newer_checkpoint():
    """Its leaf is in every later log too: only the size that is signed with it tells its age.

    Shown to fail: without the comparison of sizes in `_tied`.
    """
    made = chain()
    head, proof = made.proven()
    lines = made.export()[:-1]
    newer = made.proof(proof.leaf_index, proof.leaf_blind)
    assert newer.checkpoint != proof.checkpoint
    assert verify([*lines, auditlog.head_line(head, proof)], TRUSTED).checkpoint
    with pytest.raises(VerificationError, match="not the one that the head was signed for"):
        verify([*lines, auditlog.head_line(head, newer)], TRUSTED)


@pytest.mark.parametrize("lines", [[], ["", "\n"], chain().export()[:-1]])
def test_an_older_file_without_a_head(lines):
    with pytest.raises(VerificationError, match="no signed head"):
        auditlog.read_older(lines, TRUSTED, "test")
