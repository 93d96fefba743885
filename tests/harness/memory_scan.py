"""Looks for a data key in the memory of another process, by what Vault says the key is.

`python -m tests.harness.memory_scan PID` reads `{"address", "ca", "token", "path",
"ciphertext"}` from standard input and prints how often it found the key, as bytes and as
base64 without its last group, which other values may share.
"""

from __future__ import annotations

import base64
import json
import ssl
import sys
import urllib.request
from pathlib import Path


def data_key(order: dict[str, str]) -> bytes:
    """Ask Vault for the data key: who is scanned must not be who looks."""
    request = urllib.request.Request(  # noqa: S310 our own Vault
        f"{order['address']}/v1/{order['path']}",
        json.dumps({"ciphertext": order["ciphertext"]}).encode(),
        {"X-Vault-Token": order["token"]},
        method="POST",
    )
    context = ssl.create_default_context(cafile=order["ca"])
    with urllib.request.urlopen(request, context=context, timeout=60) as answer:  # noqa: S310
        return base64.b64decode(json.load(answer)["data"]["plaintext"])


def count(pid: int, needles: list[bytes]) -> dict[int, int]:
    """Count needles in the writable memory of a process."""
    found = dict.fromkeys(range(len(needles)), 0)
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights, *_ = line.split()
            if not rights.startswith("rw"):
                continue
            start, end = (int(part, 16) for part in span.split("-"))
            try:
                memory.seek(start)
                data = memory.read(end - start)
            except OSError:
                continue
            for number, needle in enumerate(needles):
                found[number] += data.count(needle)
    return found


if __name__ == "__main__":
    key = data_key(json.load(sys.stdin))
    print(json.dumps(count(int(sys.argv[1]), [key, base64.b64encode(key)[:40]])))
