"""How KEKs are written in Vault's Transit engine, and how its answers are read.

A KEK's name in Transit is prefix and name, with "-" for "/": `tenant/acme` is
`byokeep-tenant-acme`. Vault answers 400 to a missing key, to a version that is gone and to a
damaged ciphertext alike, and only its text tells them apart (builtin/logical/transit/
path_decrypt.go, sdk/helper/keysutil/policy.go; OpenBao's are the same). The text is looked
into, not kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from services.keyvault.kek import KekMissingError, RewrapFailed, Rewrapped
from services.keyvault.kek.vault import states
from services.keyvault.kek.vault.reply import Reply

_KEK = re.compile(r"system|tenant/[a-z0-9][a-z0-9-]*|(intake|content)/[A-Za-z0-9][A-Za-z0-9-]*")
_CIPHERTEXT = re.compile(rb"vault:v([1-9][0-9]{0,8}):[A-Za-z0-9+/]+={0,2}")
_CIPHERTEXT_FIELD = re.compile(rb'"ciphertext"\s*:\s*"(vault:v[0-9]+:[A-Za-z0-9+/]+={0,2})"')
_GONE = (b"encryption key not found", b"(too old)", b"key not found", b"no existing key named")
_DAMAGED = (b"message authentication failed", b"invalid ciphertext")


@dataclass(frozen=True, slots=True)
class Place:
    """Where KEKs are: the engine's mount, and what all their names start with."""

    mount: str
    prefix: str

    def key(self, kek: str) -> str:
        """Return a KEK's name in Transit. Raises ValueError where it is the name of none."""
        if _KEK.fullmatch(kek) is None:
            raise ValueError("not the name of a KEK")
        name = self.prefix + kek.replace("/", "-")
        # A Transit key's name ends in a letter, a digit or "_"; a tenant's may end in "-" and
        # never has "_", so this makes no two alike.
        return f"{name}_" if name.endswith("-") else name


def check(reply: Reply, kek: str) -> None:
    """Wipe an answer that says that the KEK, or what it is in, is not there; and raise.

    Raises:
        KekMissingError, KekUnavailableError.
    """
    if reply.status == 404:
        reply.wipe()
        raise states.unavailable("no_mount")
    if reply.status == 400 and any(reply.says(phrase) for phrase in _GONE):
        reply.wipe()
        raise KekMissingError(kek)


def damaged(reply: Reply) -> bool:
    """Say whether an answer is that the ciphertext is none of the KEK's."""
    return reply.status == 400 and any(reply.says(phrase) for phrase in _DAMAGED)


def is_ciphertext(wrapped: bytes) -> bool:
    """Say whether this has the form of Transit's ciphertexts."""
    return _CIPHERTEXT.fullmatch(wrapped) is not None


def ciphertext_in(reply: Reply) -> bytes:
    """Return the ciphertext of an answer that holds a data key as well; b"" where it has none."""
    found = _CIPHERTEXT_FIELD.search(reply.body)
    return bytes(found.group(1)) if found else b""


def version(ciphertext: bytes) -> int:
    """Return which version of its KEK made a ciphertext. Raises KekUnavailableError."""
    found = _CIPHERTEXT.fullmatch(ciphertext)
    if found is None:
        raise states.unavailable("broken")
    return int(found.group(1))


def rewrapped(result: dict[str, str]) -> Rewrapped | RewrapFailed:
    """Read one result of a rewrap: a ciphertext, or an error of its own."""
    wrapped = result.get("ciphertext", "").encode()
    if wrapped and not result.get("error"):
        return Rewrapped(wrapped, version(wrapped))
    error = result.get("error", "").encode()
    gone = any(phrase in error for phrase in _GONE)
    return RewrapFailed("UNDECRYPTABLE" if gone else "ROW_TAMPERED")
