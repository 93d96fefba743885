"""A real Vault in a test: found, or built; run with TLS; set up by deploy/vault itself.

Where the binary comes from, in this order:

1. `BYOKEEP_VAULT_BIN`, a path
2. `vault` on PATH
3. the cache, `${BYOKEEP_CACHE:-~/.cache/byokeep}/vault-1.21.1/vault`
4. the image `hashicorp/vault:1.21.1` (testcontainers' Docker client), into the cache
5. a build from the Go module proxy, into the cache: about ten minutes, once

No source, no test: it raises, and is never a skip.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from deploy.local.pki import CertificateAuthority

VERSION = "1.21.1"
IMAGE = f"hashicorp/vault:{VERSION}"
ROOT = Path(__file__).resolve().parents[2]
# HashiCorp's module builds unpatched with these two replacements (Go 1.26); 1.21.3 and 1.21.4
# do not: no vault/sdk is published that matches them.
_GO_MOD = f"""module vault-build

go 1.26

require github.com/hashicorp/vault v{VERSION}

replace github.com/99designs/keyring => github.com/Jeffail/keyring v1.2.3

replace github.com/ma314smith/signedxml v1.1.1 => github.com/moov-io/signedxml v1.1.1
"""
_BUILD_SECONDS = 3600


def binary() -> Path:
    """Return a Vault binary; raises RuntimeError where none can be had."""
    named = os.environ.get("BYOKEEP_VAULT_BIN")
    if named:
        if not Path(named).is_file():
            raise RuntimeError(f"BYOKEEP_VAULT_BIN: {named} is not a file")
        return Path(named)
    found = shutil.which("vault")
    if found:
        return Path(found)
    cached = cache() / "vault"
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        reasons = [reason for get in (_from_image, _from_source) if (reason := get(cached))]
        if not cached.is_file():
            raise RuntimeError("no Vault for the integration tests: " + "; ".join(reasons))
    return cached


def available() -> bool:
    """Say whether a Vault can be had without a build."""
    return bool(
        os.environ.get("BYOKEEP_VAULT_BIN")
        or shutil.which("vault")
        or (cache() / "vault").is_file()
    )


def cache() -> Path:
    """Return the folder that a binary is kept in between runs."""
    base = Path(os.environ.get("BYOKEEP_CACHE") or Path.home() / ".cache" / "byokeep")
    return base / f"vault-{VERSION}"


def _from_image(target: Path) -> str:
    """Take the binary out of the public image; return why not, or ""."""
    if not sys.platform.startswith("linux"):
        return "the image's binary is for Linux"
    try:
        from testcontainers.core.docker_client import DockerClient

        client = DockerClient().client
        client.images.pull(IMAGE)
        container = client.containers.create(IMAGE)
        try:
            stream, _ = container.get_archive("/bin/vault")
            with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as archive:
                data = archive.extractfile("vault")
                assert data is not None
                _keep(target, data.read())
        finally:
            container.remove()
    except Exception as error:  # Docker's client raises what it likes
        return f"{IMAGE} can't be pulled ({type(error).__name__})"
    return ""


def _from_source(target: Path) -> str:
    """Build from the Go module proxy; return why not, or ""."""
    go = shutil.which("go") or next(iter(Path("/usr/local/go/bin").glob("go")), None)
    if go is None:
        return "and there is no Go >= 1.26 to build one with"
    print(f"building Vault {VERSION} once, into {target.parent}: about ten minutes", flush=True)
    with tempfile.TemporaryDirectory(prefix="byokeep-vault-") as folder:
        (Path(folder) / "go.mod").write_text(_GO_MOD)
        command = [str(go), "build", "-ldflags=-s -w", "-o", "vault", "github.com/hashicorp/vault"]
        with subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "GOFLAGS": "-mod=mod"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as build:
            assert build.stderr is not None
            watchdog = threading.Timer(_BUILD_SECONDS, build.kill)
            watchdog.start()
            ticker = _Ticker()
            last = ""
            for line in build.stderr:
                last = line.strip() or last
            ticker.stop()
            watchdog.cancel()
        if build.returncode != 0:
            return f"and the build failed: {last}"
        _keep(target, (Path(folder) / "vault").read_bytes())
    return ""


class _Ticker:
    """Says every half minute that a build still goes on."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._start = time.monotonic()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while not self._stopped.wait(30):
            print(f"  … building Vault, {time.monotonic() - self._start:.0f} s", flush=True)

    def stop(self) -> None:
        self._stopped.set()


