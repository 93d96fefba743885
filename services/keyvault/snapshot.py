"""What was followed, as parts that stand in the database under a MAC of keyvault's own."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from typing import Any


def seal(key: bytes, head: Mapping[str, object], parts: Sequence[bytes]) -> list[bytes]:
    """Return the parts with one before them that authenticates itself and them."""
    text = json.dumps({**head, "digest": _digest(parts)}).encode()
    return [hmac.digest(key, text, hashlib.sha256) + text, *parts]


def opened(key: bytes, sealed: Sequence[bytes]) -> tuple[dict[str, Any], list[bytes]] | None:
    """Return head and parts; None where there are none, or not all of them as they were sealed."""
    if not sealed:
        return None
    mac, text = sealed[0][:32], sealed[0][32:]
    if not hmac.compare_digest(mac, hmac.digest(key, text, hashlib.sha256)):
        return None
    head, parts = json.loads(text), list(sealed[1:])
    return (head, parts) if head.pop("digest") == _digest(parts) else None


def _digest(parts: Sequence[bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()
