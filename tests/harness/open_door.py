"""Runs a service whose memory a test may read: a test's launcher, and no part of a product.

    python -m tests.harness.open_door SOCKET [--hold] MODULE [ARGUMENT ...]

A service closes its door (not dumpable) before it holds anything. This opens /proc/self/mem and
/proc/self/maps before that, hands both descriptors to the test over SOCKET, and becomes the
module. With `--hold` a reference to every plaintext and data key is kept: what a defect would do.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys

HELD: list[bytes] = []


def _hold() -> None:
    from byokeep import hpke

    from services.keyvault import envelope

    seal, decrypt = hpke.seal, envelope.decrypt

    def holding_seal(suite, public_key, plaintext, info):
        HELD.append(bytes(plaintext))
        return seal(suite, public_key, plaintext, info)

    def holding_decrypt(data_key, sealed, context):
        HELD.append(bytes(data_key))
        return decrypt(data_key, sealed, context)

    hpke.seal, envelope.decrypt = holding_seal, holding_decrypt


def main() -> None:
    """Give the door away, then become the module."""
    address, *command = sys.argv[1:]
    doors = [os.open(f"/proc/self/{name}", os.O_RDONLY) for name in ("mem", "maps")]
    with socket.socket(socket.AF_UNIX) as test:
        test.connect(address)
        socket.send_fds(test, [str(os.getpid()).encode()], doors)
    for door in doors:
        os.close(door)
    if command[0] == "--hold":
        del command[0]
        _hold()
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
