"""A real Vault for the integration tests, and a fault proxy in front of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.harness import keyvault as kv
from tests.harness.vault import VaultServer
from tests.harness.vault_backend import KEK, started
from tests.harness.vault_binary import OPENBAO, Product
from tests.harness.vault_faults import FaultProxy

#: What setup.sh can't do from within a namespace.
HEADER = ("write", "sys/config/auditing/request-headers/X-Byokeep-Lease", "hmac=false")


@pytest.fixture(scope="session")
def vault() -> Iterator[VaultServer]:
    """One Vault for the run, set up by deploy/vault with AppRoles. Leave it as it was found."""
    with _started() as server:
        server.set_up("approle")
        yield server


@pytest.fixture
def bare_vault() -> Iterator[VaultServer]:
    """A Vault of the test's own with an audit device, and nothing else."""
    with _started() as server:
        yield server


@pytest.fixture
def own_vault() -> Iterator[VaultServer]:
    """A Vault of the test's own, set up like `vault`: to seal, stop or alter."""
    with _started() as server:
        server.set_up("approle")
        yield server


@pytest.fixture(scope="module")
def in_namespace() -> Iterator[VaultServer]:
    """An OpenBao, which has namespaces in its open version, set up in one of them."""
    with _started(OPENBAO) as server:
        server.cli("namespace", "create", "teams")
        server.cli("namespace", "create", "-namespace=teams", "byokeep")
        server.cli(*HEADER)
        server.namespace = "teams/byokeep"
        server.set_up("approle")
        yield server


@pytest.fixture
def proxy(vault: VaultServer, tmp_path: Path) -> Iterator[FaultProxy]:
    """A fault proxy in front of the run's Vault."""
    proxy = FaultProxy(vault, tmp_path)
    yield proxy
    proxy.close()


@pytest.fixture
async def wrapped(vault, deployment: kv.Deployment, tmp_path: Path) -> AsyncIterator[bytes]:
    """A data key of the KEK `KEK`, wrapped."""
    folder = tmp_path / "maker"
    folder.mkdir()
    async with started(deployment, vault.settings(folder)) as backend:
        await backend.create(KEK)
        with (made := await backend.generate_data_key(KEK)).plaintext:
            yield made.wrapped
        await backend.destroy(KEK)


@pytest.fixture
def deployment(tmp_path: Path, keyvault_database_url: str) -> kv.Deployment:
    """A deployment with a database of its own."""
    folder = tmp_path / "deployment"
    folder.mkdir()
    return kv.Deployment(folder, keyvault_database_url)


class _started:
    def __init__(self, product: Product | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="byokeep-vault-"))
        self._server = VaultServer(self._folder, product)

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
