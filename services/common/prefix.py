"""How provider keys begin: what may be shown of one."""

from __future__ import annotations

from typing import Final

_PUBLIC: Final = (
    "sk-ant-api03-",
    "sk-svcacct-",
    "sk-proj-",
    "sk-ant-",
    "sk-",
    "AIza",
    "AQ.",
)


def public_prefix(key: str) -> str:
    """The beginning of a key that all keys of its kind share, and that gives nothing away."""
    return next((prefix for prefix in _PUBLIC if key.startswith(prefix)), "")
