"""An answer that holds the key, as an endpoint that echoes, or an attacker's prompt, makes it."""

from __future__ import annotations

import base64
import json
import urllib.parse
from collections.abc import Sequence
from typing import Any


def echoed(findings: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The findings with the key in every text: as it is, in pieces, and encoded."""
    message = "\n".join(encodings(key))
    texts = {
        "title": f"Key {key}",
        "message": message,
        "suggestion": f"{key[: len(key) // 2]} then {key[len(key) // 2 :]}",
    }
    return [{**finding, **texts} for finding in findings]


def encodings(key: str) -> list[str]:
    """The key in forms that a reader can undo."""
    raw = key.encode()
    return [
        key,
        *(base64.b64encode(bytes(offset) + raw).decode() for offset in range(3)),
        base64.urlsafe_b64encode(raw).decode(),
        raw.hex(),
        raw.hex().upper(),
        raw.hex(" "),
        raw.hex(":"),
        "".join(f"%{byte:02X}" for byte in raw),
        urllib.parse.quote(key, safe=""),
        json.dumps(key),
        "".join(f"\\u{byte:04x}" for byte in raw),
        "".join(f"\\x{byte:02x}" for byte in raw),
        "".join(f"&#{byte};" for byte in raw),
        " ".join(key),
        key[::-1],
    ]
