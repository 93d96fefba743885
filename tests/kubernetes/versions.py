"""The versions that upgrades go between, as deploy/kubernetes/upgrades.toml names them: the commit
before this one, this one, and this one with more migrations."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from deploy.docker import images
from deploy.docker.images import CHECKOUT
from deploy.docker.layout import SITE
from deploy.kubernetes.edges import HERE
from tests.kubernetes.manifests import Document, rendered

#: Zones with a service, and the database's table that a migration here adds to, where there is one.
SERVICES: Mapping[str, str] = {"keyvault": "tenant", "orchestrator": "review", "runner": ""}
#: What a cluster runs beside them, of every version the same.
TOOLS = "tools"
#: Versions made of this commit, with the migrations that they add.
ADDED: Mapping[str, tuple[str, ...]] = {"next": ("9000",), "newest": ("9000", "9001")}

# As an upgrade brings them: nothing that the code before it needs changes.
_MIGRATION = '''"""A column for the upgrade's test."""

from alembic import op

revision = "{revision}"
down_revision = "{before}"


def upgrade() -> None:
    """Go to this revision."""
    op.execute("ALTER TABLE {table} ADD COLUMN upgrade_test_{revision} text")
'''


def tag(version: str) -> str:
    """Return the tag of a version's images, which are no others'."""
    return f"kubernetes-{version}"


def previous() -> Path:
    """Return a folder with the commit before this one; this one where there is none, as in a clone
    without history."""
    commit = _before()
    if not commit:
        print("there is no commit before this one here: this one stands for it", flush=True)
        return CHECKOUT
    folder = CHECKOUT / "build/kubernetes" / commit
    if not folder.exists():
        archive = subprocess.run(
            ["git", "-C", CHECKOUT, "archive", commit], check=True, capture_output=True
        ).stdout
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / folder.name
            with tarfile.open(fileobj=io.BytesIO(archive)) as files:
                files.extractall(made, filter="tar")
            made.rename(folder)
    return folder


def _before() -> str:
    """Return the commit before this one; empty where there is none."""
    command = ["git", "-C", CHECKOUT, "rev-parse", "--verify", "--quiet", "HEAD^"]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()


def build() -> list[str]:
    """Build the images of every version, and name them."""
    made = [images.build(zone, tag("dev")) for zone in (*SERVICES, TOOLS)]
    made += [images.build(zone, tag("previous"), context=previous()) for zone in SERVICES]
    for version, revisions in ADDED.items():
        made += [_with_migrations(zone, version, revisions) for zone in SERVICES]
    return made


def _with_migrations(zone: str, version: str, revisions: tuple[str, ...]) -> str:
    name, table = images.reference(zone, tag(version)), SERVICES[zone]
    base = images.reference(zone, tag("dev"))
    if not table:
        images.docker("tag", base, name)
        return name
    versions = f"services/{zone}/migrations/versions"
    before = max(path.name for path in (CHECKOUT / versions).glob("0*.py")).partition("_")[0]
    with tempfile.TemporaryDirectory() as folder:
        for revision in revisions:
            text = _MIGRATION.format(revision=revision, before=before, table=table)
            (Path(folder) / f"{revision}_more.py").write_text(text)
            before = revision
        (Path(folder) / "Dockerfile").write_text(
            f"FROM {base}\nCOPY *_more.py {SITE}/{versions}/\n"
        )
        images.docker("build", "--tag", name, folder)
    return name


def images_of(version: str) -> str:
    """Return a kustomization's lines that have a version's images."""
    tags = dict.fromkeys(SERVICES, tag(version)) | {TOOLS: tag("dev")}
    lines = (f"  - {{name: byokeep/{zone}, newTag: {each}}}\n" for zone, each in tags.items())
    return "images:\n" + "".join(lines)


def manifests(version: str) -> list[Document]:
    """Return overlay `dev` of a version, with its images."""
    root = previous() if version == "previous" else HERE.parents[1]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = os.path.relpath(root / "deploy/kubernetes/overlays/dev", folder.resolve())
        (folder / "kustomization.yaml").write_text(f"resources: [{base}]\n{images_of(version)}")
        return list(rendered(folder))
