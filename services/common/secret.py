"""A secret in memory: shown by nothing, wiped at the end."""

from __future__ import annotations

import os
from types import TracebackType


def wipe(buffer: bytearray) -> None:
    """Overwrite a buffer with zeros."""
    buffer[:] = bytes(len(buffer))


class Secret:
    """Bytes that are wiped when their block ends and that no report can show.

    Python copies bytes freely, so this reduces how long a secret can be found in
    memory; it can't promise that no copy was made by a library underneath.
    """

    __slots__ = ("_buffer",)

    def __init__(self, value: bytes | bytearray) -> None:
        """Take over a bytearray as it is; copy immutable bytes."""
        self._buffer = value if isinstance(value, bytearray) else bytearray(value)

    @classmethod
    def random(cls, size: int) -> Secret:
        """Return so many random bytes, drawn into the buffer itself.

        os.urandom returns immutable bytes, which nobody could wipe.
        """
        os.urandom(1)  # waits until the system's generator is seeded; /dev/urandom does not
        buffer = bytearray(size)
        with open("/dev/urandom", "rb", buffering=0) as source:
            if source.readinto(buffer) != size:
                raise OSError("/dev/urandom gave too little")
        return cls(buffer)

    def reveal(self) -> bytearray:
        """Return the buffer itself. It is wiped when the block ends: keep no reference."""
        return self._buffer

    def wipe(self) -> None:
        """Overwrite the buffer with zeros."""
        wipe(self._buffer)

    def __enter__(self) -> Secret:
        """Use as a block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wipe, however the block ended."""
        self.wipe()

    def __repr__(self) -> str:
        """Show nothing."""
        return "<Secret>"

    def __reduce__(self) -> str:
        """Refuse to be pickled."""
        raise TypeError("a secret is not pickled")
