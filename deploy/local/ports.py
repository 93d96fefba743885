"""Free ports that stay ours from before a server binds them until after it ends."""

from __future__ import annotations

import socket

from .processes import StackError


class Ports:
    """Loopback ports, each held by a bound socket that never listens.

    gRPC servers bind with SO_REUSEPORT, so they can share the port with the
    reservation (socket(7): all sockets need the option and the same user); any other
    process that asks for a free port is given another one, a second stack's too.
    """

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._held: list[socket.socket] = []

    def reserve(self, number: int = 0) -> int:
        """Return a port of 127.0.0.1; 0: one that is free. Raises StackError where it is taken."""
        if number:
            # Our own way of holding it would share it with another stack that holds it so.
            self.probe(number)
        held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", number))
        self._held.append(held)
        port: int = held.getsockname()[1]
        return port

    @staticmethod
    def probe(number: int) -> None:
        """Raise StackError where a port of 127.0.0.1 can't be had."""
        try:
            socket.create_server(("127.0.0.1", number)).close()
        except OSError as error:
            raise StackError(f"port {number} can't be had: {error.strerror}") from None

    def close(self) -> None:
        """Give every port back."""
        while self._held:
            self._held.pop().close()
