"""How much is kept of a review, and how much an answer carries.

What a client reads fits into the 4 MiB that gRPC's clients take by default: lists end a page
where it is full, and what is stored of one thing is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from byokeep.orchestrator.v1.review_pb2 import Finding

#: A page of a list, or of a review's findings, ends with what makes it larger than this.
PAGE_BYTES: Final = 1024 * 1024
#: Most bytes of findings that are kept of one chunk: twice what 32,000 tokens of answer have.
CHUNK_BYTES: Final = 256 * 1024
#: Most bytes of findings that are kept of a review, unless it has hundreds of chunks.
REVIEW_BYTES: Final = 16 * 1024 * 1024
# The largest finding that a runner lets through fits.
_LEAST_BYTES: Final = 48 * 1024
#: More than the findings of 1,000 chunks, which is the most calls that a review may make.
ALL_BYTES: Final = 64 * 1024 * 1024
#: Most versions of a key that an answer has: the newest, and the active one.
VERSIONS: Final = 50
#: Most keys that an answer names of one model.
KEYS_OF_MODEL: Final = 50
#: Most keys of a provider whose lists of models are read at once, a thousand names each: of what
#: none of them has, it is not known whether a further key can use it.
LISTS: Final = 10
#: Most models for patterns of repositories that a tenant may have.
OVERRIDES: Final = 1000
#: Most of them that look at the paths of a diff: each is held against every path.
PATH_OVERRIDES: Final = 100


def worst(findings: Sequence[Finding], chunks: int) -> list[Finding]:
    """Return what is kept of a chunk's findings, in their order: the worst, where all of them are
    more than the part of one of so many chunks."""
    room = min(CHUNK_BYTES, max(_LEAST_BYTES, REVIEW_BYTES // max(chunks, 1)))
    kept: set[int] = set()
    for at in sorted(range(len(findings)), key=lambda at: -findings[at].severity):
        room -= findings[at].ByteSize()
        if room < 0:
            break
        kept.add(at)
    return [findings[at] for at in sorted(kept)]
