"""The redacted form of a provider key."""

from __future__ import annotations

_PUBLIC_PREFIXES = (
    "sk-ant-api03-",
    "sk-svcacct-",
    "sk-proj-",
    "sk-ant-",
    "sk-",
    "AIza",
    "AQ.",
)


def hint(key: str) -> str:
    """Return the redacted form that may be shown: `sk-...AbCd`.

    The last four characters only from 24 characters on: of a shorter key they
    would be too large a part.
    """
    prefix = next((one for one in _PUBLIC_PREFIXES if key.startswith(one)), "")
    return f"{prefix}...{key[-4:] if len(key) >= 24 else ''}"
