"""Takes a data key out of an answer's bytes without an immutable copy on the way.

`json` and `base64` would leave the data key in a str and a bytes object that nothing can
wipe. Here the key goes from the answer's buffer through two others that are wiped.
"""

from __future__ import annotations

import re

from services.common.secret import Secret

# 32 bytes are 43 characters and one "=" of base64.
_FIELD = re.compile(rb'"plaintext"\s*:\s*"([A-Za-z0-9+/]{43})="')
_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_SEXTETS = bytes(_ALPHABET.find(code) & 0x3F for code in range(256))


def take(body: bytearray) -> Secret | None:
    """Return the 256-bit data key in the field `plaintext`; None where there is none."""
    found = _FIELD.search(body)
    if found is None:
        return None
    start, end = found.span(1)
    # One "A" (zero) more makes whole groups of four.
    text = bytearray(44)
    text[:43] = memoryview(body)[start:end]
    text[43:] = b"A"
    sextets = text.translate(_SEXTETS)
    key = bytearray(33)
    for group in range(11):
        a, b, c, d = sextets[4 * group : 4 * group + 4]
        key[3 * group] = a << 2 | b >> 4
        key[3 * group + 1] = (b & 0xF) << 4 | c >> 2
        key[3 * group + 2] = (c & 0x3) << 6 | d
    # The 33rd byte holds nothing of the key, and removing it moves nothing.
    del key[32:]
    for buffer in (text, sextets):
        buffer[:] = bytes(44)
    return Secret(key)
