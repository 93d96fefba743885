"""Connections that nobody authenticated must not bring a service down."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from deploy.local.pki import CertificateAuthority

_SERVER = """
import sys, grpc, time
from pathlib import Path
from byokeep.transport import TlsFiles
from services.common.tls import ServerIdentity
from concurrent.futures import ThreadPoolExecutor
folder = Path(sys.argv[1])
identity = ServerIdentity(TlsFiles(folder / "s.pem", folder / "s.key", folder / "ca.pem"))
server = grpc.server(ThreadPoolExecutor(2))
port = server.add_secure_port("127.0.0.1:0", identity.credentials())
server.start()
print(port, flush=True)
time.sleep(300)
"""


@pytest.mark.timeout(120)
def test_silent_connections_do_not_crash_a_server(tmp_path):
    """12 rounds of 300 silent connections, opened and closed, before any certificate.

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
            for _ in range(12):
                many = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(300)]
                for one in many:
                    one.close()
            with pytest.raises(subprocess.TimeoutExpired):
                server.wait(1)
        finally:
            server.kill()
