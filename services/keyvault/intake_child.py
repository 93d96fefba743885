"""The one-shot process of sealed intake: opens one seal, encrypts the key, ends.

On standard input: a line of JSON, the raw intake private key, the raw data key.
On standard output: a line of JSON, with ciphertext and hint or a refusal. It has no
network, no database and no second job; the operating system reclaims its memory.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from byokeep import hpke
from byokeep.keyshape import KeyFormatError, check_key

from services.common import hardening, logs
from services.keyvault.envelope import Context, encrypt
from services.keyvault.hint import hint

#: Written once the door is closed; only then does keyvault send the order.
READY = b"\n"


def answer(order: dict[str, Any], private: bytes, data_key: bytearray) -> dict[str, str]:
    """Open, check and encrypt one key."""
    try:
        opened = hpke.PrivateKey(order["suite"], private).open(
            bytes.fromhex(order["sealed"]), bytes.fromhex(order["info"])
        )
    except hpke.SealError:
        return {"refusal": "seal"}
    try:
        key = opened.decode(errors="replace")
        check_key(order["provider"], key)
    except KeyFormatError as error:
        return {"refusal": error.rule}
    sealed = encrypt(data_key, opened, Context(*order["context"]))
    return {"envelope": sealed.hex(), "hint": hint(key)}


def main() -> None:
    """Read one order, its private key and data key; write one answer."""
    hardening.close_the_door()
    # Standard error is keyvault's: what breaks here is reported like everything there.
    logs.setup("keyvault.intake", "info")
    logs.catch_all()
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    order = json.loads(sys.stdin.buffer.readline())
    private = sys.stdin.buffer.read(order["private_bytes"])
    data_key = bytearray(sys.stdin.buffer.read(32))
    sys.stdout.write(json.dumps(answer(order, private, data_key)))


if __name__ == "__main__":
    main()
