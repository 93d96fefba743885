"""A repository's model: of its patterns, and of those of the paths in it.

Nothing here imports grpc: a process beside the event loop looks at a diff's paths.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Override:
    """The model of some repositories, or of changes of some paths in them; `path` may be empty."""

    repository: str
    path: str
    model: str


def overrides_for(repository: str, overrides: Iterable[Override]) -> list[Override]:
    """Return the overrides that may count for a repository's review, the most specific first.

    The longest repository pattern comes first, of the same length the longest path pattern. What
    comes after the first without a path can't win: it is left out.
    """
    found = []
    order = sorted(
        overrides,
        key=lambda one: (len(one.repository), len(one.path), one.repository, one.path),
        reverse=True,
    )
    for one in order:
        if fnmatch.fnmatchcase(repository, one.repository):
            found.append(one)
            if not one.path:
                break
    return found


def override_of(overrides: Iterable[Override], paths: Collection[str]) -> str:
    """Return the model of the first override that has no path pattern, or one that matches a
    path; empty where there is none. `*` matches slashes too."""
    for one in overrides:
        if not one.path or fnmatch.filter(paths, one.path):
            return one.model
    return ""
