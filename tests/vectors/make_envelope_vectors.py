"""Made tests/vectors/envelope-v1.json, once. Running it again would defeat its purpose."""

from __future__ import annotations

import json
import os
from pathlib import Path

from services.keyvault.envelope import Context, encrypt

CASES = {
    "tenant key": (Context("prod", "acme", "", "openai", "key_01", 1), b"sk-proj-" + b"a" * 40),
    "user key": (Context("prod", "acme", "ann@x", "gemini", "key_02", 7), b"AIza" + b"b" * 35),
    "shortest": (Context("d", "t", "", "anthropic", "k", 1), b"c" * 16),
    "longest": (Context("d", "t", "o" * 128, "anthropic", "k", 2**31 - 1), b"~" * 512),
}

if __name__ == "__main__":
    rows = []
    for name, (context, plaintext) in CASES.items():
        data_key = bytearray(os.urandom(32))
        rows.append(
            {
                "name": name,
                "context": [getattr(context, field) for field in context.__slots__],
                "data_key": data_key.hex(),
                "plaintext": plaintext.hex(),
                "envelope": encrypt(data_key, plaintext, context).hex(),
            }
        )
    Path(__file__).with_name("envelope-v1.json").write_text(
        json.dumps({"envelopes": rows}, indent=1) + "\n"
    )