def _keep(target: Path, data: bytes) -> None:
    # Whole or not at all: another run may look for it now.
    temporary = target.with_name(f"vault.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.chmod(0o755)
    temporary.replace(target)


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class VaultServer:
    """A Vault with TLS, file storage and an audit device; not in development mode, so that it
    can be sealed, and lives through a restart."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.address = f"https://localhost:{self.port}"
        self.authority = CertificateAuthority.new("vault.test")
        self.ca = folder / "vault-ca.pem"
        self.ca.write_text(self.authority.pem)
        self.audit_log = folder / "vault-audit.jsonl"
        self.root_token = ""
        #: What `api` says that it opens data keys for.
        self.lease_header = ""
        self._unseal_key = ""
        self._process: subprocess.Popen[bytes] | None = None
        self.client_context = ssl.create_default_context(cafile=self.ca)
        self.authority.issue(folder / "vault", spiffe_id="vault", dns=["localhost"])
        (folder / "vault.hcl").write_text(
            f"""
            storage "file" {{ path = "{folder}/storage" }}
            listener "tcp" {{
              address       = "127.0.0.1:{self.port}"
              tls_cert_file = "{folder}/vault.pem"
              tls_key_file  = "{folder}/vault.key"
            }}
            disable_mlock = true
            api_addr      = "{self.address}"
            log_level     = "error"
            """
        )

    def start(self) -> None:
        """Start, initialise (the first time), unseal."""
        log = (self.folder / "vault.log").open("ab")
        self._process = subprocess.Popen(
            [str(binary()), "server", f"-config={self.folder}/vault.hcl"],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        log.close()
        self._wait_for_answer()
        if not self.root_token:
            answer = self.api("PUT", "sys/init", secret_shares=1, secret_threshold=1)
            self.root_token, self._unseal_key = answer["root_token"], answer["keys"][0]
            self.unseal()
            self.cli("audit", "enable", "file", f"file_path={self.audit_log}")
        else:
            self.unseal()

    def stop(self) -> None:
        """Stop; what it stored stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def seal(self) -> None:
        self.api("PUT", "sys/seal")

    def unseal(self) -> None:
        self.api("PUT", "sys/unseal", key=self._unseal_key)
        deadline = time.monotonic() + 60
        while self.status("sys/health") != 200:
            assert time.monotonic() < deadline, "Vault does not become active"
            time.sleep(0.05)

    def set_up(self, *arguments: str, **environment: str) -> None:
        """Run deploy/vault/setup.sh as an administrator would."""
        self._run(["sh", str(ROOT / "deploy/vault/setup.sh"), *arguments], environment)

    def cli(self, *arguments: str) -> str:
        """Run the `vault` command with the root token; return what it prints."""
        return self._run([str(binary()), *arguments], {})

    def api(self, method: str, path: str, /, token: str | None = None, **body: object) -> dict:
        """Call the API; raises urllib.error.HTTPError."""
        headers = {"X-Vault-Token": self.root_token if token is None else token}
        if self.lease_header:
            headers["X-Byokeep-Lease"] = self.lease_header
        request = urllib.request.Request(  # noqa: S310 our own address
            f"{self.address}/v1/{path}",
            json.dumps(body).encode() if body else None,
            headers,
            method=method,
        )
        opened = urllib.request.urlopen(request, context=self.client_context, timeout=60)  # noqa: S310
        with opened as answer:
            text = answer.read()
        return json.loads(text) if text else {}

    def status(self, path: str, method: str = "GET", token: str = "", **body: object) -> int:
        """Call the API; return the status alone."""
        try:
            self.api(method, path, token=token, **body)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code
        return 200

    def token(self, policy: str, **options: object) -> str:
        """Return a fresh token of one policy, without the default policy."""
        answer = self.api(
            "POST", "auth/token/create", policies=[policy], no_default_policy=True, **options
        )
        return answer["auth"]["client_token"]

    def approle(self, folder: Path, role: str) -> str:
        """Write an AppRole's files; return the login setting that names them."""
        role_id = self.api("GET", f"auth/approle/role/{role}/role-id")["data"]["role_id"]
        secret = self.api("POST", f"auth/approle/role/{role}/secret-id")["data"]["secret_id"]
        names = [
            str(write_secret(folder / f"{role}.{part}", text))
            for part, text in (("role-id", role_id), ("secret-id", secret))
        ]
        return f"approle role_id={names[0]} secret_id={names[1]}"

    def settings(self, folder: Path, **changes: object) -> dict[str, object]:
        """Return the settings of a keyvault with both identities at this Vault."""
        return {
            "kek_backend": "vault",
            "vault_address": self.address,
            "vault_ca": self.ca,
            "vault_data_login": self.approle(folder, "keyvault-data"),
            "vault_admin_login": self.approle(folder, "keyvault-admin"),
            # Other helpers share the cores: a slow machine is not a slow Vault.
            "vault_deadline_ms": 10_000,
            **changes,
        }

    def _wait_for_answer(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                self.status("sys/health")
                return
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise RuntimeError((self.folder / "vault.log").read_text()) from None
                time.sleep(0.05)

    def _run(self, command: list[str], environment: dict[str, str]) -> str:
        # setup.sh calls `vault`; ours may have another name, or not be on PATH.
        folder = self.folder / "bin"
        folder.mkdir(exist_ok=True)
        link = folder / "vault"
        if not link.exists():
            link.symlink_to(binary())
        done = subprocess.run(
            command,
            env={
                **os.environ,
                "PATH": f"{folder}:{os.environ['PATH']}",
                "VAULT_ADDR": self.address,
                "VAULT_CACERT": str(self.ca),
                "VAULT_TOKEN": self.root_token,
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{command[:3]}: {done.stdout}{done.stderr}")
        return done.stdout


def write_secret(path: Path, text: str) -> Path:
    """Write a file that only its owner may read."""
    path.touch(mode=0o600)
    path.write_text(text)
    return path


if __name__ == "__main__":
    # Before the tests, whose time limits no build would fit into.
    print(f"Vault for the integration tests: {binary()}")
