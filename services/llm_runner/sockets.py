"""The parent dials for its children: the one host of the attempt's provider, nothing else."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from typing import Final

from byokeep.common.v1 import options_pb2

HOSTS: Final[Mapping[int, str]] = {
    options_pb2.PROVIDER_OPENAI: "api.openai.com",
    options_pb2.PROVIDER_ANTHROPIC: "api.anthropic.com",
    options_pb2.PROVIDER_GEMINI: "generativelanguage.googleapis.com",
}
PORT: Final = 443
_CONNECT_SECONDS: Final = 5.0
_DIAL_SECONDS: Final = 12.0


def parse_overrides(text: str) -> Mapping[str, tuple[str, int]]:
    """Read `host=ip:port` pairs separated by blanks. Raises ValueError."""
    overrides = {}
    for pair in text.split():
        host, _, address = pair.partition("=")
        ip, _, port = address.rpartition(":")
        if host not in HOSTS.values() or not ip or not port.isdecimal():
            raise ValueError(f"host=ip:port expected, host one of {', '.join(HOSTS.values())}")
        overrides[host] = (ip.strip("[]"), int(port))
    return overrides


class Dialer:
    """Connects to providers; whom it reached is verified in the child, by TLS."""

    def __init__(self, overrides: Mapping[str, tuple[str, int]]) -> None:
        """`overrides` changes the address that is dialled for a host, never the host."""
        self._overrides = overrides

    async def dial(
        self, provider: options_pb2.Provider.ValueType, asked: str
    ) -> socket.socket | None:
        """Return a connected socket, or None: refused, because `asked` (host:port) is not the
        provider's, or not reached."""
        host = HOSTS.get(provider)
        if host is None or asked != f"{host}:{PORT}":
            return None
        try:
            async with asyncio.timeout(_DIAL_SECONDS):
                return await self._connect(*self._overrides.get(host, (host, PORT)))
        except (OSError, TimeoutError):
            return None

    async def _connect(self, host: str, port: int) -> socket.socket:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in found:
            sock = socket.socket(family, kind, protocol)
            connected = False
            try:
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                async with asyncio.timeout(_CONNECT_SECONDS):
                    await loop.sock_connect(sock, address)
                connected = True
                return sock
            except (OSError, TimeoutError):
                continue
            finally:
                if not connected:
                    sock.close()
        raise OSError("no address answers")
