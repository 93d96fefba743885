"""A real Vault in a test, HashiCorp's or OpenBao: run with TLS; set up by deploy/vault itself.

python -m tests.harness.vault FOLDER   runs one, and writes FOLDER/settings for a shell
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from deploy.local.pki import CertificateAuthority
from tests.harness.vault_binary import OPENBAO, ROOT, Product, chosen


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class VaultServer:
    """A Vault with TLS, raft storage and an audit device; not in development mode, so that it
    can be sealed, and lives through a restart."""

    def __init__(self, folder: Path, product: Product | None = None) -> None:
        self.folder = folder
        self.product = product or chosen()
        self._binary = self.product.binary()
        self.port = free_port()
        self.address = f"https://localhost:{self.port}"
        self.authority = CertificateAuthority.new("vault.test")
        self.ca = folder / "vault-ca.pem"
        self.ca.write_text(self.authority.pem)
        self.audit_log = folder / "vault-audit.jsonl"
        self.root_token = ""
        #: The namespace that `api`, `cli`, `set_up` and `settings` mean; "" is the root.
        self.namespace = ""
        #: What `api` says that it opens data keys for.
        self.lease_header = ""
        self._unseal_key = ""
        self._process: subprocess.Popen[bytes] | None = None
        self.client_context = ssl.create_default_context(cafile=self.ca)
        self.authority.issue(folder / "vault", spiffe_id="vault", dns=["localhost"])
        (folder / "storage").mkdir()
        cluster = free_port()
        (folder / "vault.hcl").write_text(
            f"""
            storage "raft" {{
              path                   = "{folder}/storage"
              node_id                = "one"
              performance_multiplier = 1
            }}
            listener "tcp" {{
              address         = "127.0.0.1:{self.port}"
              cluster_address = "127.0.0.1:{cluster}"
              tls_cert_file   = "{folder}/vault.pem"
              tls_key_file    = "{folder}/vault.key"
            }}
            disable_mlock = true
            api_addr      = "{self.address}"
            cluster_addr  = "https://127.0.0.1:{cluster}"
            log_level     = "error"
            {self._declared_audit()}
            """
        )

    def start(self) -> None:
        """Start, initialise (the first time), unseal."""
        log = (self.folder / "vault.log").open("ab")
        self._process = subprocess.Popen(
            [str(self._binary), "server", f"-config={self.folder}/vault.hcl"],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        log.close()
        self._wait_for_answer()
        if not self.root_token:
            answer = self.api("PUT", "sys/init", secret_shares=1, secret_threshold=1)
            self.root_token, self._unseal_key = answer["root_token"], answer["keys"][0]
            self.unseal()
            if not self._declared_audit():
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
        """Run the `vault` (`bao`) command with the root token; return what it prints."""
        return self._run([str(self._binary), *arguments], {})

    def api(self, method: str, path: str, /, token: str | None = None, **body: object) -> dict:
        """Call the API; raises urllib.error.HTTPError."""
        headers = {"X-Vault-Token": self.root_token if token is None else token}
        if self.namespace:
            headers["X-Vault-Namespace"] = self.namespace
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
            "vault_namespace": self.namespace,
            "vault_data_login": self.approle(folder, "keyvault-data"),
            "vault_admin_login": self.approle(folder, "keyvault-admin"),
            # Other helpers share the cores: a slow machine is not a slow Vault.
            "vault_deadline_ms": 10_000,
            **changes,
        }

    def _declared_audit(self) -> str:
        # OpenBao takes audit devices from its configuration alone, Vault through its API alone.
        if self.product != OPENBAO:
            return ""
        options = f'{{ file_path = "{self.audit_log}" }}'
        return f'audit "file" "file" {{ options {options} }}'

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

    def administrator(self) -> dict[str, str]:
        """Return the environment of Vault's administrator."""
        return {
            "VAULT_CLI": str(self._binary),
            "VAULT_ADDR": self.address,
            "VAULT_CACERT": str(self.ca),
            "VAULT_TOKEN": self.root_token,
            "VAULT_NAMESPACE": self.namespace,
        }

    def _run(self, command: list[str], environment: dict[str, str]) -> str:
        done = subprocess.run(
            command,
            env={**os.environ, **self.administrator(), **environment},
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


def main() -> None:
    """Run a Vault until something ends us."""
    folder = Path(sys.argv[1])
    server = VaultServer(folder)
    server.start()
    lines = (f"export {name}={shlex.quote(v)}\n" for name, v in server.administrator().items())
    write_secret(folder / "settings.new", "".join(lines)).rename(folder / "settings")
    signal.pause()


if __name__ == "__main__":
    main()
