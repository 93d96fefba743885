"""docs/deployment.md, "By hand, in production mode": walked from nothing to a review.

Production mode takes no other address or CA for a provider. So the walk has a network and a view
of files of its own, in which the emulator is at the provider's name and port, and its CA is the
public one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import certifi

from deploy.local import binaries
from deploy.local.material import PROVIDER_HOSTS
from deploy.local.pki import CertificateAuthority
from deploy.local.postgres import EmbeddedPostgres
from tests.harness.pages import ROOT, block

PAGE = "docs/deployment.md"
KEY = "sk-proj-" + "aB3x" * 10

_WORLD = """
ip link set lo up
mount --bind $W/hosts /etc/hosts
mount --bind $W/public.pem {public}
python -m deploy.local.emulator --accept-any --cert=$W/provider.pem --key=$W/provider.key \
  --https-port=443 --ready-file=$W/ready >$W/emulator.log 2>&1 &
until [ -e $W/ready ]; do kill -0 $!; sleep 0.1; done
"""


def walk(*, beside: str = "", after_settings: str = "") -> None:
    """Walk the page; `beside` brings up more of the world, and what comes
    after the settings is a step more. Raises AssertionError."""
    with _folder() as scratch, EmbeddedPostgres(scratch / "postgres") as postgres:
        world, folder = scratch / "world", scratch / "deployment"
        for each in (world, folder):
            each.mkdir(mode=0o700)
        authority = CertificateAuthority.new("elsewhere.example")
        authority.issue(world / "provider", dns=PROVIDER_HOSTS)
        (world / "public.pem").write_text(authority.pem)
        names = "".join(f"127.0.0.1 {host}\n" for host in ("localhost", *PROVIDER_HOSTS))
        (world / "hosts").write_text(names)
        (folder / "openai-key").write_text(KEY)
        steps = [
            _WORLD.replace("{public}", certifi.where()),
            beside,
            block(PAGE, "databases"),
            f"(\ncd $D\n{block('docs/identities.md', 'by-hand')})",
            block(PAGE, "keys"),
            block(PAGE, "settings"),
            after_settings,
            block(PAGE, "serve"),
            block(PAGE, "tenant"),
            block(PAGE, "review"),
        ]
        script = "\n".join(steps)
        path = [str(Path(sys.executable).parent), str(binaries.reachable("") / "bin")]
        done = subprocess.run(
            [
                "unshare",
                "--mount",
                "--net",
                "--pid",
                "--fork",
                "--kill-child",
                "sh",
                "-euc",
                script,
            ],
            cwd=ROOT,
            env={
                "PATH": ":".join([*path, os.environ["PATH"]]),
                "PGHOST": str(postgres.socket_directory),
                "D": str(folder),
                "W": str(world),
            },
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        logs = "".join(path.read_text()[-1500:] for path in scratch.glob("*/*.log"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    assert "VALID: the provider accepts it" in done.stdout
    assert re.search(r"^8 findings: 2 critical, ", done.stdout, re.M)
    assert "leases live now: 0" in done.stdout
    assert "BYOKEEP_MODE" not in script, "production is what a service takes by itself"
    assert KEY not in done.stdout + done.stderr + logs


@contextmanager
def _folder() -> Iterator[Path]:
    """Where PostgreSQL's own user may pass, and a socket's path is short."""
    with tempfile.TemporaryDirectory(prefix="byokeep-page-", dir="/var/tmp") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)
