"""Reading the memory of a service that `open_door` started."""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Iterator
from pathlib import Path

_CHUNK = 8 << 20
_OVERLAP = 2048


class Door:
    """The memory of one process, through descriptors that it opened itself."""

    def __init__(self, pid: int, mem: int, maps: int) -> None:
        self.pid = pid
        self._mem, self._maps = mem, maps

    def close(self) -> None:
        os.close(self._mem)
        os.close(self._maps)

    def regions(self) -> Iterator[tuple[int, int, str]]:
        """Start, end and name of everything that the process may have written to."""
        os.lseek(self._maps, 0, os.SEEK_SET)
        text = b""
        while block := os.read(self._maps, 1 << 16):
            text += block
        for line in text.decode().splitlines():
            span, rights, _, _, _, *name = line.split(maxsplit=5)
            if rights.startswith("r") and (rights[1] == "w" or not name):
                first, last = (int(one, 16) for one in span.split("-"))
                yield first, last, name[0] if name else ""

    def scan(self, wanted: dict[str, bytes]) -> dict[str, list[str]]:
        """Return the names of the forms that occur, and where."""
        found: dict[str, list[str]] = {}
        for first, last, name in self.regions():
            for at in range(first, last, _CHUNK):
                try:
                    data = os.pread(self._mem, min(_CHUNK + _OVERLAP, last - at), at)
                except OSError:
                    continue  # unmapped meanwhile, or never backed by a page
                for what, form in wanted.items():
                    index = data.find(form)
                    if index >= 0:
                        found.setdefault(what, []).append(f"{name or 'anonymous'}+{at + index:x}")
        return found


def listen(path: Path) -> socket.socket:
    """Wait for doors at a path."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    listener.settimeout(60)
    return listener


def accept(listener: socket.socket) -> Door:
    """Take the door of the next process that starts."""
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(60)
        pid, descriptors, _, _ = socket.recv_fds(connection, 32, 2)
    return Door(int(pid), *descriptors)


def forms(name: str, secret: bytes) -> dict[str, bytes]:
    """Return the forms of a secret that memory is searched for.

    The halves find what an allocator has half overwritten: it keeps its lists in the first
    16 bytes of what was freed.
    """
    found = {
        "raw": secret,
        "second half": secret[len(secret) // 2 :],
        "hex": secret.hex().encode(),
        "hex upper": secret.hex().upper().encode(),
    }
    for offset in range(3):
        for kind, encode in (("b64", base64.b64encode), ("b64url", base64.urlsafe_b64encode)):
            whole = encode(bytes(offset) + secret)
            found[f"{kind} at {offset}"] = whole[4 if offset else 0 : len(whole) // 4 * 4 - 4]
    return {f"{name}: {kind}": form for kind, form in found.items()}
