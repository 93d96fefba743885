"""The redacted form of a provider key."""

from __future__ import annotations

from services.common.prefix import public_prefix


def hint(key: str) -> str:
    """Return the redacted form that may be shown: `sk-...AbCd`.

    The last four characters only from 24 characters on: of a shorter key they
    would be too large a part.
    """
    return f"{public_prefix(key)}...{key[-4:] if len(key) >= 24 else ''}"
