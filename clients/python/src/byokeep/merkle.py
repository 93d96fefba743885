"""Merkle tree hashes and the checks of their proofs.

Sources: RFC 6962, section 2.1 (tree), RFC 9162, sections 2.1.3.2 and 2.1.4.2 (checks).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

#: The root of the tree without leaves.
EMPTY = hashlib.sha256(b"").digest()


class ProofError(Exception):
    """A proof does not lead to the root that it is held against."""


def leaf_hash(entry: bytes) -> bytes:
    """Return the hash of a leaf: SHA-256(0x00 ‖ entry)."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of an inner node: SHA-256(0x01 ‖ left ‖ right)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def verify_inclusion(
    leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes
) -> None:
    """Check that a leaf's hash stands at an index of the tree of a size and root.

    Raises:
        ProofError: it does not follow.
    """
    if not 0 <= index < size:
        raise ProofError("the leaf's index is not in the tree")
    node, last, result = index, size - 1, leaf
    for step in proof:
        if last == 0:
            raise ProofError("the inclusion proof is too long")
        if node & 1 or node == last:
            result = node_hash(step, result)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            result = node_hash(result, step)
        node, last = node >> 1, last >> 1
    if last or not hmac.compare_digest(result, root):
        raise ProofError("the inclusion proof does not lead to the tree's root")


def verify_consistency(
    old_size: int, old_root: bytes, size: int, root: bytes, proof: Sequence[bytes]
) -> None:
    """Check that the tree of a size and root is the older one with leaves appended.

    Raises:
        ProofError: it does not follow.
    """
    if not 0 <= old_size <= size:
        raise ProofError("the older tree is larger")
    if old_size in (0, size):
        expected = root if old_size else EMPTY
        if proof or not hmac.compare_digest(old_root, expected):
            raise ProofError("the two trees differ")
        return
    steps = list(proof)
    if old_size & (old_size - 1) == 0:
        steps.insert(0, old_root)
    if not steps:
        raise ProofError("the consistency proof is too short")
    node, last = old_size - 1, size - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    before = after = steps[0]
    for step in steps[1:]:
        if last == 0:
            raise ProofError("the consistency proof is too long")
        if node & 1 or node == last:
            before, after = node_hash(step, before), node_hash(step, after)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            after = node_hash(after, step)
        node, last = node >> 1, last >> 1
    if last or not (hmac.compare_digest(before, old_root) and hmac.compare_digest(after, root)):
        raise ProofError("the consistency proof does not lead to both roots")
