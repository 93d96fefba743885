"""The Merkle tree of RFC 6962 as keyvault keeps it.

Stored are the roots of complete subtrees: node (level, index) covers the leaves from
index·2^level up to, not with, (index + 1)·2^level. Nothing stored ever changes, and a
root or a proof for n leaves needs O(log n) of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from byokeep.merkle import EMPTY, node_hash

#: (level, index)
Node = tuple[int, int]
#: First leaf, and the one after the last.
Range = tuple[int, int]


class Frontier:
    """The roots of the complete subtrees of a tree: all that is needed to append to it."""

    def __init__(self, size: int = 0, roots: Sequence[bytes] = ()) -> None:
        """Start with a tree whose complete subtrees have these roots, widest first."""
        if len(roots) != size.bit_count():
            raise ValueError("a tree has a complete subtree for each bit of its size")
        self.size = size
        self._roots = list(roots)

    def append(self, leaf: bytes) -> list[tuple[int, int, bytes]]:
        """Append a leaf's hash; return (level, index, hash) of the nodes that it completes."""
        node, width, level = leaf, self.size, 0
        completed = []
        while width & 1:
            node = node_hash(self._roots.pop(), node)
            width >>= 1
            level += 1
            completed.append((level, width, node))
        self._roots.append(node)
        self.size += 1
        return completed

    def copy(self) -> Frontier:
        """Return one that can be appended to apart."""
        return Frontier(self.size, self._roots)

    def roots(self) -> list[bytes]:
        """Return the roots, widest subtree first."""
        return list(self._roots)

    def root(self) -> bytes:
        """Return the tree's hash."""
        if not self._roots:
            return EMPTY
        node = self._roots[-1]
        for left in reversed(self._roots[:-1]):
            node = node_hash(left, node)
        return node


def nodes_of(covered: Range) -> list[Node]:
    """Return the complete subtrees that a range consists of, from the left.

    The range is one that a proof names: its start is a multiple of a power of two that
    is not smaller than its width.
    """
    start, end = covered
    nodes = []
    while start < end:
        level = (end - start).bit_length() - 1
        nodes.append((level, start >> level))
        start += 1 << level
    return nodes


def root_of(covered: Range, hashes: Mapping[Node, bytes]) -> bytes:
    """Return the hash over a range from those of its complete subtrees."""
    nodes = nodes_of(covered)
    if not nodes:
        return EMPTY
    result = hashes[nodes[-1]]
    for node in reversed(nodes[:-1]):
        result = node_hash(hashes[node], result)
    return result


def needed(ranges: Iterable[Range]) -> list[Node]:
    """Return every stored node that some ranges' hashes need."""
    return sorted({node for covered in ranges for node in nodes_of(covered)})


def inclusion(index: int, size: int) -> list[Range]:
    """Return the ranges whose hashes prove a leaf (RFC 9162, 2.1.3.1)."""
    return _path(index, 0, size)


def consistency(old_size: int, size: int) -> list[Range]:
    """Return the ranges whose hashes prove an older tree (RFC 9162, 2.1.4.1)."""
    if old_size in (0, size):
        return []
    return _subproof(old_size, 0, size, whole=True)


def _path(index: int, start: int, end: int) -> list[Range]:
    if end - start == 1:
        return []
    middle = start + _split(end - start)
    if index < middle:
        return [*_path(index, start, middle), (middle, end)]
    return [*_path(index, middle, end), (start, middle)]


def _subproof(old_end: int, start: int, end: int, *, whole: bool) -> list[Range]:
    if old_end == end:
        return [] if whole else [(start, end)]
    middle = start + _split(end - start)
    if old_end <= middle:
        return [*_subproof(old_end, start, middle, whole=whole), (middle, end)]
    return [*_subproof(old_end, middle, end, whole=False), (start, middle)]


def _split(width: int) -> int:
    """Return the largest power of two below a width."""
    return 1 << ((width - 1).bit_length() - 1)
