"""Connections that nobody authenticated must not bring a service down."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import time

import pytest

from deploy.local.pki import CertificateAuthority

_SERVER = """
import asyncio, sys, grpc
from pathlib import Path
from byokeep.transport import TlsFiles
from services.common.tls import ServerIdentity

async def serve(folder):
    files = TlsFiles(folder / "s.pem", folder / "s.key", folder / "ca.pem")
    server = grpc.aio.server()
    port = server.add_secure_port("127.0.0.1:0", ServerIdentity(files).credentials())
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()

asyncio.run(serve(Path(sys.argv[1])))
"""
_CONNECTIONS = 4_000


@pytest.fixture
def many_files():
    """Room for the sockets, here and in the server, which inherits the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    assert hard > _CONNECTIONS + 100
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.timeout(120)
def test_silent_connections_do_not_crash_a_server(tmp_path, many_files):
    """4,000 silent connections, opened and closed, before any certificate.

    gRPC core frees its handshaker factory whenever the certificate callback gives it a
    configuration, while handshakes may run (grpc/grpc#36693).
    Shown to fail: with ServerIdentity._changed returning a configuration every time, the
    process died of memory corruption.
    """
    ca = CertificateAuthority.new("byokeep.test")
    (tmp_path / "ca.pem").write_text(ca.pem)
    ca.issue(tmp_path / "s", spiffe_id="server", dns=["s"])
    command = [sys.executable, "-c", _SERVER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        port = int(server.stdout.readline())
        try:
            address = ("127.0.0.1", port)
            many = [socket.create_connection(address, 5) for _ in range(_CONNECTIONS)]
            time.sleep(1)
            for one in many:
                one.close()
            with pytest.raises(subprocess.TimeoutExpired):
                server.wait(2)
        finally:
            server.kill()
