"""A real Vault for the integration tests, and a fault proxy in front of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import keyvault as kv
from tests.harness.vault import VaultServer
from tests.harness.vault_faults import FaultProxy


@pytest.fixture(scope="session")
def vault() -> Iterator[VaultServer]:
    """One Vault for the run, set up by deploy/vault with AppRoles. Leave it as it was found."""
    with _started() as server:
        server.set_up("approle")
        yield server


@pytest.fixture
def own_vault() -> Iterator[VaultServer]:
    """A Vault of the test's own, set up like `vault`: to seal, stop or alter."""
    with _started() as server:
        server.set_up("approle")
        yield server


@pytest.fixture
def proxy(vault: VaultServer, tmp_path: Path) -> Iterator[FaultProxy]:
    """A fault proxy in front of the run's Vault."""
    proxy = FaultProxy(vault, tmp_path)
    yield proxy
    proxy.close()


@pytest.fixture
def deployment(tmp_path: Path, keyvault_database_url: str) -> kv.Deployment:
    """A deployment with a database of its own."""
    folder = tmp_path / "deployment"
    folder.mkdir()
    return kv.Deployment(folder, keyvault_database_url)


class _started:
    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="byokeep-vault-"))
        self._server = VaultServer(self._folder)

    def __enter__(self) -> VaultServer:
        try:
            self._server.start()
        except BaseException:
            self.__exit__()
            raise
        return self._server

    def __exit__(self, *_: object) -> None:
        self._server.stop()
        shutil.rmtree(self._folder, ignore_errors=True)
