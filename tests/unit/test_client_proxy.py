"""A proxy of the environment diverts no channel; one that the profile names is used."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator

import pytest
from byokeep.keyvault.v1 import admin_pb2, admin_pb2_grpc
from byokeep.transport import TlsFiles, aio_channel

from tests.harness.fake_edge import NAMES

pytest_plugins = ["tests.harness.cli_fixtures"]

REFUSAL = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"


class Proxy(socketserver.ThreadingTCPServer):
    """An HTTP proxy that notes every CONNECT."""

    daemon_threads = False

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.refuses = False
        super().__init__(("127.0.0.1", 0), _Connect)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,)).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Connect(socketserver.StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        address = self.rfile.readline().split()[1].decode()
        self.server.asked.append(address)
        while self.rfile.readline().strip():
            pass
        if self.server.refuses:
            self.wfile.write(REFUSAL)
            return
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port))) as there:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=_pump, args=(there, self.connection))
            back.start()
            _pump(self.connection, there)
            back.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy(monkeypatch) -> Iterator[Proxy]:
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    running = Proxy()
    yield running
    running.stop()


@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "grpc_proxy"])
@pytest.mark.parametrize("command", [("key", "list"), ("doctor",)])
def test_a_proxy_of_the_environment_is_not_used(edge, byokeep, proxy, monkeypatch, name, command):
    """Shown to fail without `grpc.enable_http_proxy`: both channels ask the proxy."""
    monkeypatch.setenv(name, proxy.url)
    assert byokeep(*command).code == 0
    assert proxy.asked == []


async def test_nor_by_a_channel_of_a_service(edge, proxy, monkeypatch):
    monkeypatch.setenv("http_proxy", proxy.url)
    (edge.directory / "ca.pem").write_text(edge.ca.pem)
    files = TlsFiles(
        *(edge.directory / name for name in ("developer.pem", "developer.key", "ca.pem"))
    )
    async with aio_channel(edge.addresses["keyvault"], NAMES["keyvault"], files) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=20)
    assert proxy.asked == []


def test_the_profiles_proxy_is_used_by_commands_and_doctor_alike(edge, byokeep, proxy):
    edge.write_config(proxy=proxy.url)
    assert byokeep("key", "list").code == 0
    assert proxy.asked == [edge.addresses["orchestrator"]]
    ran = byokeep("doctor")
    assert ran.code == 0
    assert set(proxy.asked) == set(edge.addresses.values())
    assert "answers through the profile's proxy" in ran.out
    assert proxy.url not in ran.out


def test_a_proxy_that_refuses_is_named(edge, byokeep, proxy):
    proxy.refuses = True
    edge.write_config(proxy=proxy.url)
    assert "the proxy refuses to connect" in byokeep("key", "list").err
    assert "the proxy refuses to connect" in byokeep("doctor").out
