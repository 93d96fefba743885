"""Finding a secret wherever it may have been written, in whatever form."""

from __future__ import annotations

import base64
import contextlib
import json
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

_FRAGMENT = 8


def forms(secret: str, public_prefix: str) -> dict[str, bytes]:
    """Return every form of a secret that a leak may have, by name.

    Fragments of 8 characters are taken past the public prefix; the redacted hint's
    last four are too few to be one.
    """
    raw = secret.encode()
    found = {
        "raw": raw,
        "hex": raw.hex().encode(),
        "hex upper": raw.hex().upper().encode(),
        "spaced hex": raw.hex(" ").encode(),
        "colon hex": raw.hex(":").encode(),
        "url": urllib.parse.quote(secret, safe="").encode(),
        "json": json.dumps(secret)[1:-1].encode(),
        "escaped": "".join(f"\\x{byte:02x}" for byte in raw).encode(),
        "reversed": raw[::-1],
        "utf-16": secret.encode("utf-16-le"),
    }
    for offset in range(3):
        # Without the ends, which depend on what stands beside the secret.
        for name, encode in (("b64", base64.b64encode), ("b64url", base64.urlsafe_b64encode)):
            whole = encode(bytes(offset) + raw)
            found[f"{name} at {offset}"] = whole[4 if offset else 0 : len(whole) // 4 * 4 - 4]
    body = secret.removeprefix(public_prefix)
    for start in range(0, len(body) - _FRAGMENT + 1):
        found[f"fragment {start}"] = body[start : start + _FRAGMENT].encode()
    return found


def found_in(data: bytes, wanted: dict[str, bytes]) -> list[str]:
    """Return the names of the forms that occur."""
    return [name for name, form in wanted.items() if form in data]


def files_with(root: Path, wanted: dict[str, bytes]) -> Iterator[tuple[Path, list[str]]]:
    """Yield every file below a folder that has a form of the secret, and which."""
    for path in sorted(root.rglob("*")):
        if not path.is_file() or path.is_symlink():
            continue
        with contextlib.suppress(FileNotFoundError):  # a running database removes files
            if names := found_in(path.read_bytes(), wanted):
                yield path, names
