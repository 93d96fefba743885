"""The parent dials for its children: the one host of the attempt's provider, nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterable, Mapping
from typing import Any, Final

from byokeep.common.v1 import options_pb2
from byokeep.orchestrator.v1 import key_pb2

HOSTS: Final[Mapping[int, str]] = {
    options_pb2.PROVIDER_OPENAI: "api.openai.com",
    options_pb2.PROVIDER_ANTHROPIC: "api.anthropic.com",
    options_pb2.PROVIDER_GEMINI: "generativelanguage.googleapis.com",
}
PORT: Final = 443
_CONNECT_SECONDS: Final = 5.0
_DIAL_SECONDS: Final = 12.0
# A peer that is gone without a word, and sends nothing while a model thinks, is noticed after a
# minute: the child would wait for it until its own deadlines.
_OPTIONS: Final = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000),
)


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
    ) -> socket.socket | key_pb2.UnreachableCause.ValueType:
        """Return a connected socket, or what was unreachable.

        Nothing was, and nothing is dialled, where `asked` (host:port) is not the provider's.
        """
        host = HOSTS.get(provider)
        if host is None or asked != f"{host}:{PORT}":
            return key_pb2.UNREACHABLE_CAUSE_UNSPECIFIED
        loop = asyncio.get_running_loop()
        address, port = self._overrides.get(host, (host, PORT))
        cause = key_pb2.UNREACHABLE_CAUSE_NAME_RESOLUTION
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_DIAL_SECONDS):
                found = await loop.getaddrinfo(address, port, type=socket.SOCK_STREAM)
                cause = key_pb2.UNREACHABLE_CAUSE_CONNECT
                return await _connect(found)
        return cause


async def _connect(found: Iterable[tuple[int, int, int, str, Any]]) -> socket.socket:
    for family, kind, protocol, _, address in found:
        sock = socket.socket(family, kind, protocol)
        connected = False
        try:
            sock.setblocking(False)
            for level, option, value in _OPTIONS:
                sock.setsockopt(level, option, value)
            async with asyncio.timeout(_CONNECT_SECONDS):
                await asyncio.get_running_loop().sock_connect(sock, address)
            connected = True
            return sock
        except (OSError, TimeoutError):
            continue
        finally:
            if not connected:
                sock.close()
    raise OSError("no address answers")
