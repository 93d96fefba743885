"""The Merkle tree of RFC 6962, section 2.1, over a list of leaf hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

EMPTY = hashlib.sha256(b"").digest()


def leaf_hash(entry: bytes) -> bytes:
    """Return the hash of a leaf: SHA-256(0x00 ‖ entry)."""
    return hashlib.sha256(b"\x00" + entry).digest()


class Frontier:
    """The roots of the perfect subtrees of a tree: all that is needed to append to it."""

    def __init__(self) -> None:
        """Start with the empty tree."""
        self.size = 0
        self._roots: list[bytes] = []  # widest first

    def append(self, leaf: bytes) -> None:
        """Append a leaf's hash."""
        node, width = leaf, self.size
        while width & 1:
            node = _node(self._roots.pop(), node)
            width >>= 1
        self._roots.append(node)
        self.size += 1

    def root(self) -> bytes:
        """Return the tree's hash."""
        if not self._roots:
            return EMPTY
        node = self._roots[-1]
        for left in reversed(self._roots[:-1]):
            node = _node(left, node)
        return node


def root(leaves: Sequence[bytes]) -> bytes:
    """Return the hash of the tree over some leaves."""
    frontier = Frontier()
    for leaf in leaves:
        frontier.append(leaf)
    return frontier.root()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()
