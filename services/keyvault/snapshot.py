"""What is known of the log, as parts that stand in the database under a MAC of keyvault's own."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

_LABEL: Final = b"byokeep/snapshot/v1"


def seal(
    key_id: str, key: bytes, head: Mapping[str, object], parts: Sequence[bytes]
) -> list[bytes]:
    """Return the parts with one before them that authenticates itself and them."""
    text = json.dumps({**head, "key": key_id, "digest": _digest(parts)}).encode()
    return [_mac(key, text) + text, *parts]


def opened(
    keys: Mapping[str, bytes], sealed: Sequence[bytes]
) -> tuple[dict[str, Any], list[bytes]] | None:
    """Return head and parts; None where there are none, or not all of them as they were sealed."""
    if not sealed:
        return None
    mac, text, parts = sealed[0][:32], sealed[0][32:], list(sealed[1:])
    if not any(hmac.compare_digest(mac, _mac(key, text)) for key in keys.values()):
        return None
    head = json.loads(text)
    return (head, parts) if head.pop("digest") == _digest(parts) else None


def _mac(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, _LABEL + text, "sha256")


def _digest(parts: Sequence[bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()
