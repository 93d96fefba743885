"""The Merkle log against the RFC's own definitions."""

from __future__ import annotations

import hashlib

import pytest
from byokeep import merkle as client
from hypothesis import given, settings
from hypothesis import strategies as st

from services.keyvault import merkle
from tests.harness import merkle as naive

_SIZES = st.integers(min_value=1, max_value=70)


def leaves_of(size: int) -> list[bytes]:
    return [hashlib.sha256(b"%d" % number).digest() for number in range(size)]


class Stored:
    """The nodes that keyvault stores for a log."""

    def __init__(self, leaves: list[bytes]) -> None:
        self.frontier = merkle.Frontier()
        self.nodes = {}
        for index, leaf in enumerate(leaves):
            self.nodes[(0, index)] = leaf
            for level, position, digest in self.frontier.append(leaf):
                self.nodes[(level, position)] = digest

    def hashes(self, ranges: list[merkle.Range]) -> list[bytes]:
        found = {node: self.nodes[node] for node in merkle.needed(ranges)}
        return [merkle.root_of(covered, found) for covered in ranges]

    def at(self, size: int) -> merkle.Frontier:
        return merkle.Frontier(size, [self.nodes[node] for node in merkle.nodes_of((0, size))])


@pytest.mark.parametrize("size", range(20))
def test_root_is_the_one_of_the_rfc(size):
    leaves = leaves_of(size)
    stored = Stored(leaves)
    assert stored.frontier.root() == naive.mth(leaves)
    assert stored.at(size).root() == naive.mth(leaves)


@given(_SIZES, st.data())
def test_a_frontier_of_any_past_size_is_in_the_nodes(size, data):
    past = data.draw(st.integers(0, size))
    leaves = leaves_of(size)
    frontier = Stored(leaves).at(past)
    for leaf in leaves[past:]:
        frontier.append(leaf)
    assert frontier.root() == naive.mth(leaves)


@given(_SIZES, st.data())
@settings(deadline=None)
def test_inclusion(size, data):
    index = data.draw(st.integers(0, size - 1))
    leaves = leaves_of(size)
    proof = Stored(leaves).hashes(merkle.inclusion(index, size))
    assert proof == naive.path(index, leaves)
    root = naive.mth(leaves)
    client.verify_inclusion(leaves[index], index, size, proof, root)
    other = data.draw(st.integers(0, size))
    if other != index:
        with pytest.raises(client.ProofError):
            client.verify_inclusion(leaves[index], other, size, proof, root)
    for wrong in _wrong(proof, data):
        with pytest.raises(client.ProofError):
            client.verify_inclusion(leaves[index], index, size, wrong, root)


@given(_SIZES, st.data())
@settings(deadline=None)
def test_consistency(size, data):
    old = data.draw(st.integers(0, size))
    leaves = leaves_of(size)
    proof = Stored(leaves).hashes(merkle.consistency(old, size))
    assert proof == naive.proof(old, leaves)
    before, root = naive.mth(leaves[:old]), naive.mth(leaves)
    client.verify_consistency(old, before, size, root, proof)
    for wrong in _wrong(proof, data):
        with pytest.raises(client.ProofError):
            client.verify_consistency(old, before, size, root, wrong)
    with pytest.raises(client.ProofError):
        client.verify_consistency(old, bytes(32), size, root, proof)
    if 0 < old < size:
        with pytest.raises(client.ProofError):
            client.verify_consistency(old, before, size, bytes(32), proof)


def _wrong(proof, data):
    yield [*proof, bytes(32)]
    if proof:
        place = data.draw(st.integers(0, len(proof) - 1))
        yield proof[:place] + proof[place + 1 :]
        flipped = bytearray(proof[place])
        flipped[data.draw(st.integers(0, 31))] ^= 1 << data.draw(st.integers(0, 7))
        yield [*proof[:place], bytes(flipped), *proof[place + 1 :]]


def test_proofs_of_a_large_log_need_few_nodes():
    """A proof in a log of more than a million leaves reads tens of nodes."""
    size = 1_000_000 + 12_345
    for ranges in (merkle.inclusion(777_777, size), merkle.consistency(654_321, size)):
        assert len(merkle.needed(ranges)) <= 60
    assert len(merkle.nodes_of((0, size))) == size.bit_count()


def test_a_larger_older_log_is_refused():
    with pytest.raises(client.ProofError, match="larger"):
        client.verify_consistency(2, bytes(32), 1, bytes(32), [])
