"""The compact map of states."""

from __future__ import annotations

import random

from services.keyvault.states import States

KEY = b"k" * 32


def test_states_are_what_was_set_last_by_sequence():
    states, expected, source = States(KEY), {}, random.Random(7)
    for _ in range(5000):
        version = ("acme", f"key_{source.randrange(800)}", source.randrange(1, 4))
        state, sequence = source.randrange(1, 7), source.randrange(1, 10**6)
        states.set(states.fingerprint(*version), state, sequence)
        if sequence >= expected.get(version, (0, 0))[1]:
            expected[version] = (state, sequence)
    assert len(states) == len(expected)
    copy = States(KEY)
    copy.restore(states.dump())
    for version, (state, sequence) in expected.items():
        for one in (states, copy):
            assert one.get(one.fingerprint(*version)) == (state, sequence, False)


def test_what_is_frozen_stays_so():
    states = States(KEY)
    version = states.fingerprint("acme", "key_1", 1)
    states.freeze(version)
    states.freeze(version)
    states.set(version, 2, 9)
    assert states.get(version) == (2, 9, True)
    copy = States(KEY)
    copy.restore(states.dump())
    assert (copy.frozen, copy.get(version)) == (1, (2, 9, True))


def test_an_unknown_version_has_no_state():
    states = States(KEY)
    assert states.get(states.fingerprint("acme", "key_1", 1)) == (0, 0, False)


def test_fingerprints_are_keyed_and_of_every_part():
    states = States(KEY)
    one = states.fingerprint("acme", "key_1", 1)
    others = [("evil", "key_1", 1), ("acme", "key_2", 1), ("acme", "key_1", 2)]
    assert one not in [states.fingerprint(*other) for other in others]
    assert one != States(b"j" * 32).fingerprint("acme", "key_1", 1)
