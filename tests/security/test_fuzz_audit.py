"""35. Whatever bytes an auditor is given as an export: a verdict, or VerificationError."""

from __future__ import annotations

import io
import json
import os
import random
import secrets

import pytest
from byokeep import auditlog

from tests.harness.chain import Chain, SigningKey

INPUTS = int(os.environ.get("BYOKEEP_FUZZ_INPUTS", "200000")) // 50
SEED = int(os.environ.get("BYOKEEP_FUZZ_SEED", "0")) or secrets.randbits(48)
_PARTS = 4

KEY = SigningKey("alk")
TRUSTED = {KEY.key_id: KEY.public}
_ODD = [None, 5, -1, 1e400, 10**30, True, [], [[]], {}, {"a": 1}, "", "\ud800", "é", "\x00", "AAAA"]
_MORE = [b" ", b"\n", b"\r\n", b"\x00", b"\xff", b"=", b"\xc3\xa9", b"\\ud800", b"[" * 100_000]


def _made() -> list[bytes]:
    made = Chain(key=KEY)
    for number in range(8):
        made.add("LEASED", key_id="key_" + "0" * 26, key_version=number + 1)
    return [line.encode() + b"\n" for line in made.export()]


LINES = _made()


def _spots(value: object):
    """Yield each place in a JSON value: what holds it, and its name or index there."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for name, one in list(inner):
        yield value, name
        if isinstance(one, dict | list):
            yield from _spots(one)


def _odd(chance: random.Random, line: bytes) -> bytes:
    """A line that is still JSON, with a value of another type, or a name that is none."""
    try:
        record = json.loads(line)
        held, name = chance.choice(list(_spots(record)))
    except (ValueError, RecursionError, TypeError, IndexError):
        return line
    held[name] = chance.choice(_ODD)
    if isinstance(held, dict) and chance.random() < 0.3:
        held["\ud800"] = held.pop(name)
    return json.dumps(record).encode() + b"\n"


def _damaged(chance: random.Random) -> bytes:
    lines = list(LINES)
    for _ in range(chance.randrange(1, 4)):
        at = chance.choice((-1, chance.randrange(len(lines))))
        line = lines[at]
        spot = chance.randrange(len(line) + 1)
        act = chance.randrange(6)
        if act == 0:
            lines[at] = line[:spot] + bytes([chance.randrange(256)]) + line[spot + 1 :]
        elif act == 1:
            lines[at] = line[:spot]
        elif act == 2:
            lines[at] = line[:spot] + chance.choice(_MORE) + line[spot:]
        elif act == 3:
            lines[at] = chance.randbytes(spot)
        else:
            lines[at] = _odd(chance, line)
    return b"".join(lines)


@pytest.mark.fuzz
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(_PARTS))
def test_fuzz_export(part):
    """Shown to fail: with RecursionError not caught in _record, or only ParseError in `_end`."""
    chance = random.Random(f"{SEED} {part}")
    for number in range(INPUTS // _PARTS):
        raw = _damaged(chance)
        lines = raw.decode("utf-8", "replace").splitlines(keepends=True)
        for take in (
            lambda raw=raw: auditlog.verify_chunks(auditlog.chunks_of(io.BytesIO(raw)), TRUSTED),
            lambda lines=lines: auditlog.read_older(lines, TRUSTED, "test"),
        ):
            other = ""
            try:
                take()
            except auditlog.VerificationError:
                pass
            except Exception as error:
                other = repr(error)
            if other:
                pytest.fail(
                    f"BYOKEEP_FUZZ_SEED={SEED}: part {part}, number {number}: {other}:"
                    f" {raw[-3000:]!r}"
                )
