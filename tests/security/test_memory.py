"""16. `mem_scan`: no key in the memory of a process that should not have it any more.

The services close their doors before they hold anything; `tests/harness/open_door.py` opens its
own memory before that and hands it to the test. What is claimed: after the call, no copy of a
provider key or data key is reachable or left in keyvault; none was ever in the orchestrator or in
the runner's parent. The keyring's root keys are in keyvault by design, and nowhere else.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from byokeep.testing import Stack

from services.keyvault import kek
from services.keyvault.database import Database
from services.keyvault.kek.keyring import load_keyring
from services.keyvault.kek.local import LocalBackend
from tests.harness import memory
from tests.security.test_canary import PREFIXES, add_key, fresh_key, review

pytestmark = pytest.mark.deep

KEYS, REVIEWS = 6, 8
DEPLOYMENT = "local"
MODULES = {
    "keyvault": "services.keyvault",
    "orchestrator": "services.orchestrator",
    "runner": "services.llm_runner",
}


class Scanned:
    """A stack whose services open their doors to the test."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.doors: dict[str, memory.Door] = {}

    def restart(self, name: str, *options: str) -> None:
        """Start a service again, with its door open."""
        folder = Path(tempfile.mkdtemp(prefix="byokeep-door-", dir="/tmp"))
        process = self.stack.process(name)
        process.stop()
        launch = [sys.executable, "-m", "tests.harness.open_door", str(folder / "door"), *options]
        process._command = [*launch, MODULES[name], "serve"]
        try:
            with memory.listen(folder / "door") as listener:
                process.start()
                if name in self.doors:
                    self.doors.pop(name).close()
                self.doors[name] = memory.accept(listener)
        finally:
            shutil.rmtree(folder)
        self.stack.wait_ready(name)

    def work(self, keys: int, reviews: int) -> dict[str, bytes]:
        """Intakes, validations, leases and reviews; return every provider key by a name."""
        known = {}
        with self.stack.connect() as connection:
            for number in range(keys):
                provider = list(PREFIXES)[number % len(PREFIXES)]
                key = fresh_key(provider)
                key_id = add_key(connection, provider, key, "scan-" + key[-6:])
                # The prefix is no secret, and stands in hints.
                known[f"provider key {key_id}"] = key.removeprefix(PREFIXES[provider]).encode()
            for number in range(reviews):
                done = review(connection, list(PREFIXES)[number % len(PREFIXES)])
                assert not done.failure, done
        return known

    async def data_keys(self) -> dict[str, bytes]:
        """Every data key, as a thief of both keyring and database would have it."""
        database = Database(self.stack.database_url("keyvault"), 2)
        await database.open()
        backend = LocalBackend(database, load_keyring(self._keyring, {}), DEPLOYMENT)
        found = {}
        for tenant, key_id, version, wrapped in await database.all(
            "SELECT tenant, key_id, version, wrapped_dek FROM key_secret"
        ):
            with await backend.unwrap(kek.tenant_kek(tenant), bytes(wrapped)) as data_key:
                found[f"data key {key_id}/{version}"] = bytes(data_key.reveal())
        await database.close()
        return found

    def root_keys(self) -> dict[str, bytes]:
        keys = json.loads(self._keyring.read_text())["keys"]
        return {f"root key {one}": base64.b64decode(raw) for one, raw in keys.items()}

    @property
    def _keyring(self) -> Path:
        return self.stack.root / "secrets" / "keyring.json"


@pytest.fixture(scope="module")
def scanned() -> Iterator[Scanned]:
    with Stack(environment={"keyvault": {"BYOKEEP_INTAKE_PER_HOUR": "1000"}}) as stack:
        found = Scanned(stack)
        for name in MODULES:
            found.restart(name)
        yield found
        for door in found.doors.values():
            door.close()


def _forms(secrets: dict[str, bytes]) -> dict[str, bytes]:
    return {k: v for name, secret in secrets.items() for k, v in memory.forms(name, secret).items()}


@pytest.mark.timeout(600)
def test_mem_scan(scanned):
    """16. After intakes, validations and reviews: nothing in any of the three.

    Shown to fail: with `envelope.decrypt` keeping a copy of what it returns, and below.
    """
    keys = scanned.work(KEYS, REVIEWS)
    data_keys = asyncio.run(scanned.data_keys())
    assert len(data_keys) >= KEYS
    mine = _forms({**keys, **data_keys})
    root = _forms(scanned.root_keys())
    assert scanned.doors["keyvault"].scan(mine) == {}
    assert scanned.doors["orchestrator"].scan({**mine, **root}) == {}
    assert scanned.doors["runner"].scan({**mine, **root}) == {}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MODULES)
def test_mem_scan_reads_memory(scanned, name):
    """The control: what a process does hold is found, so that nothing found means something."""
    held = {"environment": b"BYOKEEP_TLS_CERT=", "a table of Python's": b"UnicodeDecodeError"}
    assert scanned.doors[name].scan(held).keys() == held.keys()


@pytest.mark.timeout(600)
def test_mem_scan_finds_one_held_reference(scanned):
    """The mutation, made in a running keyvault: one reference held, and it is found; the root
    keys are found too, where they have to be."""
    scanned.restart("keyvault", "--hold")
    keys = scanned.work(1, 1)
    data_keys = asyncio.run(scanned.data_keys())
    found = scanned.doors["keyvault"].scan(_forms({**keys, **data_keys, **scanned.root_keys()}))
    (name,) = keys
    assert f"{name}: raw" in found
    assert f"{name.replace('provider', 'data')}/1: raw" in found
    assert "root key 1: raw" in found
