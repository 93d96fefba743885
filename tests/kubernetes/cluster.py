"""A real one-node cluster with overlay `dev`, and what the tests do to it.

node/README.md says what the cluster is; its build is kept in ~/.cache/k8s-local, or where K8S_CACHE
says. BYOKEEP_KEEP_CLUSTER=1 leaves it up, and uses one that is up with the images that it has.

python -m tests.kubernetes.cluster builds it, and no more.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from deploy.dev import trust
from deploy.docker import images
from deploy.kubernetes.edges import HERE
from tests.harness import engine
from tests.kubernetes import versions
from tests.kubernetes.manifests import CACHE

ROOT = HERE.parents[1]
NODE = Path(__file__).with_name("node")
PUBLIC = (engine.POSTGRES, engine.OPENBAO)
DEPLOYMENTS = {
    "keyvault-data": "byokeep-keyvault",
    "keyvault-admin": "byokeep-keyvault",
    "orchestrator": "byokeep-orchestrator",
    "runner": "byokeep-runner",
}
AGNHOST = "localhost/k8s-local/agnhost:1"
_PACKAGES = ("nftables", "iptables", "iproute2", "util-linux", "jq", "openssl", "gcc", "libc6-dev")
_STATE = Path(os.environ.get("K8S_STATE", "/var/lib/k8s-local"))
_KUBECONFIG = _STATE / "conf/admin.kubeconfig"
# A machine that does much else at the same time is slow, not broken.
PATIENCE = 300


class Cluster:
    """A cluster that is up, with overlay `dev` on it."""

    def __init__(self) -> None:
        self._environment = {**os.environ, "KUBECONFIG": str(_KUBECONFIG)}
        self._kubectl = str(CACHE / "bin/kubectl")

    def kubectl(self, *arguments: str, text: str | None = None, check: bool = True) -> str:
        """Run kubectl and return its output. Raises RuntimeError with what it said."""
        done = subprocess.run(
            [self._kubectl, *arguments],
            check=False,
            capture_output=True,
            text=True,
            input=text,
            env=self._environment,
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"kubectl {shlex.join(arguments)}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def shell(self, script: str, **environment: str) -> str:
        """Run a script of commands with `kubectl` in the checkout, and return what it prints."""
        path = f"{Path(self._kubectl).parent}:{os.environ['PATH']}"
        return subprocess.run(
            ["sh", "-euc", script],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**self._environment, "PATH": path, **environment},
        ).stdout

    def apply(self, documents: Sequence[Any], *arguments: str) -> str:
        """Apply manifests."""
        text = yaml.safe_dump_all(documents)
        return self.kubectl("apply", "--filename=-", *arguments, text=text)

    def start(self, *arguments: str, text: str) -> subprocess.Popen[str]:
        """Start kubectl with something on its standard input."""
        process = subprocess.Popen(
            [self._kubectl, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self._environment,
        )
        assert process.stdin is not None
        process.stdin.write(text)
        process.stdin.close()
        process.stdin = None  # for communicate(), which would flush it
        return process

    def get(self, *arguments: str) -> Any:
        """Return what `kubectl get` finds."""
        return json.loads(self.kubectl("get", *arguments, "--output=json"))

    def python(self, code: str, pod: str = "client", *, namespace: str = "") -> str:
        """Run Python in a pod of image tools, and return what it prints."""
        return self.kubectl(*self.python_command(pod, namespace), text=code)

    @staticmethod
    def python_command(pod: str = "client", namespace: str = "") -> list[str]:
        """Return kubectl's arguments that run Python code from its standard input in a pod."""
        place = ["--namespace", namespace or f"byokeep-{pod}", f"{pod}-0"]
        return ["exec", "--stdin", *place, "--", "/opt/byokeep/bin/python", "-"]

    def byokeep(self, *arguments: str, text: str = "", check: bool = True) -> str:
        """Run the command in the client's pod."""
        place = ["--namespace=byokeep-client", "client-0", "--"]
        command = ["/opt/byokeep/bin/python", "-m", "byokeep.cli", *arguments]
        return self.kubectl("exec", "--stdin", *place, *command, text=text, check=check)

    def rolled_out(self, name: str) -> None:
        """Wait until a Deployment is as it was told to be."""
        place = f"--namespace={DEPLOYMENTS[name]}"
        self.patiently("rollout", "status", place, f"deployment/{name}")

    def patiently(self, *arguments: str) -> None:
        """Run a kubectl that waits. Raises RuntimeError with all pods and what happened to them."""
        try:
            self.kubectl(*arguments, f"--timeout={PATIENCE}s")
        except RuntimeError as error:
            pods = self.kubectl("get", "pods", "--all-namespaces", "--output=wide")
            warnings = ("events", "--all-namespaces", "--types=Warning")
            raise RuntimeError(f"{error}\n{pods}\n{self.kubectl(*warnings)}") from None

    def ready(self, name: str) -> None:
        """Wait until a Deployment's pods are, two of them. A rollout's status lags their death."""

        def all_ready() -> bool:
            conditions = [
                condition["status"]
                for pod in self.pods_of(name)
                for condition in pod["status"].get("conditions", [])
                if condition["type"] == "Ready"
            ]
            return conditions == ["True", "True"]

        soon(all_ready, f"{name} does not come back")

    def pods_of(self, name: str) -> list[Any]:
        """Return the pods of a zone that are not on their way out."""
        place = ("pods", "--all-namespaces", "--selector", f"app.kubernetes.io/name={name}")
        found = self.get(*place)["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def emulator(self, method: str, path: str, body: Any = None) -> Any:
        """Ask the emulator's control listener, which is on its pod's loopback interface."""
        data = None if body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:8080{path}"
        code = (
            "import urllib.request as http\n"
            f"request = http.Request({url!r}, data={data!r}, method={method!r})\n"
            "print(http.urlopen(request).read().decode())\n"
        )
        return json.loads(self.python(code, "emulator"))


def build() -> None:
    """Have what the cluster consists of: a quarter of an hour the first time, then nothing.

    Raises RuntimeError, or CalledProcessError: the program has said why.
    """
    engine.install(*_PACKAGES)
    subprocess.run([NODE / "build"], check=True)


@contextmanager
def running() -> Iterator[Cluster]:
    """A cluster with overlay `dev`, for as long as the block lasts."""
    kept = os.environ.get("BYOKEEP_KEEP_CLUSTER") == "1"
    cluster = Cluster()
    if not kept or not _KUBECONFIG.exists():
        build()
        with engine.running():
            made = _images()
            _run(NODE / "up")
            with tempfile.TemporaryDirectory() as folder:
                # In one archive: most of their layers are the same.
                images.docker("save", f"--output={folder}/images.tar", *made, *PUBLIC)
                _run(NODE / "load", f"{folder}/images.tar")
    try:
        _deploy(cluster)
        yield cluster
    finally:
        if not kept:
            _run(NODE / "down", "--keep-logs")


def _run(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def _images() -> list[str]:
    for image in (engine.PYTHON, *PUBLIC):
        engine.ensure(image)
    return versions.build()


def _deploy(cluster: Cluster) -> None:
    cluster.apply(versions.manifests("dev"))
    for name in DEPLOYMENTS:
        cluster.rolled_out(name)
    cluster.patiently("wait", "--namespace=byokeep-client", "pod/client-0", "--for=condition=Ready")
    _profiles(cluster)


def _profiles(cluster: Cluster) -> None:
    """Give the client's pod a profile for each role, with the trust bundle that keyvault's
    migration printed."""
    log = cluster.kubectl("logs", "--namespace=byokeep-keyvault", "job/keyvault-migrate-v0-1-0")
    cluster.python(_PROFILES.replace("PRINTED", repr(trust.printed(log))))


_PROFILES = """
import pathlib
folder = pathlib.Path("/tmp/byokeep")
folder.mkdir(mode=0o700, exist_ok=True)
(folder / "trust.json").write_text(PRINTED)
lines = ['default_profile = "developer"']
for role in ("developer", "submitter", "key-admin", "auditor", "operator"):
    lines += [
        f"[profiles.{role}]",
        'orchestrator = "orchestrator.byokeep-orchestrator.svc.cluster.local:8443"',
        'orchestrator_name = "orchestrator.byokeep.internal"',
        'keyvault = "keyvault-admin.byokeep-keyvault.svc.cluster.local:8443"',
        'keyvault_name = "keyvault.byokeep.internal"',
        'trust = "trust.json"',
        f'certificate = "/etc/byokeep/client/{role}.pem"',
        f'key = "/etc/byokeep/client/{role}.key"',
        'tenant = "demo"',
    ]
(folder / "config.toml").write_text("\\n".join(lines) + "\\n")
"""


def at_once(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Do some work for each item, four at a time."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(work, items))


def soon(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Wait until something holds. Raises AssertionError."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.5)


if __name__ == "__main__":
    build()
