"""Links checked in runs, by one process or several: the verdict is that of one link at a time."""

from __future__ import annotations

import dataclasses
import io

import pytest
from byokeep import auditlog
from byokeep.auditlog import fast, verification
from byokeep.keyvault.v1 import audit_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.chain import Chain, SigningKey

KEY = SigningKey("alk")
TRUSTED = {KEY.key_id: KEY.public}
_LENGTH = 40


def _made(name: str = "tenants/demo") -> Chain:
    made = Chain(name=name, key=KEY)
    for number in range(_LENGTH):
        kind = ("LEASED", "RELEASED", "PROMOTED")[number % 3]
        made.add(kind, key_id="key_" + "0" * 26, key_version=number + 1)
    return made


CHAIN = _made()
WHOLE = [line.encode() + b"\n" for line in CHAIN.export()]
OTHER = [line.encode() + b"\n" for line in _made("tenants/other").export()]
OLDER = auditlog.read_older([WHOLE[-1].decode()], TRUSTED, "test").head


def _pruned() -> list[bytes]:
    """An export that begins after what retention dropped, and says so further on."""
    made = _made()
    made.add("RETENTION_PRUNED", pruned_sequence=5, pruned_hash=made.links[4].hash)
    return [line.encode() + b"\n" for line in made.export()][5:]


PRUNED = _pruned()
_ACTS = ["flip", "drop", "swap", "twice", "cut", "blank", "other", "crlf"]


@st.composite
def damaged(draw) -> bytes:
    """An export, most often with something done to it: on any line, so also where chunks meet."""
    lines = list(draw(st.sampled_from([WHOLE, PRUNED])))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(lines) - 1))
        act = draw(
            st.sampled_from(["flip", "drop", "swap", "twice", "cut", "blank", "other", "crlf"])
        )
        if act == "flip":
            line = bytearray(lines[at])
            line[draw(st.integers(0, len(line) - 1))] ^= 1 << draw(st.integers(0, 7))
            lines[at] = bytes(line)
        elif act == "drop":
            del lines[at]
        elif act == "swap":
            lines[at], lines[at - 1] = lines[at - 1], lines[at]
        elif act == "twice":
            lines.insert(at, lines[at])
        elif act == "cut":
            lines[at] = lines[at][: len(lines[at]) // 2]
        elif act == "blank":
            lines.insert(at, b"\n")
        elif act == "other":
            lines[at] = OTHER[min(at, len(OTHER) - 1)]
        else:
            lines[at] = lines[at].removesuffix(b"\n") + b"\r\n"
        if not lines:
            break
    return b"".join(lines)


def verdict(raw: bytes, against: audit_pb2.ChainHead | None, processes: int = 1) -> object:
    try:
        found = auditlog.verify_chunks(
            auditlog.chunks_of(io.BytesIO(raw)),
            TRUSTED,
            deployment="test",
            against=against,
            processes=processes,
        )
    except auditlog.VerificationError as error:
        return type(error), error.sequence, error.what
    return dataclasses.astuple(found)


def _same(raw: bytes, size: int, against: audit_pb2.ChainHead | None, processes: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fast, "run_of", lambda lines, ask: None)
        expected = verdict(raw, against)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fast, "_CHUNK_BYTES", size)
        patched.setattr(fast, "_WORTH_PROCESSES", 1)
        assert verdict(raw, against, processes) == expected


@given(damaged(), st.integers(1, 9000), st.booleans())
@settings(deadline=None, max_examples=300)
def test_runs_give_the_verdict_of_single_links(raw, size, older):
    """Shown to fail: with any one comparison of run_of or _join taken out."""
    _same(raw, size, OLDER if older else None, 1)


@given(damaged(), st.integers(2000, 9000))
@settings(deadline=None, max_examples=15)
def test_processes_give_the_verdict_of_one(raw, size):
    _same(raw, size, None, 2)


def test_an_older_head_inside_a_run_must_be_that_link():
    """Shown to fail: without the link that was asked about in _join."""
    older = audit_pb2.ChainHead()
    older.CopyFrom(OLDER)
    older.sequence, older.hash = 7, CHAIN.links[6].hash
    raw = b"".join(WHOLE)
    assert verdict(raw, older)[2] == _LENGTH
    older.hash = CHAIN.links[5].hash
    assert verdict(raw, older)[1:] == (7, "it is not the link that the older head names")


def test_a_link_after_the_head_is_not_taken(monkeypatch):
    """Also where the head ends a chunk, and the link goes on where the chain is.

    Shown to fail: with runs joined after the head (Hypothesis found it).
    """
    monkeypatch.setattr(fast, "_CHUNK_BYTES", 1)
    raw = b"".join([*WHOLE[:-2], WHOLE[-1], WHOLE[-2]])
    assert verdict(raw, None)[2] == "there is something after the signed head"


class _Endless(io.RawIOBase):
    """A file with one line that does not end."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        buffer[:] = (b'{"event": "' * (len(buffer) // 11 + 1))[: len(buffer)]
        return len(buffer)


def test_a_line_without_an_end_is_not_held():
    """Shown to fail: with `readline()` without a size, it reads until memory ends."""
    chunks = auditlog.chunks_of(io.BufferedReader(_Endless()))
    with pytest.raises(auditlog.VerificationError, match="line 1 is longer than 16 MiB"):
        auditlog.verify_chunks(chunks, TRUSTED)
    chunks = auditlog.chunks_of(io.BufferedReader(_Endless()))
    with pytest.raises(auditlog.VerificationError, match="line 1 is longer than 16 MiB"):
        auditlog.read_older((chunk.decode() for chunk in chunks), TRUSTED, "test")


def test_a_note_without_an_end_is_not_held():
    def endless():
        yield "byokeep/test/audit\n"
        while True:
            yield "x" * 1_000_000 + "\n"

    with pytest.raises(auditlog.VerificationError, match="longer than 16 MiB"):
        auditlog.read_older(endless(), TRUSTED, "test")


def test_a_line_is_never_taken_in_two(monkeypatch):
    """A link's line that is as long as a reader takes at once, with the next one right after it.

    Shown to fail: without the length in run_of, it was taken for two lines.
    """
    for module in (fast, verification):
        monkeypatch.setattr(module, "LINE_BYTES", len(WHOLE[0]) - 3)
    monkeypatch.setattr(fast, "_CHUNK_BYTES", 1)
    raw = b"".join([WHOLE[0].removesuffix(b"\n"), *WHOLE[1:]])
    assert verdict(raw, None)[2].startswith("line 1 is longer than")


def test_a_file_is_never_held_whole(monkeypatch):
    """Of a long file only a few chunks wait for processes at any time."""
    monkeypatch.setattr(fast, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(fast, "_WORTH_PROCESSES", 2)
    taken = 0

    def counted(stream: io.BytesIO):
        nonlocal taken
        for chunk in auditlog.chunks_of(stream):
            taken += 1
            yield chunk

    for done, _ in enumerate(fast._runs(counted(io.BytesIO(b"".join(WHOLE))), 0, 2), 1):
        assert taken - done <= 5
    assert done == taken == _LENGTH + 1


def test_chunks_are_whole_lines(monkeypatch):
    monkeypatch.setattr(fast, "_CHUNK_BYTES", 700)
    chunks = list(auditlog.chunks_of(io.BytesIO(b"".join(WHOLE))))
    assert b"".join(chunks) == b"".join(WHOLE)
    assert len(chunks) > 10
    assert all(chunk.endswith(b"\n") for chunk in chunks)
