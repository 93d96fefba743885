"""Secrets and settings as files: a folder for each namespace, which Compose mounts as a volume."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from deploy.local.pki import write_file

# Whom a namespace's files belong to: what its containers run as.
_OWNERS = {"byokeep-postgres": 999, "byokeep-postgres-data": 999}
_OWNER = 65532


class Folders:
    """Files `ROOT/NAMESPACE/NAME/KEY`."""

    def __init__(self, root: Path) -> None:
        """Use a folder that is there; what it has goes to its owners, empty volumes too."""
        self._root = root
        for namespace in root.iterdir():
            _close(namespace, _OWNERS.get(namespace.name, _OWNER))

    def secret(self, namespace: str, name: str) -> dict[str, bytes]:
        """Return a set's files; none where there is no such set."""
        folder = self._root / namespace / name
        if not folder.is_dir():
            return {}
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    def write_secret(self, namespace: str, name: str, files: Mapping[str, bytes]) -> None:
        """Write a set's files, for their owner alone."""
        self._write(namespace, name, files, 0o600)

    def write_config(self, namespace: str, name: str, files: Mapping[str, str]) -> None:
        """Write a set's files, for everybody in that namespace."""
        self._write(namespace, name, {key: text.encode() for key, text in files.items()}, 0o644)

    def _write(self, namespace: str, name: str, files: Mapping[str, bytes], mode: int) -> None:
        owner = _OWNERS.get(namespace, _OWNER)
        folder = self._root / namespace / name
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder.parent, folder):
            _close(path, owner)
        for key, content in files.items():
            write_file(folder / key, content, mode=mode)
            os.chown(folder / key, owner, owner)


def _close(folder: Path, owner: int) -> None:
    folder.chmod(0o700)
    os.chown(folder, owner, owner)
